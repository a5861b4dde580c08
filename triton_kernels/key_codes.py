"""Keys in few dimensions, quantized, straight from the pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from minference_vllm.core.inputs import Inputs
from minference_vllm.selection import projection
from minference_vllm.selection.projection import Projection
from minference_vllm.triton_kernels.attention import compute_type
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.launch import launcher

MAX_KEY = tl.constexpr(projection.MAX_KEY)
MAX_KEY_NORM = tl.constexpr(projection.MAX_KEY_NORM)


@triton.jit
def precise_dot(b_rows, b_matrix):
    """Products of rows ``[M, D]`` with a float32 matrix ``[D, R]``, as precise as in float32. Rows of 16 bits use
    tensor cores."""
    if b_rows.dtype == tl.float32:
        b_product = tl.dot(b_rows, b_matrix, input_precision="ieee")
    else:
        b_high = b_matrix.to(b_rows.dtype)
        b_low = (b_matrix - b_high.to(tl.float32)).to(b_rows.dtype)
        b_product = tl.dot(b_rows, b_low)
        b_product = tl.dot(b_rows, b_high, b_product)
    return b_product


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["seq_len"])
def key_codes_kernel(
    p_key, p_pages, p_heads, p_mean, p_to_key, p_codes, stride_key_page, stride_key_head, stride_key_slot, seq_len,
    key_scale, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, RANK: tl.constexpr,
    R: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys for one query head.

    ``p_mean`` is float32 ``[h, HEAD_SIZE]``, the mean key, ``p_to_key`` float32 ``[h, HEAD_SIZE, RANK]``,
    ``p_codes`` int8 ``[h, S, RANK]``.
    """
    i_block, i_slot = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot)
    o_dim, o_rank = tl.arange(0, D), tl.arange(0, R)
    m_dim, m_rank = o_dim < HEAD_SIZE, o_rank < RANK
    o_position = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_key = o_position < seq_len
    b_page = tl.load(p_pages + o_position // PAGE, mask=m_key, other=0).to(tl.int64)
    o_key = (i_head // GROUP).to(tl.int64) * stride_key_head + b_page * stride_key_page
    o_key += o_position % PAGE * stride_key_slot
    m_tile = m_key[:, None] & m_dim[None, :]
    b_key = tl.load(p_key + o_key[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(COMPUTE)
    b_mean = tl.load(p_mean + i_slot * HEAD_SIZE + o_dim, mask=m_dim, other=0.0)
    o_to_key = (i_slot * HEAD_SIZE + o_dim)[:, None] * RANK + o_rank[None, :]
    b_to_key = tl.load(p_to_key + o_to_key, mask=m_dim[:, None] & m_rank[None, :], other=0.0)
    b_low = precise_dot(b_key, b_to_key) * key_scale - tl.sum(b_mean[:, None] * b_to_key, 0)[None, :]
    b_norm = tl.sqrt(tl.sum(b_low * b_low, 1))
    b_low = b_low / (tl.maximum(b_norm, MAX_KEY_NORM) / MAX_KEY_NORM)[:, None]
    b_code = tl.minimum(tl.maximum(tl.floor(b_low + 0.5), -MAX_KEY), MAX_KEY)
    o_code = (i_slot.to(tl.int64) * seq_len + o_position)[:, None] * RANK + o_rank[None, :]
    tl.store(p_codes + o_code, b_code.to(tl.int8), mask=m_key[:, None] & m_rank[None, :])


BLOCK_N, NUM_WARPS = 64, 4


def constants(group: int, head_size: int, block_size: int, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "GROUP": group,
        "COMPUTE": compute_type(dtype)[0],
        "HEAD_SIZE": head_size,
        "D": max(16, triton.next_power_of_2(head_size)),
        "PAGE": block_size,
        "RANK": rank,
        "R": triton.next_power_of_2(rank),
        "BLOCK_N": BLOCK_N,
        "num_warps": NUM_WARPS,
    }


def key_codes(inputs: Inputs, heads: Sequence[int], projection: Projection) -> torch.Tensor:
    """``projection.quantize_keys`` of all keys of some query heads.

    Args:
        inputs: with a cache of layout ``rows``, contiguous along ``D``.
        heads: the heads of ``projection``.

    Returns:
        int8 ``[h, S, r]``. Elements half way between two integers are rounded up.
    """
    cache, seq_len = inputs.cache, inputs.chunk.seq_len
    rank = projection.to_key.shape[2]
    codes = torch.empty(len(heads), seq_len, rank, dtype=torch.int8, device=inputs.pages.device)
    launcher(key_codes_kernel, (triton.cdiv(seq_len, BLOCK_N), len(heads)))(
        cache.key, inputs.pages, on_device(heads, inputs.query), projection.mean, projection.to_key.contiguous(),
        codes, *cache.key.stride()[:3], seq_len, cache.key_scale,
        **constants(inputs.group, cache.head_size, cache.block_size, rank, inputs.query.dtype),
    )  # fmt: skip
    return codes
