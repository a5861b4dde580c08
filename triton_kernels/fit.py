"""``projection.fit`` for ``low_rank``, of all heads in two launches, straight from queries and pages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from minference_vllm.core.inputs import Inputs
from minference_vllm.selection import projection
from minference_vllm.selection.low_rank import FIT_SHARE, fit_step
from minference_vllm.selection.projection import Projection, start_vectors
from minference_vllm.triton_kernels.attention import compute_type
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.key_codes import precise_dot
from minference_vllm.triton_kernels.launch import launcher

ITERATIONS = tl.constexpr(projection.ITERATIONS)
NOTHING = tl.constexpr(1e-6)
"""Squared sine between a column and those before it, below which the column consists of rounding errors only."""
MAX_KEY, MAX_KEY_NORM = tl.constexpr(projection.MAX_KEY), tl.constexpr(projection.MAX_KEY_NORM)
LEAST = tl.constexpr(1e-30)
RIDGE, LEAST_VALUE = tl.constexpr(1e-6), tl.constexpr(1e-9)
"""See ``projection.fit``."""


@triton.jit
def _products(b_rows, b_columns, b_sum, PRECISION: tl.constexpr):
    return tl.dot(tl.trans(b_rows), b_columns, b_sum, input_precision=PRECISION)


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["chunk", "seq_len", "query_step", "key_step", "num_alone"])
def moments_kernel(
    p_query, p_key, p_pages, p_heads, p_alone, p_moment, p_mean, stride_query_row, stride_query_head, stride_key_page,
    stride_key_head, stride_key_slot, chunk, seq_len, query_step, key_step, num_alone, alone_share, key_scale,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns of the second moment of one head's sampled queries, or of its centred keys.

    ``p_alone``: int64 ``[h, num_alone]``, last and outlier rows, which together weigh ``alone_share`` times as much as
    the sampled ones. ``p_moment``: float32 ``[h, 2, D, D]``, of queries and of keys; ``p_mean``: float32
    ``[h, HEAD_SIZE]``, of keys.
    """
    i_block, i_kind, i_slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    o_dim, o_column = tl.arange(0, D), i_block * COLUMNS + tl.arange(0, COLUMNS)
    m_dim, m_column = o_dim < HEAD_SIZE, o_column < HEAD_SIZE
    b_moment = tl.zeros([D, COLUMNS], dtype=tl.float32)
    p_moment += (i_slot * 2 + i_kind).to(tl.int64) * D * D
    o_moment = o_dim[:, None] * D + o_column[None, :]
    if i_kind == 0:
        p_query += i_head * stride_query_head
        for i_row in range(0, num_alone, BLOCK_N):
            o_place = i_row + tl.arange(0, BLOCK_N)
            m_row = (o_place < num_alone)[:, None]
            o_row = tl.load(p_alone + i_slot * num_alone + o_place, mask=o_place < num_alone, other=0)
            o_row = o_row.to(tl.int64)[:, None] * stride_query_row
            b_rows = tl.load(p_query + o_row + o_dim[None, :], mask=m_row & m_dim[None, :], other=0.0).to(COMPUTE)
            b_columns = tl.load(p_query + o_row + o_column[None, :], mask=m_row & m_column[None, :], other=0.0)
            b_moment = _products(b_rows, b_columns.to(COMPUTE), b_moment, PRECISION)
        sampled = (chunk + query_step - 1) // query_step
        b_moment *= alone_share * sampled / tl.maximum(num_alone, 1)
        for i_row in range(0, sampled, BLOCK_N):
            o_place = i_row + tl.arange(0, BLOCK_N)
            m_row = (o_place < sampled)[:, None]
            o_row = (o_place * query_step).to(tl.int64)[:, None] * stride_query_row
            b_rows = tl.load(p_query + o_row + o_dim[None, :], mask=m_row & m_dim[None, :], other=0.0).to(COMPUTE)
            b_columns = tl.load(p_query + o_row + o_column[None, :], mask=m_row & m_column[None, :], other=0.0)
            b_moment = _products(b_rows, b_columns.to(COMPUTE), b_moment, PRECISION)
        tl.store(p_moment + o_moment, b_moment / (sampled + num_alone))
    else:
        p_key += i_head // GROUP * stride_key_head
        b_sum, b_column_sum = tl.zeros([D], dtype=tl.float32), tl.zeros([COLUMNS], dtype=tl.float32)
        sampled = (seq_len + key_step - 1) // key_step
        for i_row in range(0, sampled, BLOCK_N):
            o_place = i_row + tl.arange(0, BLOCK_N)
            o_position = o_place * key_step
            m_row = (o_place < sampled)[:, None]
            b_page = tl.load(p_pages + o_position // PAGE, mask=o_place < sampled, other=0).to(tl.int64)
            o_row = (b_page * stride_key_page + o_position % PAGE * stride_key_slot)[:, None]
            b_rows = tl.load(p_key + o_row + o_dim[None, :], mask=m_row & m_dim[None, :], other=0.0).to(COMPUTE)
            b_columns = tl.load(p_key + o_row + o_column[None, :], mask=m_row & m_column[None, :], other=0.0)
            b_columns = b_columns.to(COMPUTE)
            b_moment = _products(b_rows, b_columns, b_moment, PRECISION)
            b_sum += tl.sum(b_rows.to(tl.float32), 0)
            b_column_sum += tl.sum(b_columns.to(tl.float32), 0)
        b_mean, b_column_mean = b_sum / sampled, b_column_sum / sampled
        b_moment = b_moment / sampled - b_mean[:, None] * b_column_mean[None, :]
        tl.store(p_moment + o_moment, b_moment * key_scale * key_scale)
        tl.store(p_mean + i_slot * HEAD_SIZE + o_column, b_column_mean * key_scale, mask=m_column)


@triton.jit
def _scale(p_moment, HEAD_SIZE: tl.constexpr, D: tl.constexpr):
    """The mean eigenvalue of a moment, or 1 if it is at most LEAST."""
    mean = tl.sum(tl.load(p_moment + tl.arange(0, D) * (D + 1)), 0) / HEAD_SIZE
    return tl.where(mean > LEAST, mean, 1.0)


@triton.jit
def _times(p_moment, p_vectors, factor, D: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr):
    """A moment ``[D, D]`` times vectors ``[D, R]`` that this program has stored, times ``factor``."""
    o_dim, o_rank = tl.arange(0, D), tl.arange(0, R)
    b_product = tl.zeros([D, R], dtype=tl.float32)
    for i_dim in range(0, D, STEP):
        o_step = i_dim + tl.arange(0, STEP)
        b_moment = tl.load(p_moment + o_dim[:, None] * D + o_step[None, :])
        b_vectors = tl.load(p_vectors + o_step[:, None] * R + o_rank[None, :])
        b_product = tl.dot(b_moment * factor, b_vectors, b_product, input_precision="tf32x3")
    return b_product


@triton.jit
def _keep(p_vectors, b_vectors, D: tl.constexpr, R: tl.constexpr):
    """Store vectors ``[D, R]`` for this program's other threads."""
    tl.debug_barrier()
    tl.store(p_vectors + tl.arange(0, D)[:, None] * R + tl.arange(0, R)[None, :], b_vectors)
    tl.debug_barrier()


@triton.jit
def orthonormal(b_vectors, b_images, RANK: tl.constexpr, R: tl.constexpr):
    """``projection.orthonormal`` in float32: columns that depend linearly on those before them become zero."""
    o_rank = tl.arange(0, R)
    b_before = tl.sum(b_vectors * b_images, 0)
    for i_rank in range(RANK):
        m_rank = (o_rank == i_rank)[None, :]
        b_vector = tl.sum(tl.where(m_rank, b_vectors, 0.0), 1)
        b_image = tl.sum(tl.where(m_rank, b_images, 0.0), 1)
        before = tl.maximum(tl.sum(tl.where(o_rank == i_rank, b_before, 0.0), 0), LEAST)
        left = tl.sum(b_vector * b_image, 0)
        factor = tl.where(left >= NOTHING * before, 1.0 / tl.sqrt(tl.maximum(left, LEAST)), 0.0)
        b_vector, b_image = b_vector * factor, b_image * factor
        b_along = tl.where(o_rank > i_rank, tl.sum(b_image[:, None] * b_vectors, 0), 0.0)[None, :]
        b_vectors = tl.where(m_rank, b_vector[:, None], b_vectors - b_vector[:, None] * b_along)
        b_images = tl.where(m_rank, b_image[:, None], b_images - b_image[:, None] * b_along)
    return b_vectors, b_images


@triton.jit(do_not_specialize=["seq_len", "key_step"])
def fit_kernel(
    p_moment, p_mean, p_start, p_vectors, p_key, p_pages, p_heads, p_to_query, p_to_key, p_key_size, stride_key_page,
    stride_key_head, stride_key_slot, seq_len, key_step, key_scale, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
    BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: ``projection.fit`` and ``projection.for_int8`` of one head.

    ``p_start``: float32 ``[D, R]``; ``p_vectors``: float32 ``[h, D, R]``, workspace. ``p_to_query``, ``p_to_key``:
    float32 ``[h, HEAD_SIZE, WIDTH]``; ``p_key_size``: float32 ``[h, WIDTH]``.
    """
    i_slot = tl.program_id(0)
    i_head = tl.load(p_heads + i_slot).to(tl.int64)
    o_dim, o_rank = tl.arange(0, D), tl.arange(0, R)
    m_dim = o_dim < HEAD_SIZE
    p_queries = p_moment + i_slot.to(tl.int64) * 2 * D * D
    p_spread = p_queries + D * D
    p_vectors += i_slot.to(tl.int64) * D * R
    # Both are scaled to a mean eigenvalue of 1, so that float32 suffices below.
    of_queries, of_keys = _scale(p_queries, HEAD_SIZE, D), _scale(p_spread, HEAD_SIZE, D)
    b_start = tl.load(p_start + o_dim[:, None] * R + o_rank[None, :])
    b_images, b_vectors = tl.zeros([D, R], dtype=tl.float32), tl.zeros([D, R], dtype=tl.float32)
    for _ in range(ITERATIONS):
        # Columns that have become zero start again.
        b_images = tl.where((tl.max(tl.abs(b_images), 0) > 0)[None, :], b_images, b_start)
        _keep(p_vectors, b_images, D, R)
        b_vectors = _times(p_spread, p_vectors, 1.0 / of_keys, D, R, STEP) + RIDGE * b_images
        _keep(p_vectors, b_vectors, D, R)
        b_images = _times(p_queries, p_vectors, 1.0 / of_queries, D, R, STEP)
        b_vectors, b_images = orthonormal(b_vectors, b_images, RANK, R)
    _keep(p_vectors, b_images, D, R)
    b_spread = _times(p_spread, p_vectors, 1.0 / of_keys, D, R, STEP) + RIDGE * b_images
    b_value = tl.maximum(tl.sum(b_images * b_spread, 0), 0.0)
    b_value = (b_value + tl.sum(b_value, 0) / RANK * LEAST_VALUE + LEAST) * of_queries * of_keys
    b_size = tl.sqrt(tl.sqrt(b_value))
    b_to_query = b_vectors * (b_size / tl.sqrt(of_queries))[None, :]
    b_to_key = b_images * (tl.sqrt(of_queries) / b_size)[None, :]
    # The size of the sampled keys.
    b_mean = tl.load(p_mean + i_slot * HEAD_SIZE + o_dim, mask=m_dim, other=0.0)
    b_low_mean = tl.sum(b_mean[:, None] * b_to_key, 0)
    b_longest = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_largest = tl.zeros([BLOCK_N], dtype=tl.float32)
    p_key += i_head // GROUP * stride_key_head
    sampled = (seq_len + key_step - 1) // key_step
    for i_row in range(0, sampled, BLOCK_N):
        o_place = i_row + tl.arange(0, BLOCK_N)
        o_position = o_place * key_step
        m_row = o_place < sampled
        b_page = tl.load(p_pages + o_position // PAGE, mask=m_row, other=0).to(tl.int64)
        o_key = (b_page * stride_key_page + o_position % PAGE * stride_key_slot)[:, None] + o_dim[None, :]
        b_key = tl.load(p_key + o_key, mask=m_row[:, None] & m_dim[None, :], other=0.0).to(COMPUTE)
        b_low = precise_dot(b_key, b_to_key) * key_scale - b_low_mean[None, :]
        b_low = tl.where(m_row[:, None], b_low, 0.0)
        b_longest = tl.maximum(b_longest, tl.sum(b_low * b_low, 1))
        b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_low), 1))
    unit = tl.maximum(tl.sqrt(tl.max(b_longest, 0)) / MAX_KEY_NORM, tl.max(b_largest, 0) / MAX_KEY)
    unit = tl.maximum(unit, 1e-20)
    o_out = (i_slot * HEAD_SIZE + o_dim)[:, None] * WIDTH + o_rank[None, :]
    m_out = m_dim[:, None] & (o_rank < WIDTH)[None, :]
    tl.store(p_to_query + o_out, b_to_query * unit, mask=m_out)
    tl.store(p_to_key + o_out, b_to_key / unit, mask=m_out)
    m_fitted = o_rank < RANK
    tl.store(p_key_size + i_slot * WIDTH + o_rank, tl.where(m_fitted, b_size / unit, 0.0), mask=o_rank < WIDTH)


BLOCK_N, STEP, NUM_WARPS = 64, 32, 8
COLUMNS = 32
"""Columns of a moment per program."""


@functools.lru_cache(maxsize=64)
def padded_start(shape: tuple[int, int], room: tuple[int, int], device: torch.device) -> torch.Tensor:
    """``projection.start_vectors`` of this shape, padded with zeros to float32 ``[*room]``."""
    vectors = start_vectors(*shape, device).float()
    return torch.nn.functional.pad(vectors, (0, room[1] - shape[1], 0, room[0] - shape[0]))


def constants(inputs: Inputs) -> dict[str, Any]:
    """Constants of both kernels."""
    size, compute = inputs.cache.head_size, compute_type(inputs.query.dtype)[0]
    wide = max(16, triton.next_power_of_2(size))
    return {
        "GROUP": inputs.group,
        "HEAD_SIZE": size,
        "D": wide,
        "PAGE": inputs.cache.block_size,
        "BLOCK_N": BLOCK_N,
        "COMPUTE": compute,
        "num_warps": NUM_WARPS,
    }


def fitted(inputs: Inputs, query: torch.Tensor, heads: Sequence[int], alone: torch.Tensor, rank: int) -> Projection:
    """``low_rank.fitted`` of a sample of the chunk's queries and of the sequence's keys, in ``rank`` dimensions.

    Args:
        inputs: with a cache of layout ``rows``, contiguous along ``D``.
        query: ``[chunk, H, D]``, contiguous along ``D``.
        alone: int64 ``[h, m]``, the last and the outlier rows of the chunk.
    """
    cache, seq_len, device = inputs.cache, inputs.chunk.seq_len, query.device
    size, rank = cache.head_size, min(rank, cache.head_size)
    width, shape = rank + -rank % 16, constants(inputs)
    wide, room = shape["D"], max(16, triton.next_power_of_2(width))
    of_heads = on_device(heads, query)
    query_step, key_step = (fit_step(length) for length in (len(query), seq_len))
    moments = torch.empty(len(heads), 2, wide, wide, device=device)
    mean = torch.empty(len(heads), 1, size, device=device)
    columns = min(wide, COLUMNS)
    launcher(moments_kernel, (wide // columns, 2, len(heads)))(
        query, cache.key, inputs.pages, of_heads, alone.contiguous(), moments, mean, query.stride(0), query.stride(1),
        *cache.key.stride()[:3], len(query), seq_len, query_step, key_step, alone.shape[1], FIT_SHARE,
        cache.key_scale, **shape, COLUMNS=columns, PRECISION=compute_type(inputs.query.dtype)[1],
    )  # fmt: skip
    vectors = torch.empty(len(heads), wide, room, device=device)
    to_query, to_key = (torch.empty(len(heads), size, width, device=device) for _ in range(2))
    key_size = torch.empty(len(heads), 1, width, device=device)
    launcher(fit_kernel, (len(heads),))(
        moments, mean, padded_start((size, rank), (wide, room), device), vectors, cache.key, inputs.pages,
        of_heads, to_query, to_key, key_size, *cache.key.stride()[:3], seq_len, key_step, cache.key_scale, **shape,
        RANK=rank, WIDTH=width, R=room, STEP=min(wide, STEP),
    )  # fmt: skip
    return Projection(to_query, to_key, mean, key_size)
