"""``SparseIndex``: which keys each query tile of a chunk attends, and how it is built from scores.

Sizes: ``H`` query heads, ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence, ``S`` its tokens. A block
is a page of the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minference_vllm.patterns import (
    ESTIMATION_BLOCK,
    AShape,
    BlockSparse,
    Dense,
    HeadPattern,
    TriShape,
    VerticalSlash,
)
from minference_vllm.plan import tile_starts

FORCED_COLUMNS = 30
"""First columns that vertical-slash heads always keep (MInference)."""
FORCED_DIAGONALS = 100
"""Nearest diagonals that vertical-slash heads always keep (MInference)."""


@dataclass(frozen=True)
class SparseIndex:
    """The keys that each query tile of one chunk attends, causally.

    Row ``i`` of a tile attends every key ``j <= i`` that lies in one of the tile's blocks or is one of its columns. No
    key is named twice. Every tile has the blocks that hold its own rows, so every row attends at least itself.
    """

    context_len: int
    seq_len: int
    block_size: int
    tile_starts: torch.Tensor
    """int64 ``[T + 1]``: absolute position of each tile's first row, and the end of the last tile."""
    blocks: torch.Tensor
    """int32 ``[H, T, max_blocks]``: logical key blocks, ascending, the tile's own last; -1 past ``num_blocks``."""
    num_blocks: torch.Tensor
    """int32 ``[H, T]``."""
    columns: torch.Tensor
    """int32 ``[H, T, max_columns]``: absolute positions of single keys, all before the tile; -1 past
    ``num_columns``."""
    num_columns: torch.Tensor
    """int32 ``[H, T]``."""

    @property
    def num_heads(self) -> int:
        return self.blocks.shape[0]

    @property
    def num_tiles(self) -> int:
        return self.blocks.shape[1]

    def to_mask(self) -> torch.Tensor:
        """bool ``[H, S - context_len, S]``: True where a row attends a key. For tests and plots: it is quadratic."""
        device = self.blocks.device
        num_blocks_total = -(-self.seq_len // self.block_size)
        width = num_blocks_total * self.block_size
        tile_mask = torch.zeros(self.num_heads, self.num_tiles, width, dtype=torch.bool, device=device)
        by_block = tile_mask.view(self.num_heads, self.num_tiles, num_blocks_total, self.block_size)
        _scatter_true(by_block, self.blocks)
        _scatter_true(tile_mask, self.columns)
        rows = self.tile_starts[1:] - self.tile_starts[:-1]
        mask = tile_mask[..., : self.seq_len].repeat_interleave(rows, dim=1)
        positions = torch.arange(self.context_len, self.seq_len, device=device)
        return mask & (torch.arange(self.seq_len, device=device) <= positions[:, None])

    def computed_pairs(self) -> torch.Tensor:
        """float64 ``[H]``: query-key pairs that the kernel works on (whole blocks; the causal half of the last)."""
        rows = (self.tile_starts[1:] - self.tile_starts[:-1]).double()
        last_start = (self.tile_starts[1:] - 1) // self.block_size * self.block_size
        in_last = (self.tile_starts[1:] - last_start).double()
        keys = (self.num_blocks - 1).double() * self.block_size + in_last + self.num_columns.double()
        return ((keys - (rows - 1) / 2) * rows).sum(-1)

    def dense_pairs(self) -> float:
        """Pairs of one head that dense causal attention computes."""
        rows = self.seq_len - self.context_len
        return rows * (self.context_len + (rows + 1) / 2)

    def density(self) -> torch.Tensor:
        """float64 ``[H]``: computed pairs as a share of the dense ones."""
        return self.computed_pairs() / self.dense_pairs()


def _scatter_true(target: torch.Tensor, positions: torch.Tensor) -> None:
    """Set ``target[h, t, positions[h, t, k]]`` for every position that is not -1."""
    head, tile, slot = torch.nonzero(positions >= 0, as_tuple=True)
    target[head, tile, positions[head, tile, slot].long()] = True


def compact(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of True along the last dimension, ascending and padded with -1, and how many there are."""
    count = mask.sum(-1, dtype=torch.int32)
    width = max(1, int(count.max())) if count.numel() else 1
    positions = torch.full((*mask.shape[:-1], width + 1), -1, dtype=torch.int32, device=mask.device)
    # False entries all land in one spare last slot, which is cut off again.
    slots = torch.where(mask, mask.cumsum(-1) - 1, width)
    source = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand_as(mask)
    positions.scatter_(-1, slots, source)
    return positions[..., :width].contiguous(), count


@dataclass(frozen=True)
class Tiling:
    """The query tiles of one chunk over key blocks; what every builder below starts from."""

    context_len: int
    seq_len: int
    block_size: int
    tile: int
    starts: torch.Tensor
    """int64 ``[T + 1]``."""
    column_multiple: int = 1
    """The engine takes columns in groups of this many; an engine whose kernel sees whole pages only: the page size."""

    @classmethod
    def of(
        cls,
        context_len: int,
        seq_len: int,
        block_size: int,
        tile: int,
        column_multiple: int = 1,
        device: torch.device | str = "cpu",
    ) -> Tiling:
        if tile % block_size:
            raise ValueError(f"tile must be a multiple of the page size {block_size}, not {tile}")
        starts = torch.tensor(tile_starts(context_len, seq_len, tile), dtype=torch.int64, device=device)
        return cls(context_len, seq_len, block_size, tile, starts, column_multiple)

    @property
    def num_tiles(self) -> int:
        return len(self.starts) - 1

    @property
    def num_key_blocks(self) -> int:
        return -(-self.seq_len // self.block_size)

    def key_blocks(self) -> torch.Tensor:
        """int64 ``[N]``: numbers of the key blocks."""
        return torch.arange(self.num_key_blocks, device=self.starts.device)

    def distance(self) -> torch.Tensor:
        """int64 ``[T, N]``: blocks from a tile's (aligned) first block back to each key block; <= 0 for its own."""
        first = self.starts[:-1] // self.tile * (self.tile // self.block_size)
        return first[:, None] - self.key_blocks()

    def reachable(self) -> torch.Tensor:
        """bool ``[T, N]``: blocks that hold a key not later than the tile's last row."""
        last = (self.starts[1:] - 1) // self.block_size
        return self.key_blocks() <= last[:, None]

    def own(self) -> torch.Tensor:
        """bool ``[T, N]``: blocks at and after the tile's aligned start, up to its last row."""
        return (self.distance() <= 0) & self.reachable()


def dense_blocks(tiling: Tiling) -> torch.Tensor:
    """bool ``[T, N]``."""
    return tiling.reachable()


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


def slash_blocks(tiling: Tiling, by_offset: torch.Tensor, slash: int) -> torch.Tensor:
    """bool ``[H, T, N]``: the blocks at the ``slash / B`` distances that hold the most diagonal mass, and the nearest.

    A kernel of pages computes whole blocks, whatever diagonal asked for them. So blocks are chosen, and paid, by the
    distance: as many tokens per row as the strongest ``slash`` single diagonals would have, but where those scatter
    they would cross nearly every block.

    Args:
        by_offset: float ``[H, S]``, the mass of each diagonal.
    """
    scores = distance_scores(tiling, by_offset)
    nearest = -(-(FORCED_DIAGONALS - 1) // tiling.block_size)
    scores[:, :nearest] = torch.inf
    count = max(-(-slash // tiling.block_size), nearest)
    chosen = scores.topk(min(count, scores.shape[1]), dim=-1, sorted=False).indices + 1
    marks = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    marks.scatter_(1, chosen, True)
    # The chosen distances are one row of marks per head, shifted along for every tile.
    distance = tiling.distance()
    before = marks[:, distance.clamp(min=0)] & (distance > 0)
    return before | tiling.own()


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


def columns_outside_blocks(
    tiling: Tiling, blocks: torch.Tensor, ranked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The columns of each tile that its blocks do not hold already, in multiples of ``tiling.column_multiple``.

    A kernel without a mask for single keys needs columns that fill pages exactly. The last page is then filled up with
    other keys, from a block that the tile does not have; where that is not enough, the blocks of the columns that did
    not fill a page are taken whole. Either way the tile attends at least what was asked for.

    Args:
        blocks: bool ``[H, T, N]``.
        ranked: int64 ``[H, V]``, the columns asked for.

    Returns:
        blocks (bool ``[H, T, N]``, perhaps with more set), columns (int32 ``[H, T, C]``, -1 padded), their number
        (int32 ``[H, T]``).
    """
    heads, tiles, _ = blocks.shape
    multiple = tiling.column_multiple
    free = ~blocks & (tiling.distance() > 0)
    candidates = ranked[:, None, :].expand(heads, tiles, -1)
    outside = free.gather(2, candidates // tiling.block_size)
    wanted = outside.sum(-1)
    if multiple > 1:
        fillers, usable = _fillers(tiling, free, ranked)
        candidates = torch.cat([candidates, fillers], -1)
        outside = torch.cat([outside, usable], -1)
    order = outside.cumsum(-1)
    fill = -(-wanted // multiple) * multiple
    filled = torch.where(fill <= order[..., -1], fill, wanted // multiple * multiple)
    keep = outside & (order <= filled[..., None])
    short = (filled < wanted)[..., None]
    if short.any():
        # A block taken whole may hold columns that were kept, and then those no longer fill pages: such a (rare) tile
        # takes the blocks of all its columns.
        blocks = blocks.clone()
        head, tile, rank = torch.nonzero(outside & (order <= wanted[..., None]) & short, as_tuple=True)
        blocks[head, tile, candidates[head, tile, rank] // tiling.block_size] = True
        keep &= ~short
    slots, count = compact(keep)
    columns = candidates.to(torch.int32).gather(2, slots.long().clamp(min=0))
    return blocks, columns.masked_fill_(slots < 0, -1), count


def _fillers(tiling: Tiling, free: torch.Tensor, ranked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of each tile's free block with the fewest ranked ones (int64 ``[H, T, B]``), and which may be used."""
    heads = ranked.shape[0]
    taken = torch.zeros(
        heads, tiling.num_key_blocks * tiling.block_size, dtype=torch.bool, device=ranked.device
    ).scatter_(1, ranked, True)
    taken_in_block = taken.view(heads, 1, tiling.num_key_blocks, -1).sum(-1)
    emptiest = torch.where(free, taken_in_block, tiling.block_size + 1).argmin(-1)
    keys = emptiest[..., None] * tiling.block_size + torch.arange(tiling.block_size, device=ranked.device)
    usable = free.any(-1, keepdim=True) & ~taken.gather(1, keys.view(heads, -1)).view_as(keys)
    return keys, usable


@dataclass(frozen=True)
class Scores:
    """Estimators that an index may ask for; each is called only when a head's pattern needs it."""

    last_query: Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]
    """heads -> column scores and diagonal scores, float32 ``[len(heads), S]`` each."""
    pooled: Callable[[Sequence[int], Tiling], torch.Tensor]
    """heads, tiling -> block scores, float32 ``[len(heads), T, N]``."""


def build_index(tiling: Tiling, patterns: Sequence[HeadPattern], scores: Scores) -> SparseIndex:
    """The index of one chunk for all heads.

    Args:
        patterns: one per query head.
    """
    heads = len(patterns)
    device = tiling.starts.device
    blocks = torch.zeros(heads, tiling.num_tiles, tiling.num_key_blocks, dtype=torch.bool, device=device)
    columns = torch.full((heads, tiling.num_tiles, 1), -1, dtype=torch.int32, device=device)
    num_columns = torch.zeros(heads, tiling.num_tiles, dtype=torch.int32, device=device)
    groups: dict[HeadPattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        groups.setdefault(pattern, []).append(head)
    for pattern, group in groups.items():
        if isinstance(pattern, Dense):
            blocks[group] = dense_blocks(tiling)
        elif isinstance(pattern, TriShape):
            blocks[group] = tri_shape_blocks(tiling, pattern)
        elif isinstance(pattern, AShape):
            blocks[group] = a_shape_blocks(tiling, pattern)
        elif isinstance(pattern, BlockSparse):
            top_k = -(-pattern.top_k * ESTIMATION_BLOCK // tiling.block_size)
            blocks[group] = top_blocks(tiling, scores.pooled(group, tiling), top_k)
        elif isinstance(pattern, VerticalSlash):
            by_column, by_offset = scores.last_query(group)
            by_column[:, :FORCED_COLUMNS] = torch.inf
            chosen = slash_blocks(tiling, by_offset, pattern.slash)
            ranked = by_column.topk(min(max(pattern.vertical, FORCED_COLUMNS), tiling.seq_len), dim=-1).indices
            chosen, found, count = columns_outside_blocks(tiling, chosen, ranked)
            if found.shape[-1] > columns.shape[-1]:
                columns = torch.nn.functional.pad(columns, (0, found.shape[-1] - columns.shape[-1]), value=-1)
            columns[group, :, : found.shape[-1]] = found
            num_columns[group] = count
            blocks[group] = chosen
        else:
            raise TypeError(f"no builder for pattern {pattern!r}")
    listed, num_blocks = compact(blocks)
    return SparseIndex(
        tiling.context_len,
        tiling.seq_len,
        tiling.block_size,
        tiling.starts,
        listed,
        num_blocks,
        columns,
        num_columns,
    )
