"""The estimates of ``minference_vllm.selection.probe_queries`` straight from paged keys of any strides.

Nothing of the size queries x context is ever stored: the chosen queries' scores are computed twice, once for each row's
log-sum-exp and once for the sums along columns and diagonals, 64 keys at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.transfer import to_device
from minference_vllm.selection.probe_queries import PROBE_GROUPS, PROBE_QUERIES, probe_groups
from minference_vllm.triton_kernels.attention import LN2, LOG2E, compute_type
from minference_vllm.triton_kernels.launch import launcher

ROWS = tl.constexpr(PROBE_QUERIES)
STRIP = tl.constexpr(64)
"""Keys per program."""
GROUPS = tl.constexpr(PROBE_GROUPS)


@triton.jit
def _queries(
    p_query,
    p_rows,
    rows,
    stride_query_row,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The chosen rows of one head, ``[ROWS, D]``, and their places in the chunk, ``[ROWS]``."""
    o_slot, o_dim = tl.arange(0, ROWS), tl.arange(0, D)
    m_slot = o_slot < rows
    o_row = tl.load(p_rows + o_slot, mask=m_slot, other=0)
    m_tile = m_slot[:, None] & (o_dim < HEAD_SIZE)[None, :]
    o_query = o_row.to(tl.int64)[:, None] * stride_query_row + o_dim[None, :]
    return tl.load(p_query + o_query, mask=m_tile, other=0.0).to(COMPUTE), o_row


@triton.jit
def _scores(
    b_query,  # [ROWS, D]
    o_position,  # [ROWS] positions of the rows
    b_position,  # [BLOCK_N] positions of the keys, may be past the end
    p_key,
    p_pages,
    stride_key_page,
    stride_key_slot,
    seq_len,
    scale_log2,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 scores, -inf where a row does not see a key: ``[ROWS, BLOCK_N]``."""
    o_dim = tl.arange(0, D)
    m_key = b_position < seq_len
    b_page = tl.load(p_pages + b_position // PAGE, mask=m_key, other=0).to(tl.int64)
    o_key = b_page * stride_key_page + (b_position % PAGE) * stride_key_slot
    m_tile = m_key[:, None] & (o_dim < HEAD_SIZE)[None, :]
    b_key = tl.load(p_key + o_key[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(b_query.dtype)  # [BLOCK_N, D]
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2
    m_score = m_key[None, :] & (b_position[None, :] <= o_position[:, None])
    return tl.where(m_score, b_score, -float("inf"))


@triton.jit
def add_scores(b_sum, b_max, b_score):
    """Add scores ``[ROWS, BLOCK_N]`` to each row's running sum of weights and maximum, ``[ROWS]``."""
    b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
    # A row that has seen no key yet keeps a maximum of -inf; subtracting 0 then gives weights of 0, not NaN.
    b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
    return b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_score - b_shift[:, None]), 1), b_new_max


@triton.jit
def combined(p_row, stride, num_parts, m_row):
    """The base-2 log-sum-exp of the results of ``num_parts`` programs for each row; -inf for masked rows.

    ``p_row``: address of the first program's result for each row. ``stride``: from one program's result to the next.
    """
    b_sum = tl.zeros(m_row.shape, dtype=tl.float32)
    b_max = tl.full(m_row.shape, -float("inf"), dtype=tl.float32)
    for i_part in range(num_parts):
        b_part = tl.load(p_row + i_part * stride, mask=m_row, other=-float("inf"))
        b_sum, b_max = add_scores(b_sum, b_max, b_part[:, None])
    return b_max + tl.log2(b_sum)


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["rows", "context_len", "seq_len"])
def row_lse_kernel(
    p_query,
    p_key,
    p_pages,
    p_heads,
    p_rows,
    p_lse,
    stride_query_row,
    stride_query_head,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    rows,
    context_len,
    seq_len,
    keys_per_part,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: each row's log-sum-exp over one part of one head's keys. ``p_lse`` ``[heads, parts, ROWS]``."""
    i_slot, i_part = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot)
    p_query += i_head * stride_query_head
    b_query, o_row = _queries(p_query, p_rows, rows, stride_query_row, HEAD_SIZE, D, COMPUTE)
    p_key += (i_head // GROUP).to(tl.int64) * stride_key_head
    b_sum = tl.zeros([ROWS], dtype=tl.float32)
    b_max = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    first = i_part * keys_per_part
    for i_key in range(first, tl.minimum(first + keys_per_part, seq_len), BLOCK_N):
        b_score = _scores(
            b_query, context_len + o_row, i_key + tl.arange(0, BLOCK_N), p_key, p_pages, stride_key_page,
            stride_key_slot, seq_len, scale_log2, HEAD_SIZE, D, PAGE, PRECISION,
        )  # fmt: skip
        b_sum, b_max = add_scores(b_sum, b_max, b_score)
    p_lse += (i_slot * tl.num_programs(1) + i_part) * ROWS
    tl.store(p_lse + tl.arange(0, ROWS), (b_max + tl.log2(b_sum)) * LN2)


@triton.jit(do_not_specialize=["rows", "context_len", "seq_len"])
def column_diagonal_kernel(
    p_query,
    p_key,
    p_pages,
    p_heads,
    p_rows,
    p_lse,
    p_columns,
    p_nearer,
    p_farther,
    stride_query_row,
    stride_query_head,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    rows,
    context_len,
    seq_len,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the masses on STRIP keys of one head, summed along columns, and along diagonals by group of rows.

    Row r of a group sees key ``first_key + c`` at the distance ``first_row + r - first_key - c``. Over a group's rows a
    strip's distances span up to two strips. The nearer and the farther one go to separate arrays, so that each sum,
    ``[heads, GROUPS, seq_len]`` by distance, has one writer. ``p_rows`` holds each row, its place in its group, and its
    group.
    """
    i_slot, i_strip = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot)
    o_slot, o_key = tl.arange(0, ROWS), tl.arange(0, STRIP)
    m_slot = o_slot < rows
    p_query += i_head * stride_query_head
    b_query, o_row = _queries(p_query, p_rows, rows, stride_query_row, HEAD_SIZE, D, COMPUTE)
    p_key += (i_head // GROUP).to(tl.int64) * stride_key_head
    b_position = i_strip * STRIP + o_key
    b_score = _scores(
        b_query, context_len + o_row, b_position, p_key, p_pages, stride_key_page,
        stride_key_slot, seq_len, scale_log2, HEAD_SIZE, D, PAGE, PRECISION,
    )  # fmt: skip
    b_lse = tl.load(p_lse + i_slot * ROWS + o_slot, mask=m_slot, other=0.0) / LN2
    b_weight = tl.where(m_slot[:, None], tl.exp2(b_score - b_lse[:, None]), 0.0)  # [ROWS, STRIP]
    tl.store(p_columns + i_slot.to(tl.int64) * seq_len + b_position, tl.sum(b_weight, 0), mask=b_position < seq_len)

    o_place = tl.load(p_rows + rows + o_slot, mask=m_slot, other=0)
    b_group = tl.load(p_rows + 2 * rows + o_slot, mask=m_slot, other=GROUPS)
    # Distance t of the nearer strip belongs to key STRIP - 1 + place - t, of the farther one to key place - 1 - t.
    o_near = STRIP - 1 + o_place[:, None] - o_key[None, :]
    o_far = o_near - STRIP
    b_near = tl.gather(b_weight, tl.minimum(o_near, STRIP - 1), 1)
    b_far = tl.gather(b_weight, tl.maximum(o_far, 0), 1)
    b_near = tl.where(o_near < STRIP, b_near, 0.0)
    b_far = tl.where(o_far >= 0, b_far, 0.0)
    for i_group in tl.static_range(GROUPS):
        m_group = (b_group == i_group)[:, None]
        # All rows of a group agree on the group's first row. A group without rows stores zeros, which are never read.
        first_row = tl.max(tl.where(b_group == i_group, context_len + o_row - o_place, -1), 0)
        o_distance = first_row - i_strip * STRIP - (STRIP - 1) + o_key
        p_group = (i_slot * GROUPS + i_group).to(tl.int64) * seq_len
        m_near = (o_distance >= 0) & (o_distance < seq_len)
        tl.store(p_nearer + p_group + o_distance, tl.sum(tl.where(m_group, b_near, 0.0), 0), mask=m_near)
        o_distance += STRIP
        m_far = (o_distance >= 0) & (o_distance < seq_len)
        tl.store(p_farther + p_group + o_distance, tl.sum(tl.where(m_group, b_far, 0.0), 0), mask=m_far)


KEYS_PER_PART, BLOCK_N, NUM_WARPS = 4096, 64, 4


def on_device(heads: Sequence[int], query: torch.Tensor) -> torch.Tensor:
    """int32 heads on the device of the query. Cached, so that all layers share one copy of equal heads."""
    return _on_device(tuple(heads), query.device, query.is_cuda)


@functools.lru_cache(maxsize=4096)
def _on_device(heads: tuple[int, ...], device: torch.device, is_cuda: bool) -> torch.Tensor:
    return to_device(torch.tensor(heads, dtype=torch.int32, device="cpu"), device, is_cuda)


@functools.lru_cache(maxsize=64)
def _rows(chunk: int, device: torch.device) -> torch.Tensor:
    """int32 ``[3, rows]``: ``probe_groups`` of a chunk as rows, their places in their groups, and their groups."""
    groups = probe_groups(chunk)
    rows = torch.cat([torch.arange(begin, end, device=device) for begin, end in groups])
    places = torch.cat([torch.arange(end - begin, device=device) for begin, end in groups])
    numbers = torch.cat([torch.full((end - begin,), i, device=device) for i, (begin, end) in enumerate(groups)])
    return torch.stack([rows, places, numbers]).to(torch.int32)


def column_diagonal_scores(
    query: torch.Tensor, cache: PagedCache, pages: torch.Tensor, seq_len: int, heads: Sequence[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``probe_queries.column_diagonal_scores`` straight from the pages.

    Args:
        query: ``[chunk, H, D]``, contiguous along ``D``.
        cache: layout ``rows``, contiguous along ``D``.
        pages: int64 ``[N]``, contiguous.
        heads: query heads wanted, in any order.

    Returns:
        float32 ``[len(heads), S]`` twice: columns and diagonals.
    """
    device, context_len = query.device, seq_len - query.shape[0]
    wanted, rows = on_device(heads, query), _rows(query.shape[0], device)
    parts = triton.cdiv(seq_len, KEYS_PER_PART)
    lse = torch.empty(len(heads), parts, PROBE_QUERIES, device=device)
    compute, precision = compute_type(query.dtype)
    strides = query.stride(0), query.stride(1), *cache.key.stride()[:3]
    lengths = rows.shape[1], context_len, seq_len
    scale_log2 = scale * cache.key_scale * LOG2E.value
    shape = {
        "GROUP": query.shape[1] // cache.num_kv_heads,
        "HEAD_SIZE": cache.head_size,
        "D": max(16, triton.next_power_of_2(cache.head_size)),
        "PAGE": cache.block_size,
        "COMPUTE": compute,
        "PRECISION": precision,
        "num_warps": NUM_WARPS,
    }
    launcher(row_lse_kernel, (len(heads), parts))(
        query, cache.key, pages, wanted, rows, lse, *strides, *lengths, KEYS_PER_PART, scale_log2,
        BLOCK_N=BLOCK_N, **shape,
    )  # fmt: skip
    total = lse.logsumexp(1)
    columns = torch.empty(len(heads), seq_len, device=device)
    nearer, farther = (torch.zeros(len(heads), PROBE_GROUPS, seq_len, device=device) for _ in range(2))
    launcher(column_diagonal_kernel, (len(heads), triton.cdiv(seq_len, STRIP.value)))(
        query, cache.key, pages, wanted, rows, total, columns, nearer, farther, *strides, *lengths, scale_log2, **shape
    )
    agreed = torch.full((len(heads), seq_len), torch.inf, device=device)
    for number, (begin, end) in enumerate(probe_groups(query.shape[0])):
        reach = context_len + end
        mean = (nearer[:, number, :reach] + farther[:, number, :reach]).div_(end - begin)
        torch.minimum(agreed[:, :reach], mean, out=agreed[:, :reach])
    return columns, agreed.mul_(rows.shape[1])
