"""The queries of a tile that are scored: all of its rows, or a few representatives where all rows would cost too much.

Representatives are chosen by farthest-first traversal (Gonzalez 1985, doi:10.1016/0304-3975(85)90224-5). The distance
of two rows is the root mean square difference of their scores over all keys. The traversal is a 2-approximation: no
other choice of as many rows halves the largest distance to the nearest representative. Rows that look where no other
row looks are found first. Representing a tile by its mean query and a few directions of deviation instead needed 1.6
times the keys on SmolLM2 at the same noise (``docs/estimator.md``). If a row is still too far from all representatives,
as in heads whose rows each look up something different, all rows of the tile are scored.

Sizes: ``h`` query heads, ``T`` query tiles, ``S`` tokens in the sequence, ``r`` rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from minference_vllm.core.tiling import Tiling

CANDIDATES = 128
"""Maximum number of candidate rows of a tile. A wider tile uses every n-th row as a candidate."""
LEAST_SIZE = 1e-3
"""Lower bound of the keys' size in a dimension, in units of their int8 elements."""
LEAST_APART = 1e-30
"""Added to the squared distances from the mean, so that one row is taken even if all are equal."""
ALIKE = 3.0
"""If a candidate is farther than this from its nearest representative, the tile is scored by all candidates. In bits:
root mean square over all keys of the difference of two rows' scores."""


def candidate_step(tile: int) -> int:
    """Stride between the candidate rows of a tile."""
    return -(-tile // CANDIDATES)


def num_candidates(tile: int) -> int:
    """Maximum number of candidate rows of a tile of this width."""
    return -(-tile // candidate_step(tile))


class TileQueries(NamedTuple):
    """Some queries of every tile, padded to ``n`` per tile."""

    low: torch.Tensor
    """float32 ``[h, T * n, r]``: the queries in ``r`` dimensions; entries past ``count`` repeat rows of the tile."""
    position: torch.Tensor
    """int32 ``[h, T * n]``: their positions in the sequence."""
    count: torch.Tensor
    """int32 ``[h, T]``: number of valid queries of each tile."""


def all_rows(low: torch.Tensor, tiling: Tiling) -> TileQueries:
    """All rows of every tile.

    Args:
        low: float32 ``[h, chunk, r]``, see ``projection.project_queries``.
    """
    places = _places(tiling, 1).flatten()
    position, count = (places + tiling.context_len).int(), tiling.starts.diff().int()
    return TileQueries(low[:, places], position.repeat(len(low), 1), count.repeat(len(low), 1))


def representatives(low: torch.Tensor, key_size: torch.Tensor, tiling: Tiling, count: int) -> TileQueries:
    """Representative queries of every tile. Deterministic, and without a host synchronisation.

    Args:
        low: float32 ``[h, chunk, r]``, see ``projection.project_queries``.
        key_size: float32 ``[h, 1, r]``, see ``projection.Projection``.
        count: maximum number of representatives of a tile.

    Returns:
        For each tile the row farthest from the tile's mean, then repeatedly the row farthest from all chosen so far,
        until ``count`` are chosen or the rest equals a chosen one. All candidates, if one of them is farther than
        ``ALIKE`` from the nearest representative.
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
        # Rows equal to a chosen one add nothing. NaN counts as different.
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
    """int64 ``[T, n]``: rows of the chunk, every ``step``-th of each tile, padded with the tile's last row."""
    starts = tiling.starts - tiling.context_len
    places = starts[:-1, None] + torch.arange(0, tiling.tile, step, device=starts.device)
    return torch.minimum(places, starts[1:, None] - 1)
