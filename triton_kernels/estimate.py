"""The estimates of ``minference_vllm.estimate`` straight from paged keys of any strides.

Nothing of the size queries x context is ever stored: the last queries' scores are computed twice, once for each row's
log-sum-exp and once for the sums along columns and diagonals, 64 keys at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minference_vllm.estimate import LAST_QUERIES, ROW_GROUPS
from minference_vllm.paged_cache import PagedCache
from minference_vllm.triton_kernels.sparse_attention import LN2, LOG2E, compute_type

ROWS = tl.constexpr(LAST_QUERIES)
STRIP = tl.constexpr(64)
"""Columns, and diagonals, that one program sums."""
GROUPS = tl.constexpr(ROW_GROUPS)


@triton.jit
def _scores(
    b_query,  # [ROWS, D]
    o_row,  # [ROWS] positions of the rows
    b_position,  # [BLOCK_N] positions of the keys, perhaps outside the sequence
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
    """Scores in powers of two, -inf where a row does not see a key: ``[ROWS, BLOCK_N]``."""
    o_dim = tl.arange(0, D)
    m_key = (b_position >= 0) & (b_position < seq_len)
    b_page = tl.load(p_pages + b_position // PAGE, mask=m_key, other=0).to(tl.int64)
    o_key = b_page * stride_key_page + (b_position % PAGE) * stride_key_slot
    m_tile = m_key[:, None] & (o_dim < HEAD_SIZE)[None, :]
    b_key = tl.load(p_key + o_key[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(b_query.dtype)  # [BLOCK_N, D]
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2
    m_score = m_key[None, :] & (b_position[None, :] <= o_row[:, None])
    return tl.where(m_score, b_score, -float("inf"))


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["rows", "seq_len"])
def row_lse_kernel(
    p_query,
    p_key,
    p_pages,
    p_heads,
    p_lse,
    stride_query_row,
    stride_query_head,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    rows,
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
    """One program: each row's log-sum-exp over one part of the keys, one head. ``p_lse`` ``[heads, parts, ROWS]``."""
    i_slot, i_part = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot)
    o_dim, o_query = tl.arange(0, D), tl.arange(0, ROWS)
    o_row = seq_len - rows + o_query
    p_query += i_head * stride_query_head
    m_query = (o_query < rows)[:, None] & (o_dim < HEAD_SIZE)[None, :]
    b_query = tl.load(p_query + o_query[:, None] * stride_query_row + o_dim[None, :], mask=m_query, other=0.0)
    b_query = b_query.to(COMPUTE)
    p_key += (i_head // GROUP).to(tl.int64) * stride_key_head
    b_sum = tl.zeros([ROWS], dtype=tl.float32)
    b_max = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    first = i_part * keys_per_part
    for i_key in range(first, tl.minimum(first + keys_per_part, seq_len), BLOCK_N):
        b_score = _scores(
            b_query, o_row, i_key + tl.arange(0, BLOCK_N), p_key, p_pages, stride_key_page, stride_key_slot,
            seq_len, scale_log2, HEAD_SIZE, D, PAGE, PRECISION,
        )  # fmt: skip
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        # A row that has seen no key yet keeps a maximum of -inf; subtracting 0 then gives weights of 0, not NaN.
        b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_score - b_shift[:, None]), 1)
        b_max = b_new_max
    p_lse += (i_slot * tl.num_programs(1) + i_part) * ROWS
    tl.store(p_lse + o_query, (b_max + tl.log2(b_sum)) * LN2)


@triton.jit(do_not_specialize=["rows", "seq_len"])
def column_diagonal_kernel(
    p_query,
    p_key,
    p_pages,
    p_heads,
    p_lse,
    p_columns,
    p_diagonals,
    stride_query_row,
    stride_query_head,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    rows,
    seq_len,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: STRIP diagonals and STRIP columns of one head, from the two strips of keys that hold the diagonals.

    Row r meets diagonal ``first + q`` in key ``seq_len - rows + r - first - q``, so over ROWS rows STRIP diagonals
    need ROWS + STRIP - 1 keys; the columns of the later strip of them are summed on the way.
    """
    i_slot, i_strip = tl.program_id(0), tl.program_id(1)
    i_head = tl.load(p_heads + i_slot)
    o_dim, o_query = tl.arange(0, D), tl.arange(0, ROWS)
    o_row = seq_len - rows + o_query
    m_query = o_query < rows
    p_query += i_head * stride_query_head
    m_tile = m_query[:, None] & (o_dim < HEAD_SIZE)[None, :]
    b_query = tl.load(p_query + o_query[:, None] * stride_query_row + o_dim[None, :], mask=m_tile, other=0.0)
    b_query = b_query.to(COMPUTE)
    p_key += (i_head // GROUP).to(tl.int64) * stride_key_head
    o_window = tl.arange(0, ROWS + STRIP)
    b_position = seq_len - rows - i_strip * STRIP - (STRIP - 1) + o_window
    b_score = _scores(
        b_query, o_row, b_position, p_key, p_pages, stride_key_page, stride_key_slot,
        seq_len, scale_log2, HEAD_SIZE, D, PAGE, PRECISION,
    )  # fmt: skip
    b_lse = tl.load(p_lse + i_slot * ROWS + o_query, mask=m_query, other=0.0) / LN2
    b_weight = tl.where(m_query[:, None], tl.exp2(b_score - b_lse[:, None]), 0.0)  # [ROWS, ROWS + STRIP]
    p_columns += i_slot.to(tl.int64) * seq_len
    m_column = (o_window >= STRIP) & (b_position >= 0) & (b_position < seq_len)
    tl.store(p_columns + b_position, tl.sum(b_weight, 0), mask=m_column)

    o_diagonal = tl.arange(0, STRIP)
    b_sheared = tl.gather(b_weight, o_query[:, None] - o_diagonal[None, :] + (STRIP - 1), 1)  # [ROWS, STRIP]
    groups = tl.minimum(rows, GROUPS)
    b_agreed = tl.full([STRIP], float("inf"), dtype=tl.float32)
    for i_group in tl.static_range(GROUPS):
        m_group = (o_query >= i_group * rows // groups) & (o_query < (i_group + 1) * rows // groups)
        b_mass = tl.sum(tl.where(m_group[:, None], b_sheared, 0.0), 0)
        b_agreed = tl.where(i_group < groups, tl.minimum(b_agreed, b_mass), b_agreed)
    o_diagonal += i_strip * STRIP
    p_diagonals += i_slot.to(tl.int64) * seq_len
    tl.store(p_diagonals + o_diagonal, b_agreed * groups, mask=o_diagonal < seq_len)


@triton.jit(do_not_specialize=["first_kv_head", "seq_len"])
def block_mean_kernel(
    p_key,
    p_pages,
    p_mean,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    first_kv_head,
    seq_len,
    key_scale,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program: the mean key of one block of one KV head. ``p_mean`` float32 ``[heads, N, HEAD_SIZE]``."""
    i_block, i_slot = tl.program_id(0), tl.program_id(1)
    o_slot, o_dim = tl.arange(0, SLOTS), tl.arange(0, D)
    count = tl.minimum(seq_len - i_block * PAGE, PAGE)
    o_page = tl.load(p_pages + i_block).to(tl.int64) * stride_key_page
    p_key += o_page + (first_kv_head + i_slot).to(tl.int64) * stride_key_head
    m_tile = (o_slot < count)[:, None] & (o_dim < HEAD_SIZE)[None, :]
    b_key = tl.load(p_key + o_slot[:, None] * stride_key_slot + o_dim[None, :], mask=m_tile, other=0.0)
    b_mean = tl.sum(b_key.to(tl.float32), 0) * key_scale / count
    p_mean += (i_slot.to(tl.int64) * tl.num_programs(0) + i_block) * HEAD_SIZE
    tl.store(p_mean + o_dim, b_mean, mask=o_dim < HEAD_SIZE)


KEYS_PER_PART, BLOCK_N, NUM_WARPS = 4096, 64, 4


@functools.lru_cache(maxsize=256)
def _on_device(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 heads; a copy to a GPU, which waits for it, once for all layers that ask for the same."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def last_query_scores(
    query: torch.Tensor, cache: PagedCache, pages: torch.Tensor, seq_len: int, heads: Sequence[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``estimate.last_query_scores`` straight from the pages.

    Args:
        query: ``[chunk, H, D]``, elements of a head side by side.
        cache: layout ``rows``, elements of a head side by side.
        pages: int64 ``[N]``, contiguous.
        heads: query heads wanted, in any order.

    Returns:
        float32 ``[len(heads), S]`` twice: columns and diagonals.
    """
    last = query[-LAST_QUERIES:]
    rows, device = last.shape[0], query.device
    wanted = _on_device(tuple(heads), device)
    parts = triton.cdiv(seq_len, KEYS_PER_PART)
    lse = torch.empty(len(heads), parts, LAST_QUERIES, device=device)
    columns, diagonals = (torch.empty(len(heads), seq_len, device=device) for _ in range(2))
    compute, precision = compute_type(query.dtype)
    queries = last.stride(0), last.stride(1)
    keys = cache.key.stride()[:3]
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
    row_lse_kernel[(len(heads), parts)](
        last, cache.key, pages, wanted, lse, *queries, *keys, rows, seq_len, KEYS_PER_PART, scale_log2,
        BLOCK_N=BLOCK_N, **shape,
    )  # fmt: skip
    total = lse.logsumexp(1)
    # One strip more than there are diagonals: with fewer rows than a strip, its columns reach less far back.
    strips = triton.cdiv(seq_len, STRIP.value) + 1
    column_diagonal_kernel[(len(heads), strips)](
        last, cache.key, pages, wanted, total, columns, diagonals, *queries, *keys, rows, seq_len, scale_log2, **shape
    )
    return columns, diagonals


def mean_keys(cache: PagedCache, pages: torch.Tensor, seq_len: int, first: int, last: int) -> torch.Tensor:
    """``estimate.mean_keys`` of KV heads ``[first, last)`` straight from the pages: float32 ``[heads, N, D]``.

    Args: as ``last_query_scores``.
    """
    blocks = triton.cdiv(seq_len, cache.block_size)
    means = torch.empty(last - first, blocks, cache.head_size, device=pages.device)
    block_mean_kernel[(blocks, last - first)](
        cache.key, pages, means, *cache.key.stride()[:3], first, seq_len, cache.key_scale,
        HEAD_SIZE=cache.head_size,
        D=triton.next_power_of_2(cache.head_size),
        PAGE=cache.block_size,
        SLOTS=triton.next_power_of_2(cache.block_size),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return means
