"""The score bins of ``low_rank``, from the representatives of tiles.

Representatives are ordered so that those of one tile are in one thread (``in_thread.py``). Tiles whose representatives
do not suffice are scored one by one, by all their queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minference_vllm.triton_kernels.approx_lse import bits, codes
from minference_vllm.triton_kernels.in_thread import THREADS, max_in_thread, place_of, thread_of
from minference_vllm.triton_kernels.tile_bins import LOCAL_BIN, as_bins, below, bins_of_tile


@triton.jit
def _best_bins(b_product, b_below, b_bits, TILES: tl.constexpr):
    """The bin of the largest of each tile's products, see ``as_bins``: ``[BLOCK_N, TILES]``."""
    return as_bins(max_in_thread(b_product - b_below[None, :], TILES // THREADS).to(tl.float32) * b_bits[None, :])


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_tiles", "num_parts", "window"])
def representative_bins_kernel(
    p_query, p_count, p_key, p_scale, p_lse, p_bins, stride_bins, context_len, seq_len, num_tiles, num_parts, window,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, PER_TILE: tl.constexpr, COUNT: tl.constexpr,
    TILES: tl.constexpr, STRIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS_ALONE: tl.constexpr,
):  # fmt: skip
    """One program: the bins of STRIP keys for TILES tiles of one head with up to COUNT representatives each; at least
    four tiles and two representatives. Then, one after the other, for those tiles that have more.

    Work per key, such as loading it, is shared by all of those tiles. ``p_count`` is int32 and ``p_scale`` int16
    ``[h, T]``, ``p_lse`` float32 ``[h, num_parts, T * PER_TILE]``, ``p_bins`` uint8 ``[h, T, stride_bins]``.
    """
    i_strip, i_group, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_column, o_tile = tl.arange(0, TILES * COUNT), i_group * TILES + tl.arange(0, TILES)
    # All representatives of a tile are in one thread.
    o_their_tile = i_group * TILES + place_of(o_column) // COUNT * THREADS + thread_of(o_column)
    o_place, num_queries = place_of(o_column) % COUNT, num_tiles * PER_TILE
    o_query = o_their_tile * PER_TILE + o_place
    p_count += i_head * num_tiles
    m_query = o_place < tl.load(p_count + o_their_tile, mask=o_their_tile < num_tiles, other=0)
    # The other tiles are scored below.
    m_tile = (o_tile < num_tiles) & (tl.load(p_count + o_tile, mask=o_tile < num_tiles, other=0) <= COUNT)
    p_query += i_head.to(tl.int64) * num_queries * RANK
    p_key += i_head.to(tl.int64) * seq_len * RANK
    b_query = tl.trans(codes(p_query, o_query, m_query, RANK, R))
    p_scale += i_head * num_tiles
    b_bits = bits(p_scale, o_tile, m_tile)
    p_lse += i_head.to(tl.int64) * num_parts * num_queries
    b_below = below(p_lse, o_query, m_query, bits(p_scale, o_their_tile, m_query), num_queries, num_parts)
    b_own = ((context_len // TILE + o_tile) * TILE)[None, :]
    b_first = tl.where(window > 0, tl.maximum(b_own, context_len) - window + 1, 0)
    first_tile = i_head.to(tl.int64) * num_tiles
    o_bins = ((first_tile + o_tile) * stride_bins)[None, :]
    begin = i_strip * STRIP
    stop = tl.where(tl.max(m_tile.to(tl.int32), 0) > 0, tl.minimum(begin + STRIP, seq_len), begin)
    # Keys before all of those tiles, if there is no window.
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

    for i_tile in range(i_group * TILES, tl.minimum((i_group + 1) * TILES, num_tiles)):
        count = tl.load(p_count + i_tile)
        if count > COUNT:
            bins_of_tile(
                p_query, p_key, p_lse, p_bins + (first_tile + i_tile) * stride_bins, bits(p_scale, i_tile, True),
                count, i_tile, begin, begin + STRIP, context_len, seq_len, num_tiles, num_parts, window, RANK, R, TILE,
                PER_TILE, BLOCK_M, KEYS_ALONE,
            )  # fmt: skip


QUERIES, STRIP, BLOCK_N = 128, 2048, 128
"""Representatives and keys per program, and keys per step."""
