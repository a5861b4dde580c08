"""``Remainder``: what the query tiles of a chunk leave out, as one key and one value each; and which keys it samples.

See ``prefill.remainder``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SAMPLED_KEYS = 2048
"""At least so many keys of a sequence are sampled, all of them where there are no more, and less than twice as many."""
NUM_DIMENSIONS = 8
MOST_SPREAD = 2.0
"""Nats by which the spread of the keys left out may raise a row's score, at most: a row far from the mean query is
beyond what two orders can tell."""


class Dimensions(NamedTuple):
    """The ``r`` dimensions in which the remainder is expanded to the second order; float32, contiguous.

    ``H`` query heads over ``HK`` KV heads of size ``D``, ``T`` query tiles.
    """

    to_query: torch.Tensor
    """``[HK, D, r]``: ``(q @ to_query) @ (k @ to_key)`` is what scores, scaled, have in these dimensions."""
    to_key: torch.Tensor
    """``[HK, D, r]``."""
    key_mean: torch.Tensor
    """``[HK, r]``: a point near the keys, from which they are taken."""
    query_mean: torch.Tensor
    """``[H, T, r]``: each tile's mean query in these dimensions."""


class SecondOrder(NamedTuple):
    """The second order of the remainder, by head and tile, around its mean query ``q0``; float32, contiguous."""

    dimensions: Dimensions
    spread: torch.Tensor
    """``[H, T, r, r]``: covariance of the keys left out, weighed as ``q0`` attends them. ``y @ spread @ y`` is the
    variance of the scores by which a row's, ``y = q @ to_query - query_mean``, differ from those of ``q0``."""
    slope: torch.Tensor
    """``[H, T, r, D]``: their covariance with the values: how the value changes with ``y``."""


class Remainder(NamedTuple):
    """``H`` query heads of size ``D``, ``T`` query tiles; float32, contiguous."""

    key: torch.Tensor
    """``[H, T, D]``."""
    value: torch.Tensor
    """``[H, T, D]``."""
    bias: torch.Tensor
    """``[H, T]``: added to a row's scaled product with the key; -inf where a tile leaves nothing out."""
    second: SecondOrder | None = None
    """None: to the first order; zeros for heads that are."""

    @classmethod
    def empty(cls, heads: int, tiles: int, head_size: int, device: torch.device, space: Dimensions | None) -> Remainder:
        """Of tiles that leave nothing out.

        Args:
            space: of the second order; None: to the first.
        """
        key, value = torch.zeros(2, heads, tiles, head_size, device=device)
        bias = torch.full((heads, tiles), -torch.inf, device=device)
        if space is None:
            return cls(key, value, bias)
        rank = space.to_key.shape[2]
        spread = torch.zeros(heads, tiles, rank, rank, device=device)
        return cls(
            key, value, bias, SecondOrder(space, spread, torch.zeros(heads, tiles, rank, head_size, device=device))
        )

    def parts(self) -> tuple[torch.Tensor, ...]:
        """All tensors that are ``[H, T, ...]`` of what is left out."""
        second = () if self.second is None else (self.second.spread, self.second.slope)
        return self.key, self.value, self.bias, *second


def sample_step(seq_len: int) -> int:
    """One key in so many is sampled."""
    return max(1, seq_len // SAMPLED_KEYS)


def sampled_positions(seq_len: int, device: torch.device | str = "cpu", step: int | None = None) -> torch.Tensor:
    """int64 ``[n]``, ascending: one key of each ``step`` neighbours (default: ``sample_step``), at ever other places
    among them."""
    step = sample_step(seq_len) if step is None else step
    first = torch.arange(seq_len // step, device=device)
    # The golden ratio's multiples, in 16 bits, fall evenly between 0 and 1.
    return first * step + first * 40503 % 65536 * step // 65536
