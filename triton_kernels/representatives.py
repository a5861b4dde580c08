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

LEAST_SIZE, LEAST_APART = tl.constexpr(tile_queries.LEAST_SIZE), tl.constexpr(tile_queries.LEAST_APART)
ALIKE = tl.constexpr(tile_queries.ALIKE)


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_tiles"])
def representatives_kernel(
    p_query, p_heads, p_to_query, p_key_size, p_codes, p_position, p_count, p_scale, stride_row, stride_head,
    context_len, seq_len, num_tiles, factor, HEAD_SIZE: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr,
    R: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, PER_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: COUNT representatives of one tile of one head among every STEP-th of its rows, at most PER_TILE; or
    all of those rows.

    ``p_to_query`` is float32 ``[h, HEAD_SIZE, RANK]``, ``p_key_size`` float32 ``[h, RANK]``; ``p_codes`` int8
    ``[h, T * PER_TILE, RANK]``, ``p_position`` int32 ``[h, T * PER_TILE]``, ``p_count`` int32 and ``p_scale`` int16
    ``[h, T]``.
    """
    i_tile, i_slot = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    o_rank, o_place = tl.arange(0, R), tl.arange(0, BLOCK_M)
    aligned = (context_len // TILE + i_tile) * TILE - context_len
    begin, end = tl.maximum(aligned, 0), tl.minimum(aligned + TILE, seq_len - context_len)
    o_row = begin + o_place * STEP
    m_row = (o_row < end) & (o_place < PER_TILE)
    b_query = load_rows(p_query + i_head * stride_head, stride_row, o_row, m_row, HEAD_SIZE, D)
    b_low = precise_dot(b_query, load_projection(p_to_query, i_slot, HEAD_SIZE, D, RANK, R)) * factor
    b_size = tl.maximum(tl.load(p_key_size + i_slot * RANK + o_rank, mask=o_rank < RANK, other=1.0), LEAST_SIZE)
    b_unit = units(b_low)
    # Invalid rows are zeros, and never the farthest.
    b_apart = b_low * b_size[None, :]
    b_away = b_apart - (tl.sum(b_apart, 0) / tl.sum(m_row.to(tl.float32), 0))[None, :]
    # One row is taken even if all are equal.
    b_farthest = tl.where(m_row, tl.sum(b_away * b_away, 1) + LEAST_APART, -1.0)
    b_distance = tl.where(m_row, float("inf"), -1.0)
    b_order = tl.full([BLOCK_M], PER_TILE, dtype=tl.int32)
    found = 0
    for _ in range(COUNT):
        m_taken = o_place == tl.argmax(b_farthest, 0).to(tl.int32)
        new = (tl.max(b_farthest, 0) > 0).to(tl.int32)
        b_order = tl.where(m_taken, tl.where(new > 0, found, b_order), b_order)
        found += new
        b_away = b_apart - tl.sum(tl.where(m_taken[:, None], b_apart, 0.0), 0)[None, :]
        b_distance = tl.minimum(b_distance, tl.sum(b_away * b_away, 1))
        b_farthest = b_distance
    b_all = tl.where(m_row, o_place, PER_TILE)
    b_order = tl.where(tl.max(b_distance, 0) > ALIKE * ALIKE, b_all, b_order)
    m_found = b_order < PER_TILE
    # One unit for all of them, since products are compared as integers.
    b_code, scale = quantized(b_low, tl.max(tl.where(m_found, b_unit, 0.0), 0))
    i_out = i_slot * num_tiles + i_tile
    o_code = i_out.to(tl.int64) * PER_TILE + b_order
    m_code = m_found[:, None] & (o_rank < RANK)[None, :]
    tl.store(p_codes + o_code[:, None] * RANK + o_rank[None, :], b_code, mask=m_code)
    tl.store(p_position + o_code, (context_len + o_row).to(tl.int32), mask=m_found)
    tl.store(p_count + i_out, tl.maximum(tl.sum(m_found.to(tl.int32), 0), 1))
    tl.store(p_scale + i_out, scale)


def launch_shape(head_size: int, rank: int, tile: int, count: int) -> dict[str, int]:
    """Constants of the kernel."""
    per_tile = tile_queries.num_candidates(tile)
    block_m = max(16, triton.next_power_of_2(per_tile))
    shape = {"TILE": tile, "STEP": tile_queries.candidate_step(tile), "COUNT": count, "PER_TILE": per_tile}
    return constants(head_size, rank) | shape | {"BLOCK_M": block_m}


def representative_codes(
    query: torch.Tensor,
    heads: Sequence[int],
    projection: Projection,
    factor: float,
    keys: torch.Tensor,
    tiling: Tiling,
    count: int,
) -> QuantizedQK:
    """``tile_queries.representatives`` of every tile, times ``factor``, quantized.

    Args:
        query: ``[chunk, H, D]``, contiguous along ``D``.
        heads: the heads of ``projection``.
        keys: int8 ``[h, S, r]``, for the result.
        count: maximum number of representatives of each tile, where they suffice.
    """
    found = unwritten(len(heads), tiling, tile_queries.num_candidates(tiling.tile), keys)
    launcher(representatives_kernel, (tiling.num_tiles, len(heads)))(
        query, on_device(heads, query), projection.to_query.contiguous(), projection.key_size.contiguous(), found.query,
        found.position, found.count, found.dequant_scale, query.stride(0), query.stride(1), tiling.context_len,
        tiling.seq_len, tiling.num_tiles, factor, **launch_shape(query.shape[2], keys.shape[2], tiling.tile, count),
    )  # fmt: skip
    return found
