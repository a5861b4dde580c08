"""Which key blocks and single columns a pattern selects, from its budgets and from scores.

Sizes: ``H`` query heads, ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence, ``S`` its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import AShape, Coverage, PeakThreshold, TriShape, VerticalSlash

FORCED_COLUMNS = 30
"""First columns that vertical-slash heads always keep (MInference)."""
FORCED_DIAGONALS = 100
"""Nearest diagonals that vertical-slash heads always keep (MInference)."""
DENSE_FROM = 0.5
"""A head whose budget the data decide and that needs this share of all keys is computed densely: listing them would
cost more than it saves."""
ALWAYS = (1 << 15) - 1 - (0x7F800000 >> 16)
"""Place of infinite worth in ``coverage``'s histogram, highest first; what would stand before it is no number."""


@dataclass(frozen=True)
class Columns:
    """Single keys that every tile of a head attends, as far as they lie before it."""

    ranked: torch.Tensor
    """int64 ``[H, V]``: positions, the most wanted first."""
    wanted: torch.Tensor
    """bool ``[H, V]``: False fills up heads that want fewer."""
    crowded: torch.Tensor | None = None
    """bool ``[H]``: heads that wanted more columns than there is room for, and have none. None: nobody did."""


def a_shape_blocks(tiling: Tiling, pattern: AShape | TriShape) -> torch.Tensor:
    """bool ``[T, N]``: blocks that the sink, or any row's local window, touches."""
    block = tiling.key_blocks()
    sink = block < -(-pattern.sink // tiling.block_size)
    oldest_local = (tiling.starts[:-1] - pattern.local + 1).clamp(min=0) // tiling.block_size
    local = block >= oldest_local[:, None]
    return ((sink | local) & tiling.reachable()) | tiling.own()


def tri_shape_blocks(tiling: Tiling, pattern: TriShape) -> torch.Tensor:
    """bool ``[T, N]``: A-shape, and everything for tiles that hold one of the chunk's last ``last`` rows."""
    tail = tiling.starts[1:] > tiling.seq_len - pattern.last
    return torch.where(tail[:, None], tiling.reachable(), a_shape_blocks(tiling, pattern))


def distance_scores(tiling: Tiling, by_offset: torch.Tensor) -> torch.Tensor:
    """The mass of the diagonals that cross the blocks at each distance before a tile.

    A diagonal crosses two or more blocks of a tile, each in a share of the tile's rows; it counts by that share. Tiles
    start at multiples of their size, so the shares depend on the distance alone and not on the tile.

    Args:
        by_offset: ``[H, S]``, the mass of each diagonal ``j = i - offset``.

    Returns:
        float64 ``[H, N]``: for ``distance`` 1 to N, in blocks before the tile's first.
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
    """Block distances before a tile that hold its nearest ``FORCED_DIAGONALS`` diagonals; its own blocks are apart."""
    return -(-(FORCED_DIAGONALS - 1) // tiling.block_size)


def blocks_at(tiling: Tiling, marks: torch.Tensor) -> torch.Tensor:
    """bool ``[H, T, N]``: each tile's own blocks, and those at the marked distances before it.

    Args:
        marks: bool ``[H, N + 1]``, by distance; distance 0 is ignored.
    """
    # One row of marks per head, shifted along for every tile.
    distance = tiling.distance()
    before = marks[:, distance.clamp(min=0)] & (distance > 0)
    return before | tiling.own()


def slash_blocks(tiling: Tiling, by_offset: torch.Tensor, slash: int) -> torch.Tensor:
    """bool ``[H, T, N]``: the blocks at the ``slash / B`` distances that hold the most diagonal mass, and the nearest.

    A kernel of pages computes whole blocks, whatever diagonal asked for them. So blocks are chosen, and paid, by the
    distance: as many tokens per row as the strongest ``slash`` single diagonals would have, but where those scatter
    they would cross nearly every block.

    Args:
        by_offset: float ``[H, S]``, the mass of each diagonal.
    """
    scores = distance_scores(tiling, by_offset)
    nearest = forced_distances(tiling)
    scores[:, :nearest] = torch.inf
    count = max(-(-slash // tiling.block_size), nearest)
    chosen = scores.topk(min(count, scores.shape[1]), dim=-1, sorted=False).indices + 1
    marks = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    return blocks_at(tiling, marks.scatter_(1, chosen, True))


def top_blocks(tiling: Tiling, scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """bool ``[H, T, N]``: each tile's own blocks and its ``top_k`` best others.

    Args:
        scores: float ``[H, T, N]``; where blocks are out of reach the value is ignored.
    """
    before = tiling.reachable() & ~tiling.own()
    scores = scores.masked_fill(~before, -torch.inf)
    best = scores.topk(min(top_k, scores.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(before.expand_as(scores)).scatter(-1, best, True)
    return (chosen & before) | tiling.own()


def vertical_slash(
    tiling: Tiling, by_column: torch.Tensor, by_offset: torch.Tensor, pattern: VerticalSlash
) -> tuple[torch.Tensor, Columns]:
    """Blocks (bool ``[H, T, N]``) and columns of fixed budgets, from last-query scores ``[H, S]``."""
    by_column = by_column.clone()
    by_column[:, :FORCED_COLUMNS] = torch.inf
    ranked = by_column.topk(min(max(pattern.vertical, FORCED_COLUMNS), tiling.seq_len), dim=-1).indices
    return slash_blocks(tiling, by_offset, pattern.slash), Columns(ranked, torch.ones_like(ranked, dtype=torch.bool))


class LineWorth(NamedTuple):
    """What tokens are worth, as shares of a row's attention, and infinity where they are taken whatever they are worth;
    and the share that is had with them."""

    of_distance: torch.Tensor
    """float32 ``[H, N]``: in a page at distance 1 to N before a tile."""
    of_key: torch.Tensor
    """float32 ``[H, S]``: the same of every key, seen from the last tile, infinity for its own pages."""
    alone: torch.Tensor
    """float32 ``[H, S]``: as a column."""
    distances: torch.Tensor
    """float32 ``[H, N]``: the share on the diagonals at each distance."""
    columns: torch.Tensor
    """float32 ``[H, S]``: the share on each column; with ``distances`` and the tile's own pages all sum to 1."""


def line_worth(tiling: Tiling, by_column: torch.Tensor, by_offset: torch.Tensor, always: int = 0) -> LineWorth:
    """What columns and page distances hold, per token of their cost.

    Args:
        by_column, by_offset: float32 ``[H, S]``, see ``coverage``.
        always: the nearest distances that are taken.
    """
    total = by_column.sum(1, keepdim=True) + by_offset.sum(1, keepdim=True)
    distances = distance_scores(tiling, by_offset).float().div_(total).clamp_(min=0)
    of_distance = distances / tiling.block_size
    of_distance[:, :always] = torch.inf
    distance = tiling.distance()[-1]
    of_block = torch.where(distance > 0, of_distance[:, distance.clamp(min=1) - 1], torch.inf)
    of_key = of_block.repeat_interleave(tiling.block_size, dim=1)[:, : tiling.seq_len]
    columns = by_column / total
    return LineWorth(of_distance, of_key, columns.masked_fill(of_key.isinf(), 0.0), distances, columns)


def coverage(
    tiling: Tiling,
    by_column: torch.Tensor,
    by_offset: torch.Tensor,
    pattern: Coverage,
    most_columns: int | None = None,
) -> tuple[torch.Tensor, Columns]:
    """The cheapest blocks and columns that hold a share ``gamma`` of the last queries' attention.

    A key can be had in two ways: as part of a page distance, for what lies on its diagonals, which every tile pays for
    in all its tokens, or as a column. Either way its worth is mass per token of cost, and keys are taken in the order
    of it, down to one threshold per head, until what is had reaches ``gamma`` and their number ``min_budget``. The
    threshold is found from a histogram over the worth's leading 16 bits: no sort, and whole bins are taken, so that the
    mass is reached or exceeded. A head whose budget would take a bin of half of all keys fills it up with the nearest
    pages instead.

    Args:
        by_column: float32 ``[H, S]``, mass of each column beyond the diagonals, summed over the last queries.
        by_offset: float32 ``[H, S]``, mass of each diagonal, alike.
        most_columns: room for columns, so that a GPU need not be waited for; None: as many as are wanted.

    Returns:
        blocks (bool ``[H, T, N]``) and columns. A head that needs more than half of all keys, or has no room for its
        columns, has every reachable block and no column.
    """
    heads, length = by_column.shape
    of_distance, of_key, alone, distances, columns = line_worth(tiling, by_column, by_offset, forced_distances(tiling))
    alone[:, :FORCED_COLUMNS] = torch.inf
    of_keys, of_distances = _bins(torch.maximum(of_key, alone)), _bins(of_distance)
    zeros = torch.zeros(heads, 1 << 15, device=columns.device)
    covered = zeros.scatter_add(1, of_keys, columns).scatter_add_(1, of_distances, distances).flip(1).cumsum(1)
    # The rest lies on the tile's own pages, which are taken with the first bin that counts.
    covered[:, ALWAYS:] += (1.0 - covered[:, -1:]).clamp(min=0)
    taken = zeros.scatter_add(1, of_keys, torch.ones_like(columns)).flip(1).cumsum(1)
    held, budget = covered >= covered[:, -1:] * pattern.gamma, min(pattern.min_budget, length)
    needed = held.int().argmax(1)
    lowest = (held & (taken >= budget)).int().argmax(1)
    most = DENSE_FROM * length
    # Where the budget asks for keys that are all worth the same, those nearest to the tile are as good as any.
    alike = taken.gather(1, lowest[:, None]) > most
    alike &= taken.gather(1, needed[:, None]) + budget + tiling.block_size <= most
    lowest = torch.where(alike[:, 0], needed, lowest)
    threshold = ((1 << 15) - 1 - lowest).to(torch.int32).mul_(1 << 16).view(torch.float32)[:, None]
    marks = of_distance >= threshold
    marks[:, : -(-budget // tiling.block_size)] |= alike
    blocks = blocks_at(tiling, torch.nn.functional.pad(marks, (1, 0)))
    dense = taken.gather(1, lowest[:, None]) > most
    chosen = alone >= threshold
    crowded = None
    if most_columns is not None:
        crowded = ~dense & (chosen.sum(1, keepdim=True) > most_columns)
        dense = dense | crowded
    blocks = torch.where(dense[..., None], tiling.reachable(), blocks)
    chosen &= ~dense
    width = max(FORCED_COLUMNS, int(chosen.sum(1).max())) if most_columns is None else most_columns
    best = torch.where(chosen, alone, -1.0).topk(min(width, length), dim=1)
    return blocks, Columns(best.indices, best.values >= 0, None if crowded is None else crowded[:, 0])


def _bins(worth: torch.Tensor) -> torch.Tensor:
    """int64: the leading bits of positive floats, which order like integers."""
    return worth.contiguous().view(torch.int32).long() >> 16


def covering_blocks(tiling: Tiling, scores: torch.Tensor, tau: float) -> torch.Tensor:
    """bool ``[H, T, N]``: each tile's own blocks, and the fewest others with which its scores reach ``tau``.

    Args:
        scores: float ``[H, T, N]``, each tile's summing to 1 over the blocks in its reach.
    """
    own = tiling.own()
    missing = tau - (scores * own).sum(-1, keepdim=True)
    best = scores.masked_fill(own | ~tiling.reachable(), 0.0).sort(-1, descending=True)
    before = best.values.cumsum(-1) - best.values
    needed = (before < missing) & (best.values > 0)
    return torch.zeros_like(needed).scatter_(-1, best.indices, needed) | own


def peak_blocks(tiling: Tiling, scores: torch.Tensor, pattern: PeakThreshold) -> torch.Tensor:
    """bool ``[H, T, N]``: A-shape of ``sink`` and ``window``, and blocks near the tile's highest score.

    Args:
        scores: float ``[H, T, N]``, zero out of reach.
    """
    always = a_shape_blocks(tiling, AShape(sink=pattern.sink, local=pattern.window))
    peaks = scores >= pattern.alpha * scores.amax(-1, keepdim=True)
    return (peaks & tiling.reachable()) | always
