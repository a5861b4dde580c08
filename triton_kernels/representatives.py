"""Representative queries of tiles (``selection.tile_queries``), quantized, straight from the chunk's queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection import tile_queries
from minference_vllm.selection.projection import Projection, QuantizedQK
from minference_vllm.triton_kernels.chunk_queries import (
    constants,
    load_projection,
    load_rows,
    quantized,
    units,
    unwritten,
)
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.key_codes import precise_dot
from minference_vllm.triton_kernels.launch import launcher

LEAST_SIZE = tl.constexpr(tile_queries.LEAST_SIZE)


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_tiles"])
def representatives_kernel(
    p_query, p_heads, p_to_query, p_key_size, p_codes, p_position, p_scale, stride_row, stride_head, context_len,
    seq_len, num_tiles, factor, HEAD_SIZE: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: the COUNT representatives of one tile of one head, among one in STEP of its rows, BLOCK_M at most.

    ``p_to_query`` is float32 ``[h, HEAD_SIZE, RANK]``, ``p_key_size`` float32 ``[h, RANK]``; ``p_codes`` int8
    ``[h, T * COUNT, RANK]``, ``p_position`` int32 ``[h, T * COUNT]``, ``p_scale`` int16 ``[h, T]``.
    """
    i_tile, i_slot = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    o_rank, o_place, o_count = tl.arange(0, R), tl.arange(0, BLOCK_M), tl.arange(0, COUNT)
    m_rank = o_rank < RANK
    aligned = (context_len // TILE + i_tile) * TILE - context_len
    begin, end = tl.maximum(aligned, 0), tl.minimum(aligned + TILE, seq_len - context_len)
    o_row = begin + o_place * STEP
    m_row = (o_row < end) & (o_place * STEP < TILE)
    b_query = load_rows(p_query + i_head * stride_head, stride_row, o_row, m_row, HEAD_SIZE, D)
    b_low = precise_dot(b_query, load_projection(p_to_query, i_slot, HEAD_SIZE, D, RANK, R)) * factor
    b_size = tl.maximum(tl.load(p_key_size + i_slot * RANK + o_rank, mask=m_rank, other=1.0), LEAST_SIZE)
    b_unit = units(b_low)
    # Rows that are not there are zeros, and farthest from none.
    b_apart = b_low * b_size[None, :]
    b_away = b_apart - (tl.sum(b_apart, 0) / tl.sum(m_row.to(tl.float32), 0))[None, :]
    b_farthest = tl.where(m_row, tl.sum(b_away * b_away, 1), -1.0)
    b_distance = tl.where(m_row, float("inf"), -1.0)
    b_order = tl.full([BLOCK_M], COUNT, dtype=tl.int32)
    b_again = tl.zeros([COUNT], dtype=tl.int32)
    for i in range(COUNT):
        m_taken = o_place == tl.argmax(b_farthest, 0).to(tl.int32)
        # Where there are no more, one is taken again.
        again = tl.sum((m_taken & (b_order < COUNT)).to(tl.int32), 0)
        b_again = tl.where(o_count == i, again, b_again)
        b_order = tl.where(m_taken, tl.minimum(b_order, i), b_order)
        b_away = b_apart - tl.sum(tl.where(m_taken[:, None], b_apart, 0.0), 0)[None, :]
        b_distance = tl.minimum(b_distance, tl.sum(b_away * b_away, 1))
        b_farthest = b_distance
    # One unit for all of them: products are compared as whole numbers.
    unit = tl.max(tl.where(b_order < COUNT, b_unit, 0.0), 0)
    b_code, scale = quantized(b_low, unit)
    o_first = (i_slot * num_tiles + i_tile).to(tl.int64) * COUNT
    o_code, o_again = o_first + b_order, o_first + o_count
    m_code, m_again = (b_order < COUNT)[:, None] & m_rank[None, :], (b_again > 0)[:, None] & m_rank[None, :]
    tl.store(p_codes + o_code[:, None] * RANK + o_rank[None, :], b_code, mask=m_code)
    b_first = tl.sum(tl.where((b_order == 0)[:, None], b_code.to(tl.int32), 0), 0).to(tl.int8)
    b_first = tl.broadcast_to(b_first[None, :], [COUNT, R])
    tl.store(p_codes + o_again[:, None] * RANK + o_rank[None, :], b_first, mask=m_again)
    b_position = (context_len + o_row).to(tl.int32)
    first = tl.sum(tl.where(b_order == 0, b_position, 0), 0)
    tl.store(p_position + o_code, b_position, mask=b_order < COUNT)
    tl.store(p_position + o_again, tl.zeros([COUNT], dtype=tl.int32) + first, mask=b_again > 0)
    tl.store(p_scale + i_slot * num_tiles + i_tile, scale)


def launch_shape(head_size: int, rank: int, tile: int, count: int) -> dict[str, int]:
    """Constants of the kernel."""
    step = tile_queries.candidate_step(tile)
    block_m = max(16, triton.next_power_of_2(triton.cdiv(tile, step)))
    return constants(head_size, rank) | {"TILE": tile, "STEP": step, "COUNT": count, "BLOCK_M": block_m}


def representative_codes(
    query: torch.Tensor,
    heads: Sequence[int],
    projection: Projection,
    factor: float,
    keys: torch.Tensor,
    tiling: Tiling,
    count: int,
) -> QuantizedQK:
    """``count`` representatives of every tile, times ``factor``, quantized.

    Args:
        query: ``[chunk, H, D]``, elements of a head side by side.
        heads: those that the projection is for.
        keys: int8 ``[h, S, r]``, to go with them.
        count: a power of two.
    """
    found = unwritten(len(heads), tiling, count, keys)
    launcher(representatives_kernel, (tiling.num_tiles, len(heads)))(
        query, on_device(heads, query), projection.to_query.contiguous(), projection.key_size.contiguous(), found.query,
        found.position, found.dequant_scale, query.stride(0), query.stride(1), tiling.context_len, tiling.seq_len,
        tiling.num_tiles, factor, **launch_shape(query.shape[2], keys.shape[2], tiling.tile, count),
    )  # fmt: skip
    return found
