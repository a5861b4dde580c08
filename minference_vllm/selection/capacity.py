"""Plan the list widths of an index on a GPU from patterns and lengths alone, without a host synchronisation.

Patterns with a fixed budget never need more than planned. Tiles that may be dense (of dense heads, the last tiles of
tri-shape heads, and of heads with an adaptive budget) overflow instead: they attend everything, without a list.
"""

from __future__ import annotations

from collections.abc import Sequence

from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection.compaction import Capacity
from minference_vllm.selection.families import family_of
from minference_vllm.selection.vertical_slash import FORCED_COLUMNS

MEMORY_LIMIT = 512 << 20
"""Memory for building one layer's index, scores included, for contexts up to a million tokens."""
ADAPTIVE_BYTES = 64 << 20
"""Memory for the block lists of heads with an adaptive budget, and the same again for their columns. A tile that needs
more is dense."""


def adaptive_room(num_heads: int, tiles: int) -> int:
    """Planned blocks, and planned columns, of a head and tile with an adaptive budget, see ``Family.room``."""
    return max(FORCED_COLUMNS, ADAPTIVE_BYTES // (4 * num_heads * tiles))


def plan_capacity(
    patterns: Sequence[HeadPattern],
    context_len: int,
    seq_len: int,
    block_size: int,
    tile: int,
    column_multiple: int = 1,
    list_everything: bool = False,
) -> Capacity:
    """The capacity for one chunk's index.

    Args:
        patterns: one per query head.
        tile, column_multiple: see ``Tiling``.
        list_everything: whether dense tiles are listed, too, for a kernel that reads nothing but lists.
    """
    key_blocks = -(-seq_len // block_size)
    tiles = -(-seq_len // tile) - context_len // tile
    adaptive = adaptive_room(len(patterns), tiles)
    blocks, columns = 1, 1
    for pattern in set(patterns):
        family = family_of(pattern)
        room, singles = family.room(pattern, block_size, adaptive)
        room += tile // block_size
        if column_multiple > 1 and singles:
            # The last page of columns is filled up, or the blocks of all columns are taken whole.
            room += singles
            singles = -(-singles // column_multiple) * column_multiple
        if list_everything and family.may_be_dense:
            room = key_blocks
        blocks, columns = max(blocks, room), max(columns, singles)
    blocks, columns = min(blocks, key_blocks), min(columns, max(1, -(-seq_len // column_multiple) * column_multiple))
    per_head = max(
        family_of(pattern).selection_bytes(pattern, tiles, seq_len, key_blocks, columns + column_multiple)
        for pattern in set(patterns)
    )
    codes = columns if any(pattern.samples for pattern in patterns) else 0
    lists = len(patterns) * tiles * (4 * (blocks + columns) + codes)
    in_place = column_multiple == 1 and all(family_of(pattern).writes_lists for pattern in set(patterns))
    if column_multiple > 1 and any(family_of(pattern).writes_lists for pattern in set(patterns)):
        # The torch path holds a mask over all keys and its positions.
        per_head += tiles * (seq_len + 24 * key_blocks + 8 * columns)
    at_once = max(1, (MEMORY_LIMIT * 3 // 4 - (lists if in_place else 2 * lists)) // per_head)
    return Capacity(blocks, columns, min(at_once, len(patterns)))
