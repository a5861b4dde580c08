"""The attention of ``low_rank``'s calibration rows by bin, straight from paged keys and values of any strides.

Nothing of the size rows x context is stored: scores are computed twice, once for what each row's shares sum to, and
once for their sums by bin. Those are whole numbers, whose sums do not depend on the order of atomic additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.tiling import Tiling
from minference_vllm.triton_kernels.attention import LOG2E, compute_type
from minference_vllm.triton_kernels.column_diagonal import add_scores, combined, on_device
from minference_vllm.triton_kernels.launch import launcher

ROWS = tl.constexpr(128)
"""Of one program."""
UNITS = tl.constexpr(1 << 30)
"""Of a row's attention: a share of 1."""
LEAST_NORM, LARGEST_NORM = tl.constexpr(1e-20), tl.constexpr(1e20)
"""See ``measured_rows.by_value``."""


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["seq_len"])
def value_norms_kernel(
    p_value, p_pages, p_norm, stride_value_page, stride_value_head, stride_value_slot, seq_len, HEAD_SIZE: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: the logarithms of the norms of KEYS values of one KV head, in powers of two.

    ``p_norm`` is float32 ``[HK, S]``.
    """
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    o_dim, o_position = tl.arange(0, D), i_block * KEYS + tl.arange(0, KEYS)
    m_key = o_position < seq_len
    b_page = tl.load(p_pages + o_position // PAGE, mask=m_key, other=0).to(tl.int64)
    o_value = (
        i_head.to(tl.int64) * stride_value_head + b_page * stride_value_page + o_position % PAGE * stride_value_slot
    )
    m_tile = m_key[:, None] & (o_dim < HEAD_SIZE)[None, :]
    b_value = tl.load(p_value + o_value[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_norm = tl.minimum(tl.maximum(tl.sqrt(tl.sum(b_value * b_value, 1)), LEAST_NORM), LARGEST_NORM)
    tl.store(p_norm + i_head.to(tl.int64) * seq_len + o_position, tl.log2(b_norm), mask=m_key)


@triton.jit
def _keys_and_norms(
    b_position, p_key, p_norm, p_pages, o_key_head, stride_key_page, stride_key_slot, seq_len, HEAD_SIZE: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Keys ``[BLOCK_N, D]``, and the logarithms of the norms of their values, ``[BLOCK_N]``."""
    o_dim = tl.arange(0, D)
    m_key = b_position < seq_len
    m_tile = m_key[:, None] & (o_dim < HEAD_SIZE)[None, :]
    b_page = tl.load(p_pages + b_position // PAGE, mask=m_key, other=0).to(tl.int64)
    o_key = o_key_head + b_page * stride_key_page + b_position % PAGE * stride_key_slot
    b_key = tl.load(p_key + o_key[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(COMPUTE)
    return b_key, tl.load(p_norm + b_position, mask=m_key, other=0.0)


@triton.jit
def _rows_of(p_query, p_rows, num_rows, stride_query_row, HEAD_SIZE: tl.constexpr, D: tl.constexpr,
             COMPUTE: tl.constexpr):  # fmt: skip
    """ROWS of one head's rows, ``[ROWS, D]``, and where they lie in the chunk, ``[ROWS]``; the first one fills up."""
    o_slot, o_dim = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    o_row = tl.load(p_rows + tl.where(o_slot < num_rows, o_slot, 0))
    o_query = o_row[:, None] * stride_query_row + o_dim[None, :]
    return tl.load(p_query + o_query, mask=(o_dim < HEAD_SIZE)[None, :], other=0.0).to(COMPUTE), o_row


@triton.jit
def _log_shares(
    b_query, o_row, b_key, b_norm, b_position, context_len, seq_len, window, scale_log2, softcap_log2,
    WITH_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of keys in the rows' attention times the norms of their values, not yet normalised, in powers of two; -inf where
    a row does not see a key: ``[ROWS, BLOCK_N]``."""
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2
    if WITH_SOFTCAP:
        # As in the attention kernel: the scale is the one of tanh's exponential.
        b_score = softcap_log2 * (1.0 - 2.0 / (tl.exp2(b_score) + 1.0))
    o_seen = context_len + o_row[:, None]
    m_score = (b_position < seq_len)[None, :] & (b_position[None, :] <= o_seen)
    m_score = m_score & (b_position[None, :] > o_seen - window)
    return tl.where(m_score, b_score + b_norm[None, :], -float("inf"))


@triton.jit(do_not_specialize=["context_len", "seq_len", "window", "num_rows"])
def share_sum_kernel(
    p_query, p_key, p_norm, p_pages, p_heads, p_rows, p_sum, stride_query_row, stride_query_head, stride_key_page,
    stride_key_head, stride_key_slot, context_len, seq_len, window, num_rows, keys_per_part, scale_log2, softcap_log2,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    WITH_SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the logarithm of what the shares of ROWS rows sum to over one part of the keys, one head.

    ``p_rows`` is int64 ``[h, num_rows]``, ``p_sum`` float32 ``[h, parts, num_rows]``, in powers of two.
    """
    i_slot, i_part = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    p_norm += i_head // GROUP * seq_len
    b_query, o_row = _rows_of(
        p_query + i_head * stride_query_head, p_rows + i_slot * num_rows, num_rows, stride_query_row, HEAD_SIZE, D,
        COMPUTE,
    )  # fmt: skip
    b_sum = tl.zeros([ROWS], dtype=tl.float32)
    b_max = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    first = i_part * keys_per_part
    for i_key in range(first, tl.minimum(first + keys_per_part, seq_len), BLOCK_N):
        b_position = i_key + tl.arange(0, BLOCK_N)
        b_key, b_norm = _keys_and_norms(
            b_position, p_key, p_norm, p_pages, i_head // GROUP * stride_key_head, stride_key_page, stride_key_slot,
            seq_len, HEAD_SIZE, D, PAGE, COMPUTE,
        )  # fmt: skip
        b_share = _log_shares(
            b_query, o_row, b_key, b_norm, b_position, context_len, seq_len, window, scale_log2, softcap_log2,
            WITH_SOFTCAP, PRECISION,
        )  # fmt: skip
        b_sum, b_max = add_scores(b_sum, b_max, b_share)
    o_slot = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    p_sum += (i_slot * tl.num_programs(1) + i_part) * num_rows
    tl.store(p_sum + o_slot, b_max + tl.log2(b_sum), mask=o_slot < num_rows)


@triton.jit(do_not_specialize=["context_len", "seq_len", "window", "num_rows", "num_tiles", "num_parts"])
def share_by_bin_kernel(
    p_query, p_key, p_norm, p_pages, p_heads, p_rows, p_sum, p_bins, p_mass, stride_query_row, stride_query_head,
    stride_key_page, stride_key_head, stride_key_slot, context_len, seq_len, window, num_rows, keys_per_part,
    scale_log2, softcap_log2, num_tiles, num_parts,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    WITH_SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: the shares of one part of the keys, one head, added by the bins of the rows' tiles.

    ``p_sum`` is float32 ``[h, num_parts, num_rows]``, ``p_bins`` uint8 ``[h, T, S]``, ``p_mass`` int32
    ``[h, num_rows, 256]``.
    """
    i_slot, i_part = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    p_norm += i_head // GROUP * seq_len
    o_slot = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    m_slot = o_slot < num_rows
    b_query, o_row = _rows_of(
        p_query + i_head * stride_query_head, p_rows + i_slot * num_rows, num_rows, stride_query_row, HEAD_SIZE, D,
        COMPUTE,
    )  # fmt: skip
    b_total = combined(p_sum + i_slot * num_parts * num_rows + o_slot, num_rows, num_parts, m_slot)
    b_total = tl.where(m_slot, b_total, 0.0)
    b_tile = (context_len + o_row) // TILE - context_len // TILE
    o_bins = (i_slot * num_tiles + b_tile).to(tl.int64) * seq_len
    p_mass += i_slot * num_rows * 256
    first = i_part * keys_per_part
    for i_key in range(first, tl.minimum(first + keys_per_part, seq_len), BLOCK_N):
        b_position = i_key + tl.arange(0, BLOCK_N)
        b_key, b_norm = _keys_and_norms(
            b_position, p_key, p_norm, p_pages, i_head // GROUP * stride_key_head, stride_key_page, stride_key_slot,
            seq_len, HEAD_SIZE, D, PAGE, COMPUTE,
        )  # fmt: skip
        b_share = _log_shares(
            b_query, o_row, b_key, b_norm, b_position, context_len, seq_len, window, scale_log2, softcap_log2,
            WITH_SOFTCAP, PRECISION,
        )  # fmt: skip
        b_units = (tl.exp2(b_share - b_total[:, None]) * UNITS + 0.5).to(tl.int32)
        m_units = (b_units > 0) & m_slot[:, None]
        b_bin = tl.load(p_bins + o_bins[:, None] + b_position[None, :], mask=m_units, other=0).to(tl.int32)
        tl.atomic_add(p_mass + o_slot[:, None] * 256 + b_bin, b_units, mask=m_units, sem="relaxed")


KEYS_PER_PART, BLOCK_N, NUM_WARPS = 4096, 32, 8
KEYS = 64
"""Values of one program."""


def constants(inputs: Inputs) -> dict[str, Any]:
    """Constants that both kernels share."""
    compute, precision = compute_type(inputs.query.dtype)
    return {
        "GROUP": inputs.group,
        "HEAD_SIZE": inputs.cache.head_size,
        "D": max(16, triton.next_power_of_2(inputs.cache.head_size)),
        "PAGE": inputs.cache.block_size,
        "BLOCK_N": BLOCK_N,
        "WITH_SOFTCAP": inputs.softcap > 0,
        "COMPUTE": compute,
        "PRECISION": precision,
        "num_warps": NUM_WARPS,
    }


def value_norms(inputs: Inputs) -> torch.Tensor:
    """float32 ``[HK, S]``: logarithms of the norms of all values, in powers of two, up to one summand for all.

    Args:
        inputs: with a cache of layout ``rows``, elements of a head side by side.
    """
    cache, seq_len, shape = inputs.cache, inputs.chunk.seq_len, constants(inputs)
    norms = torch.empty(cache.num_kv_heads, seq_len, device=inputs.pages.device)
    launcher(value_norms_kernel, (triton.cdiv(seq_len, KEYS), cache.num_kv_heads))(
        cache.value, inputs.pages, norms, *cache.value.stride()[:3], seq_len, HEAD_SIZE=shape["HEAD_SIZE"],
        D=shape["D"], PAGE=shape["PAGE"], KEYS=KEYS, num_warps=4,
    )  # fmt: skip
    return norms


def mass_by_bin(
    inputs: Inputs,
    query: torch.Tensor,
    heads: Sequence[int],
    rows: torch.Tensor,
    tiling: Tiling,
    bins: torch.Tensor,
    norms: torch.Tensor,
) -> torch.Tensor:
    """``score_bins.mass_by_bin`` of some rows' shares (``measured_rows.by_value``) at the bins of their tiles. Equal
    inputs give equal results, and nothing waits for the GPU.

    Args:
        inputs: with a cache of layout ``rows``, elements of a head side by side.
        query: ``[chunk, H, D]``, elements of a head side by side.
        heads: query heads.
        rows: int64 ``[h, R]``, rows of the chunk.
        bins: uint8 ``[h, T, S]``.
        norms: see ``value_norms``.

    Returns:
        int32 ``[h, R, 256]``, in ``UNITS``.
    """
    cache, chunk, device = inputs.cache, inputs.chunk, query.device
    parts = triton.cdiv(chunk.seq_len, KEYS_PER_PART)
    shape, num_rows = constants(inputs), rows.shape[1]
    grid = len(heads), parts, triton.cdiv(num_rows, ROWS.value)
    strides = query.stride(0), query.stride(1), *cache.key.stride()[:3]
    scale_log2 = inputs.scale * cache.key_scale * LOG2E.value
    softcap_log2 = inputs.softcap * LOG2E.value
    if inputs.softcap:
        scale_log2 = 2 * scale_log2 / inputs.softcap
    scalars = chunk.context_len, chunk.seq_len, inputs.window or chunk.seq_len, num_rows, KEYS_PER_PART
    tensors = query, cache.key, norms, inputs.pages, on_device(heads, query), rows.contiguous()
    sums = torch.empty(len(heads), parts, num_rows, device=device)
    launcher(share_sum_kernel, grid)(*tensors, sums, *strides, *scalars, scale_log2, softcap_log2, **shape)
    mass = torch.zeros(*rows.shape, 256, dtype=torch.int32, device=device)
    launcher(share_by_bin_kernel, grid)(
        *tensors, sums, bins, mass, *strides, *scalars, scale_log2, softcap_log2, tiling.num_tiles, parts,
        TILE=tiling.tile, **shape,
    )  # fmt: skip
    return mass
