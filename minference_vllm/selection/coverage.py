"""``coverage``: the fewest columns and diagonals that hold a share of what the probe queries attend (after FlexPrefill,
arXiv 2502.20766).

Sizes: ``h`` query heads, ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence, ``S`` its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import Coverage
from minference_vllm.selection.compaction import Capacity, Columns, Selection, compact_columns
from minference_vllm.selection.family import Family
from minference_vllm.selection.score_bins import DENSE_FROM
from minference_vllm.selection.scores import Scores
from minference_vllm.selection.vertical_slash import FORCED_COLUMNS, blocks_at, distance_scores, forced_distances

ALWAYS = (1 << 15) - 1 - (0x7F800000 >> 16)
"""Bin of infinity in ``coverage``'s histogram of mass per token, highest first. Bins before it would be NaNs."""


class MassPerToken(NamedTuple):
    """Share of the probe queries' attention per computed token; infinity for tokens that are always selected."""

    of_distance: torch.Tensor
    """float32 ``[h, N]``: for a token in the page at distance 1 to N before a tile."""
    of_key: torch.Tensor
    """float32 ``[h, S]``: the same for every key, seen from the last tile; infinity in the tile's own pages."""
    as_column: torch.Tensor
    """float32 ``[h, S]``: for a key that is selected as a column."""
    distances: torch.Tensor
    """float32 ``[h, N]``: the share on the diagonals at each distance."""
    columns: torch.Tensor
    """float32 ``[h, S]``: the share on each column; with ``distances`` and the tile's own pages all sum to 1."""


def mass_per_token(tiling: Tiling, by_column: torch.Tensor, by_offset: torch.Tensor, always: int) -> MassPerToken:
    """Attention of columns and page distances, per token of their cost.

    Args:
        by_column, by_offset: float32 ``[h, S]``, see ``Scores.column_diagonal``.
        always: number of nearest distances that are always selected.
    """
    total = by_column.sum(1, keepdim=True) + by_offset.sum(1, keepdim=True)
    distances = distance_scores(tiling, by_offset).float().div_(total).clamp_(min=0)
    of_distance = distances / tiling.block_size
    of_distance[:, :always] = torch.inf
    distance = tiling.distance()[-1]
    of_block = torch.where(distance > 0, of_distance[:, distance.clamp(min=1) - 1], torch.inf)
    of_key = of_block.repeat_interleave(tiling.block_size, dim=1)[:, : tiling.seq_len]
    columns = by_column / total
    return MassPerToken(of_distance, of_key, columns.masked_fill(of_key.isinf(), 0.0), distances, columns)


def coverage(
    tiling: Tiling,
    by_column: torch.Tensor,
    by_offset: torch.Tensor,
    pattern: Coverage,
    capacity: Capacity,
) -> tuple[torch.Tensor, Columns]:
    """The cheapest blocks and columns that hold a share ``gamma`` of the probe queries' attention.

    A key can be selected in two ways: with its page, for the diagonals that cross the page's distance from the tile, at
    the cost of a page; or as a column, at the cost of one key. Either way it counts by its mass per token of cost. Keys
    are taken in that order, down to one threshold per head, until they hold ``gamma`` of the mass and are at least
    ``min_budget``. The threshold comes from a histogram over the leading 16 bits of the mass per token: no sort, and
    whole bins are taken, so that the mass is reached or exceeded. Where the budget would take a bin of half of all
    keys, the nearest pages fill it instead.

    Args:
        by_column: float32 ``[h, S]``, mass of each column beyond the diagonals, summed over the probe queries.
        by_offset: float32 ``[h, S]``, mass of each diagonal, alike.
        capacity: room for columns.

    Returns:
        blocks (bool ``[h, T, N]``) and columns. A head that needs more than half of all keys, or has no room for its
        columns, has every reachable block and no column.
    """
    heads, length = by_column.shape
    mass = mass_per_token(tiling, by_column, by_offset, forced_distances(tiling))
    of_distance, of_key, as_column, distances, columns = mass
    as_column[:, :FORCED_COLUMNS] = torch.inf
    of_keys, of_distances = _bins(torch.maximum(of_key, as_column)), _bins(of_distance)
    zeros = torch.zeros(heads, 1 << 15, device=columns.device)
    covered = zeros.scatter_add(1, of_keys, columns).scatter_add_(1, of_distances, distances).flip(1).cumsum(1)
    # The rest lies on the tile's own pages, which are taken with the first bin that counts.
    covered[:, ALWAYS:] += (1.0 - covered[:, -1:]).clamp(min=0)
    taken = zeros.scatter_add(1, of_keys, torch.ones_like(columns)).flip(1).cumsum(1)
    held, budget = covered >= covered[:, -1:] * pattern.gamma, min(pattern.min_budget, length)
    needed = held.int().argmax(1)
    lowest = (held & (taken >= budget)).int().argmax(1)
    most = DENSE_FROM * length
    # If the budget would be filled with keys of equal mass, the nearest pages are used instead.
    alike = taken.gather(1, lowest[:, None]) > most
    alike &= taken.gather(1, needed[:, None]) + budget + tiling.block_size <= most
    lowest = torch.where(alike[:, 0], needed, lowest)
    threshold = ((1 << 15) - 1 - lowest).to(torch.int32).mul_(1 << 16).view(torch.float32)[:, None]
    marks = of_distance >= threshold
    marks[:, : -(-budget // tiling.block_size)] |= alike
    blocks = blocks_at(tiling, torch.nn.functional.pad(marks, (1, 0)))
    dense = taken.gather(1, lowest[:, None]) > most
    chosen = as_column >= threshold
    crowded = None
    if not capacity.exact:
        crowded = ~dense & (chosen.sum(1, keepdim=True) > capacity.columns)
        dense = dense | crowded
    chosen &= ~dense
    blocks = fill_up(tiling, blocks, chosen, budget)
    blocks = torch.where(dense[..., None], tiling.reachable(), blocks)
    width = max(FORCED_COLUMNS, int(chosen.sum(1).max())) if capacity.exact else capacity.columns
    best = torch.where(chosen, as_column, -1.0).topk(min(width, length), dim=1)
    return blocks, Columns(best.indices, best.values >= 0, None if crowded is None else crowded[:, 0])


def fill_up(tiling: Tiling, blocks: torch.Tensor, columns: torch.Tensor, budget: int) -> torch.Tensor:
    """Add the nearest other blocks to tiles that have fewer keys than the budget. The thresholds fit the last tile; for
    an earlier tile, part of those keys lies after it or before the prompt.

    Args:
        blocks: bool ``[h, T, N]``.
        columns: bool ``[h, S]``.
        budget: keys of a tile, its own pages included, or all where there are fewer.
    """
    earlier = tiling.reachable() & (tiling.distance() > 0)
    free = ~blocks & earlier
    in_page = torch.nn.functional.pad(columns, (0, -columns.shape[1] % tiling.block_size))
    in_page = in_page.unflatten(1, (-1, tiling.block_size)).sum(2, dtype=torch.int32)
    whole = (blocks & earlier | tiling.own()).sum(2, dtype=torch.int32) * tiling.block_size
    missing = budget - whole - (free * in_page[:, None]).sum(2, dtype=torch.int32)
    # A page that is taken replaces its columns.
    gained = (free * (tiling.block_size - in_page[:, None])).flip(2).cumsum(2)
    nearest = free & ((gained.flip(2) - tiling.block_size + in_page[:, None]) < missing[..., None])
    return blocks | nearest


def _bins(mass: torch.Tensor) -> torch.Tensor:
    """int64: the leading bits of positive floats, which order like integers."""
    return mass.contiguous().view(torch.int32).long() >> 16


class CoverageFamily(Family[Coverage]):
    pattern = Coverage
    colour = "#56B4E9"

    def select(
        self, pattern: Coverage, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection:
        blocks, columns = coverage(tiling, *scores.column_diagonal(heads), pattern, capacity)
        return compact_columns(tiling, blocks, columns, capacity)

    def tokens(self, pattern: Coverage) -> float:
        return pattern.min_budget


FAMILY = CoverageFamily()
