"""Attention under a ``SparseIndex`` over paged keys and values of any strides, in one online softmax. Columns may count
more than once (``SparseIndex.column_codes``).

A tile's softmax starts from its remainder, if there is one. Three loops read the tile's keys: whole pages before it,
without a mask; full steps of single keys, without a mask; and the remaining single keys together with the tile's own
pages, with a causal mask (without own pages if the index is not ``causal``). Keys come from ``physical_lists``. Lists
are read one step ahead; otherwise Triton would prefetch fewer keys and values (see ``tools/kernel_account.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import Remainder
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.triton_kernels.launch import launch_shape, launcher, major_capability
from minference_vllm.triton_kernels.physical_lists import physical_lists, place_of, split_keys
from minference_vllm.triton_kernels.tile_rows import add_begun, own_keys_from, packed_rows, past_skipped

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped_log2(b_score, scale_log2, softcap_log2):
    """``cap * tanh(score / cap)``, with ``tanh(x) = 1 - 2 / (exp(2 x) + 1)``, in base 2."""
    return softcap_log2 * (1.0 - 2.0 / (tl.exp2(b_score * scale_log2) + 1.0))


@triton.jit
def _attend_keys(
    b_query,  # [BLOCK_M, D]
    p_keys,  # [N, D]
    p_values,  # [N, D]
    m_score,  # [BLOCK_M, N] which keys a row attends, if MASKED: at least one, unless it has attended others before
    m_dim,  # [D] valid dimensions, if PADDED
    b_count,  # [N] float32, how often each key counts, if COUNTED
    b_out,  # [BLOCK_M, D] float32
    b_sum,  # [BLOCK_M]
    b_max,  # [BLOCK_M]
    scale_log2,
    softcap_log2,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    COUNTED: tl.constexpr,
    WITH_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One online-softmax step over N keys."""
    b_key = (tl.load(p_keys, mask=m_dim[None, :], other=0.0) if PADDED else tl.load(p_keys)).to(b_query.dtype)
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)  # [BLOCK_M, N]
    if WITH_SOFTCAP:
        b_score = capped_log2(b_score, scale_log2, softcap_log2)
        factor = 1.0
    else:
        factor = scale_log2
    if MASKED:
        b_score = tl.where(m_score, b_score, -float("inf"))
    # The scale is positive, so that scaling takes one fused multiply-add per score, and one multiplication per row.
    b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * factor)
    b_weight = tl.exp2(b_score * factor - b_new_max[:, None])
    if COUNTED:
        b_weight *= b_count[None, :]
    b_decay = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
    b_value = (tl.load(p_values, mask=m_dim[None, :], other=0.0) if PADDED else tl.load(p_values)).to(b_query.dtype)
    b_out = tl.dot(b_weight.to(b_query.dtype), b_value, b_out * b_decay[:, None], input_precision=PRECISION)
    return b_out, b_sum, b_new_max


# Sizes differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=["num_tiles", "num_parts", "num_rows", "max_blocks", "max_singles", "own_from"])
def sparse_attention_kernel(
    p_query,
    p_key,
    p_value,
    p_out,
    p_lse,
    p_sinks,
    p_left_key,
    p_left_value,
    p_bias,
    p_tile_starts,
    p_order,
    p_blocks,
    p_num_blocks,
    p_num_columns,
    p_table,
    p_listed,
    p_singles,
    p_counts,
    stride_query_row,
    stride_query_head,
    stride_out_row,
    stride_out_head,
    stride_key_head,
    stride_slot,
    num_tiles,
    num_parts,
    num_rows,
    max_blocks,
    max_singles,
    own_from,
    scale_log2,
    softcap_log2,
    key_scale,
    value_scale,
    LISTS: tl.constexpr,
    HEADS_PER_LIST: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_SOFTCAP: tl.constexpr,
    WITH_SINKS: tl.constexpr,
    WITH_REMAINDER: tl.constexpr,
    WITH_LSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    CONTINUES: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One program: BLOCK_M packed rows of one query tile, of the query heads that share a list."""
    PADDED: tl.constexpr = HEAD_SIZE != D
    i_item = tl.load(p_order + tl.program_id(0) // num_parts).to(tl.int32)
    i_part = num_parts - 1 - tl.program_id(0) % num_parts
    i_kv_head, i_list, i_tile = place_of(i_item, num_tiles, LISTS)
    tile_start = tl.load(p_tile_starts + i_tile).to(tl.int32)
    tile_end = tl.load(p_tile_starts + i_tile + 1).to(tl.int32)
    if tile_start + i_part * BLOCK_M // HEADS_PER_LIST < tile_end:
        o_dim = tl.arange(0, D)
        m_dim = o_dim < HEAD_SIZE
        o_row, o_query, o_head, m_row = packed_rows(
            i_item, i_part, p_tile_starts, num_tiles, LISTS, HEADS_PER_LIST, BLOCK_M
        )
        p_row = p_query + o_query * stride_query_row + o_head * stride_query_head
        m_tile = m_row[:, None] & m_dim[None, :]
        b_query = tl.load(p_row[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(COMPUTE)
        p_key += i_kv_head.to(tl.int64) * stride_key_head
        p_value += i_kv_head.to(tl.int64) * stride_key_head
        i_list_row = (i_list * num_tiles + i_tile).to(tl.int64)
        num_blocks = tl.load(p_num_blocks + i_list_row)
        num_before, num_left = split_keys(num_blocks, tile_start, tile_end, PAGE, BLOCK_N, CAUSAL)
        num_steps = num_before * PAGE // BLOCK_N
        num_singles = tl.load(p_num_columns + i_list_row) + num_left
        # Without a list the tile attends every page, in order.
        is_listed = tl.load(p_blocks + i_list_row * max_blocks) >= 0
        p_before = tl.where(is_listed, p_listed + i_list_row * max_blocks, p_table)
        p_singles += i_list_row * max_singles
        p_counts += i_list_row * max_singles

        if WITH_REMAINDER:
            # [1] if all rows are of one head: loading it for every row would take registers.
            o_left = o_head * num_tiles + i_tile if HEADS_PER_LIST > 1 else tl.full([1], i_list_row, tl.int64)
            o_left_dim = o_left[:, None] * HEAD_SIZE + o_dim[None, :]
            b_left_key = tl.load(p_left_key + o_left_dim, mask=m_dim[None, :], other=0.0)
            # Keys and values in the cache are not scaled yet, the remainder is.
            b_max = tl.sum(b_query.to(tl.float32) * b_left_key, 1) / key_scale
            b_max = capped_log2(b_max, scale_log2, softcap_log2) if WITH_SOFTCAP else b_max * scale_log2
            b_max += tl.load(p_bias + o_left) * LOG2E
            b_sum = tl.where(b_max > -float("inf"), 1.0, 0.0)
            b_left_value = tl.load(p_left_value + o_left_dim, mask=m_dim[None, :], other=0.0) / value_scale
            b_out = tl.broadcast_to(b_left_value, [BLOCK_M, D])
        else:
            b_out = tl.zeros([BLOCK_M, D], dtype=tl.float32)
            b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
        if CONTINUES:
            p_row = p_out + o_query * stride_out_row + o_head * stride_out_head
            b_begun_out = tl.load(p_row[:, None] + o_dim[None, :], mask=m_tile, other=0.0)
            b_begun = tl.load(p_lse + o_head * num_rows + o_query, mask=m_row, other=0.0) * LOG2E
            b_out, b_sum, b_max = add_begun(b_begun_out, b_begun, b_out, b_sum, b_max)
        o_slot = tl.arange(0, BLOCK_N)
        if PAGE % BLOCK_N == 0:
            o_in_page = o_slot[:, None] * stride_slot + o_dim[None, :]
            page = tl.load(p_before)
            for i_step in tl.range(0, num_steps, num_stages=STAGES):
                o_page = page.to(tl.int64) * UNIT
                if PAGE != BLOCK_N:
                    o_page += i_step * BLOCK_N % PAGE * stride_slot
                b_out, b_sum, b_max = _attend_keys(
                    b_query, p_key + o_page + o_in_page, p_value + o_page + o_in_page, m_dim, m_dim, m_dim,
                    b_out, b_sum, b_max, scale_log2, softcap_log2, False, PADDED, False, WITH_SOFTCAP, PRECISION,
                )  # fmt: skip
                page = tl.load(p_before + (i_step + 1) * BLOCK_N // PAGE)
        else:
            b_page = tl.load(p_before + o_slot // PAGE)
            for i_step in tl.range(0, num_steps, num_stages=STAGES):
                o_key = i_step * BLOCK_N + o_slot
                o_place = b_page.to(tl.int64) * UNIT
                if BLOCK_N % PAGE == 0:
                    o_place += o_slot % PAGE * stride_slot
                else:
                    o_place += o_key % PAGE * stride_slot
                o_before = o_place[:, None] + o_dim[None, :]
                b_out, b_sum, b_max = _attend_keys(
                    b_query, p_key + o_before, p_value + o_before, m_dim, m_dim, m_dim,
                    b_out, b_sum, b_max, scale_log2, softcap_log2, False, PADDED, False, WITH_SOFTCAP, PRECISION,
                )  # fmt: skip
                b_page = tl.load(p_before + (o_key + BLOCK_N) // PAGE)

        num_full = num_singles // BLOCK_N * BLOCK_N
        b_single = tl.load(p_singles + o_slot)
        for first in tl.range(0, num_full, BLOCK_N, num_stages=STAGES):
            o_columns = (b_single.to(tl.int64) * UNIT)[:, None] + o_dim[None, :]
            b_count = tl.load(p_counts + first + o_slot) if COUNTED else o_slot
            b_out, b_sum, b_max = _attend_keys(
                b_query, p_key + o_columns, p_value + o_columns, m_dim, m_dim, b_count,
                b_out, b_sum, b_max, scale_log2, softcap_log2, False, PADDED, COUNTED, WITH_SOFTCAP, PRECISION,
            )  # fmt: skip
            b_single = tl.load(p_singles + first + BLOCK_N + o_slot)

        # The remaining single keys lie before the tile, so position 0 stands for theirs. The first key of the first
        # step is visible to every row, so all rows have a maximum.
        p_singles += num_full
        p_counts += num_full
        num_left = num_singles - num_full
        if CAUSAL:
            own = tile_start // PAGE * PAGE
            last = tl.minimum(tile_start + ((i_part + 1) * BLOCK_M - 1) // HEADS_PER_LIST, tile_end - 1)
        else:
            # No own keys: entries after the remaining keys lie behind every row.
            own = tile_end
            last = tile_end - 1
        skipped = 0
        if CONTINUES:
            skipped, own, last = own_keys_from(own, own_from, last, tile_end)
        o_own = tl.arange(0, BLOCK_OWN)
        b_place = tl.load(p_singles + past_skipped(0, o_own, num_left, skipped, CONTINUES))
        for first in tl.range(0, num_left + last + 1 - own, BLOCK_OWN, num_stages=STAGES):
            o_position = tl.where(first + o_own < num_left, 0, own + first + o_own - num_left)
            o_rest = (b_place.to(tl.int64) * UNIT)[:, None] + o_dim[None, :]
            # All own keys count once, so there is no need to skip any here.
            b_own_count = tl.load(p_counts + first + o_own) if COUNTED else o_own
            b_out, b_sum, b_max = _attend_keys(
                b_query, p_key + o_rest, p_value + o_rest, o_position[None, :] <= o_row[:, None], m_dim, b_own_count,
                b_out, b_sum, b_max, scale_log2, softcap_log2, True, PADDED, COUNTED, WITH_SOFTCAP, PRECISION,
            )  # fmt: skip
            o_next = past_skipped(first + BLOCK_OWN, o_own, num_left, skipped, CONTINUES)
            b_place = tl.load(p_singles + first + BLOCK_OWN + o_next)

        # Read again: otherwise the output's addresses would occupy registers during the loops.
        i_item = tl.load(p_order + tl.program_id(0) // num_parts, volatile=True).to(tl.int32)
        _, o_query, o_head, m_row = packed_rows(
            i_item, i_part, p_tile_starts, num_tiles, LISTS, HEADS_PER_LIST, BLOCK_M
        )
        if WITH_SINKS:
            # One more key, with a score of its own and a value of zero.
            b_sum += tl.exp2(tl.load(p_sinks + o_head).to(tl.float32) * LOG2E - b_max)
        # Only an index without own keys has rows without any key. They get zeros, and a log-sum-exp of -inf.
        b_divisor = b_sum if CAUSAL else tl.where(b_sum > 0, b_sum, 1.0)
        b_out = b_out * (value_scale / b_divisor)[:, None]
        p_row = p_out + o_query * stride_out_row + o_head * stride_out_head
        m_tile = m_row[:, None] & m_dim[None, :]
        tl.store(p_row[:, None] + o_dim[None, :], b_out.to(p_out.dtype.element_ty), mask=m_tile)
        if WITH_LSE:
            tl.store(p_lse + o_head * num_rows + o_query, (b_max + tl.log2(b_sum)) * LN2, mask=m_row)


def compute_type(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """The type of products with queries of this type, and the precision of float32 products."""
    types = {torch.float32: tl.float32, torch.float16: tl.float16}
    return types.get(dtype, tl.bfloat16), "ieee" if dtype == torch.float32 else "tf32"


def scales_log2(inputs: Inputs) -> tuple[float, float]:
    """Scales of scores and of their soft cap in base 2, see ``capped_log2``. With a soft cap, the first is that of
    tanh's exponential."""
    scale = inputs.scale * inputs.cache.key_scale * LOG2E.value
    return (2 * scale / inputs.softcap if inputs.softcap else scale), inputs.softcap * LOG2E.value


def run(
    inputs: Inputs,
    index: SparseIndex,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    remainder: Remainder | None = None,
    own_from: int | None = None,
) -> None:
    """See ``kernels.kernel.Run``. The log-sum-exp includes the shares of sink and remainder.

    Args:
        inputs: head sizes up to 256. The query may be FP8; its scale is then part of ``inputs.scale``. The cache has
            layout ``rows``, is contiguous along ``D``, with the same strides for keys and values, and has the query's
            type or FP8 with scales. ``sinks`` is contiguous.
        index: on the device of the query.
        own_from: not None: another kernel has attended the tiles' own keys before this position, and further keys that
            are not in the index. ``out`` and ``lse`` have its results, and its softmax is continued. Not for FP8
            caches.

    Raises:
        ValueError: the cache has another layout, or other strides for values than for keys.
    """
    query, cache, sinks = inputs.query, inputs.cache, inputs.sinks
    assert remainder is None or all(part.is_contiguous() for part in remainder)
    if cache.layout != "rows":
        raise ValueError(f"the Triton kernel reads pages of plain rows, not {cache.layout!r}")
    chunk = len(query)
    major = major_capability(query)
    compute, precision = compute_type(query.dtype)
    launch = launch_shape(major, cache.head_size, compute.primitive_bitwidth // 8, cache.key.element_size())
    lists = physical_lists(inputs, index, launch.block_n)
    counts = lists.singles if lists.counts is None else lists.counts
    parts = triton.cdiv(min(index.tiling.tile, chunk) * index.heads_per_list, launch.block_m)
    launcher(sparse_attention_kernel, (index.num_lists * index.num_tiles * parts,))(
        query, cache.key, cache.value, out, query if lse is None else lse, query if sinks is None else sinks,
        *((query, query, query) if remainder is None else remainder),
        index.tiling.starts, lists.order, index.blocks, index.num_blocks, index.num_columns,
        lists.table, lists.listed, lists.singles, counts,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), cache.key.stride(1), cache.key.stride(2),
        index.num_tiles, parts, chunk, index.blocks.shape[2], lists.max_singles, own_from or 0,
        *scales_log2(inputs),
        cache.key_scale, cache.value_scale,
        LISTS=inputs.group // index.heads_per_list,
        HEADS_PER_LIST=index.heads_per_list,
        HEAD_SIZE=cache.head_size,
        D=max(16, triton.next_power_of_2(cache.head_size)),
        PAGE=cache.block_size,
        UNIT=lists.unit,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_OWN=launch.block_own,
        STAGES=launch.stages,
        COMPUTE=compute,
        PRECISION=precision,
        WITH_SOFTCAP=inputs.softcap != 0.0,
        WITH_SINKS=sinks is not None,
        WITH_REMAINDER=remainder is not None,
        WITH_LSE=lse is not None,
        CAUSAL=index.causal,
        CONTINUES=own_from is not None,
        COUNTED=lists.counts is not None,
        num_warps=launch.num_warps,
    )  # fmt: skip
