"""The rows of one attention program, and how it continues what another kernel has computed for them.

Another kernel's output is one more key of the row's softmax: its score is the log-sum-exp, its value the output. A
tile's loops therefore continue where that kernel stopped, and nothing is merged afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minference_vllm.triton_kernels.physical_lists import place_of


@triton.jit
def packed_rows(
    i_item, i_part, p_tile_starts, num_tiles, LISTS: tl.constexpr, HEADS_PER_LIST: tl.constexpr, BLOCK_M: tl.constexpr
):
    """``[BLOCK_M]``: positions, places in the chunk and heads of a program's rows, and which rows are valid.

    The heads of a row are packed next to each other, as in memory, so that short tiles fill a program, too.
    """
    _, i_list, i_tile = place_of(i_item, num_tiles, LISTS)
    # Positions have 32 bits, since rows keep theirs in registers.
    tile_start = tl.load(p_tile_starts + i_tile).to(tl.int32)
    o_packed = i_part * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = tile_start + o_packed // HEADS_PER_LIST
    o_query = (o_row - tl.load(p_tile_starts).to(tl.int32)).to(tl.int64)
    o_head = (i_list * HEADS_PER_LIST + o_packed % HEADS_PER_LIST).to(tl.int64)
    return o_row, o_query, o_head, o_row < tl.load(p_tile_starts + i_tile + 1).to(tl.int32)


@triton.jit
def add_begun(
    b_begun_out,  # [BLOCK_M, D] output of the other kernel
    b_begun,  # [BLOCK_M] its base-2 log-sum-exp; -inf: it saw no key, and its output is ignored
    b_out,  # [BLOCK_M, D] float32
    b_sum,  # [BLOCK_M]
    b_max,  # [BLOCK_M]
):
    """One online-softmax step over the other kernel's result."""
    b_new_max = tl.maximum(b_max, b_begun)
    b_base = tl.where(b_new_max > -float("inf"), b_new_max, 0.0)
    b_decay = tl.exp2(b_max - b_base)
    b_weight = tl.exp2(b_begun - b_base)
    b_share = tl.where(b_weight[:, None] > 0, b_begun_out.to(tl.float32) * b_weight[:, None], 0.0)
    return b_out * b_decay[:, None] + b_share, b_sum * b_decay + b_weight, b_new_max


@triton.jit
def own_keys_from(own, own_from, last, tile_end):
    """The own keys ``own`` to ``last`` from position ``own_from`` on.

    Returns:
        The number of keys that are skipped in front; the first key, ``tile_end`` if ``own_from`` is behind the tile;
        the last key, which is before the first if there is none.
    """
    some = own_from < tile_end
    skipped = tl.where(some, tl.maximum(own_from - own, 0), 0)
    first = tl.where(some, own + skipped, tile_end)
    return skipped, first, tl.maximum(last, first - 1)


@triton.jit
def past_skipped(first, o_entry, num_left, skipped, CONTINUES: tl.constexpr):
    """``[n]``: places after ``first`` of entries ``first + o_entry`` of a tile's list of keys, without the skipped
    ones. The list has the tile's own keys after ``num_left`` others."""
    if CONTINUES:
        o_entry += tl.where(first + o_entry < num_left, 0, skipped)
    return o_entry
