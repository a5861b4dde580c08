"""A chunk's queries: the outlier rows, and all queries in few dimensions, without float32 copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection import projection
from minference_vllm.selection.measured_rows import DrawnRows
from minference_vllm.selection.projection import Projection, QuantizedQK
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.key_codes import precise_dot
from minference_vllm.triton_kernels.launch import launcher

MAX_QUERY, MAX_KEY_NORM = tl.constexpr(projection.MAX_QUERY), tl.constexpr(projection.MAX_KEY_NORM)
MIN_RANGE, MAX_PRODUCT = tl.constexpr(projection.MIN_RANGE), tl.constexpr(projection.MAX_PRODUCT)
UNITS_PER_BIT = tl.constexpr(projection.BINS_PER_BIT << 15)


@triton.jit
def load_rows(p_query, stride_row, o_row, m_row, HEAD_SIZE: tl.constexpr, D: tl.constexpr):
    """Rows of one head, ``[len(o_row), D]``; zeros where masked."""
    o_dim = tl.arange(0, D)
    o_query = o_row.to(tl.int64)[:, None] * stride_row + o_dim[None, :]
    return tl.load(p_query + o_query, mask=m_row[:, None] & (o_dim < HEAD_SIZE)[None, :], other=0.0)


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["chunk", "num_drawn", "num_unlike"])
def unlike_rows_kernel(
    p_query, p_heads, p_mean, p_drawn, p_taken, p_rows, stride_row, stride_head, chunk, num_drawn, num_unlike,
    HEAD_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: the outlier row of one of ``num_unlike`` equal parts of the chunk, whose query is farthest from its
    head's mean query; and a copy of some of the rows that are drawn for all heads.

    ``p_mean`` is float32 ``[H, HEAD_SIZE]``, ``p_drawn`` int64 ``[num_drawn]``, ``p_taken`` uint8 ``[chunk]``, 1 for
    drawn rows; ``p_rows`` int64 ``[h, num_drawn + num_unlike]``.
    """
    i_part, i_slot = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    p_rows += i_slot * (num_drawn + num_unlike)
    for i_drawn in range(i_part, num_drawn, tl.num_programs(0)):
        tl.store(p_rows + i_drawn, tl.load(p_drawn + i_drawn))
    if num_unlike > 0:
        o_dim = tl.arange(0, D)
        b_mean = tl.load(p_mean + i_head * HEAD_SIZE + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
        begin = i_part * chunk // num_unlike
        end = (i_part + 1) * chunk // num_unlike
        farthest, row = -2.0, begin
        for i_row in range(begin, end, BLOCK_M):
            o_row = i_row + tl.arange(0, BLOCK_M)
            m_row = o_row < end
            b_query = load_rows(p_query + i_head * stride_head, stride_row, o_row, m_row, HEAD_SIZE, D)
            b_apart = tl.where((o_dim < HEAD_SIZE)[None, :], b_query.to(tl.float32) - b_mean[None, :], 0.0)
            b_taken = tl.load(p_taken + o_row, mask=m_row, other=1)
            b_distance = tl.where(m_row, tl.where(b_taken > 0, -1.0, tl.sum(b_apart * b_apart, 1)), -2.0)
            found = tl.max(b_distance, 0)
            place = i_row + tl.argmax(b_distance, 0)
            row = tl.where(found > farthest, place, row)
            farthest = tl.maximum(farthest, found)
        tl.store(p_rows + num_drawn + i_part, row.to(tl.int64))


@triton.jit
def units(b_low):
    """Minimum unit of products with each of the queries ``[M, R]``, in bits."""
    b_norm = tl.sqrt(tl.sum(b_low * b_low, 1))
    b_unit = tl.maximum(b_norm * MAX_KEY_NORM, MIN_RANGE) / MAX_PRODUCT
    return tl.maximum(b_unit, tl.max(tl.abs(b_low), 1) / MAX_QUERY)


@triton.jit
def quantized(b_low, unit):
    """``projection.quantize_queries`` of a tile's ``[M, R]``: codes, and bins per unit of their products, times
    ``2 ** 15``."""
    scale = tl.ceil(unit * UNITS_PER_BIT)
    b_code = tl.floor(b_low / (scale / UNITS_PER_BIT) + 0.5)
    return b_code.to(tl.int8), tl.minimum(scale, 32767.0).to(tl.int16)


@triton.jit
def _rows_of_tile(p_query, stride_row, b_to_query, o_row, end, factor, HEAD_SIZE: tl.constexpr, D: tl.constexpr):
    """A tile's rows in few dimensions; zeros from row ``end`` on."""
    return precise_dot(load_rows(p_query, stride_row, o_row, o_row < end, HEAD_SIZE, D), b_to_query) * factor


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["context_len", "chunk", "num_tiles"])
def query_codes_kernel(
    p_query, p_heads, p_to_query, p_codes, p_position, p_count, p_scale, stride_row, stride_head, context_len, chunk,
    num_tiles, factor, HEAD_SIZE: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: the queries of one tile of one head in RANK dimensions.

    ``p_to_query`` is float32 ``[h, HEAD_SIZE, RANK]``, ``p_codes`` int8 ``[h, T * TILE, RANK]``, ``p_position`` int32
    ``[h, T * TILE]``, ``p_count`` int32 and ``p_scale`` int16 ``[h, T]``.
    """
    i_tile, i_slot = tl.program_id(0), tl.program_id(1)
    o_place, o_rank = tl.arange(0, BLOCK_M), tl.arange(0, R)
    p_query += tl.load(p_heads + i_slot).to(tl.int64) * stride_head
    aligned = (context_len // TILE + i_tile) * TILE - context_len
    first, end = tl.maximum(aligned, 0), tl.minimum(aligned + TILE, chunk)
    o_first = (i_slot * num_tiles + i_tile).to(tl.int64) * TILE
    tl.store(p_count + i_slot * num_tiles + i_tile, (end - first).to(tl.int32))
    b_to_query = load_projection(p_to_query, i_slot, HEAD_SIZE, D, RANK, R)
    unit = 0.0
    for i_down in range(0, TILE, BLOCK_M):
        o_row = first + i_down + o_place
        b_low = _rows_of_tile(p_query, stride_row, b_to_query, o_row, end, factor, HEAD_SIZE, D)
        unit = tl.maximum(unit, tl.max(units(b_low), 0))
    for i_down in range(0, TILE, BLOCK_M):
        o_row = first + i_down + o_place
        b_low = _rows_of_tile(p_query, stride_row, b_to_query, o_row, end, factor, HEAD_SIZE, D)
        o_out, m_out = o_first + i_down + o_place, o_row < end
        b_code, scale = quantized(b_low, unit)
        m_code = m_out[:, None] & (o_rank < RANK)[None, :]
        tl.store(p_codes + o_out[:, None] * RANK + o_rank[None, :], b_code, mask=m_code)
        tl.store(p_position + o_out, (context_len + o_row).to(tl.int32), mask=m_out)
        tl.store(p_scale + i_slot * num_tiles + i_tile, scale)


@triton.jit
def load_projection(p_matrix, i_slot, HEAD_SIZE: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr):
    """One head's float32 ``[D, R]`` of ``[h, HEAD_SIZE, RANK]``, padded with zeros."""
    o_dim, o_rank = tl.arange(0, D), tl.arange(0, R)
    o_matrix = (i_slot * HEAD_SIZE + o_dim)[:, None] * RANK + o_rank[None, :]
    return tl.load(p_matrix + o_matrix, mask=(o_dim < HEAD_SIZE)[:, None] & (o_rank < RANK)[None, :], other=0.0)


BLOCK_M, NUM_WARPS = 64, 4


def constants(head_size: int, rank: int = 0) -> dict[str, int]:
    """Constants of either kernel."""
    shape = {"HEAD_SIZE": head_size, "D": max(16, triton.next_power_of_2(head_size)), "BLOCK_M": BLOCK_M}
    return shape | ({"RANK": rank, "R": triton.next_power_of_2(rank)} if rank else {}) | {"num_warps": NUM_WARPS}


def measured_rows(query: torch.Tensor, heads: Sequence[int], drawn: DrawnRows) -> torch.Tensor:
    """int64 ``[h, R]``: the rows of ``measured_rows.calibration_rows``, the drawn ones first.

    Args:
        query: ``[chunk, H, D]``, contiguous along ``D``.
    """
    chunk, _, head_size = query.shape
    mean = query.mean(0, dtype=torch.float32)
    rows = torch.empty(len(heads), len(drawn.rows) + drawn.unlike, dtype=torch.int64, device=query.device)
    launcher(unlike_rows_kernel, (max(1, drawn.unlike), len(heads)))(
        query, on_device(heads, query), mean, drawn.rows, drawn.taken, rows, query.stride(0), query.stride(1), chunk,
        len(drawn.rows), drawn.unlike, **constants(head_size),
    )  # fmt: skip
    return rows


def unwritten(heads: int, tiling: Tiling, per_tile: int, keys: torch.Tensor) -> QuantizedQK:
    """Uninitialised ``QuantizedQK`` for ``per_tile`` queries of every tile, with int8 keys ``[h, S, r]``."""
    rows = tiling.num_tiles * per_tile
    codes = torch.empty(heads, rows, keys.shape[2], dtype=torch.int8, device=keys.device)
    position = torch.empty(heads, rows, dtype=torch.int32, device=keys.device)
    count, scale = (position.new_empty(heads, tiling.num_tiles, dtype=dtype) for dtype in (torch.int32, torch.int16))
    return QuantizedQK(codes, position, count, keys, scale)


def query_codes(
    query: torch.Tensor,
    heads: Sequence[int],
    projection: Projection,
    factor: float,
    keys: torch.Tensor,
    tiling: Tiling,
) -> QuantizedQK:
    """All queries of every tile in few dimensions times ``factor``, quantized: ``projection.project_queries``,
    ``tile_queries.all_rows`` and ``projection.quantize_queries``.

    Args:
        query: ``[chunk, H, D]``, contiguous along ``D``.
        heads: the heads of ``projection``.
        keys: int8 ``[h, S, r]``, for the result.
    """
    chunk, _, head_size = query.shape
    tiles, found = tiling.num_tiles, unwritten(len(heads), tiling, tiling.tile, keys)
    launcher(query_codes_kernel, (tiles, len(heads)))(
        query, on_device(heads, query), projection.to_query.contiguous(), found.query, found.position,
        found.count, found.dequant_scale, query.stride(0), query.stride(1), tiling.context_len, chunk, tiles, factor,
        TILE=tiling.tile, **constants(head_size, keys.shape[2]),
    )  # fmt: skip
    return found
