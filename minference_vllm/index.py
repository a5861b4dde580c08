"""``SparseIndex``: which keys each query tile of a chunk attends, and how it is built from scores.

Sizes: ``H`` query heads, ``L`` lists per tile (as many, or fewer where heads share theirs), ``T`` query tiles, ``N``
key blocks of ``B`` tokens in the sequence, ``S`` its tokens. A block is a page of the KV cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minference_vllm import selection
from minference_vllm.capacity import Capacity
from minference_vllm.levels import Levels, keys_at_levels
from minference_vllm.patterns import (
    ESTIMATION_BLOCK,
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PeakThreshold,
    TriShape,
    VerticalSlash,
)
from minference_vllm.selection import Columns
from minference_vllm.tiling import Tiling


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
    """int32 ``[L, T, max_blocks]``: logical key blocks, ascending, the tile's own last; -1 past ``num_blocks``. Where
    already the first is -1 the tile attends every block up to its own, without a list (built with a ``Capacity``)."""
    num_blocks: torch.Tensor
    """int32 ``[L, T]``, of tiles without a list, too."""
    columns: torch.Tensor
    """int32 ``[L, T, max_columns]``: absolute positions of single keys, all before the tile; -1 past
    ``num_columns``."""
    num_columns: torch.Tensor
    """int32 ``[L, T]``."""
    overflowed: torch.Tensor | None = None
    """bool ``[L, T]``: tiles that wanted more than the planned ``Capacity``, and attend everything instead."""
    heads_per_list: int = 1
    """Neighbouring query heads that share each list: query head ``h`` has list ``h // heads_per_list``."""

    @property
    def num_lists(self) -> int:
        return self.blocks.shape[0]

    @property
    def num_heads(self) -> int:
        return self.num_lists * self.heads_per_list

    @property
    def num_tiles(self) -> int:
        return self.blocks.shape[1]

    def tile_mask(
        self, tiles: torch.Tensor, heads: slice = slice(None), first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """bool ``[H, R, last - first]``: which of the keys ``[first, last)`` the named tiles (int64 ``[R]``) have,
        future ones included. ``last``: default ``seq_len``."""
        last = self.seq_len if last is None else last
        first_block, last_block = first // self.block_size, -(-last // self.block_size)
        by_block = self.block_mask(tiles, heads, first_block, last_block)
        begin = first - first_block * self.block_size
        by_key = by_block.repeat_interleave(self.block_size, dim=-1)[..., begin : begin + last - first]
        return by_key | _marks(self.columns[self._lists(tiles, heads), tiles], first, last)

    def block_mask(self, tiles: torch.Tensor, heads: slice, first: int, last: int) -> torch.Tensor:
        """bool ``[H, R, last - first]``: which of the key blocks ``[first, last)`` the named tiles (int64 ``[R]``)
        have, their columns apart."""
        blocks = self.blocks[self._lists(tiles, heads), tiles]
        return _marks(blocks, first, last) | (blocks[..., :1] < 0)

    def _lists(self, tiles: torch.Tensor, heads: slice) -> torch.Tensor:
        return torch.arange(self.num_heads, device=tiles.device)[heads, None] // self.heads_per_list

    def to_mask(self) -> torch.Tensor:
        """bool ``[H, S - context_len, S]``: True where a row attends a key. For tests and plots: it is quadratic."""
        device = self.blocks.device
        rows = self.tile_starts[1:] - self.tile_starts[:-1]
        mask = self.tile_mask(torch.arange(self.num_tiles, device=device)).repeat_interleave(rows, dim=1)
        positions = torch.arange(self.context_len, self.seq_len, device=device)
        return mask & (torch.arange(self.seq_len, device=device) <= positions[:, None])

    def computed_pairs(self) -> torch.Tensor:
        """float64 ``[H]``: query-key pairs that the kernel works on (whole blocks; the causal half of the last)."""
        rows = (self.tile_starts[1:] - self.tile_starts[:-1]).double()
        last_start = (self.tile_starts[1:] - 1) // self.block_size * self.block_size
        in_last = (self.tile_starts[1:] - last_start).double()
        keys = (self.num_blocks - 1).double() * self.block_size + in_last + self.num_columns.double()
        return ((keys - (rows - 1) / 2) * rows).sum(-1).repeat_interleave(self.heads_per_list)

    def dense_pairs(self) -> float:
        """Pairs of one head that dense causal attention computes."""
        rows = self.seq_len - self.context_len
        return rows * (self.context_len + (rows + 1) / 2)

    def density(self) -> torch.Tensor:
        """float64 ``[H]``: computed pairs as a share of the dense ones."""
        return self.computed_pairs() / self.dense_pairs()


def _marks(positions: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """bool ``[H, R, last - first]``: the positions ``[first, last)`` that ``[H, R, K]`` names."""
    # All others are marked in one spare last place, which is cut off again.
    outside = (positions < first) | (positions >= last)
    places = positions.long().sub_(first).masked_fill_(outside, last - first)
    marks = torch.zeros(*positions.shape[:2], last - first + 1, dtype=torch.bool, device=positions.device)
    return marks.scatter_(-1, places, True)[..., :-1]


def compact(mask: torch.Tensor, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of True along the last dimension, ascending and padded with -1, and how many there are.

    Args:
        width: room for positions; the ones after it are dropped, but counted. None: as many as there are, which waits
            for a GPU.
    """
    if width is None:
        count = mask.sum(-1, dtype=torch.int32)
        width = max(1, int(count.max())) if count.numel() else 1
        positions = torch.full((*mask.shape[:-1], width), -1, dtype=torch.int32, device=mask.device)
        row, position = torch.nonzero(mask.reshape(count.numel(), -1), as_tuple=True)
        ends = count.flatten().cumsum(0)
        slots = torch.arange(len(row), device=mask.device) - (ends - count.flatten())[row]
        positions.view(-1, width)[row, slots] = position.to(torch.int32)
        return positions, count
    # The k-th position is where the running count reaches k.
    order = mask.cumsum(-1, dtype=torch.int32)
    count = order[..., -1].contiguous()
    slots = torch.arange(1, width + 1, dtype=torch.int32, device=mask.device).repeat(*mask.shape[:-1], 1)
    positions = torch.searchsorted(order, slots, out_int32=True)
    return positions.masked_fill_(slots > count[..., None], -1), count


def columns_outside_blocks(
    tiling: Tiling, blocks: torch.Tensor, columns: Columns, wait: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The columns of each tile that its blocks do not hold already, in multiples of ``tiling.column_multiple``.

    A kernel without a mask for single keys needs columns that fill pages exactly. The last page is then filled up with
    other keys, from a block that the tile does not have; where that is not enough, the blocks of the columns that did
    not fill a page are taken whole. Either way the tile attends at least what was asked for.

    Args:
        blocks: bool ``[H, T, N]``.
        columns: those asked for.
        wait: whether a GPU may be waited for; without, the list is as wide as the columns that there could be.

    Returns:
        blocks (bool ``[H, T, N]``, perhaps with more set), columns (int32 ``[H, T, C]``, -1 padded), their number
        (int32 ``[H, T]``).
    """
    heads, tiles, _ = blocks.shape
    multiple = tiling.column_multiple
    free = ~blocks & (tiling.distance() > 0)
    candidates = columns.ranked[:, None, :].expand(heads, tiles, -1)
    outside = free.gather(2, candidates // tiling.block_size) & columns.wanted[:, None, :]
    wanted = outside.sum(-1)
    if multiple > 1:
        fillers, usable = _fillers(tiling, free, columns)
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
    found = candidates.to(torch.int32).gather(2, slots.long().clamp(min=0))
    return blocks, found.masked_fill_(slots < 0, -1), count


MAX_PIECE = 1 << 22
"""Heads times tiles times columns that are sorted out at once: what the caches of a processor hold."""
PLANNED_PIECE = 1 << 23
"""Heads times tiles times keys whose marks are counted at once, where sizes are planned."""


def _columns_in_pieces(
    tiling: Tiling, blocks: torch.Tensor, columns: Columns, wait: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``columns_outside_blocks``; where sizes may be read, some heads at a time, and no wider than those need."""
    heads, widest = columns.ranked.shape
    at_once = max(1, MAX_PIECE // (tiling.num_tiles * max(1, widest)))
    if not wait or at_once >= heads:
        return columns_outside_blocks(tiling, blocks, columns, wait=wait)
    pieces = []
    for first in range(0, heads, at_once):
        piece = slice(first, first + at_once)
        # The wanted ones stand in front.
        width = int(columns.wanted[piece].sum(1).max())
        narrow = Columns(columns.ranked[piece, :width], columns.wanted[piece, :width])
        pieces.append(columns_outside_blocks(tiling, blocks[piece], narrow))
    width = max(found.shape[-1] for _, found, _ in pieces)
    padded = [torch.nn.functional.pad(found, (0, width - found.shape[-1]), value=-1) for _, found, _ in pieces]
    return torch.cat([piece[0] for piece in pieces]), torch.cat(padded), torch.cat([piece[2] for piece in pieces])


def single_keys(
    tiling: Tiling, blocks: torch.Tensor, wanted: torch.Tensor, width: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys that each tile wants for itself as its columns, in multiples of ``tiling.column_multiple``.

    The last page is filled up with the first other keys that the tile does not have; a tile with too few of them takes
    everything.

    Args:
        blocks: bool ``[H, T, N]``.
        wanted: bool ``[H, T, S]``, none in a block of the tile.
        width: see ``compact``.

    Returns:
        as ``columns_outside_blocks``.
    """
    if tiling.column_multiple > 1:
        taken = (blocks | (tiling.distance() <= 0)).repeat_interleave(tiling.block_size, dim=2)[..., : wanted.shape[2]]
        free = ~(taken | wanted)
        missing = (-wanted.sum(-1) % tiling.column_multiple)[..., None]
        order = free.cumsum(-1, dtype=torch.int32)
        short = order[..., -1:] < missing
        wanted = (wanted | (free & (order <= missing))) & ~short
        blocks = torch.where(short, tiling.reachable(), blocks)
    if width is None:
        return blocks, *compact(wanted)
    # Tiles at a time: keys that are counted take four times the room of their marks.
    at_once = max(1, PLANNED_PIECE // wanted[:, 0].numel())
    parts = [compact(part, width) for part in wanted.split(at_once, dim=1)]
    return blocks, torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


def _fillers(tiling: Tiling, free: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of each tile's free block with the fewest wanted ones (int64 ``[H, T, B]``), and which may be used."""
    ranked = columns.ranked
    heads = ranked.shape[0]
    taken = torch.zeros(
        heads, tiling.num_key_blocks * tiling.block_size, dtype=torch.bool, device=ranked.device
    ).scatter_(1, ranked, columns.wanted)
    taken_in_block = taken.view(heads, 1, tiling.num_key_blocks, -1).sum(-1)
    emptiest = torch.where(free, taken_in_block, tiling.block_size + 1).argmin(-1)
    keys = emptiest[..., None] * tiling.block_size + torch.arange(tiling.block_size, device=ranked.device)
    usable = free.any(-1, keepdim=True) & ~taken.gather(1, keys.view(heads, -1)).view_as(keys)
    return keys, usable


class Scores(Protocol):
    """Estimates of one chunk, each computed only when a head's pattern asks for it. ``S``: tokens in the sequence."""

    def last_query(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mass of columns, beyond what diagonals explain, and of diagonals: float32 ``[len(heads), S]`` each."""

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        """Block scores of mean queries and mean keys, float32 ``[len(heads), T, N]``."""

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        """Block scores of single queries and mean keys, float32 ``[len(heads), T, N]``."""

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        """Block scores along antidiagonals, float32 ``[len(heads), T, N]``."""

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> Levels:
        """Levels of single keys, from products in ``rank`` dimensions, at which a share ``gamma`` of the attention
        lies."""


def select(
    tiling: Tiling, pattern: HeadPattern, heads: Sequence[int], scores: Scores, most_columns: int | None = None
) -> tuple[torch.Tensor, Columns | None]:
    """Blocks (bool ``[len(heads), T, N]``, or ``[T, N]`` where they are the same for all heads) and columns that one
    pattern selects for all tiles of the named heads.

    Args:
        most_columns: room for the columns of a head whose budget the data decide; None: as many as it wants.
    """
    if isinstance(pattern, Dense):
        return tiling.reachable(), None
    if isinstance(pattern, TriShape):
        return selection.tri_shape_blocks(tiling, pattern), None
    if isinstance(pattern, AShape):
        return selection.a_shape_blocks(tiling, pattern), None
    if isinstance(pattern, BlockSparse):
        top_k = -(-pattern.top_k * ESTIMATION_BLOCK // tiling.block_size)
        return selection.top_blocks(tiling, scores.pooled(heads, tiling), top_k), None
    if isinstance(pattern, PeakThreshold):
        return selection.peak_blocks(tiling, scores.peaks(heads, tiling), pattern), None
    if isinstance(pattern, Antidiagonal):
        return selection.covering_blocks(tiling, scores.antidiagonal(heads, tiling, pattern.stride), pattern.tau), None
    if isinstance(pattern, VerticalSlash):
        return selection.vertical_slash(tiling, *scores.last_query(heads), pattern)
    if isinstance(pattern, Coverage):
        return selection.coverage(tiling, *scores.last_query(heads), pattern, most_columns)
    raise TypeError(f"no selection for pattern {pattern!r}")


def share_lists(patterns: Sequence[HeadPattern], group: int) -> bool:
    """Whether the ``group`` query heads of every KV head are known to select the same keys, whatever the scores say."""
    read_no_scores = all(isinstance(pattern, Dense | AShape | TriShape) for pattern in patterns)
    return read_no_scores and all(pattern == patterns[head - head % group] for head, pattern in enumerate(patterns))


def build_index(
    tiling: Tiling,
    patterns: Sequence[HeadPattern],
    scores: Scores,
    capacity: Capacity | None = None,
    group: int = 1,
) -> SparseIndex:
    """The index of one chunk for all heads.

    Args:
        patterns: one per query head.
        capacity: planned sizes, so that nothing waits for a GPU; None: as large as the selection turns out.
        group: query heads of each KV head, for an engine that knows lists they share; 1: every head has its own.
    """
    heads_per_list = group if share_lists(patterns, group) else 1
    patterns = patterns[::heads_per_list]
    parts: Iterable[_Part] = _parts(tiling, patterns, scores, capacity)
    if capacity is None:
        parts = list(parts)
        widths = [max(part.blocks.shape[-1] for part in parts), max(part.columns.shape[-1] for part in parts)]
    else:
        widths = [capacity.blocks, capacity.columns]
    shape, device = (len(patterns), tiling.num_tiles), tiling.starts.device
    blocks, columns = (torch.full((*shape, width), -1, dtype=torch.int32, device=device) for width in widths)
    num_blocks, num_columns = (torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2))
    overflowed = torch.zeros(shape, dtype=torch.bool, device=device) if capacity else None
    for part in parts:
        for source, target in _runs(part.heads):
            blocks[target, :, : part.blocks.shape[-1]] = part.blocks[source]
            num_blocks[target] = part.num_blocks[source]
            columns[target, :, : part.columns.shape[-1]] = part.columns[source]
            num_columns[target] = part.num_columns[source]
            if overflowed is not None and part.overflowed is not None:
                overflowed[target] = part.overflowed[source]
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
        heads_per_list,
    )


@dataclass(frozen=True)
class _Part:
    """The index of some heads that share a pattern; fields as ``SparseIndex`` has them."""

    heads: list[int]
    blocks: torch.Tensor
    num_blocks: torch.Tensor
    columns: torch.Tensor
    num_columns: torch.Tensor
    overflowed: torch.Tensor | None


def _parts(
    tiling: Tiling, patterns: Sequence[HeadPattern], scores: Scores, capacity: Capacity | None
) -> Iterator[_Part]:
    """As many heads at once as the capacity says: what a part needs beside its lists is gone before the next."""
    groups: dict[HeadPattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        groups.setdefault(pattern, []).append(head)
    for pattern, group in groups.items():
        at_once = len(group) if capacity is None else capacity.heads_at_once
        if isinstance(pattern, LowRank) and capacity is None:
            at_once = 1  # each may turn out to need no scores
        for first in range(0, len(group), at_once):
            yield _list(tiling, pattern, group[first : first + at_once], scores, capacity)


def _list(tiling: Tiling, pattern: HeadPattern, heads: list[int], scores: Scores, capacity: Capacity | None) -> _Part:
    shape, device = (len(heads), tiling.num_tiles), tiling.starts.device
    columns = torch.full((*shape, 1), -1, dtype=torch.int32, device=device)
    num_columns = torch.zeros(shape, dtype=torch.int32, device=device)
    wanted = None
    if isinstance(pattern, LowRank):
        levels = scores.low_rank(heads, tiling, pattern.rank, pattern.gamma)
        if levels.lists and capacity is None and tiling.column_multiple == 1:
            chosen, columns, num_columns = levels.lists(tiling, levels.of_keys, levels.threshold)
        else:
            chosen, single = keys_at_levels(tiling, levels.of_keys, levels.threshold)
            del levels  # as large as what comes now
            chosen, columns, num_columns = single_keys(tiling, chosen, single, capacity.columns if capacity else None)
    else:
        chosen, wanted = select(tiling, pattern, heads, scores, capacity.columns if capacity else None)
        if wanted:
            chosen, columns, num_columns = _columns_in_pieces(tiling, chosen, wanted, wait=capacity is None)
    blocks, num_blocks = compact(chosen, capacity.blocks if capacity else None)
    blocks, num_blocks = blocks.expand(*shape, -1), num_blocks.expand(shape)
    if capacity is None:
        return _Part(heads, blocks, num_blocks, columns, num_columns, None)
    reach = ((tiling.starts[1:] - 1) // tiling.block_size + 1).to(torch.int32)
    over = (num_blocks > capacity.blocks) | (num_columns > capacity.columns)
    # A tile that wanted everything has it, and needs no room for it.
    overflowed = over & (num_blocks < reach)
    if wanted and wanted.crowded is not None:
        overflowed |= wanted.crowded[:, None]
    return _Part(
        heads,
        blocks.masked_fill(over[..., None], -1),
        torch.where(over, reach, num_blocks),
        columns[..., : capacity.columns].masked_fill(over[..., None], -1),
        num_columns.masked_fill(over, 0),
        overflowed,
    )


def _runs(heads: list[int]) -> Iterator[tuple[slice, slice]]:
    """Places and numbers of neighbouring heads. Slices, since a list as an index would be copied to a GPU, and waited
    for."""
    for _, run in itertools.groupby(enumerate(heads), key=lambda item: item[1] - item[0]):
        items = list(run)
        (place, head), count = items[0], len(items)
        yield slice(place, place + count), slice(head, head + count)
