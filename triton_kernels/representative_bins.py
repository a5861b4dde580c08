"""The score bins of ``low_rank``, of the representatives of tiles.

Products are whole numbers, in one unit for all representatives of a tile, and stay so until the best is known: per
product a subtraction and a maximum. Queries and keys come in an order in which those that are compared meet in one
thread (``in_thread.py``).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from minference_vllm.selection import projection, score_bins
from minference_vllm.triton_kernels.column_diagonal import combined
from minference_vllm.triton_kernels.in_thread import THREADS, max_in_thread, place_of, thread_of

PEAK_KEYS = tl.constexpr(score_bins.PEAK_KEYS)
SAMPLED_GROUPS = tl.constexpr(score_bins.SAMPLED_GROUPS)
LOG2_SAMPLED = tl.constexpr(math.log2(score_bins.SAMPLED_GROUPS))
BINS_PER_BIT = tl.constexpr(projection.BINS_PER_BIT)
TOP_BIN, LOCAL_BIN = tl.constexpr(score_bins.TOP_BIN), tl.constexpr(score_bins.LOCAL_BIN)
BITS_PER_SCALE = tl.constexpr(1.0 / (projection.BINS_PER_BIT << 15))
NEVER = tl.constexpr(1 << 30)
"""More than any product."""


@triton.jit
def codes(p_rows, o_row, m_row, RANK: tl.constexpr, R: tl.constexpr):
    """Rows of RANK bytes that lie one behind the other, zeros where there are none: int8 ``[len(o_row), R]``."""
    o_dim = tl.arange(0, R)
    m_code = m_row[:, None] if RANK == R else (m_row[:, None] & (o_dim < RANK)[None, :])
    return tl.load(p_rows + o_row[:, None] * RANK + o_dim[None, :], mask=m_code, other=0)


@triton.jit
def bits(p_scale, o_row, m_row):
    """What products of rows count for, in bits."""
    return tl.load(p_scale + o_row, mask=m_row, other=1).to(tl.float32) * BITS_PER_SCALE


@triton.jit
def as_bins(b_best):
    """``score_bins.as_bins``, float32; to be cut off after the point."""
    return tl.minimum(tl.maximum(b_best * BINS_PER_BIT + TOP_BIN, 0.0), TOP_BIN) + 0.5


@triton.jit
def _add_peaks(b_sum, b_max, b_product, b_bits, b_more):
    """A running sum of weights and their maximum, ``[M, 4]`` each, with the largest of each thread's products, ``[M,
    N]``, added: times ``b_bits``, and ``b_more`` on top."""
    b_peak = max_in_thread(b_product, 1).to(tl.float32) * b_bits + b_more
    b_new_max = tl.maximum(b_max, b_peak)
    return b_sum * tl.exp2(b_max - b_new_max) + tl.exp2(b_peak - b_new_max), b_new_max


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_queries"])
def representative_lse_kernel(
    p_query, p_key, p_scale, p_lse, context_len, seq_len, num_queries, groups_per_part, RANK: tl.constexpr,
    R: tl.constexpr, TILE: tl.constexpr, PER_TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: ``score_bins.sampled_lse`` over one part of the sampled groups, for BLOCK_M representatives of one
    head; the last part has the tiles' own keys, too.

    Each thread has a group of its own, four at a time. ``p_lse`` is float32 ``[h, parts, num_queries]``. Parts are
    multiples of four groups.
    """
    i_block, i_head, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_row, o_column = i_block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, THREADS * PEAK_KEYS)
    o_group, o_place, o_thread = thread_of(o_column), place_of(o_column), tl.arange(0, THREADS)
    m_row = o_row < num_queries
    p_key += i_head.to(tl.int64) * seq_len * RANK
    b_query = codes(p_query + i_head.to(tl.int64) * num_queries * RANK, o_row, m_row, RANK, R)
    b_bits = bits(p_scale + i_head.to(tl.int64) * num_queries, o_row, m_row)[:, None]
    b_own = tl.where(m_row, (context_len // TILE + o_row // PER_TILE) * TILE, context_len // TILE * TILE)
    b_end = tl.minimum(b_own + TILE, seq_len)
    b_sum = tl.zeros([BLOCK_M, THREADS], dtype=tl.float32)
    b_max = tl.full([BLOCK_M, THREADS], -3e38, dtype=tl.float32)
    first = i_part * groups_per_part
    last = first + groups_per_part
    # The groups that come before all of those tiles, and those that come before some.
    border = tl.minimum(last, tl.min(b_own, 0) // (PEAK_KEYS * SAMPLED_GROUPS * THREADS) * THREADS)
    stop = tl.minimum(last, tl.cdiv(tl.max(b_own, 0), PEAK_KEYS * SAMPLED_GROUPS))
    for i_group in range(first, border, THREADS):
        o_key = (i_group + o_group) * (PEAK_KEYS * SAMPLED_GROUPS) + o_place
        b_product = tl.dot(b_query, tl.trans(codes(p_key, o_key, o_key >= 0, RANK, R)), out_dtype=tl.int32)
        b_more = tl.where(i_group + o_thread > 0, LOG2_SAMPLED, 0.0)[None, :]
        b_sum, b_max = _add_peaks(b_sum, b_max, b_product, b_bits, b_more)
    for i_group in range(tl.maximum(first, border), stop, THREADS):
        o_key = (i_group + o_group) * (PEAK_KEYS * SAMPLED_GROUPS) + o_place
        b_product = tl.dot(b_query, tl.trans(codes(p_key, o_key, o_key < seq_len, RANK, R)), out_dtype=tl.int32)
        b_product = tl.where(o_key[None, :] < b_own[:, None], b_product, -NEVER)
        b_more = tl.where(i_group + o_thread > 0, LOG2_SAMPLED, 0.0)[None, :]
        b_sum, b_max = _add_peaks(b_sum, b_max, b_product, b_bits, b_more)
    if i_part == tl.num_programs(2) - 1:
        first_own = tl.min(b_own, 0) // (THREADS * PEAK_KEYS) * (THREADS * PEAK_KEYS)
        for i_key in range(first_own, tl.max(b_end, 0), THREADS * PEAK_KEYS):
            o_key = i_key + o_group * PEAK_KEYS + o_place
            b_product = tl.dot(b_query, tl.trans(codes(p_key, o_key, o_key < seq_len, RANK, R)), out_dtype=tl.int32)
            m_own = (o_key[None, :] >= b_own[:, None]) & (o_key[None, :] < b_end[:, None])
            b_sum, b_max = _add_peaks(b_sum, b_max, tl.where(m_own, b_product, -NEVER), b_bits, 0.0)
    b_most = tl.max(b_max, 1)
    b_sum = tl.sum(b_sum * tl.exp2(b_max - b_most[:, None]), 1)
    p_lse += (i_head * tl.num_programs(2) + i_part).to(tl.int64) * num_queries
    # What has met no key is far below what has.
    tl.store(p_lse + o_row, b_most + tl.log2(tl.maximum(b_sum, 1e-30)), mask=m_row)


@triton.jit
def _best_bins(b_product, b_below, b_bits, TILES: tl.constexpr):
    """The bin that the best of each tile's products comes to, see ``as_bins``: ``[BLOCK_N, TILES]``."""
    return as_bins(max_in_thread(b_product - b_below[None, :], TILES // THREADS).to(tl.float32) * b_bits[None, :])


@triton.jit(do_not_specialize=["context_len", "seq_len", "num_queries", "num_tiles", "num_parts", "window"])
def representative_bins_kernel(
    p_query, p_key, p_scale, p_lse, p_bins, stride_bins, context_len, seq_len, num_queries, num_tiles, num_parts,
    window, RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, PER_TILE: tl.constexpr, TILES: tl.constexpr,
    STRIP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the bins of STRIP keys for TILES tiles of one head, each of PER_TILE representatives; four tiles and
    two representatives at least.

    What is done once for every key, such as to read it, is done for all of those tiles. ``p_lse`` is float32
    ``[h, num_parts, num_queries]``, ``p_bins`` uint8 ``[h, T, stride_bins]``.
    """
    i_strip, i_group, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_column, o_tile = tl.arange(0, TILES * PER_TILE), i_group * TILES + tl.arange(0, TILES)
    # All of a tile's in one thread.
    o_their_tile = i_group * TILES + place_of(o_column) // PER_TILE * THREADS + thread_of(o_column)
    o_query = o_their_tile * PER_TILE + place_of(o_column) % PER_TILE
    m_query, m_tile = o_query < num_queries, o_tile < num_tiles
    p_key += i_head.to(tl.int64) * seq_len * RANK
    b_query = tl.trans(codes(p_query + i_head.to(tl.int64) * num_queries * RANK, o_query, m_query, RANK, R))
    p_scale += i_head.to(tl.int64) * num_queries
    b_bits = bits(p_scale, o_tile * PER_TILE, m_tile)
    p_lse += i_head.to(tl.int64) * num_parts * num_queries
    b_lse = combined(p_lse + o_query, num_queries, num_parts, m_query)
    # Rows that are not there come near no key.
    b_below = tl.where(m_query, tl.floor(b_lse / bits(p_scale, o_query, m_query) + 0.5), NEVER + 0.0)
    b_below = tl.minimum(tl.maximum(b_below, -NEVER + 0.0), NEVER + 0.0).to(tl.int32)
    b_own = ((context_len // TILE + o_tile) * TILE)[None, :]
    b_first = tl.where(window > 0, tl.maximum(b_own, context_len) - window + 1, 0)
    o_bins = ((i_head * num_tiles + o_tile).to(tl.int64) * stride_bins)[None, :]
    begin, stop = i_strip * STRIP, tl.minimum((i_strip + 1) * STRIP, seq_len)
    # The keys that come before all of those tiles, and see no window.
    first_own = (context_len // TILE + i_group * TILES) * TILE // BLOCK_N * BLOCK_N
    border = tl.where(window > 0, begin, tl.maximum(begin, tl.minimum(stop, first_own)))
    for i_key in range(begin, border, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        b_product = tl.dot(codes(p_key, o_key, o_key >= 0, RANK, R), b_query, out_dtype=tl.int32)
        b_bin = _best_bins(b_product, b_below, b_bits, TILES)
        tl.store(p_bins + o_bins + o_key[:, None], b_bin.to(tl.uint8), mask=m_tile[None, :])
    for i_key in range(border, stop, BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        b_product = tl.dot(codes(p_key, o_key, o_key < stop, RANK, R), b_query, out_dtype=tl.int32)
        b_bin = _best_bins(b_product, b_below, b_bits, TILES)
        b_position = o_key[:, None]
        b_bin = tl.where(b_position < b_own, tl.where(b_position >= b_first, b_bin, 0.0), LOCAL_BIN)
        b_bin = tl.where(b_position < b_own + TILE, b_bin, 0.0)
        tl.store(p_bins + o_bins + b_position, b_bin.to(tl.uint8), mask=m_tile[None, :] & (b_position < stop))


BLOCK_M, BLOCK_N = 64, 128
"""Representatives of one program of denominators; keys of one step of bins."""
QUERIES, GROUPS_PER_PART, STRIP = 128, 128, 2048
"""Of one program: representatives of bins, sampled groups of denominators, keys of bins."""
