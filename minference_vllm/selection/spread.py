"""A synthetic index of a given density, on which kernels are timed (``prefill/kernel_trial.py``).

Keys are spread evenly over the keys before a tile, with a different start in every list and tile. The time of
attention depends on the number of pages and single keys, not on which keys they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection.capacity import adaptive_room
from minference_vllm.selection.compaction import Capacity, Lists
from minference_vllm.selection.families import family_of, share_lists


def spread_index(
    tiling: Tiling, patterns: Sequence[HeadPattern], density: float, capacity: Capacity, group: int = 1
) -> SparseIndex:
    """An index whose tiles select a given share of the keys before them, in the form that these patterns use.

    A pattern with a budget selects at most that. A pattern with single keys takes half of its keys as single keys, up
    to the planned capacity, and the rest as pages. A dense head selects everything.

    Args:
        patterns: one per query head.
        density: share of the keys before a tile, at most 0.5; its own pages come on top.
        capacity: planned sizes. Which keys are named does not depend on them: indices of several kernels are the same.
        group: query heads of each KV head, see ``build_index``.
    """
    heads_per_list = group if share_lists(patterns, group) else 1
    of_lists, device = patterns[::heads_per_list], tiling.starts.device
    lists = Lists.empty((len(of_lists), tiling.num_tiles), capacity.blocks, capacity.columns, device)
    size, adaptive = tiling.block_size, adaptive_room(len(patterns), tiling.num_tiles)
    first_own = tiling.starts[:-1, None] // tiling.tile * (tiling.tile // size)  # [T, 1], as all below
    reach = (tiling.starts[1:, None] - 1) // size + 1
    keys = (first_own * size * density).long()
    # Pages have even numbers, single keys lie in odd pages, so no key is selected twice.
    half = first_own // 2
    generator = torch.Generator(device).manual_seed(0)
    for row, pattern in enumerate(of_lists):
        if pattern.kind == "dense":
            count, listed = reach, torch.arange(capacity.blocks, device=device)
            lists.num_blocks[row] = count[:, 0]
            if capacity.blocks >= tiling.num_key_blocks:
                lists.blocks[row] = torch.where(listed < count, listed, -1)
            continue
        room = family_of(pattern).room(pattern, size, adaptive)
        begin = torch.rand(len(keys), 1, generator=generator, device=device)
        columns = torch.minimum(keys // 2, half * size).clamp(max=room.columns)
        blocks = torch.minimum((keys - columns) // size, half).clamp(max=room.blocks)
        place = torch.arange(capacity.blocks, device=device)
        before = 2 * _spread(place, begin, blocks, half)
        own = first_own + place - blocks
        lists.blocks[row] = torch.where(place < blocks, before, torch.where(own < reach, own, -1))
        lists.num_blocks[row] = (blocks + reach - first_own)[:, 0]
        place = torch.arange(capacity.columns, device=device)
        among = _spread(place, begin, columns, half * size)
        position = (among // size * 2 + 1) * size + among % size
        lists.columns[row] = torch.where(place < columns, position, -1)
        lists.num_columns[row] = columns[:, 0]
    return SparseIndex(tiling, *lists[:5], heads_per_list)


def _spread(place: torch.Tensor, begin: torch.Tensor, count: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """int64 ``[T, W]``: ``count`` (``[T, 1]``) numbers spread evenly over ``among``.

    Args:
        place: int64 ``[W]``.
        begin: ``[T, 1]``, from 0 to 1.
    """
    return ((place + begin.double()) * among / count.clamp(min=1)).long()
