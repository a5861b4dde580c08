"""Queries and keys in few dimensions and small whole numbers: products that tell keys apart at a fraction of the cost.

The dimensions are those that keep the products of this chunk's queries with this sequence's keys best, fitted anew for
every head and chunk, so that nothing is trained or stored.

Sizes: ``h`` query heads, ``S`` tokens in the sequence, ``D`` head size, ``r`` rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

LEVELS_PER_BIT = 6
"""Levels between a score and twice its exponential: 254 of them span 42 bits, or 29 nats."""
MOST_QUERY, MOST_KEY = 63, 127
"""Largest elements of queries and keys as whole numbers: 2 * 63 * 255 fits 16 bits."""
MOST_PRODUCT = 24576
"""Largest product of theirs; the rest of 16 bits is for norms above it."""
KEY_NORM = 156
"""Length of the longest keys: near the square root of ``MOST_PRODUCT``, which makes rounding errors least."""
LEAST_RANGE = 40
"""Bits that ``MOST_PRODUCT`` stands for at least, also where no score comes near that."""
ITERATIONS = 8


class Projection(NamedTuple):
    """Products of centred keys and queries in ``r`` dimensions: ``(query @ to_query) @ ((key - mean) @ to_key)``."""

    to_query: torch.Tensor
    """float32 ``[h, D, r]``."""
    to_key: torch.Tensor
    """float32 ``[h, D, r]``."""
    mean: torch.Tensor
    """float32 ``[h, 1, D]``. What all keys have in common changes no softmax."""


class Factors(NamedTuple):
    """Queries and keys in ``r`` dimensions, as whole numbers, so that products take a third of the time.

    The products have errors of a few thousandths of the largest that a row could have, at the most.
    """

    query: torch.Tensor
    """int8 ``[h, chunk, r]``, at most ``MOST_QUERY`` in size; the last row is the sequence's last token."""
    keys: torch.Tensor
    """int8 ``[h, S, r]``."""
    step: torch.Tensor
    """int16 ``[h, chunk]``: a product of a row counts for so many levels, times ``2 ** 15``."""

    def rows(self, rows: torch.Tensor) -> Factors:
        """Those of some rows of the chunk."""
        return Factors(self.query[:, rows], self.keys, self.step[:, rows])

    def bits(self) -> torch.Tensor:
        """float32 ``[h, chunk, 1]``: what a product of a row counts for."""
        return self.step.float().div_(LEVELS_PER_BIT << 15)[..., None]


def fit(query: torch.Tensor, keys: torch.Tensor, rank: int, enough: float | None = None) -> Projection:
    """The ``rank`` dimensions, or fewer if they are enough, that keep the products of queries and keys best in the mean
    square.

    With ``A`` the second moment of the queries and ``L L'`` that of the centred keys, they are the leading eigenvectors
    ``V`` of ``L' A L``: a query becomes ``V' L' q``, a key ``V' L^-1 k``, and in that eigenspace ``L^-T V`` is
    ``A L V (V' L' A L V)^-1``, which needs no inverse of ``L``.

    Args:
        query: ``[h, n, D]``. keys: ``[h, m, D]``.
        rank: at most ``D``.
        enough: root of the mean square of what products may lose; steps of 16 dimensions up to ``rank`` are tried.
            None: always ``rank``, so that nothing waits for a GPU.
    """
    query, keys = query.float(), keys.float()
    mean = keys.mean(1, keepdim=True)
    keys = keys - mean
    queries, spread = (((x.transpose(1, 2) @ x) / x.shape[1]).double() for x in (query, keys))
    dim = query.shape[2]
    identity = torch.eye(dim, dtype=torch.float64, device=query.device)
    root = torch.linalg.cholesky_ex(spread + _ridge(spread, 1e-6) * identity).L
    moment = root.transpose(1, 2) @ queries @ root
    # Orthogonal iteration from vectors that are orthogonal to nothing in particular.
    places = torch.arange(1, dim + 1, dtype=torch.float64, device=query.device)
    vectors = (places[:, None] * places[:rank] + places[:rank]).cos().expand(len(query), -1, -1)
    for _ in range(ITERATIONS):
        vectors = torch.linalg.qr(moment @ vectors).Q
    within = vectors.transpose(1, 2) @ moment @ vectors
    if enough is not None:
        total = moment.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        lost = (total - within.diagonal(dim1=1, dim2=2).cumsum(1))[:, 15:-1:16].amax(0)
        rank = next((16 * (step + 1) for step, rest in enumerate(lost.tolist()) if rest <= enough**2), rank)
        vectors, within = vectors[:, :, :rank], within[:, :rank, :rank]
    to_query = root @ vectors
    inverse = torch.linalg.inv_ex(within + _ridge(within, 1e-9) * identity[:rank, :rank]).inverse
    to_key = queries @ to_query @ inverse
    # Both are as large in every dimension, which rounding wants.
    balance = (within.diagonal(dim1=1, dim2=2).clamp(min=0) + _ridge(within, 1e-9)[..., 0]).pow(0.25)[:, None]
    return Projection((to_query / balance).float(), (to_key * balance).float(), mean)


def _ridge(moment: torch.Tensor, share: float) -> torch.Tensor:
    """float64 ``[h, 1, 1]``: a share of the mean eigenvalue, above zero."""
    return (moment.diagonal(dim1=1, dim2=2).mean(1) * share + 1e-30)[:, None, None]


def in_units(projection: Projection, sample: torch.Tensor) -> Projection:
    """The same products from keys of the size that ``whole_keys`` wants, in a multiple of 16 dimensions, which kernels
    want; ``sample`` is ``[h, n, D]``, some of the keys."""
    keys = torch.matmul(sample.float() - projection.mean, projection.to_key)
    longest = keys.norm(dim=2).amax(1) / KEY_NORM
    unit = torch.maximum(longest, keys.abs().amax((1, 2)) / MOST_KEY).clamp_(min=1e-20)[:, None, None]
    room = (0, -keys.shape[2] % 16)
    to_query, to_key = projection.to_query * unit, projection.to_key / unit
    return Projection(torch.nn.functional.pad(to_query, room), torch.nn.functional.pad(to_key, room), projection.mean)


def whole_keys(keys: torch.Tensor, projection: Projection) -> torch.Tensor:
    """int8 ``[h, n, r]`` of keys ``[h, n, D]``. Keys longer than ``KEY_NORM`` are shortened to it."""
    low = torch.matmul(keys.float() - projection.mean, projection.to_key)
    low *= KEY_NORM / low.norm(dim=2, keepdim=True).clamp_(min=KEY_NORM)
    return low.round_().clamp_(-MOST_KEY, MOST_KEY).to(torch.int8)


def whole_queries(query: torch.Tensor, projection: Projection, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``Factors.query`` and ``Factors.step`` of queries ``[h, chunk, D]``."""
    low = torch.matmul(query.float(), projection.to_query).mul_(scale / math.log(2))
    most = (low.norm(dim=2) * KEY_NORM).clamp_(min=LEAST_RANGE) / MOST_PRODUCT
    unit = torch.maximum(most, low.abs().amax(2) / MOST_QUERY)
    step = (unit * (LEVELS_PER_BIT << 15)).ceil_()
    low *= (LEVELS_PER_BIT << 15) / step[..., None]
    return low.round_().to(torch.int8), step.clamp_(max=(1 << 15) - 1).to(torch.int16)
