"""``Remainder``: the keys that each query tile leaves out, as one key and value; and the positions that it samples.

See ``prefill.remainder``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SAMPLED_KEYS = 2048
"""Minimum number of keys sampled from a sequence (all of them, if it has fewer); always fewer than twice as many."""


class Remainder(NamedTuple):
    """``H`` query heads of size ``D``, ``T`` query tiles; float32, contiguous."""

    key: torch.Tensor
    """``[H, T, D]``."""
    value: torch.Tensor
    """``[H, T, D]``."""
    bias: torch.Tensor
    """``[H, T]``: added to a row's scaled product with the key; -inf where a tile leaves nothing out."""


def sample_step(seq_len: int) -> int:
    """Stride of the sampled keys."""
    return max(1, seq_len // SAMPLED_KEYS)


def sampled_positions(seq_len: int, device: torch.device | str = "cpu", step: int | None = None) -> torch.Tensor:
    """int64 ``[n]``, ascending: one key of each ``step`` neighbours (default: ``sample_step``), at varying
    offsets."""
    step = sample_step(seq_len) if step is None else step
    first = torch.arange(seq_len // step, device=device)
    # Multiples of the golden ratio, as 16-bit fractions, are spread evenly between 0 and 1.
    return first * step + first * 40503 % 65536 * step // 65536
