"""``SparseIndex``: which keys each query tile of a chunk attends, and how it is built from scores.

Sizes: ``H`` query heads, ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence, ``S`` its tokens. A block
is a page of the KV cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from minference_vllm.capacity import Capacity, attends_everything
from minference_vllm.patterns import (
    ESTIMATION_BLOCK,
    FORCED_COLUMNS,
    FORCED_DIAGONALS,
    AShape,
    BlockSparse,
    Dense,
    HeadPattern,
    TriShape,
    VerticalSlash,
)


@dataclass(frozen=True)
class SparseIndex:
    """The keys that each query tile of one chunk attends, causally.

    Row ``i`` of a tile attends every key ``j <= i`` that lies in one of the tile's blocks or is one of its columns. No
    key is named twice. Every tile has the blocks that hold its own rows, so every row attends at least itself.
    """

    context_len: int
    seq_len: int
    block_size: int
    tile: int
    """Rows of a whole tile; those at a chunk's two ends may have fewer."""
    tile_starts: torch.Tensor
    """int64 ``[T + 1]``: absolute position of each tile's first row, and the end of the last tile."""
    blocks: torch.Tensor
    """int32 ``[H, T, max_blocks]``: logical key blocks, ascending, the tile's own last; -1 past ``num_blocks``. Where
    already the first is -1 the tile attends every block up to its own, without a list (built with a ``Capacity``)."""
    num_blocks: torch.Tensor
    """int32 ``[H, T]``, of tiles without a list, too."""
    columns: torch.Tensor
    """int32 ``[H, T, max_columns]``: absolute positions of single keys, all before the tile; -1 past
    ``num_columns``."""
    num_columns: torch.Tensor
    """int32 ``[H, T]``."""
    overflowed: torch.Tensor | None = None
    """bool ``[H, T]``: tiles that wanted more than the planned ``Capacity``, and attend everything instead."""

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
        by_block |= (self.blocks[..., 0] < 0)[..., None, None]
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


def compact(mask: torch.Tensor, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of True along the last dimension, ascending and padded with -1, and how many there are.

    Args:
        width: room for positions; the ones after it are dropped, but counted. None: as many as there are, which waits
            for a GPU.
    """
    count = mask.sum(-1, dtype=torch.int32)
    if width is None:
        width = max(1, int(count.max())) if count.numel() else 1
    positions = torch.full((*mask.shape[:-1], width + 1), -1, dtype=torch.int32, device=mask.device)
    # False entries, and those without room, all land in one spare last slot, which is cut off again.
    slots = mask.cumsum(-1).sub_(1).masked_fill_(~mask, width).clamp_(max=width)
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
        # Borders lie at multiples of ``tile``, whatever the chunk's own start: a prompt cut into other chunks has the
        # same tiles, except for the pieces at a chunk's two ends. A copy from the host would wait for a GPU.
        first, last = context_len // tile, -(-seq_len // tile)
        starts = torch.arange(first, last + 1, device=device).mul_(tile).clamp_(context_len, seq_len)
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
    tiling: Tiling, blocks: torch.Tensor, ranked: torch.Tensor, wait: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The columns of each tile that its blocks do not hold already, in multiples of ``tiling.column_multiple``.

    A kernel without a mask for single keys needs columns that fill pages exactly. The last page is then filled up with
    other keys, from a block that the tile does not have; where that is not enough, the blocks of the columns that did
    not fill a page are taken whole. Either way the tile attends at least what was asked for.

    Args:
        blocks: bool ``[H, T, N]``.
        ranked: int64 ``[H, V]``, the columns asked for.
        wait: whether a GPU may be waited for; without, the list is as wide as the columns that there could be.

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
    if multiple > 1 and (not wait or short.any()):
        # A block taken whole may hold columns that were kept, and then those no longer fill pages: such a (rare) tile
        # takes the blocks of all its columns.
        whole = outside & (order <= wanted[..., None]) & short
        # One block more than there are, for the candidates that take none.
        target = torch.where(whole, candidates // tiling.block_size, tiling.num_key_blocks)
        blocks = torch.nn.functional.pad(blocks, (0, 1)).scatter_(2, target, True)[..., :-1]
        keep &= ~short
    slots, count = compact(keep, None if wait else keep.shape[-1])
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


def build_index(
    tiling: Tiling, patterns: Sequence[HeadPattern], scores: Scores, capacity: Capacity | None = None
) -> SparseIndex:
    """The index of one chunk for all heads.

    Args:
        patterns: one per query head.
        capacity: planned sizes, so that nothing waits for a GPU; None: as large as the selection turns out.
    """
    groups: dict[HeadPattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        groups.setdefault(pattern, []).append(head)
    parts = []
    for pattern, group in groups.items():
        at_once = len(group) if capacity is None else capacity.heads_at_once
        for first in range(0, len(group), at_once):
            heads = group[first : first + at_once]
            selected = _select(tiling, pattern, heads, scores, wait=capacity is None)
            parts.append((heads, pattern, _list(tiling, len(heads), *selected, capacity)))
    shape = len(patterns), tiling.num_tiles
    widths = [max(lists[place].shape[-1] for _, _, lists in parts) for place in (0, 2)]
    device = tiling.starts.device
    blocks, columns = (torch.full((*shape, width), -1, dtype=torch.int32, device=device) for width in widths)
    num_blocks, num_columns = (torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2))
    overflowed = torch.zeros(shape, dtype=torch.bool, device=device) if capacity else None
    for heads, pattern, (listed, count, found, found_count, over) in parts:
        for source, target in _runs(heads):
            blocks[target, :, : listed.shape[-1]] = listed[source]
            num_blocks[target] = count[source]
            columns[target, :, : found.shape[-1]] = found[source]
            num_columns[target] = found_count[source]
            if overflowed is not None and not attends_everything(pattern):
                overflowed[target] = over[source]
    return SparseIndex(
        tiling.context_len,
        tiling.seq_len,
        tiling.block_size,
        tiling.tile,
        tiling.starts,
        blocks,
        num_blocks,
        columns,
        num_columns,
        overflowed,
    )


def _runs(heads: list[int]) -> Iterator[tuple[slice, slice]]:
    """Places and numbers of neighbouring heads. Slices, since a list as an index would be copied to a GPU, and waited
    for."""
    for _, run in itertools.groupby(enumerate(heads), key=lambda item: item[1] - item[0]):
        items = list(run)
        (place, head), count = items[0], len(items)
        yield slice(place, place + count), slice(head, head + count)


def _select(
    tiling: Tiling, pattern: HeadPattern, heads: list[int], scores: Scores, wait: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Blocks (bool ``[1 or len(heads), T, N]``) of heads with one pattern, and their columns, or None, as
    ``columns_outside_blocks`` returns them."""
    if isinstance(pattern, Dense):
        return dense_blocks(tiling)[None], None, None
    if isinstance(pattern, TriShape):
        return tri_shape_blocks(tiling, pattern)[None], None, None
    if isinstance(pattern, AShape):
        return a_shape_blocks(tiling, pattern)[None], None, None
    if isinstance(pattern, BlockSparse):
        top_k = -(-pattern.top_k * ESTIMATION_BLOCK // tiling.block_size)
        return top_blocks(tiling, scores.pooled(heads, tiling), top_k), None, None
    if isinstance(pattern, VerticalSlash):
        by_column, by_offset = scores.last_query(heads)
        by_column[:, :FORCED_COLUMNS] = torch.inf
        chosen = slash_blocks(tiling, by_offset, pattern.slash)
        ranked = by_column.topk(min(max(pattern.vertical, FORCED_COLUMNS), tiling.seq_len), dim=-1).indices
        return columns_outside_blocks(tiling, chosen, ranked, wait)
    raise TypeError(f"no builder for pattern {pattern!r}")


def _list(
    tiling: Tiling,
    heads: int,
    chosen: torch.Tensor,
    columns: torch.Tensor | None,
    num_columns: torch.Tensor | None,
    capacity: Capacity | None,
) -> tuple[torch.Tensor, ...]:
    """Blocks, their number, columns, their number, and which tiles had no room, for ``heads`` heads."""
    blocks, num_blocks = compact(chosen, capacity.blocks if capacity else None)
    shape, device = (heads, tiling.num_tiles), blocks.device
    if columns is None or num_columns is None:
        columns = torch.full((*shape, 1), -1, dtype=torch.int32, device=device)
        num_columns = torch.zeros(shape, dtype=torch.int32, device=device)
    blocks, num_blocks = blocks.expand(heads, -1, -1), num_blocks.expand(heads, -1)
    over = torch.zeros(shape, dtype=torch.bool, device=device)
    if capacity:
        over = (num_blocks > capacity.blocks) | (num_columns > capacity.columns)
        reach = ((tiling.starts[1:] - 1) // tiling.block_size + 1).to(torch.int32)
        blocks = blocks.masked_fill(over[..., None], -1)
        num_blocks = torch.where(over, reach, num_blocks)
        columns = columns[..., : capacity.columns].masked_fill(over[..., None], -1)
        num_columns = num_columns.masked_fill(over, 0)
    return blocks, num_blocks, columns, num_columns, over
