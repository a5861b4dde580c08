"""The queries of a tile that are scored: all its rows, or a few representatives where every row would cost too much.

Representatives are taken farthest first (Gonzalez 1985, doi:10.1016/0304-3975(85)90224-5), apart as keys tell them
apart: no other way to take so many leaves a row less than half as far from the nearest of them. Rows that look where no
other does are among the first. On SmolLM2 their mean and its deviations along a few directions needed 1.6 times the
keys for the same noise (``docs/estimator.md``).

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


def candidate_step(tile: int) -> int:
    """One of so many rows of a tile is looked at."""
    return -(-tile // CANDIDATES)


class TileQueries(NamedTuple):
    """So many queries of every tile, ``n``."""

    low: torch.Tensor
    """float32 ``[h, T * n, r]``."""
    position: torch.Tensor
    """int32 ``[h, T * n]``: theirs in the sequence."""


def all_rows(low: torch.Tensor, tiling: Tiling) -> TileQueries:
    """Of queries in few dimensions, float32 ``[h, chunk, r]``: of every tile as many as it is wide; where it has fewer
    rows, one of them again."""
    places = torch.arange(tiling.num_tiles * tiling.tile, device=low.device)
    places += tiling.context_len // tiling.tile * tiling.tile - tiling.context_len
    places.clamp_(0, low.shape[1] - 1)
    return TileQueries(low[:, places], (places + tiling.context_len).int().repeat(len(low), 1))


def representatives(low: torch.Tensor, key_size: torch.Tensor, tiling: Tiling, count: int) -> TileQueries:
    """Representative queries of every tile. Equal inputs give equal ones; nothing waits for a GPU.

    Args:
        low: float32 ``[h, chunk, r]``, queries in few dimensions, see ``projection.project_queries``.
        key_size: float32 ``[h, 1, r]``, see ``projection.Projection``.
        count: of each tile.

    Returns:
        Of each tile the row most unlike their mean, then ever the one farthest from all before it; where there are no
        more, one of them again.
    """
    step = candidate_step(tiling.tile)
    starts = tiling.starts - tiling.context_len
    places = starts[:-1, None] + torch.arange(0, tiling.tile, step, device=low.device)  # [T, candidates]
    there = places < starts[1:, None]
    rows = low[:, places.clamp(max=low.shape[1] - 1)]  # [h, T, candidates, r]
    apart = rows * key_size[:, None].clamp(min=LEAST_SIZE) * there[..., None]
    mean = apart.sum(2, keepdim=True) / there.sum(1)[:, None, None]
    from_mean = (apart - mean).square_().sum(3).masked_fill_(~there, -1.0)
    taken, distance = [from_mean.argmax(2)], torch.full_like(from_mean, torch.inf).masked_fill_(~there, -1.0)
    for _ in range(count - 1):
        row = taken[-1][..., None, None].expand(-1, -1, 1, low.shape[2])
        distance = torch.minimum(distance, (apart - apart.gather(2, row)).square_().sum(3))
        taken.append(distance.argmax(2))
    found = torch.stack(taken, 2)  # [h, T, count]
    position = (places + tiling.context_len).expand(len(low), -1, -1).gather(2, found).int()
    low = rows.gather(2, found[..., None].expand(-1, -1, -1, low.shape[2]))
    return TileQueries(low.flatten(1, 2), position.flatten(1))
