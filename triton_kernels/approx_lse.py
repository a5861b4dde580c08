"""``score_bins.approx_lse``: the approximate log-sum-exp of the scores of a tile's queries in ``low_rank``.

Exponential units would be the bottleneck, so there is only one exponential for each sampled group of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minference_vllm.selection import projection, score_bins
from minference_vllm.triton_kernels.in_thread import THREADS, max_in_thread, place_of, thread_of

PEAK_KEYS = tl.constexpr(score_bins.PEAK_KEYS)
LEAST_GROUPS, MAX_GROUP_STEP = tl.constexpr(score_bins.LEAST_GROUPS), tl.constexpr(score_bins.MAX_GROUP_STEP)
BITS_PER_SCALE = tl.constexpr(1.0 / (projection.BINS_PER_BIT << 15))
NEVER = tl.constexpr(1 << 30)
"""Larger than any product."""


@triton.jit
def codes(p_rows, o_row, m_row, RANK: tl.constexpr, R: tl.constexpr):
    """Load rows of RANK contiguous bytes, zeros where masked: int8 ``[len(o_row), R]``."""
    o_dim = tl.arange(0, R)
    m_code = m_row[:, None] if RANK == R else (m_row[:, None] & (o_dim < RANK)[None, :])
    return tl.load(p_rows + o_row[:, None] * RANK + o_dim[None, :], mask=m_code, other=0)


@triton.jit
def bits(p_scale, o_tile, m_tile):
    """Bits per unit of the products of tiles."""
    return tl.load(p_scale + o_tile, mask=m_tile, other=1).to(tl.float32) * BITS_PER_SCALE


@triton.jit
def _add_peaks(b_sum, b_max, b_product, unit, b_more):
    """Add each thread's largest product to a running sum of weights and their maximum, ``[M, 4]`` each. Scores are
    products ``[M, N]`` times ``unit``, plus ``b_more``."""
    b_peak = max_in_thread(b_product, 1).to(tl.float32) * unit + b_more
    b_new_max = tl.maximum(b_max, b_peak)
    return b_sum * tl.exp2(b_max - b_new_max) + tl.exp2(b_peak - b_new_max), b_new_max


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_tiles"])
def approx_lse_kernel(
    p_query, p_position, p_count, p_key, p_scale, p_lse, context_len, seq_len, num_tiles, groups_per_part,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, PER_TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one tile of one head, over one part of the groups before the tile; the last part
    also has the tile's own keys.

    Four groups are processed at a time, one per thread. ``p_position`` is int32 ``[h, T * PER_TILE]``, ``p_count``
    int32 and ``p_scale`` int16 ``[h, T]``, ``p_lse`` float32 ``[h, parts, T * PER_TILE]``, in bits, written for valid
    queries only. Parts are multiples of four groups.
    """
    BLOCKS: tl.constexpr = (PER_TILE + BLOCK_M - 1) // BLOCK_M
    i_tile, i_head, i_part = tl.program_id(0) // BLOCKS, tl.program_id(1), tl.program_id(2)
    o_down = tl.program_id(0) % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, THREADS * PEAK_KEYS)
    o_group, o_place, o_thread = thread_of(o_column), place_of(o_column), tl.arange(0, THREADS)
    count = tl.load(p_count + i_head * num_tiles + i_tile)
    m_row, o_row = o_down < count, i_tile * PER_TILE + o_down
    num_queries = num_tiles * PER_TILE
    p_key += i_head.to(tl.int64) * seq_len * RANK
    b_query = codes(p_query + i_head.to(tl.int64) * num_queries * RANK, o_row, m_row, RANK, R)
    unit = bits(p_scale, i_head * num_tiles + i_tile, True)
    own = (context_len // TILE + i_tile) * TILE
    step = tl.minimum(tl.maximum(own // (PEAK_KEYS * LEAST_GROUPS), 1), MAX_GROUP_STEP)
    apart, counts_for = PEAK_KEYS * step, tl.log2(step.to(tl.float32))
    b_sum = tl.zeros([BLOCK_M, THREADS], dtype=tl.float32)
    b_max = tl.full([BLOCK_M, THREADS], -3e38, dtype=tl.float32)
    # The last programs of a tile often have no valid query.
    there = tl.program_id(0) % BLOCKS * BLOCK_M < count
    first = i_part * groups_per_part
    last = tl.where(there, tl.minimum(first + groups_per_part, tl.cdiv(own, apart)), 0)
    whole = tl.minimum(last, own // apart // THREADS * THREADS)
    for i_group in range(first, whole, THREADS):
        o_key = (i_group + o_group) * apart + o_place
        b_product = tl.dot(b_query, tl.trans(codes(p_key, o_key, o_key >= 0, RANK, R)), out_dtype=tl.int32)
        b_more = tl.where(i_group + o_thread > 0, counts_for, 0.0)[None, :]
        b_sum, b_max = _add_peaks(b_sum, b_max, b_product, unit, b_more)
    for i_group in range(tl.maximum(first, whole), last, THREADS):
        o_key = (i_group + o_group) * apart + o_place
        b_product = tl.dot(b_query, tl.trans(codes(p_key, o_key, o_key < own, RANK, R)), out_dtype=tl.int32)
        b_more = tl.where(i_group + o_thread > 0, counts_for, 0.0)[None, :]
        b_sum, b_max = _add_peaks(b_sum, b_max, tl.where((o_key < own)[None, :], b_product, -NEVER), unit, b_more)
    if there & (i_part == tl.num_programs(2) - 1):
        b_position = tl.load(p_position + i_head * num_queries + o_row, mask=m_row, other=-1)[:, None]
        for i_key in range(own // PEAK_KEYS * PEAK_KEYS, tl.minimum(own + TILE, seq_len), THREADS * PEAK_KEYS):
            o_key = i_key + o_group * PEAK_KEYS + o_place
            b_product = tl.dot(b_query, tl.trans(codes(p_key, o_key, o_key < seq_len, RANK, R)), out_dtype=tl.int32)
            m_seen = (o_key[None, :] >= own) & (o_key[None, :] <= b_position)
            b_sum, b_max = _add_peaks(b_sum, b_max, tl.where(m_seen, b_product, -NEVER), unit, 0.0)
    b_most = tl.max(b_max, 1)
    b_sum = tl.sum(b_sum * tl.exp2(b_max - b_most[:, None]), 1)
    p_lse += (i_head * tl.num_programs(2) + i_part).to(tl.int64) * num_queries
    # Queries without any key get a value far below all others.
    tl.store(p_lse + o_row, b_most + tl.log2(tl.maximum(b_sum, 1e-30)), mask=m_row)


BLOCK_M, NUM_WARPS = 64, 4
"""Queries per program (fewer would not go through Hopper's tensor cores), and warps."""
GROUPS_PER_PART = 128
"""Number of sampled groups in 64K tokens."""


def most_groups(length: int) -> int:
    """Maximum number of groups that a tile samples in a sequence of this length."""
    groups = triton.cdiv(length, PEAK_KEYS.value)
    return min(groups, max(2 * LEAST_GROUPS.value, triton.cdiv(groups, MAX_GROUP_STEP.value)))
