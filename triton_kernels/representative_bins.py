"""The score bins of ``low_rank``, of the representatives of tiles.

Products are whole numbers, in one unit for all representatives of a tile, and stay so until the best is known: per
product a subtraction and a maximum. Representatives come in an order in which those that are compared meet in one
thread (``in_thread.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from minference_vllm.selection import projection, score_bins
from minference_vllm.triton_kernels.approx_lse import NEVER, bits, codes
from minference_vllm.triton_kernels.column_diagonal import combined
from minference_vllm.triton_kernels.in_thread import THREADS, max_in_thread, place_of, thread_of

BINS_PER_BIT = tl.constexpr(projection.BINS_PER_BIT)
TOP_BIN, LOCAL_BIN = tl.constexpr(score_bins.TOP_BIN), tl.constexpr(score_bins.LOCAL_BIN)


@triton.jit
def below(p_lse, o_query, m_query, b_bits, num_queries, num_parts):
    """What is subtracted from the products of queries, in their units: int32. Queries that are not there come near no
    key."""
    b_lse = combined(p_lse + o_query, num_queries, num_parts, m_query)
    b_below = tl.where(m_query, tl.floor(b_lse / b_bits + 0.5), NEVER + 0.0)
    return tl.minimum(tl.maximum(b_below, -NEVER + 0.0), NEVER + 0.0).to(tl.int32)


@triton.jit
def as_bins(b_best):
    """``score_bins.as_bins``, float32; to be cut off after the point."""
    return tl.minimum(tl.maximum(b_best * BINS_PER_BIT + TOP_BIN, 0.0), TOP_BIN) + 0.5


@triton.jit
def _best_bins(b_product, b_below, b_bits, TILES: tl.constexpr):
    """The bin that the best of each tile's products comes to, see ``as_bins``: ``[BLOCK_N, TILES]``."""
    return as_bins(max_in_thread(b_product - b_below[None, :], TILES // THREADS).to(tl.float32) * b_bits[None, :])


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_tiles", "num_parts", "window"])
def representative_bins_kernel(
    p_query, p_key, p_scale, p_lse, p_bins, stride_bins, context_len, seq_len, num_tiles, num_parts, window,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, PER_TILE: tl.constexpr, TILES: tl.constexpr,
    STRIP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the bins of STRIP keys for TILES tiles of one head, each of PER_TILE representatives; four tiles and
    two representatives at least.

    What is done once for every key, such as to read it, is done for all of those tiles. ``p_scale`` is int16
    ``[h, T]``, ``p_lse`` float32 ``[h, num_parts, T * PER_TILE]``, ``p_bins`` uint8 ``[h, T, stride_bins]``.
    """
    i_strip, i_group, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_column, o_tile = tl.arange(0, TILES * PER_TILE), i_group * TILES + tl.arange(0, TILES)
    # All of a tile's in one thread.
    o_their_tile = i_group * TILES + place_of(o_column) // PER_TILE * THREADS + thread_of(o_column)
    o_query = o_their_tile * PER_TILE + place_of(o_column) % PER_TILE
    num_queries = num_tiles * PER_TILE
    m_query, m_tile = o_query < num_queries, o_tile < num_tiles
    p_key += i_head.to(tl.int64) * seq_len * RANK
    b_query = tl.trans(codes(p_query + i_head.to(tl.int64) * num_queries * RANK, o_query, m_query, RANK, R))
    p_scale += i_head * num_tiles
    b_bits = bits(p_scale, o_tile, m_tile)
    p_lse += i_head.to(tl.int64) * num_parts * num_queries
    b_below = below(p_lse, o_query, m_query, bits(p_scale, o_their_tile, m_query), num_queries, num_parts)
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


QUERIES, STRIP, BLOCK_N = 128, 2048, 128
"""Of one program: representatives, and keys; keys of one step."""
