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

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import (
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
from minference_vllm.selection import vertical_slash as selection
from minference_vllm.selection.capacity import Capacity
from minference_vllm.selection.compaction import columns_in_pieces, compact, single_keys
from minference_vllm.selection.score_bins import Levels, keys_at_levels
from minference_vllm.selection.vertical_slash import Columns


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
            chosen, columns, num_columns = columns_in_pieces(tiling, chosen, wanted, wait=capacity is None)
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
