"""The rows of one of attention's programs, and what another kernel has computed for them already.

Another kernel's output is one more key of the row's softmax: its score is the log-sum-exp, its value the output. So a
tile's loops continue where that kernel stopped, and nothing is merged afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minference_vllm.triton_kernels.physical_lists import place_of


@triton.jit
def packed_rows(
    i_item, i_part, p_tile_starts, num_tiles, LISTS: tl.constexpr, HEADS_PER_LIST: tl.constexpr, BLOCK_M: tl.constexpr
):
    """``[BLOCK_M]``: positions, places in the chunk and heads of a program's rows, and which of them are there.

    The heads of a row are packed side by side, as they lie in memory: short tiles fill a program, too.
    """
    _, i_list, i_tile = place_of(i_item, num_tiles, LISTS)
    # Positions take 32 bits: rows keep theirs in registers.
    tile_start = tl.load(p_tile_starts + i_tile).to(tl.int32)
    o_packed = i_part * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = tile_start + o_packed // HEADS_PER_LIST
    o_query = (o_row - tl.load(p_tile_starts).to(tl.int32)).to(tl.int64)
    o_head = (i_list * HEADS_PER_LIST + o_packed % HEADS_PER_LIST).to(tl.int64)
    return o_row, o_query, o_head, o_row < tl.load(p_tile_starts + i_tile + 1).to(tl.int32)


@triton.jit
def add_begun(
    b_begun_out,  # [BLOCK_M, D] what the other kernel gave
    b_begun,  # [BLOCK_M] its log-sum-exp, in powers of two; -inf: it has met no key, whatever it gave
    b_out,  # [BLOCK_M, D] float32
    b_sum,  # [BLOCK_M]
    b_max,  # [BLOCK_M]
):
    """One online-softmax step over what has been computed."""
    b_new_max = tl.maximum(b_max, b_begun)
    b_base = tl.where(b_new_max > -float("inf"), b_new_max, 0.0)
    b_decay = tl.exp2(b_max - b_base)
    b_weight = tl.exp2(b_begun - b_base)
    b_share = tl.where(b_weight[:, None] > 0, b_begun_out.to(tl.float32) * b_weight[:, None], 0.0)
    return b_out * b_decay[:, None] + b_share, b_sum * b_decay + b_weight, b_new_max


@triton.jit
def own_keys_from(own, own_from, last, tile_end):
    """Of own keys ``own`` to ``last`` those from position ``own_from`` on; none: the first is ``tile_end``.

    Returns:
        how many are left out in front; the first; the last, before the first where there is none.
    """
    some = own_from < tile_end
    skipped = tl.where(some, tl.maximum(own_from - own, 0), 0)
    first = tl.where(some, own + skipped, tile_end)
    return skipped, first, tl.maximum(last, first - 1)


@triton.jit
def past_skipped(first, o_entry, num_left, skipped, CONTINUES: tl.constexpr):
    """``[n]``: of entries ``first + o_entry`` of a tile's list of keys, which lists its own after ``num_left`` others,
    the places after ``first``: the skipped ones are left out."""
    if CONTINUES:
        o_entry += tl.where(first + o_entry < num_left, 0, skipped)
    return o_entry
