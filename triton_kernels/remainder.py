"""The remainder of ``minference_vllm.prefill.remainder`` straight from paged keys and values of any strides.

There are two kernels. ``left_out_kernel`` computes each tile's mean queries and marks the sampled keys that the tile
does not leave out. ``remainder_kernel`` computes the softmax over the other sampled keys. No list is searched: the
sampled positions follow from a formula, which tells for each key in a list whether it is sampled.

A mean query is rounded to the type of products wherever it is used. It is the point around which the remainder is a
row's log-sum-exp to first order; any point near the rows does as well.

Sizes: ``H`` query heads of size ``D``, ``L`` lists, ``T`` query tiles, ``n`` sampled keys, padded to whole steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import Remainder, sample_step
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.triton_kernels.attention import LN2, capped_log2, compute_type, scales_log2
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.launch import launcher


@triton.jit
def _position(i_sample, step):
    """``core.remainder.sampled_positions``, in 32 bits: up to 2 ** 26 tokens."""
    return i_sample * step + i_sample * 40503 % 65536 * step // 65536


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_items", "num_samples", "step", "seq_len", "window", "max_blocks", "max_columns"
    ]
)  # fmt: skip
def left_out_kernel(
    p_query,
    p_pages,
    p_tile_starts,
    p_blocks,
    p_num_blocks,
    p_columns,
    p_num_columns,
    p_mean,
    p_marks,
    p_slots,
    stride_query_row,
    stride_query_head,
    num_tiles,
    num_items,
    num_samples,
    step,
    seq_len,
    window,
    max_blocks,
    max_columns,
    HEADS_PER_LIST: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one list and tile, or the slots of BLOCK sampled keys.

    ``p_mean`` is float32 ``[H, T, HEAD_SIZE]``; ``p_marks`` uint8 ``[L, T, n]``, 0 for keys that the tile leaves out;
    ``p_slots`` int32 ``[n + BLOCK_N]``, each key's physical page times PAGE plus its slot in it.
    """
    i_item = tl.program_id(0)
    o_entry = tl.arange(0, BLOCK)
    width = tl.cdiv(num_samples, BLOCK_N) * BLOCK_N
    chunk_start = tl.load(p_tile_starts).to(tl.int32)
    if i_item >= num_items:
        o_sample = (i_item - num_items) * BLOCK + o_entry
        b_position = _position(tl.minimum(o_sample, num_samples - 1), step)
        # Pages that no row sees may belong to another request. The last token, which no tile leaves out, replaces their
        # keys.
        b_position = tl.where((window > 0) & (b_position <= chunk_start - window), seq_len - 1, b_position)
        b_page = tl.load(p_pages + b_position // PAGE).to(tl.int32)
        tl.store(p_slots + o_sample, b_page * PAGE + b_position % PAGE, mask=o_sample < width + BLOCK_N)
    else:
        i_list, i_tile = i_item // num_tiles, i_item % num_tiles
        tile_start = tl.load(p_tile_starts + i_tile).to(tl.int32)
        tile_end = tl.load(p_tile_starts + i_tile + 1).to(tl.int32)

        o_dim = tl.arange(0, D)
        o_row = tl.arange(0, ROWS)
        for i_of_list in range(HEADS_PER_LIST):
            i_head = i_list * HEADS_PER_LIST + i_of_list
            b_total = tl.zeros([D], dtype=tl.float32)
            for first in range(tile_start, tile_end, ROWS):
                o_query = (first - chunk_start + o_row).to(tl.int64) * stride_query_row
                m_tile = (first + o_row < tile_end)[:, None] & (o_dim < HEAD_SIZE)[None, :]
                p_rows = p_query + i_head.to(tl.int64) * stride_query_head + o_query[:, None] + o_dim[None, :]
                b_total += tl.sum(tl.load(p_rows, mask=m_tile, other=0.0).to(tl.float32), 0)
            o_mean = (i_head * num_tiles + i_tile).to(tl.int64) * HEAD_SIZE + o_dim
            tl.store(p_mean + o_mean, b_total / (tile_end - tile_start), mask=o_dim < HEAD_SIZE)

        p_blocks += i_item.to(tl.int64) * max_blocks
        p_columns += i_item.to(tl.int64) * max_columns
        p_marks += i_item.to(tl.int64) * width
        is_listed = tl.load(p_blocks) >= 0
        # All rows of a tile see the keys before its first row that are in the window of its last row.
        first_seen = tl.where(window > 0, tile_end - window, 0)
        for first in range(0, width, BLOCK):
            o_sample = first + o_entry
            b_position = _position(o_sample, step)
            m_mark = (o_sample >= num_samples) | (b_position >= tile_start) | (b_position < first_seen) | ~is_listed
            tl.store(p_marks + o_sample, m_mark.to(tl.uint8), mask=o_sample < width)
        # The loops below overwrite marks, from other threads.
        tl.debug_barrier()
        num_columns = tl.load(p_num_columns + i_item)
        for first in range(0, num_columns, BLOCK):
            m_column = first + o_entry < num_columns
            b_column = tl.load(p_columns + first + o_entry, mask=m_column, other=0)
            o_sample = b_column // step
            m_sample = m_column & (o_sample < num_samples) & (_position(o_sample, step) == b_column)
            tl.store(p_marks + o_sample, tl.full([BLOCK], 1, tl.uint8), mask=m_sample)
        # Samples that may lie in a page: one per step, and one for a step that begins before the page.
        per_page = (PAGE - 1) // step + 2
        num_entries = tl.where(is_listed, tl.load(p_num_blocks + i_item), 0) * per_page
        for first in range(0, num_entries, BLOCK):
            m_entry = first + o_entry < num_entries
            b_begin = tl.load(p_blocks + (first + o_entry) // per_page, mask=m_entry, other=0) * PAGE
            o_sample = b_begin // step + (first + o_entry) % per_page
            b_position = _position(o_sample, step)
            m_sample = m_entry & (o_sample < num_samples) & (b_position >= b_begin) & (b_position < b_begin + PAGE)
            tl.store(p_marks + o_sample, tl.full([BLOCK], 1, tl.uint8), mask=m_sample)


@triton.jit(do_not_specialize=["num_tiles", "num_samples", "step"])
def remainder_kernel(
    p_mean,
    p_key,
    p_value,
    p_slots,
    p_marks,
    p_wanted,
    p_tile_starts,
    p_left_key,
    p_left_value,
    p_bias,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    stride_value_page,
    stride_value_head,
    stride_value_slot,
    num_tiles,
    num_samples,
    step,
    scale_log2,
    softcap_log2,
    key_scale,
    value_scale,
    log_step,
    GROUP: tl.constexpr,
    HEADS_PER_LIST: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_SOFTCAP: tl.constexpr,
):
    """One program: BLOCK_M pairs of a tile and a query head, of one KV head. A tile's heads are neighbours.

    ``p_wanted`` is int32 ``[H]``, 0 for heads without a remainder; ``p_left_key``, ``p_left_value`` and ``p_bias`` are
    the fields of ``Remainder``.
    """
    PADDED: tl.constexpr = HEAD_SIZE != D
    i_kv_head = tl.program_id(1)
    width = tl.cdiv(num_samples, BLOCK_N) * BLOCK_N
    o_packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_packed < num_tiles * GROUP
    o_tile = tl.where(m_row, o_packed // GROUP, 0)
    o_head = i_kv_head * GROUP + o_packed % GROUP
    o_row = (o_head * num_tiles + o_tile).to(tl.int64)
    o_dim = tl.arange(0, D)
    m_dim = o_dim < HEAD_SIZE
    o_tensor = o_row[:, None] * HEAD_SIZE + o_dim[None, :]
    b_query = tl.load(p_mean + o_tensor, mask=m_dim[None, :], other=0.0).to(COMPUTE)
    m_wanted = tl.load(p_wanted + o_head) > 0
    p_row_marks = p_marks + (o_head // HEADS_PER_LIST * num_tiles + o_tile).to(tl.int64) * width
    p_key += i_kv_head.to(tl.int64) * stride_key_head
    p_value += i_kv_head.to(tl.int64) * stride_value_head
    # Later samples do not lie before the last tile.
    last_start = tl.load(p_tile_starts + tl.max(o_tile, 0)).to(tl.int32)
    num_keys = tl.minimum(last_start // step + 1, num_samples)
    num_keys = tl.where(tl.max(m_wanted.to(tl.int32), 0) > 0, num_keys, 0)

    b_left_key = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    b_left_value = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    o_key = tl.arange(0, BLOCK_N)
    # Read a step ahead, as in ``attention``.
    b_slot = tl.load(p_slots + o_key)
    for first in tl.range(0, num_keys, BLOCK_N, num_stages=STAGES):
        b_page, b_in_page = (b_slot // PAGE).to(tl.int64), b_slot % PAGE
        p_keys = p_key + (b_page * stride_key_page + b_in_page * stride_key_slot)[:, None] + o_dim[None, :]
        p_values = p_value + (b_page * stride_value_page + b_in_page * stride_value_slot)[:, None] + o_dim[None, :]
        b_key = (tl.load(p_keys, mask=m_dim[None, :], other=0.0) if PADDED else tl.load(p_keys)).to(COMPUTE)
        b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        b_score = capped_log2(b_score, scale_log2, softcap_log2) if WITH_SOFTCAP else b_score * scale_log2
        b_mark = tl.load(p_row_marks[:, None] + (first + o_key)[None, :])
        b_score = tl.where((b_mark == 0) & m_wanted[:, None], b_score, -float("inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        # A row that has left out no key yet keeps a maximum of -inf; subtracting 0 then gives weights of 0, not NaN.
        b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        b_weight = tl.exp2(b_score - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_max = b_new_max
        b_weight = b_weight.to(COMPUTE)
        b_left_key = tl.dot(b_weight, b_key, b_left_key * b_decay[:, None], input_precision=PRECISION)
        b_value = (tl.load(p_values, mask=m_dim[None, :], other=0.0) if PADDED else tl.load(p_values)).to(COMPUTE)
        b_left_value = tl.dot(b_weight, b_value, b_left_value * b_decay[:, None], input_precision=PRECISION)
        b_slot = tl.load(p_slots + first + BLOCK_N + o_key)

    b_divisor = tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    b_left_key = b_left_key / b_divisor
    b_at_mean = tl.sum(b_query.to(tl.float32) * b_left_key, 1)
    b_at_mean = capped_log2(b_at_mean, scale_log2, softcap_log2) if WITH_SOFTCAP else b_at_mean * scale_log2
    m_tensor = m_row[:, None] & m_dim[None, :]
    tl.store(p_left_key + o_tensor, b_left_key * key_scale, mask=m_tensor)
    tl.store(p_left_value + o_tensor, b_left_value / b_divisor * value_scale, mask=m_tensor)
    tl.store(p_bias + o_row, (b_max + tl.log2(b_sum) - b_at_mean) * LN2 + log_step, mask=m_row)


ROWS, BLOCK, BLOCK_M, STAGES, NUM_WARPS = 32, 256, 16, 3, 4


def constants(
    heads_per_list: int, group: int, head_size: int, block_size: int, dtype: torch.dtype, cache_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of the two kernels.

    Args:
        dtype: of the queries.
        cache_size: bytes of an element of the cache.
    """
    compute, precision = compute_type(dtype)
    dims = max(16, triton.next_power_of_2(head_size))
    # The most that spill no registers, by ``tools/kernel_account.py``. FP8 is converted in registers.
    elements = 8192 if dims <= 128 and cache_size == 2 else 4096
    shared = {
        "HEADS_PER_LIST": heads_per_list,
        "HEAD_SIZE": head_size,
        "D": dims,
        "PAGE": block_size,
        "BLOCK_N": min(64, elements // dims),
        "num_warps": NUM_WARPS,
    }
    of_keys = {"GROUP": group, "BLOCK_M": BLOCK_M, "STAGES": STAGES, "COMPUTE": compute, "PRECISION": precision}
    return shared | {"ROWS": ROWS, "BLOCK": BLOCK}, shared | of_keys


def of_heads(inputs: Inputs, index: SparseIndex, heads: Sequence[int]) -> Remainder:
    """``prefill.remainder.of_heads`` straight from the pages, without a host synchronisation.

    Args:
        inputs: as for ``attention.run``, but values may have other strides than keys.
        index: causal.

    Raises:
        ValueError: the cache has another layout.
    """
    tiling, cache, query = index.tiling, inputs.cache, inputs.query
    if cache.layout != "rows":
        raise ValueError(f"the Triton kernel reads pages of plain rows, not {cache.layout!r}")
    of_lists, of_keys = constants(
        index.heads_per_list, inputs.group, cache.head_size, cache.block_size, query.dtype, cache.key.element_size()
    )
    step, block_n = sample_step(tiling.seq_len), of_keys["BLOCK_N"]
    samples = tiling.seq_len // step
    width = triton.cdiv(samples, block_n) * block_n
    items, device = index.num_lists * index.num_tiles, query.device
    mean, key, value = torch.empty(
        3, inputs.num_heads, index.num_tiles, cache.head_size, dtype=torch.float32, device=device
    )
    bias = torch.empty(key.shape[:2], dtype=torch.float32, device=device)
    marks = torch.empty(items * width, dtype=torch.uint8, device=device)
    slots = torch.empty(width + block_n, dtype=torch.int32, device=device)
    launcher(left_out_kernel, (items + triton.cdiv(width + block_n, BLOCK),))(
        query, inputs.pages, tiling.starts, index.blocks, index.num_blocks, index.columns, index.num_columns,
        mean, marks, slots, query.stride(0), query.stride(1),
        index.num_tiles, items, samples, step, tiling.seq_len, tiling.window,
        index.blocks.shape[2], index.columns.shape[2], **of_lists,
    )  # fmt: skip
    among = set(heads)
    wanted = on_device([int(head in among) for head in range(inputs.num_heads)], query)
    launcher(remainder_kernel, (triton.cdiv(index.num_tiles * inputs.group, BLOCK_M), cache.num_kv_heads))(
        mean, cache.key, cache.value, slots, marks, wanted, tiling.starts, key, value, bias,
        *cache.key.stride()[:3], *cache.value.stride()[:3], index.num_tiles, samples, step,
        *scales_log2(inputs), cache.key_scale, cache.value_scale, math.log(step),
        WITH_SOFTCAP=inputs.softcap != 0.0, **of_keys,
    )  # fmt: skip
    return Remainder(key, value, bias)
