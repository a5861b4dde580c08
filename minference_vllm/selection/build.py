"""Build the ``SparseIndex`` of one chunk for all heads of a layer from the selections of their patterns.

Sizes: ``h`` query heads of one pattern, ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection.compaction import (
    EXACT_WIDTH,
    Capacity,
    KeyLists,
    Lists,
    Selection,
    WritesLists,
    compact_blocks,
)
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
        capacity: planned widths, without a host synchronisation; or ``EXACT_WIDTH``.
        group: query heads of each KV head, for a kernel that knows lists they share; 1: every head has its own.
    """
    heads_per_list = group if share_lists(patterns, group) else 1
    patterns = patterns[::heads_per_list]
    shape, device = (len(patterns), tiling.num_tiles), tiling.starts.device
    found = _selections(tiling, patterns, scores, capacity)
    if capacity.exact:
        return _exact(tiling, shape, found, heads_per_list)
    lists = Lists.empty(shape, capacity.blocks, capacity.columns, device, sum(one.samples for one in patterns))
    sampled: list[int] = []
    for heads, selection in found:
        if isinstance(selection, Selection):
            assert not patterns[heads[0]].samples, "sampled keys need something that writes lists, or exact sizes"
            _copy(lists[:5], heads, _planned(tiling, len(heads), selection, capacity)[:5])
        else:
            selection.write(lists, heads)
            sampled += heads if selection.sampled else []
    own = tuple(sorted(sampled))
    return SparseIndex(tiling, *lists[:5], heads_per_list, column_codes=lists.codes, sampled=own)


def _selections(
    tiling: Tiling, patterns: Sequence[HeadPattern], scores: Scores, capacity: Capacity
) -> Iterator[tuple[list[int], Selection | WritesLists]]:
    """Selections of groups of heads with equal patterns. Temporaries of a group are freed before the next one."""
    groups: dict[HeadPattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        groups.setdefault(pattern, []).append(head)
    for pattern, group in groups.items():
        family = family_of(pattern)
        at_once = family.heads_at_once(pattern, tiling) if capacity.exact else capacity.heads_at_once
        for first in range(0, len(group), at_once):
            heads = group[first : first + at_once]
            yield heads, family.select(pattern, heads, tiling, scores, capacity)


def _exact(
    tiling: Tiling,
    shape: tuple[int, int],
    found: Iterable[tuple[list[int], Selection | WritesLists]],
    heads_per_list: int,
) -> SparseIndex:
    """The index with lists as wide as the widest selection."""
    parts, sampled = [], []
    for heads, selection in found:
        assert isinstance(selection, Selection), "what writes lists needs planned sizes"
        parts.append((heads, _listed(tiling, len(heads), selection, EXACT_WIDTH)))
        if selection.keys is not None and selection.keys.codes is not None:
            sampled.append((heads, selection.keys.codes))
    blocks, columns = (max(part[place].shape[-1] for _, part in parts) for place in (0, 2))
    lists = Lists.empty(shape, blocks, columns, tiling.starts.device)[:4]
    for heads, part in parts:
        _copy(lists, heads, part)
    codes = torch.zeros(lists[2].shape, dtype=torch.uint8, device=lists[2].device) if sampled else None
    for heads, part in sampled:
        _copy([codes], heads, [part])
    own = tuple(sorted(head for heads, _ in sampled for head in heads))
    return SparseIndex(tiling, *lists, heads_per_list=heads_per_list, column_codes=codes, sampled=own)


def _copy(lists: Sequence[torch.Tensor], heads: Sequence[int], part: Sequence[torch.Tensor]) -> None:
    """Copy the lists of some heads, which may be narrower, into the lists of all heads."""
    for source, target in runs(heads):
        for into, of_some in zip(lists, part, strict=True):
            if into.dim() == 3:
                into[target, :, : of_some.shape[-1]] = of_some[source]
            else:
                into[target] = of_some[source]


def _listed(
    tiling: Tiling, heads: int, selection: Selection, capacity: Capacity
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first four fields of ``Lists`` for a selection."""
    shape, device = (heads, tiling.num_tiles), tiling.starts.device
    blocks, num_blocks = compact_blocks(selection.blocks, capacity)
    columns, num_columns, _ = selection.keys or KeyLists(
        torch.full((*shape, 1), -1, dtype=torch.int32, device=device),
        torch.zeros(shape, dtype=torch.int32, device=device),
    )
    return blocks.expand(*shape, -1), num_blocks.expand(shape), columns, num_columns


def _planned(tiling: Tiling, heads: int, selection: Selection, capacity: Capacity) -> Lists:
    """``_listed`` with planned widths. A tile that needs more overflows: it attends everything, without a list."""
    blocks, num_blocks, columns, num_columns = _listed(tiling, heads, selection, capacity)
    reach = ((tiling.starts[1:] - 1) // tiling.block_size + 1).to(torch.int32)
    over = (num_blocks > capacity.blocks) | (num_columns > capacity.columns)
    # A tile that selects everything is already dense and does not overflow.
    overflowed = over & (num_blocks < reach)
    if selection.crowded is not None:
        overflowed |= selection.crowded[:, None]
    return Lists(
        blocks.masked_fill(over[..., None], -1),
        torch.where(over, reach, num_blocks),
        columns[..., : capacity.columns].masked_fill(over[..., None], -1),
        num_columns.masked_fill(over, 0),
        overflowed,
    )


def runs(heads: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Slices of the list, and of the heads, for each run of neighbouring heads. Indexing with a list instead would need
    a copy to the GPU and a synchronisation."""
    for _, run in itertools.groupby(enumerate(heads), key=lambda item: item[1] - item[0]):
        items = list(run)
        (place, head), count = items[0], len(items)
        yield slice(place, place + count), slice(head, head + count)
