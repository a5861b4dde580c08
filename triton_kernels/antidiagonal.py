"""``selection.antidiagonal.antidiagonal_scores`` straight from paged keys of any strides.

The squares' logits are computed twice, once for the log-sum-exp of each row of squares and once for the sums over tiles
and blocks, and never stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.antidiagonal import squares_per_block
from minference_vllm.triton_kernels.attention import LN2, LOG2E, compute_type
from minference_vllm.triton_kernels.column_diagonal import add_scores, on_device
from minference_vllm.triton_kernels.launch import launcher


@triton.jit
def _logits(
    o_row,  # [BLOCK_R] first row of each square, relative to the chunk; may lie outside of it
    b_position,  # [BLOCK_C] first position of each square of keys
    m_square,  # [BLOCK_C] which of them are valid
    p_query,
    p_key,
    p_pages,
    stride_query_row,
    stride_key_page,
    stride_key_slot,
    context_len,
    seq_len,
    scale_log2,
    STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Mean base-2 logits of the squares' antidiagonals, -inf for future and invalid keys: ``[BLOCK_R, BLOCK_C]``."""
    b_page = tl.load(p_pages + b_position // PAGE, mask=m_square, other=0).to(tl.int64)
    p_keys = p_key + b_page * stride_key_page + (b_position % PAGE) * stride_key_slot
    p_rows = p_query + o_row.to(tl.int64) * stride_query_row
    b_logit = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for i_step in range(STRIDE * D // BLOCK_D):
        i_row = i_step * BLOCK_D // D
        i_key = STRIDE - 1 - i_row
        o_dim = i_step * BLOCK_D % D + tl.arange(0, BLOCK_D)
        m_row = (o_row + i_row >= 0) & (o_row + i_row < seq_len - context_len)
        m_key = m_square & (b_position + i_key < seq_len)
        m_dim = (o_dim < HEAD_SIZE)[None, :]
        p_row, p_slot = p_rows + i_row * stride_query_row, p_keys + i_key * stride_key_slot
        b_query = tl.load(p_row[:, None] + o_dim[None, :], mask=m_row[:, None] & m_dim, other=0.0).to(COMPUTE)
        b_key = tl.load(p_slot[:, None] + o_dim[None, :], mask=m_key[:, None] & m_dim, other=0.0).to(COMPUTE)
        b_logit = tl.dot(b_query, tl.trans(b_key), b_logit, input_precision=PRECISION)
    m_logit = m_square[None, :] & (b_position[None, :] <= context_len + o_row[:, None])
    return tl.where(m_logit, b_logit * scale_log2, -float("inf"))


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["context_len", "seq_len"])
def square_lse_kernel(
    p_query,
    p_key,
    p_pages,
    p_heads,
    p_lse,
    stride_query_row,
    stride_query_head,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    context_len,
    seq_len,
    scale_log2,
    squares_per_part,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: base-2 log-sum-exp of BLOCK_R rows of squares over one part of the keys, for one head.

    ``p_lse`` is float32 ``[heads, parts, R]``, for the ``R`` rows of squares that contain rows of the chunk.
    """
    i_block, i_slot, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_head = tl.load(p_heads + i_slot)
    p_query += i_head.to(tl.int64) * stride_query_head
    p_key += (i_head // GROUP).to(tl.int64) * stride_key_head
    first, end = context_len // STRIDE, tl.cdiv(seq_len, STRIDE)
    o_square = first + i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    # Squares after that of the last row lie in the future of all rows.
    begin = i_part * squares_per_part
    stop = tl.minimum(tl.minimum(begin + squares_per_part, end), first + (i_block + 1) * BLOCK_R)
    b_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    b_max = tl.full([BLOCK_R], -float("inf"), dtype=tl.float32)
    for i_square in range(begin, stop, BLOCK_C):
        o_key = i_square + tl.arange(0, BLOCK_C)
        b_logit = _logits(
            o_square * STRIDE - context_len, o_key * STRIDE, o_key < stop, p_query, p_key, p_pages, stride_query_row,
            stride_key_page, stride_key_slot, context_len, seq_len, scale_log2, STRIDE, HEAD_SIZE, D, PAGE, BLOCK_R,
            BLOCK_C, BLOCK_D, COMPUTE, PRECISION,
        )  # fmt: skip
        b_sum, b_max = add_scores(b_sum, b_max, b_logit)
    p_lse += (i_slot * tl.num_programs(2) + i_part).to(tl.int64) * (end - first) - first
    tl.store(p_lse + o_square, b_max + tl.log2(b_sum), mask=o_square < end)


@triton.jit(do_not_specialize=["context_len", "seq_len", "num_tiles", "num_blocks"])
def square_mass_kernel(
    p_query,
    p_key,
    p_pages,
    p_heads,
    p_lse,
    p_scores,
    stride_query_row,
    stride_query_head,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    context_len,
    seq_len,
    scale_log2,
    num_tiles,
    num_blocks,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    PAGE_SLOTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the mass of some tiles on some blocks of one head, ``p_scores`` float32 ``[heads, T, N]``.

    Every tile gets TILE_SLOTS of the BLOCK_R rows and every block PAGE_SLOTS of the BLOCK_C columns, both powers of
    two. A tile or block with more squares takes several steps. Each sum therefore has one writer.
    """
    TILES: tl.constexpr = BLOCK_R // TILE_SLOTS
    BLOCKS: tl.constexpr = BLOCK_C // PAGE_SLOTS
    i_tile, i_slot, i_block = tl.program_id(0) * TILES, tl.program_id(1), tl.program_id(2) * BLOCKS
    i_head = tl.load(p_heads + i_slot)
    p_query += i_head.to(tl.int64) * stride_query_head
    p_key += (i_head // GROUP).to(tl.int64) * stride_key_head
    first, end = context_len // STRIDE, tl.cdiv(seq_len, STRIDE)
    p_lse += i_slot.to(tl.int64) * (end - first) - first
    first_tile = context_len // TILE
    # Blocks that no row of the tiles reaches keep a score of zero.
    if i_block * PAGE < (first_tile + i_tile + TILES) * TILE:
        o_tile_slot, o_block_slot = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
        b_mass = tl.zeros([TILES, BLOCKS], dtype=tl.float32)
        for i_down in range(0, TILE // STRIDE, TILE_SLOTS):
            o_down = i_down + o_tile_slot % TILE_SLOTS
            o_square = (first_tile + i_tile + o_tile_slot // TILE_SLOTS) * (TILE // STRIDE) + o_down
            m_row = (o_down < TILE // STRIDE) & (o_square >= first) & (o_square < end)
            # Invalid rows get a weight of zero.
            b_lse = tl.load(p_lse + o_square, mask=m_row, other=float("inf"))
            for i_across in range(0, PAGE // STRIDE, PAGE_SLOTS):
                o_across = i_across + o_block_slot % PAGE_SLOTS
                b_position = (i_block + o_block_slot // PAGE_SLOTS) * PAGE + o_across * STRIDE
                m_square = (o_across < PAGE // STRIDE) & (b_position < seq_len)
                b_logit = _logits(
                    o_square * STRIDE - context_len, b_position, m_square, p_query, p_key, p_pages, stride_query_row,
                    stride_key_page, stride_key_slot, context_len, seq_len, scale_log2, STRIDE, HEAD_SIZE, D, PAGE,
                    BLOCK_R, BLOCK_C, BLOCK_D, COMPUTE, PRECISION,
                )  # fmt: skip
                b_weight = tl.exp2(b_logit - b_lse[:, None])
                b_weight = tl.reshape(b_weight, [TILES, TILE_SLOTS, BLOCKS, PAGE_SLOTS])
                b_mass += tl.sum(tl.sum(b_weight, 3), 1)
        o_tile, o_block = i_tile + tl.arange(0, TILES), i_block + tl.arange(0, BLOCKS)
        o_begin = (first_tile + o_tile) * (TILE // STRIDE)
        b_count = tl.minimum(o_begin + TILE // STRIDE, end) - tl.maximum(o_begin, first)
        o_score = (i_slot * num_tiles + o_tile).to(tl.int64)[:, None] * num_blocks + o_block[None, :]
        m_score = (o_tile < num_tiles)[:, None] & (o_block < num_blocks)[None, :]
        tl.store(p_scores + o_score, b_mass / b_count[:, None], mask=m_score)


BLOCK_R, BLOCK_C, BLOCK_D_BYTES, NUM_WARPS = 128, 64, 128, 8
SQUARES_PER_PART = 2048
"""Squares along the keys in one part of a row's log-sum-exp."""


def mass_slots(tile: int, block_size: int, stride: int) -> dict[str, int]:
    """``square_mass_kernel``'s rows per tile and columns per block."""
    return {
        "TILE_SLOTS": min(BLOCK_R, triton.next_power_of_2(tile // stride)),
        "PAGE_SLOTS": min(BLOCK_C, triton.next_power_of_2(block_size // stride)),
    }


def antidiagonal_scores(
    query: torch.Tensor,
    cache: PagedCache,
    pages: torch.Tensor,
    heads: Sequence[int],
    tiling: Tiling,
    stride: int,
    scale: float,
) -> torch.Tensor:
    """``selection.antidiagonal.antidiagonal_scores`` straight from the pages.

    Args:
        query: ``[chunk, H, D]``, contiguous along ``D``.
        cache: layout ``rows``, contiguous along ``D``.
        pages: int64 ``[N]``, contiguous.
        heads: query heads wanted, in any order.
        stride: divides the block size.

    Returns:
        float32 ``[len(heads), T, N]``.
    """
    squares_per_block(tiling.block_size, stride)
    device, wanted = query.device, on_device(heads, query)
    compute, precision = compute_type(query.dtype)
    block_d = min(BLOCK_D_BYTES // query.element_size(), max(16, triton.next_power_of_2(cache.head_size)))
    strides = query.stride(0), query.stride(1), *cache.key.stride()[:3]
    numbers = tiling.context_len, tiling.seq_len, scale / stride * cache.key_scale * LOG2E.value
    shape = {
        "GROUP": query.shape[1] // cache.num_kv_heads,
        "STRIDE": stride,
        "HEAD_SIZE": cache.head_size,
        "D": triton.cdiv(cache.head_size, block_d) * block_d,
        "PAGE": cache.block_size,
        "BLOCK_R": BLOCK_R,
        "BLOCK_C": BLOCK_C,
        "BLOCK_D": block_d,
        "COMPUTE": compute,
        "PRECISION": precision,
        "num_warps": NUM_WARPS,
    }
    squares = triton.cdiv(tiling.seq_len, stride)
    rows, parts = squares - tiling.context_len // stride, triton.cdiv(squares, SQUARES_PER_PART)
    lse = torch.empty(len(heads), parts, rows, device=device)
    launcher(square_lse_kernel, (triton.cdiv(rows, BLOCK_R), len(heads), parts))(
        query, cache.key, pages, wanted, lse, *strides, *numbers, SQUARES_PER_PART, **shape
    )
    total = lse.mul_(LN2.value).logsumexp(1).div_(LN2.value)
    slots = mass_slots(tiling.tile, tiling.block_size, stride)
    scores = torch.zeros(len(heads), tiling.num_tiles, tiling.num_key_blocks, device=device)
    tiles, blocks = BLOCK_R // slots["TILE_SLOTS"], BLOCK_C // slots["PAGE_SLOTS"]
    grid = triton.cdiv(tiling.num_tiles, tiles), len(heads), triton.cdiv(tiling.num_key_blocks, blocks)
    launcher(square_mass_kernel, grid)(
        query, cache.key, pages, wanted, total, scores, *strides, *numbers, tiling.num_tiles, tiling.num_key_blocks,
        TILE=tiling.tile, **slots, **shape,
    )  # fmt: skip
    return scores
