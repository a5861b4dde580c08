"""The index of one chunk for all heads of a layer: each pattern's selection, put into the lists of one ``SparseIndex``.

Sizes: ``h`` query heads of one pattern, ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection.compaction import EXACT_WIDTH, Capacity, KeyLists, Selection, compact_blocks
from minference_vllm.selection.families import family_of, share_lists
from minference_vllm.selection.scores import Scores


def build_index(
    tiling: Tiling,
    patterns: Sequence[HeadPattern],
    scores: Scores,
    capacity: Capacity = EXACT_WIDTH,
    group: int = 1,
) -> SparseIndex:
    """The index of one chunk for all heads.

    Args:
        patterns: one per query head.
        capacity: planned sizes, so that nothing waits for a GPU; or ``EXACT_WIDTH``.
        group: query heads of each KV head, for a kernel that knows lists they share; 1: every head has its own.
    """
    heads_per_list = group if share_lists(patterns, group) else 1
    patterns = patterns[::heads_per_list]
    parts: Iterable[_Part] = _parts(tiling, patterns, scores, capacity)
    widths = [capacity.blocks, capacity.columns]
    if capacity.exact:
        parts = list(parts)
        widths = [max(part.blocks.shape[-1] for part in parts), max(part.columns.shape[-1] for part in parts)]
    shape, device = (len(patterns), tiling.num_tiles), tiling.starts.device
    blocks, columns = (torch.full((*shape, width), -1, dtype=torch.int32, device=device) for width in widths)
    num_blocks, num_columns = (torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2))
    overflowed = None if capacity.exact else torch.zeros(shape, dtype=torch.bool, device=device)
    for part in parts:
        for source, target in runs(part.heads):
            blocks[target, :, : part.blocks.shape[-1]] = part.blocks[source]
            num_blocks[target] = part.num_blocks[source]
            columns[target, :, : part.columns.shape[-1]] = part.columns[source]
            num_columns[target] = part.num_columns[source]
            if overflowed is not None and part.overflowed is not None:
                overflowed[target] = part.overflowed[source]
    return SparseIndex(tiling, blocks, num_blocks, columns, num_columns, overflowed, heads_per_list)


@dataclass(frozen=True)
class _Part:
    """The index of some heads that share a pattern; fields as ``SparseIndex`` has them."""

    heads: Sequence[int]
    blocks: torch.Tensor
    num_blocks: torch.Tensor
    columns: torch.Tensor
    num_columns: torch.Tensor
    overflowed: torch.Tensor | None = None


def _parts(tiling: Tiling, patterns: Sequence[HeadPattern], scores: Scores, capacity: Capacity) -> Iterator[_Part]:
    """As many heads at once as the capacity says: what a part needs beside its lists is gone before the next."""
    groups: dict[HeadPattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        groups.setdefault(pattern, []).append(head)
    for pattern, group in groups.items():
        family = family_of(pattern)
        at_once = 1 if capacity.exact and family.one_by_one else capacity.heads_at_once
        for first in range(0, len(group), at_once):
            heads = group[first : first + at_once]
            yield _listed(tiling, heads, family.select(pattern, heads, tiling, scores, capacity), capacity)


def _listed(tiling: Tiling, heads: Sequence[int], selection: Selection, capacity: Capacity) -> _Part:
    shape, device = (len(heads), tiling.num_tiles), tiling.starts.device
    blocks, num_blocks = compact_blocks(selection.blocks, capacity)
    blocks, num_blocks = blocks.expand(*shape, -1), num_blocks.expand(shape)
    columns, num_columns = selection.keys or KeyLists(
        torch.full((*shape, 1), -1, dtype=torch.int32, device=device),
        torch.zeros(shape, dtype=torch.int32, device=device),
    )
    if capacity.exact:
        return _Part(heads, blocks, num_blocks, columns, num_columns)
    reach = ((tiling.starts[1:] - 1) // tiling.block_size + 1).to(torch.int32)
    over = (num_blocks > capacity.blocks) | (num_columns > capacity.columns)
    # A tile that wanted everything has it, and needs no room for it.
    overflowed = over & (num_blocks < reach)
    if selection.crowded is not None:
        overflowed |= selection.crowded[:, None]
    return _Part(
        heads,
        blocks.masked_fill(over[..., None], -1),
        torch.where(over, reach, num_blocks),
        columns[..., : capacity.columns].masked_fill(over[..., None], -1),
        num_columns.masked_fill(over, 0),
        overflowed,
    )


def runs(heads: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Places and numbers of neighbouring heads. Slices, since a list as an index would be copied to a GPU, and waited
    for."""
    for _, run in itertools.groupby(enumerate(heads), key=lambda item: item[1] - item[0]):
        items = list(run)
        (place, head), count = items[0], len(items)
        yield slice(place, place + count), slice(head, head + count)
