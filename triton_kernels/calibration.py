"""The attention of ``low_rank``'s calibration rows below some bins, straight from paged keys and values of any strides.

Nothing of size rows x context is stored, and scores are computed once. A histogram of 256 bins would need an atomic
addition for every row and key. Sums below a few levels stay in registers instead, and ``thresholds.py`` interpolates
between the levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.tiling import Tiling
from minference_vllm.selection import measured_rows
from minference_vllm.triton_kernels.attention import capped_log2, compute_type, scales_log2
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.in_thread import THREADS, columns_of_threads
from minference_vllm.triton_kernels.launch import launcher

ROWS = tl.constexpr(128)
"""Rows per program."""
LEVELS = tl.constexpr((110, 136, 154, 168, 180, 192, 206, 232))
"""Bins, ascending, below which shares are summed. They lie from 4 to 24 bits below a row's denominator, most densely
from 8 to 16, where most thresholds lie. Each costs two instructions for every row and key."""
NUM_LEVELS = tl.constexpr(len(LEVELS.value))
FIRST_KNOT, RAMP = tl.constexpr(136), tl.constexpr(12)
"""For sums of squares, each level is a ramp instead of a step: a bin below the ramp counts fully, one in its middle
half, and one above it not at all. The first ramp begins at ``FIRST_KNOT``, and each of the others where the one before
ends. A weighted sum of these sums therefore has a weight that falls piecewise linearly from knot to knot."""
BIN_CODE, CODE_OF_0 = tl.constexpr(0x43800000), tl.constexpr(256.0)
"""``BIN_CODE + (bin << 15)``, read as the bits of a float32, is ``CODE_OF_0`` plus the bin."""
LEAST_NORM, LARGEST_NORM = tl.constexpr(measured_rows.LEAST_NORM), tl.constexpr(measured_rows.LARGEST_NORM)


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["seq_len"])
def value_norms_kernel(
    p_value, p_pages, p_norm, stride_value_page, stride_value_head, stride_value_slot, seq_len, HEAD_SIZE: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: the base-2 logarithms of the norms of KEYS values of one KV head.

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
    i_key, p_key, p_norm, p_pages, o_key_head, stride_key_page, stride_key_slot, seq_len, HEAD_SIZE: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Keys ``[BLOCK_N, D]`` from ``i_key`` on, a multiple of BLOCK_N, and the logarithms of the norms of their values,
    ``[BLOCK_N]``. ALL: no key is past the end."""
    o_dim, b_position = tl.arange(0, D), i_key + tl.arange(0, BLOCK_N)
    m_key = tl.full([BLOCK_N], True, dtype=tl.int1) if ALL else (b_position < seq_len)
    m_tile = (o_dim < HEAD_SIZE)[None, :] if ALL else (m_key[:, None] & (o_dim < HEAD_SIZE)[None, :])
    if PAGE % BLOCK_N == 0:
        i_page = tl.load(p_pages + i_key // PAGE).to(tl.int64)
        o_first = o_key_head + i_page * stride_key_page + i_key % PAGE * stride_key_slot
        o_key = o_first + tl.arange(0, BLOCK_N) * stride_key_slot
    else:
        b_page = tl.load(p_pages + b_position // PAGE, mask=m_key, other=0).to(tl.int64)
        o_key = o_key_head + b_page * stride_key_page + b_position % PAGE * stride_key_slot
    b_key = tl.load(p_key + o_key[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(COMPUTE)
    return b_key, tl.load(p_norm + b_position, mask=m_key, other=0.0)


@triton.jit
def _rows_of(p_query, p_rows, num_rows, stride_query_row, HEAD_SIZE: tl.constexpr, D: tl.constexpr,
             COMPUTE: tl.constexpr):  # fmt: skip
    """ROWS rows of one head, ``[ROWS, D]``, and their places in the chunk, ``[ROWS]``; padded with the first row."""
    o_slot, o_dim = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    o_row = tl.load(p_rows + tl.where(o_slot < num_rows, o_slot, 0))
    o_query = o_row[:, None] * stride_query_row + o_dim[None, :]
    return tl.load(p_query + o_query, mask=(o_dim < HEAD_SIZE)[None, :], other=0.0).to(COMPUTE), o_row


@triton.jit
def _log_shares(
    b_query, b_key, b_norm, scale_log2, softcap_log2, WITH_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 logarithms of the keys' unnormalised shares (attention weight times norm of the value), as if every row
    saw every key: ``[ROWS, BLOCK_N]``."""
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    b_score = capped_log2(b_score, scale_log2, softcap_log2) if WITH_SOFTCAP else b_score * scale_log2
    return b_score + b_norm[None, :]


@triton.jit
def _added(sums, b_max, b_share, b_bin, SQUARED: tl.constexpr):
    """Add shares, given as ``_log_shares`` and bins ``[ROWS, BLOCK_N]``, to the rows' sums of all shares and of those
    below each level, and to their maximum: ``[ROWS, 4]`` each, one column per thread that holds a part of the row."""
    b_code = ((b_bin.to(tl.int32) << 15) + BIN_CODE).to(tl.float32, bitcast=True)
    shares, codes = columns_of_threads(b_share), columns_of_threads(b_code)
    b_new_max = b_max
    for i in tl.static_range(len(shares)):
        b_new_max = tl.maximum(b_new_max, shares[i])
    # A row that has seen no key yet keeps a maximum of -inf; subtracting 0 then gives shares of 0, not NaN.
    b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
    b_scale = tl.exp2(b_max - b_shift)
    found = (sums[0] * b_scale,)
    if SQUARED:
        b_scale *= b_scale
    for i_level in tl.static_range(NUM_LEVELS):
        found += (sums[i_level + 1] * b_scale,)  # type: ignore[assignment]
    for i in tl.static_range(len(shares)):
        b_one = tl.exp2(shares[i] - b_shift)
        more = (found[0] + b_one,)
        if SQUARED:
            b_one *= b_one
        for i_level in tl.static_range(NUM_LEVELS):
            # Codes are integers, so this is 1 below the level, else 0; or the ramp. A saturating addition takes one
            # instruction and a comparison two; the sum takes another.
            if SQUARED:
                b_below = (FIRST_KNOT + CODE_OF_0) / RAMP + (i_level + 1.0) - codes[i] * (1.0 / RAMP)
            else:
                b_below = (CODE_OF_0 + LEVELS[i_level]) - codes[i]
            b_below = tl.minimum(tl.maximum(b_below, 0.0), 1.0)
            more += (found[i_level + 1] + b_below * b_one,)  # type: ignore[assignment]
        found = more
    return found, b_new_max


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["context_len", "seq_len", "window", "num_rows", "num_tiles"])
def share_levels_kernel(
    p_query, p_key, p_norm, p_pages, p_heads, p_rows, p_bins, p_levels, stride_query_row, stride_query_head,
    stride_key_page, stride_key_head, stride_key_slot, context_len, seq_len, window, num_rows, keys_per_part,
    scale_log2, softcap_log2, num_tiles, stride_bins,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    WITH_SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    SQUARED: tl.constexpr,
):  # fmt: skip
    """One program: sums of the shares of ROWS rows of one head over one part of the keys: of all shares, and of those
    below each level (of their squares, if SQUARED).

    ``p_rows`` is int64 ``[h, num_rows]``, ``p_bins`` uint8 ``[h, T, S]``, ``p_levels`` float32
    ``[h, parts, 2 + NUM_LEVELS, num_rows]``: a base-2 maximum, and sums relative to it, or to its square. Parts are
    multiples of BLOCK_N.
    """
    i_slot, i_part = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    p_norm += i_head // GROUP * seq_len
    b_query, o_row = _rows_of(
        p_query + i_head * stride_query_head, p_rows + i_slot * num_rows, num_rows, stride_query_row, HEAD_SIZE, D,
        COMPUTE,
    )  # fmt: skip
    o_seen = context_len + o_row
    b_tile = o_seen // TILE - context_len // TILE
    p_tile = p_bins + (i_slot * num_tiles + b_tile).to(tl.int64) * stride_bins
    o_key_head = i_head // GROUP * stride_key_head
    sums = (tl.zeros([ROWS, THREADS], dtype=tl.float32),)
    for _ in tl.static_range(NUM_LEVELS):
        sums += (tl.zeros([ROWS, THREADS], dtype=tl.float32),)  # type: ignore[assignment]
    b_max = tl.full([ROWS, THREADS], -float("inf"), dtype=tl.float32)
    first = tl.multiple_of(i_part * keys_per_part, BLOCK_N)
    end = tl.minimum(first + keys_per_part, seq_len)
    # All rows see the keys before the border.
    border = first + tl.maximum(tl.minimum(end, tl.min(o_seen, 0).to(tl.int32) + 1) - first, 0) // BLOCK_N * BLOCK_N
    border = tl.where(tl.max(o_seen, 0) - window < first, border, first)
    for i_key in range(first, border, BLOCK_N):
        i_key = tl.multiple_of(i_key, BLOCK_N)
        b_position = i_key + tl.arange(0, BLOCK_N)
        b_key, b_norm = _keys_and_norms(
            i_key, p_key, p_norm, p_pages, o_key_head, stride_key_page, stride_key_slot, seq_len, HEAD_SIZE, D, PAGE,
            COMPUTE, BLOCK_N, True,
        )  # fmt: skip
        b_bin = tl.load(p_tile[:, None] + b_position[None, :])
        b_share = _log_shares(b_query, b_key, b_norm, scale_log2, softcap_log2, WITH_SOFTCAP, PRECISION)
        sums, b_max = _added(sums, b_max, b_share, b_bin, SQUARED)
    for i_key in range(border, end, BLOCK_N):
        i_key = tl.multiple_of(i_key, BLOCK_N)
        b_position = i_key + tl.arange(0, BLOCK_N)
        b_key, b_norm = _keys_and_norms(
            i_key, p_key, p_norm, p_pages, o_key_head, stride_key_page, stride_key_slot, seq_len, HEAD_SIZE, D, PAGE,
            COMPUTE, BLOCK_N, False,
        )  # fmt: skip
        m_key = (b_position < seq_len)[None, :] & (b_position[None, :] <= o_seen[:, None])
        m_key = m_key & (b_position[None, :] > o_seen[:, None] - window)
        b_bin = tl.load(p_tile[:, None] + b_position[None, :], mask=m_key, other=0)
        b_share = _log_shares(b_query, b_key, b_norm, scale_log2, softcap_log2, WITH_SOFTCAP, PRECISION)
        b_share = tl.where(m_key, b_share, -float("inf"))
        sums, b_max = _added(sums, b_max, b_share, b_bin, SQUARED)
    o_slot = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    m_slot = o_slot < num_rows
    p_levels += (i_slot * tl.num_programs(1) + i_part) * (NUM_LEVELS + 2) * num_rows + o_slot
    b_most = tl.max(b_max, 1)
    b_scale = tl.exp2(b_max - tl.where(b_most == -float("inf"), 0.0, b_most)[:, None])
    tl.store(p_levels, b_most, mask=m_slot)
    tl.store(p_levels + num_rows, tl.sum(sums[0] * b_scale, 1), mask=m_slot)
    if SQUARED:
        b_scale *= b_scale
    for i_level in tl.static_range(NUM_LEVELS):
        tl.store(p_levels + (i_level + 2) * num_rows, tl.sum(sums[i_level + 1] * b_scale, 1), mask=m_slot)


KEYS_PER_PART, BLOCK_N, NUM_WARPS = 4096, 64, 8
KEYS = 64
"""Values per program."""


def constants(inputs: Inputs) -> dict[str, Any]:
    """Constants of ``share_levels_kernel``, except TILE and SQUARED."""
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
    """float32 ``[HK, S]``: base-2 logarithms of the norms of all values, up to a common constant.

    Args:
        inputs: with a cache of layout ``rows``, contiguous along ``D``.
    """
    cache, seq_len, shape = inputs.cache, inputs.chunk.seq_len, constants(inputs)
    norms = torch.empty(cache.num_kv_heads, seq_len, device=inputs.pages.device)
    launcher(value_norms_kernel, (triton.cdiv(seq_len, KEYS), cache.num_kv_heads))(
        cache.value, inputs.pages, norms, *cache.value.stride()[:3], seq_len, HEAD_SIZE=shape["HEAD_SIZE"],
        D=shape["D"], PAGE=shape["PAGE"], KEYS=KEYS, num_warps=4,
    )  # fmt: skip
    return norms


def share_levels(
    inputs: Inputs,
    query: torch.Tensor,
    heads: Sequence[int],
    rows: torch.Tensor,
    tiling: Tiling,
    bins: torch.Tensor,
    norms: torch.Tensor,
    squared: bool = False,
) -> torch.Tensor:
    """Distribution of some rows' shares (``measured_rows.by_value``) over the bins of their tiles. Deterministic, and
    without a host synchronisation.

    Args:
        inputs: with a cache of layout ``rows``, contiguous along ``D``.
        query: ``[chunk, H, D]``, contiguous along ``D``.
        heads: query heads.
        rows: int64 ``[h, R]``, rows of the chunk.
        bins: uint8 ``[h, T, S]``, contiguous along ``S``.
        norms: see ``value_norms``.
        squared: sum the squares of shares, by ramps; otherwise the shares of keys whose bin is below each of
            ``LEVELS``.

    Returns:
        float32 ``[h, parts, 2 + NUM_LEVELS, R]``: for each part of the keys a base-2 maximum, the sum of all shares
        relative to it, and the sum for each level, relative to it or to its square.
    """
    cache, chunk = inputs.cache, inputs.chunk
    parts = triton.cdiv(chunk.seq_len, KEYS_PER_PART)
    shape, num_rows = constants(inputs), rows.shape[1]
    levels = torch.empty(len(heads), parts, 2 + NUM_LEVELS.value, num_rows, device=query.device)
    launcher(share_levels_kernel, (len(heads), parts, triton.cdiv(num_rows, ROWS.value)))(
        query, cache.key, norms, inputs.pages, on_device(heads, query), rows.contiguous(), bins, levels,
        query.stride(0), query.stride(1), *cache.key.stride()[:3], chunk.context_len, chunk.seq_len,
        inputs.window or chunk.seq_len, num_rows, KEYS_PER_PART, *scales_log2(inputs), tiling.num_tiles, bins.stride(1),
        TILE=tiling.tile, SQUARED=squared, **shape,
    )  # fmt: skip
    return levels
