"""``vertical_slash``: the strongest columns and diagonals, in fixed numbers (MInference, arXiv 2407.02490).

Columns are single keys; diagonals are covered by whole key blocks, chosen by their distance before the tile.

Sizes: ``h`` query heads, ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence, ``S`` its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import VerticalSlash
from minference_vllm.selection.compaction import Capacity, Columns, Selection, compact_columns
from minference_vllm.selection.family import Family, Room
from minference_vllm.selection.scores import Scores

FORCED_COLUMNS = 30
"""First columns that vertical-slash heads always keep (MInference)."""
FORCED_DIAGONALS = 100
"""Nearest diagonals that vertical-slash heads always keep (MInference)."""


def distance_scores(tiling: Tiling, by_offset: torch.Tensor) -> torch.Tensor:
    """The mass of the diagonals that cross the blocks at each distance before a tile.

    A diagonal crosses two or more blocks of a tile, each in a share of the tile's rows; it counts by that share. Tiles
    start at multiples of their size, so the shares depend on the distance alone and not on the tile.

    Args:
        by_offset: ``[h, S]``, the mass of each diagonal ``j = i - offset``.

    Returns:
        float64 ``[h, N]``: for ``distance`` 1 to N, in blocks before the tile's first.
    """
    block, tile = tiling.block_size, tiling.tile
    distances = tiling.num_key_blocks
    # Row r of a tile meets distance d in the offsets of (block * (d - 1) + r, block * d + r]: a difference of
    # cumulative sums, and summed over the rows a difference of sums of those.
    width = block * distances + tile + 1
    total = torch.zeros(by_offset.shape[0], width + 1, dtype=torch.float64, device=by_offset.device)
    total[:, 1 : by_offset.shape[1] + 1] = by_offset
    total = total.cumsum(1).cumsum(1)
    rows = total[:, tile:] - total[:, :-tile]
    borders = rows[:, : block * distances + 1 : block]
    return (borders[:, 1:] - borders[:, :-1]) / tile


def forced_distances(tiling: Tiling) -> int:
    """Number of block distances that the nearest ``FORCED_DIAGONALS`` diagonals cross, not counting own blocks."""
    return -(-(FORCED_DIAGONALS - 1) // tiling.block_size)


def blocks_at(tiling: Tiling, marks: torch.Tensor) -> torch.Tensor:
    """bool ``[h, T, N]``: each tile's own blocks, and those at the marked distances before it.

    Args:
        marks: bool ``[h, N + 1]``, or ``[h, T, N + 1]``, by distance; distance 0 is ignored.
    """
    distance = tiling.distance()
    places = distance.clamp(min=0)
    before = marks[:, places] if marks.dim() == 2 else marks.gather(2, places.expand(len(marks), -1, -1))
    return (before & (distance > 0) & tiling.reachable()) | tiling.own()


def slash_blocks(tiling: Tiling, by_offset: torch.Tensor, slash: int) -> torch.Tensor:
    """bool ``[h, T, N]``: the blocks at the ``slash / B`` distances that hold the most diagonal mass, and the nearest.

    A kernel of pages computes whole blocks, whatever diagonal asked for them. So blocks are chosen, and paid, by the
    distance: as many tokens per row as the strongest ``slash`` single diagonals would have, but where those scatter
    they would cross nearly every block. Every tile chooses among the distances that it reaches, so that none loses
    budget to blocks before the prompt's first.

    Args:
        by_offset: float ``[h, S]``, the mass of each diagonal.
    """
    scores = distance_scores(tiling, by_offset)
    nearest = forced_distances(tiling)
    scores[:, :nearest] = torch.inf
    count = max(-(-slash // tiling.block_size), nearest)
    ranked = scores.argsort(dim=1, descending=True, stable=True)[:, None]
    # Distance d + 1 lies in a tile's reach if it has more than d blocks before it.
    reached = ranked < tiling.distance()[:, :1]
    chosen = reached & (reached.cumsum(2, dtype=torch.int32) <= count)
    marks = torch.zeros(*chosen.shape[:2], chosen.shape[2] + 1, dtype=torch.bool, device=scores.device)
    return blocks_at(tiling, marks.scatter_(2, (ranked + 1).expand_as(chosen), chosen))


def vertical_slash(
    tiling: Tiling, by_column: torch.Tensor, by_offset: torch.Tensor, pattern: VerticalSlash
) -> tuple[torch.Tensor, Columns]:
    """Blocks (bool ``[h, T, N]``) and columns of fixed budgets, from ``Scores.column_diagonal``, ``[h, S]`` each."""
    by_column = by_column.clone()
    by_column[:, :FORCED_COLUMNS] = torch.inf
    ranked = by_column.topk(min(max(pattern.vertical, FORCED_COLUMNS), tiling.seq_len), dim=-1).indices
    return slash_blocks(tiling, by_offset, pattern.slash), Columns(ranked, torch.ones_like(ranked, dtype=torch.bool))


class VerticalSlashFamily(Family[VerticalSlash]):
    pattern = VerticalSlash
    colour = "#0072B2"
    may_be_dense = False

    def select(
        self, pattern: VerticalSlash, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection:
        blocks, columns = vertical_slash(tiling, *scores.column_diagonal(heads), pattern)
        return compact_columns(tiling, blocks, columns, capacity)

    def room(self, pattern: VerticalSlash, block_size: int, adaptive: int) -> Room:
        nearest = -(-(FORCED_DIAGONALS - 1) // block_size)
        return Room(max(-(-pattern.slash // block_size), nearest), max(pattern.vertical, FORCED_COLUMNS))

    def tokens(self, pattern: VerticalSlash) -> float:
        return pattern.vertical + pattern.slash


FAMILY = VerticalSlashFamily()
