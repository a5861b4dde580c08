"""The score bins of keys for one tile of ``low_rank``, from any number of its queries.

Products stay integers, in one unit for all queries of a tile, until the largest is known. Each product costs a
subtraction and a maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minference_vllm.selection import projection, score_bins
from minference_vllm.triton_kernels.approx_lse import NEVER, bits, codes
from minference_vllm.triton_kernels.column_diagonal import combined

BINS_PER_BIT = tl.constexpr(projection.BINS_PER_BIT)
TOP_BIN, LOCAL_BIN = tl.constexpr(score_bins.TOP_BIN), tl.constexpr(score_bins.LOCAL_BIN)


@triton.jit
def below(p_lse, o_query, m_query, b_bits, num_queries, num_parts):
    """What is subtracted from the products of queries, in their units: int32. For masked queries it is so large that
    they never have the largest difference."""
    b_lse = combined(p_lse + o_query, num_queries, num_parts, m_query)
    b_below = tl.where(m_query, tl.floor(b_lse / b_bits + 0.5), NEVER + 0.0)
    return tl.minimum(tl.maximum(b_below, -NEVER + 0.0), NEVER + 0.0).to(tl.int32)


@triton.jit
def as_bins(b_best):
    """``score_bins.as_bins`` as float32, to be truncated to an integer."""
    return tl.minimum(tl.maximum(b_best * BINS_PER_BIT + TOP_BIN, 0.0), TOP_BIN) + 0.5


@triton.jit
def _some_queries(
    p_query, p_lse, unit, first, i_down, count, num_queries, num_parts, RANK: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of a tile's queries, int8 ``[R, BLOCK_M]``, and their ``below``, int32 ``[1, BLOCK_M]``."""
    o_down = i_down + tl.arange(0, BLOCK_M)
    o_query, m_query = first + o_down, o_down < count
    b_below = below(p_lse, o_query, m_query, unit, num_queries, num_parts)
    return tl.trans(codes(p_query, o_query, m_query, RANK, R)), b_below[None, :]


@triton.jit
def bins_of_tile(
    p_query, p_key, p_lse, p_bins, unit, count, i_tile, begin, end, context_len, seq_len, num_tiles, num_parts, window,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, PER_TILE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the bins of keys ``begin`` to ``end`` for one tile, from the first ``count`` of its queries.

    ``p_query``, ``p_key`` and ``p_lse`` are those of the kernels, for one head; ``p_bins`` is uint8 ``[seq_len]``.
    """
    own = (context_len // TILE + i_tile) * TILE
    first_seen = tl.where(window > 0, tl.maximum(tl.maximum(own, context_len) - window + 1, 0), 0)
    stop, end = tl.minimum(end, tl.minimum(own + TILE, seq_len)), tl.minimum(end, seq_len)
    before, first, num_queries = tl.minimum(stop, own), i_tile * PER_TILE, num_tiles * PER_TILE
    if PER_TILE <= BLOCK_M:
        b_query, b_below = _some_queries(
            p_query, p_lse, unit, first, 0, count, num_queries, num_parts, RANK, R, BLOCK_M
        )  # fmt: skip
    for i_key in range(begin, before, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        b_key = codes(p_key, o_key, o_key < before, RANK, R)
        # Largest difference of each key over all queries, in units.
        b_best = tl.full([BLOCK_N], -NEVER, dtype=tl.int32)
        for i_down in tl.static_range(0, PER_TILE, BLOCK_M):
            if PER_TILE > BLOCK_M:
                b_query, b_below = _some_queries(
                    p_query, p_lse, unit, first, i_down, count, num_queries, num_parts, RANK, R, BLOCK_M
                )  # fmt: skip
            b_best = tl.maximum(b_best, tl.max(tl.dot(b_key, b_query, out_dtype=tl.int32) - b_below, 1))
        b_bin = tl.where(o_key >= first_seen, as_bins(b_best.to(tl.float32) * unit), 0.0)
        tl.store(p_bins + o_key, b_bin.to(tl.uint8), mask=o_key < before)
    for i_key in range(tl.maximum(begin, own), stop, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        tl.store(p_bins + o_key, tl.full([BLOCK_N], LOCAL_BIN, dtype=tl.uint8), mask=o_key < stop)
    # Keys after the tile.
    for i_key in range(tl.maximum(begin, stop), end, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        tl.store(p_bins + o_key, tl.zeros([BLOCK_N], dtype=tl.uint8), mask=o_key < end)


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_tiles", "num_parts", "window"])
def tile_bins_kernel(
    p_query, p_count, p_key, p_scale, p_lse, p_bins, stride_bins, context_len, seq_len, num_tiles, num_parts, window,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, PER_TILE: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the bins of STRIP keys for one tile of one head.

    ``p_count`` is int32 and ``p_scale`` int16 ``[h, T]``, ``p_lse`` float32 ``[h, num_parts, T * PER_TILE]``,
    ``p_bins`` uint8 ``[h, T, stride_bins]``.
    """
    i_strip, i_tile, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_of_tiles, num_queries = i_head * num_tiles + i_tile, num_tiles * PER_TILE
    bins_of_tile(
        p_query + i_head * num_queries * RANK, p_key + i_head * seq_len * RANK,
        p_lse + i_head * num_parts * num_queries, p_bins + i_of_tiles * stride_bins, bits(p_scale, i_of_tiles, True),
        tl.load(p_count + i_of_tiles), i_tile,
        i_strip * STRIP, (i_strip + 1) * STRIP, context_len, seq_len, num_tiles, num_parts, window, RANK, R, TILE,
        PER_TILE, BLOCK_M, BLOCK_N,
    )  # fmt: skip


BLOCK_M, BLOCK_N, STRIP, NUM_WARPS = 128, 64, 2048, 4
"""Queries and keys per step, keys per program, and warps."""
