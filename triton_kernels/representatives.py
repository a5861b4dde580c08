"""Representative queries of tiles (``selection.representatives``), quantized, straight from the chunk's queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection import representatives
from minference_vllm.selection.projection import Projection, QuantizedQK
from minference_vllm.triton_kernels.chunk_queries import constants, load_projection, load_rows, quantized, units
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.fit import orthonormal, padded_start
from minference_vllm.triton_kernels.key_codes import precise_dot
from minference_vllm.triton_kernels.launch import launcher

SPREAD, LEAST_SIZE = tl.constexpr(representatives.SPREAD), tl.constexpr(representatives.LEAST_SIZE)
ITERATIONS = tl.constexpr(representatives.ITERATIONS)
WIDE = tl.constexpr(16)
"""Directions come in so many columns, as ``tl.dot`` wants."""


@triton.jit
def _low_rows(
    p_query, p_to_query, i_slot, stride_row, begin, end, i_row, factor, HEAD_SIZE: tl.constexpr, D: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Queries ``begin + i_row`` and on of a tile in few dimensions, ``[BLOCK_M, R]``, and which are there."""
    o_row = begin + i_row + tl.arange(0, BLOCK_M)
    m_row = o_row < end
    b_query = load_rows(p_query, stride_row, o_row, m_row, HEAD_SIZE, D)
    return precise_dot(b_query, load_projection(p_to_query, i_slot, HEAD_SIZE, D, RANK, R)) * factor, m_row


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_tiles"])
def representatives_kernel(
    p_query, p_heads, p_to_query, p_key_size, p_start, p_codes, p_scale, stride_row, stride_head, context_len, seq_len,
    num_tiles, factor, HEAD_SIZE: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: the ``2 * DIRECTIONS + 2`` representatives of one tile of one head.

    ``p_to_query`` is float32 ``[h, HEAD_SIZE, RANK]``, ``p_key_size`` float32 ``[h, RANK]``, ``p_start`` float32
    ``[R, WIDE]``; ``p_codes`` int8 ``[h, T * count, RANK]``, ``p_scale`` int16 ``[h, T * count]``.
    """
    i_tile, i_slot = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    o_rank, o_wide = tl.arange(0, R), tl.arange(0, WIDE)
    m_rank = o_rank < RANK
    p_query += i_head * stride_head
    aligned = (context_len // TILE + i_tile) * TILE - context_len
    begin, end = tl.maximum(aligned, 0), tl.minimum(aligned + TILE, seq_len - context_len)
    b_size = tl.maximum(tl.load(p_key_size + i_slot * RANK + o_rank, mask=m_rank, other=1.0), LEAST_SIZE)
    # Rows that are not there are zeros, and add nothing.
    b_sum = tl.zeros([R], dtype=tl.float32)
    for i_row in range(0, TILE, BLOCK_M):
        b_low, m_row = _low_rows(
            p_query, p_to_query, i_slot, stride_row, begin, end, i_row, factor, HEAD_SIZE, D, RANK, R, BLOCK_M
        )  # fmt: skip
        b_sum += tl.sum(b_low, 0)
    b_mean = b_sum / (end - begin)
    b_moment = tl.zeros([R, R], dtype=tl.float32)
    b_unlike, farthest = b_mean, -1.0
    for i_row in range(0, TILE, BLOCK_M):
        b_low, m_row = _low_rows(
            p_query, p_to_query, i_slot, stride_row, begin, end, i_row, factor, HEAD_SIZE, D, RANK, R, BLOCK_M
        )  # fmt: skip
        b_apart = tl.where(m_row[:, None], (b_low - b_mean[None, :]) * b_size[None, :], 0.0)
        # A thousandth of a variance changes no representative; more precision would spill registers.
        b_moment = tl.dot(tl.trans(b_apart), b_apart, b_moment, input_precision="tf32")
        b_distance = tl.where(m_row, tl.sum(b_apart * b_apart, 1), -1.0)
        found = tl.max(b_distance, 0)
        m_best = (tl.arange(0, BLOCK_M) == tl.argmax(b_distance, 0))[:, None]
        b_unlike = tl.where(found > farthest, tl.sum(tl.where(m_best, b_low, 0.0), 0), b_unlike)
        farthest = tl.maximum(farthest, found)
    b_moment = b_moment / (end - begin)
    b_vectors = tl.load(p_start + o_rank[:, None] * WIDE + o_wide[None, :])
    for _ in range(ITERATIONS):
        b_vectors = tl.dot(b_moment, b_vectors, input_precision="tf32x3")
        b_vectors, _ = orthonormal(b_vectors, b_vectors, DIRECTIONS, WIDE)
    b_variance = tl.sum(b_vectors * tl.dot(b_moment, b_vectors, input_precision="tf32x3"), 0)
    b_deviation = b_vectors * (tl.sqrt(tl.maximum(b_variance, 0.0)) * SPREAD)[None, :] / b_size[:, None]
    b_deviation = tl.where((o_wide < DIRECTIONS)[None, :], b_deviation, 0.0)
    # A last column without a deviation stands for the mean, and for the row most unlike it.
    b_away = tl.trans(b_deviation)
    m_last = (o_wide == DIRECTIONS)[:, None]
    b_plus, b_minus = b_mean[None, :] + b_away, tl.where(m_last, b_unlike[None, :], b_mean[None, :] - b_away)
    b_unit = tl.zeros([WIDE], dtype=tl.float32) + tl.max(tl.maximum(units(b_plus), units(b_minus)), 0)
    b_plus, b_scale = quantized(b_plus, b_unit)
    b_minus, b_scale = quantized(b_minus, b_unit)
    COUNT: tl.constexpr = 2 * DIRECTIONS + 2
    o_first = (i_slot * num_tiles + i_tile).to(tl.int64) * COUNT
    o_plus = o_first + tl.where(o_wide == DIRECTIONS, 0, 1 + o_wide)
    o_minus = o_first + DIRECTIONS + 1 + o_wide
    m_slot = o_wide <= DIRECTIONS
    m_codes = m_slot[:, None] & m_rank[None, :]
    tl.store(p_codes + o_plus[:, None] * RANK + o_rank[None, :], b_plus, mask=m_codes)
    tl.store(p_codes + o_minus[:, None] * RANK + o_rank[None, :], b_minus, mask=m_codes)
    tl.store(p_scale + o_plus, b_scale, mask=m_slot)
    tl.store(p_scale + o_minus, b_scale, mask=m_slot)


NUM_STAGES = 2


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
        count: even, at most 32.
    """
    head_size, rank, directions = query.shape[2], projection.to_query.shape[2], (count - 2) // 2
    rows = tiling.num_tiles * count
    codes = torch.empty(len(heads), rows, rank, dtype=torch.int8, device=query.device)
    scale = torch.empty(len(heads), rows, dtype=torch.int16, device=query.device)
    shape = constants(head_size, rank) | {"num_stages": NUM_STAGES}
    launcher(representatives_kernel, (tiling.num_tiles, len(heads)))(
        query, on_device(heads, query), projection.to_query.contiguous(), projection.key_size.contiguous(),
        padded_start((rank, directions), (shape["R"], WIDE.value), query.device), codes, scale, query.stride(0),
        query.stride(1), tiling.context_len, tiling.seq_len, tiling.num_tiles, factor, TILE=tiling.tile,
        DIRECTIONS=directions, **shape,
    )  # fmt: skip
    return QuantizedQK(codes, keys, scale, count)
