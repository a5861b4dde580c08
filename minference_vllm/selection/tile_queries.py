"""The queries of a tile that are scored: all its rows, or a few representatives where every row would cost too much.

Representatives are taken farthest first (Gonzalez 1985, doi:10.1016/0304-3975(85)90224-5), apart as keys tell them
apart: no other way to take so many leaves a row less than half as far from the nearest of them. Rows that look where no
other does are among the first. On SmolLM2 their mean and its deviations along a few directions needed 1.6 times the
keys for the same noise (``docs/estimator.md``). Where they do not suffice, as in heads whose every row looks something
else up, all rows are scored.

Sizes: ``h`` query heads, ``T`` query tiles, ``S`` tokens in the sequence, ``r`` rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from minference_vllm.core.tiling import Tiling

CANDIDATES = 128
"""Rows of a tile that are looked at, at most; of a tile that is wider one in so many."""
LEAST_SIZE = 1e-3
"""Of keys in a dimension, in units of their int8 elements: one that tells no keys apart."""
LEAST_APART = 1e-30
"""Of the first row from the mean: where all are alike it is taken, too."""
ALIKE = 3.0
"""All candidates of a tile are asked where one of them is farther than that from the nearest representative: root of
the mean square, over all keys, of the difference of their scores, in bits."""


def candidate_step(tile: int) -> int:
    """One of so many rows of a tile is looked at."""
    return -(-tile // CANDIDATES)


def num_candidates(tile: int) -> int:
    """Rows of a tile that are looked at, at most."""
    return -(-tile // candidate_step(tile))


class TileQueries(NamedTuple):
    """Some queries of every tile, with room for ``n``."""

    low: torch.Tensor
    """float32 ``[h, T * n, r]``; past ``count`` any of the tile's rows."""
    position: torch.Tensor
    """int32 ``[h, T * n]``: theirs in the sequence."""
    count: torch.Tensor
    """int32 ``[h, T]``: how many there are, at most ``n``."""


def all_rows(low: torch.Tensor, tiling: Tiling) -> TileQueries:
    """All rows of every tile, of queries in few dimensions, float32 ``[h, chunk, r]``."""
    places = _places(tiling, 1).flatten()
    position, count = (places + tiling.context_len).int(), tiling.starts.diff().int()
    return TileQueries(low[:, places], position.repeat(len(low), 1), count.repeat(len(low), 1))


def representatives(low: torch.Tensor, key_size: torch.Tensor, tiling: Tiling, count: int) -> TileQueries:
    """Representative queries of every tile. Equal inputs give equal ones; nothing waits for a GPU.

    Args:
        low: float32 ``[h, chunk, r]``, queries in few dimensions, see ``projection.project_queries``.
        key_size: float32 ``[h, 1, r]``, see ``projection.Projection``.
        count: of each tile, at most.

    Returns:
        Of each tile the row most unlike their mean, then ever the one farthest from all before it, as long as one
        differs from those; or all candidates, where one is not ``ALIKE``.
    """
    places = _places(tiling, candidate_step(tiling.tile))
    number = torch.arange(places.shape[1], device=low.device)
    there = places[:, :1] + number * candidate_step(tiling.tile) == places
    rows = low[:, places]  # [h, T, candidates, r]
    apart = rows * key_size[:, None].clamp(min=LEAST_SIZE) * there[..., None]
    mean = apart.sum(2, keepdim=True) / there.sum(1)[:, None, None]
    farthest = (apart - mean).square_().sum(3).add_(LEAST_APART).masked_fill_(~there, -1.0)
    distance = torch.full_like(farthest, torch.inf).masked_fill_(~there, -1.0)
    order = torch.zeros_like(farthest, dtype=torch.long)
    found = torch.zeros_like(order[..., 0])
    for _ in range(min(count, places.shape[1])):
        row = farthest.argmax(2, keepdim=True)
        order.scatter_(2, found[..., None], row)
        # Of rows that are alike none is farther than another. What is not a number is.
        found += ~(farthest.amax(2) <= 0)
        row = row[..., None].expand(-1, -1, 1, low.shape[2])
        distance = torch.minimum(distance, (apart - apart.gather(2, row)).square_().sum(3))
        farthest = distance
    unlike = distance.amax(2) > ALIKE**2
    order = torch.where(unlike[..., None], number, order)
    position = (places + tiling.context_len).int().expand(len(low), -1, -1).gather(2, order)
    low = rows.gather(2, order[..., None].expand(-1, -1, -1, low.shape[2]))
    return TileQueries(low.flatten(1, 2), position.flatten(1), torch.where(unlike, there.sum(1), found).int())


def _places(tiling: Tiling, step: int) -> torch.Tensor:
    """int64 ``[T, n]``: places in the chunk of one in so many rows of every tile; past them its last row again."""
    starts = tiling.starts - tiling.context_len
    places = starts[:-1, None] + torch.arange(0, tiling.tile, step, device=starts.device)
    return torch.minimum(places, starts[1:, None] - 1)
