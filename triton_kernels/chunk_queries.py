"""A chunk's queries in few dimensions, and how unlike each is to the others, without copies in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minference_vllm.selection.projection import Projection
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.key_codes import precise_dot
from minference_vllm.triton_kernels.launch import launcher


@triton.jit
def _load(p_query, stride_row, i_block, chunk, HEAD_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of one head, ``[BLOCK_M, D]``, where they lie in the chunk, and which are there."""
    o_row, o_dim = i_block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    m_row = o_row < chunk
    o_query = o_row.to(tl.int64)[:, None] * stride_row + o_dim[None, :]
    m_tile = m_row[:, None] & (o_dim < HEAD_SIZE)[None, :]
    return tl.load(p_query + o_query, mask=m_tile, other=0.0), o_row, m_row


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["chunk"])
def distance_kernel(
    p_query, p_heads, p_mean, p_distance, stride_row, stride_head, chunk, HEAD_SIZE: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: squared distances of BLOCK_M queries from their head's mean query.

    ``p_mean`` is float32 ``[H, HEAD_SIZE]``, ``p_distance`` float32 ``[h, chunk]``.
    """
    i_block, i_slot = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    o_dim = tl.arange(0, D)
    b_query, o_row, m_row = _load(p_query + i_head * stride_head, stride_row, i_block, chunk, HEAD_SIZE, D, BLOCK_M)
    b_mean = tl.load(p_mean + i_head * HEAD_SIZE + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
    b_apart = b_query.to(tl.float32) - b_mean[None, :]
    tl.store(p_distance + i_slot.to(tl.int64) * chunk + o_row, tl.sum(b_apart * b_apart, 1), mask=m_row)


@triton.jit(do_not_specialize=["chunk"])
def project_kernel(
    p_query, p_heads, p_to_query, p_low, stride_row, stride_head, chunk, factor, HEAD_SIZE: tl.constexpr,
    D: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head in RANK dimensions.

    ``p_to_query`` is float32 ``[h, HEAD_SIZE, RANK]``, ``p_low`` float32 ``[h, chunk, RANK]``.
    """
    i_block, i_slot = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    o_dim, o_rank = tl.arange(0, D), tl.arange(0, R)
    b_query, o_row, m_row = _load(p_query + i_head * stride_head, stride_row, i_block, chunk, HEAD_SIZE, D, BLOCK_M)
    o_to_query = (i_slot * HEAD_SIZE + o_dim)[:, None] * RANK + o_rank[None, :]
    m_to_query = (o_dim < HEAD_SIZE)[:, None] & (o_rank < RANK)[None, :]
    b_to_query = tl.load(p_to_query + o_to_query, mask=m_to_query, other=0.0)
    b_low = precise_dot(b_query, b_to_query) * factor
    o_low = (i_slot.to(tl.int64) * chunk + o_row)[:, None] * RANK + o_rank[None, :]
    tl.store(p_low + o_low, b_low, mask=m_row[:, None] & (o_rank < RANK)[None, :])


BLOCK_M, NUM_WARPS = 64, 4


def constants(head_size: int, rank: int = 0) -> dict[str, int]:
    """Of either kernel."""
    shape = {"HEAD_SIZE": head_size, "D": max(16, triton.next_power_of_2(head_size)), "BLOCK_M": BLOCK_M}
    return shape | ({"RANK": rank, "R": triton.next_power_of_2(rank)} if rank else {}) | {"num_warps": NUM_WARPS}


def distances(query: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """float32 ``[h, chunk]``: squared distance of each query from its head's mean query.

    Args:
        query: ``[chunk, H, D]``, elements of a head side by side.
    """
    chunk, _, head_size = query.shape
    mean = query.mean(0, dtype=torch.float32)
    found = torch.empty(len(heads), chunk, device=query.device)
    launcher(distance_kernel, (triton.cdiv(chunk, BLOCK_M), len(heads)))(
        query, on_device(heads, query), mean, found, query.stride(0), query.stride(1), chunk, **constants(head_size)
    )
    return found


def project(query: torch.Tensor, heads: Sequence[int], projection: Projection, factor: float) -> torch.Tensor:
    """float32 ``[h, chunk, r]``: queries in few dimensions, times ``factor``; see ``projection.project_queries``.

    Args:
        query: ``[chunk, H, D]``, elements of a head side by side.
        heads: those that the projection is for.
    """
    chunk, _, head_size = query.shape
    rank = projection.to_query.shape[2]
    low = torch.empty(len(heads), chunk, rank, device=query.device)
    launcher(project_kernel, (triton.cdiv(chunk, BLOCK_M), len(heads)))(
        query, on_device(heads, query), projection.to_query.contiguous(), low, query.stride(0), query.stride(1), chunk,
        factor, **constants(head_size, rank),
    )  # fmt: skip
    return low
