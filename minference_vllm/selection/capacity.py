"""How much room an index gets on a GPU, and how often it is audited, planned from patterns and lengths alone, so that
nothing waits for the GPU.

Patterns with a fixed budget never need more than their room. What may be dense (dense heads, the last tiles of
tri-shape heads, heads whose budget the data decide) is not listed beyond it: such a tile attends everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minference_vllm.patterns.kinds import (
    ESTIMATION_BLOCK,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    TriShape,
    VerticalSlash,
)
from minference_vllm.selection.low_rank import CALIBRATION_ROWS, WEIGHTS_BYTES
from minference_vllm.selection.vertical_slash import FORCED_COLUMNS, FORCED_DIAGONALS

MEMORY_LIMIT = 256 << 20
"""Bytes that one layer's index may take while it is built, scores included, on contexts up to a million tokens."""
ADAPTIVE_BYTES = 64 << 20
"""Where the data decide the budget of heads, the lists of blocks may take this, and those of columns likewise; a tile
that wants more is dense."""
ADAPTIVE_COLUMNS = 4096
"""The most single columns that such a head has room for."""
AUDITED_PAIR = 32
"""Pairs that attention computes in the time of one that an audit samples: attention keeps its scores in registers, an
audit writes them to memory, and copies keys for a few rows alone. Counted from the bytes moved, not timed."""


@dataclass(frozen=True)
class Capacity:
    blocks: int
    """Key blocks listed per head and tile."""
    columns: int
    """Single columns per head and tile."""
    heads_at_once: int
    """Heads that are scored and selected together; the others wait, so that their scores fit into memory."""


def plan_capacity(
    patterns: Sequence[HeadPattern],
    context_len: int,
    seq_len: int,
    block_size: int,
    tile: int,
    column_multiple: int = 1,
    list_everything: bool = False,
) -> Capacity:
    """The room for one chunk's index.

    Args:
        patterns: one per query head.
        tile, column_multiple: see ``Tiling``.
        list_everything: whether dense tiles are listed, too, for an engine that reads nothing but lists.
    """
    key_blocks = -(-seq_len // block_size)
    tiles = -(-seq_len // tile) - context_len // tile
    own = tile // block_size
    adaptive = max(FORCED_COLUMNS, ADAPTIVE_BYTES // (4 * len(patterns) * tiles))
    blocks, columns = 1, 1
    for pattern in set(patterns):
        room, singles = own, 0
        if isinstance(pattern, AShape | TriShape):
            room += -(-pattern.sink // block_size) + -(-pattern.local // block_size) + 1
        elif isinstance(pattern, VerticalSlash):
            nearest = -(-(FORCED_DIAGONALS - 1) // block_size)
            room += max(-(-pattern.slash // block_size), nearest)
            singles = max(pattern.vertical, FORCED_COLUMNS)
        elif isinstance(pattern, BlockSparse):
            room += -(-pattern.top_k * ESTIMATION_BLOCK // block_size)
        elif not isinstance(pattern, Dense):
            room += adaptive
            singles = min(adaptive, ADAPTIVE_COLUMNS)
        if column_multiple > 1 and singles:
            # The last page of columns is filled up, or the blocks of all columns are taken whole.
            room += singles
            singles = -(-singles // column_multiple) * column_multiple
        if list_everything and not isinstance(pattern, AShape | VerticalSlash | BlockSparse):
            room = key_blocks
        blocks, columns = max(blocks, room), max(columns, singles)
    blocks, columns = min(blocks, key_blocks), min(columns, max(1, -(-seq_len // column_multiple) * column_multiple))
    # Per head while it is scored: float64 sums over the sequence, masks and places over tiles and blocks or columns.
    per_head = 40 * seq_len + tiles * (24 * key_blocks + 40 * (columns + column_multiple))
    # Or a level and a mark for every tile and key, the keys of few dimensions twice, and the attention of some rows.
    if rank := max((pattern.rank for pattern in patterns if isinstance(pattern, LowRank)), default=0):
        per_head = max(
            per_head, (2 * tiles + 4 * rank) * seq_len + min(8 * CALIBRATION_ROWS * seq_len, 2 * WEIGHTS_BYTES)
        )
    lists = 4 * len(patterns) * tiles * (blocks + columns)
    at_once = max(1, (MEMORY_LIMIT * 3 // 4 - 2 * lists) // per_head)
    return Capacity(blocks, columns, min(at_once, len(patterns)))


def audit_frequency(
    patterns: Sequence[HeadPattern], context_len: int, seq_len: int, audit_rows: int, share: float
) -> float:
    """Of how many chunks one is audited, 0 to 1, for audits to cost ``share`` of what attention does.

    Args:
        patterns: one per query head.
        audit_rows: rows that an audit samples.
    """
    rows, reach = seq_len - context_len, (context_len + seq_len) / 2
    computed = sum(rows * min(reach, _planned_tokens(pattern)) for pattern in patterns)
    sampled = len(patterns) * min(audit_rows, rows) * seq_len
    return min(1.0, share * computed / (AUDITED_PAIR * sampled))


def _planned_tokens(pattern: HeadPattern) -> float:
    """Keys per row: the budget, and for heads without one the least that the default pattern takes."""
    if isinstance(pattern, Dense):
        return float("inf")
    if isinstance(pattern, AShape | TriShape):
        return pattern.sink + pattern.local
    if isinstance(pattern, VerticalSlash):
        return pattern.vertical + pattern.slash
    if isinstance(pattern, BlockSparse):
        return pattern.top_k * ESTIMATION_BLOCK
    return pattern.min_budget if isinstance(pattern, Coverage) else Coverage().min_budget
