"""Attention under a ``SparseIndex`` over paged keys and values of any strides, in one online softmax.

A key is addressed by its position alone, ``pages[position // PAGE]`` and ``position % PAGE``, so a tile's blocks and
its single columns differ only in where the positions come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.triton_kernels.launch import launcher

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend_keys(
    b_query,  # [BLOCK_M, D]
    o_row,  # [BLOCK_M] positions of the rows
    b_position,  # [BLOCK_N] positions of the keys
    m_key,  # [BLOCK_N] which of them are there
    b_out,  # [BLOCK_M, D] float32
    b_sum,  # [BLOCK_M]
    b_max,  # [BLOCK_M]
    p_key,
    p_value,
    p_pages,
    stride_key_page,
    stride_key_slot,
    stride_value_page,
    stride_value_slot,
    scale_log2,
    softcap_log2,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WITH_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One online-softmax step over BLOCK_N keys."""
    o_dim = tl.arange(0, D)
    m_dim = o_dim < HEAD_SIZE
    b_page = tl.load(p_pages + b_position // PAGE, mask=m_key, other=0).to(tl.int64)
    b_slot = b_position % PAGE
    o_key = b_page * stride_key_page + b_slot * stride_key_slot
    o_value = b_page * stride_value_page + b_slot * stride_value_slot
    m_tile = m_key[:, None] & m_dim[None, :]
    b_key = tl.load(p_key + o_key[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(b_query.dtype)  # [BLOCK_N, D]
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
    if WITH_SOFTCAP:
        # cap * tanh(score / cap), with tanh(x) = 1 - 2 / (exp(2 x) + 1); everything in powers of two.
        b_score = softcap_log2 * (1.0 - 2.0 / (tl.exp2(b_score / softcap_log2 * (2.0 * LOG2E)) + 1.0))
    m_score = m_key[None, :]
    if CAUSAL:
        m_score = m_score & (b_position[None, :] <= o_row[:, None])
    b_score = tl.where(m_score, b_score, -float("inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
    # A row that has seen no key yet keeps a maximum of -inf; subtracting 0 then gives weights of 0, not NaN.
    b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
    b_weight = tl.exp2(b_score - b_shift[:, None])
    b_decay = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
    b_value = tl.load(p_value + o_value[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(b_query.dtype)
    b_out = tl.dot(b_weight.to(b_query.dtype), b_value, b_out * b_decay[:, None], input_precision=PRECISION)
    return b_out, b_sum, b_new_max


# Sizes differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["num_tiles", "num_rows", "max_blocks", "max_columns"])
def sparse_attention_kernel(
    p_query,
    p_key,
    p_value,
    p_out,
    p_lse,
    p_sinks,
    p_pages,
    p_tile_starts,
    p_blocks,
    p_num_blocks,
    p_columns,
    p_num_columns,
    stride_query_row,
    stride_query_head,
    stride_out_row,
    stride_out_head,
    stride_key_page,
    stride_key_head,
    stride_key_slot,
    stride_value_page,
    stride_value_head,
    stride_value_slot,
    num_tiles,
    num_rows,
    max_blocks,
    max_columns,
    scale_log2,
    softcap_log2,
    value_scale,
    GROUP: tl.constexpr,
    HEADS_PER_LIST: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_SOFTCAP: tl.constexpr,
    WITH_SINKS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program: BLOCK_M packed rows of one query tile, of the query heads that share a list.

    The heads of a row are packed side by side, as they lie in memory: short tiles fill a program, too.
    """
    i_tile, i_part, i_heads = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Positions take 32 bits: rows keep theirs in registers.
    tile_start = tl.load(p_tile_starts + i_tile).to(tl.int32)
    tile_end = tl.load(p_tile_starts + i_tile + 1).to(tl.int32)
    first = tile_start + i_part * BLOCK_M // HEADS_PER_LIST
    if first < tile_end:
        o_packed = i_part * BLOCK_M + tl.arange(0, BLOCK_M)
        o_row = tile_start + o_packed // HEADS_PER_LIST
        m_row = o_row < tile_end
        # Unsigned, or what addresses the output would not stay in registers beside the loops.
        o_query = (o_row - tl.load(p_tile_starts).to(tl.int32)).to(tl.uint32)
        o_head = (i_heads * HEADS_PER_LIST + o_packed % HEADS_PER_LIST).to(tl.uint32)
        o_dim = tl.arange(0, D)
        m_tile = m_row[:, None] & (o_dim < HEAD_SIZE)[None, :]
        p_row = p_query + o_query.to(tl.int64) * stride_query_row + o_head.to(tl.int64) * stride_query_head
        b_query = tl.load(p_row[:, None] + o_dim[None, :], mask=m_tile, other=0.0).to(COMPUTE)
        i_kv_head = (i_heads * HEADS_PER_LIST // GROUP).to(tl.int64)
        p_key += i_kv_head * stride_key_head
        p_value += i_kv_head * stride_value_head
        i_list = i_heads * num_tiles + i_tile
        p_blocks += i_list.to(tl.int64) * max_blocks
        p_columns += i_list.to(tl.int64) * max_columns
        num_blocks = tl.load(p_num_blocks + i_list)
        if CAUSAL:
            # Of the tile's own blocks, its last, those after the program's last row are not read.
            last = tl.minimum(tile_start + ((i_part + 1) * BLOCK_M - 1) // HEADS_PER_LIST, tile_end - 1)
            num_blocks -= (tile_end - 1) // PAGE - last // PAGE
        num_keys = num_blocks * PAGE
        num_columns = tl.load(p_num_columns + i_list)
        # Without a list the tile attends every block, in order.
        num_listed = tl.where(tl.load(p_blocks) >= 0, num_keys, 0)

        b_out = tl.zeros([BLOCK_M, D], dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
        for i_key in range(0, num_keys, BLOCK_N):
            o_key = i_key + tl.arange(0, BLOCK_N)
            m_key = o_key < num_keys
            m_listed = o_key < num_listed
            b_block = tl.where(m_listed, tl.load(p_blocks + o_key // PAGE, mask=m_listed, other=0), o_key // PAGE)
            b_position = b_block * PAGE + o_key % PAGE
            b_out, b_sum, b_max = _attend_keys(
                b_query, o_row, b_position, m_key & (b_position < tile_end), b_out, b_sum, b_max,
                p_key, p_value, p_pages, stride_key_page, stride_key_slot, stride_value_page, stride_value_slot,
                scale_log2, softcap_log2, HEAD_SIZE, D, PAGE, WITH_SOFTCAP, PRECISION, True,
            )  # fmt: skip
        for i_key in range(0, num_columns, BLOCK_N):
            o_key = i_key + tl.arange(0, BLOCK_N)
            m_key = o_key < num_columns
            b_position = tl.load(p_columns + o_key, mask=m_key, other=0)
            b_out, b_sum, b_max = _attend_keys(
                b_query, o_row, b_position, m_key, b_out, b_sum, b_max,
                p_key, p_value, p_pages, stride_key_page, stride_key_slot, stride_value_page, stride_value_slot,
                scale_log2, softcap_log2, HEAD_SIZE, D, PAGE, WITH_SOFTCAP, PRECISION, False,
            )  # fmt: skip
        if WITH_SINKS:
            # One more key, with a score of its own and a value of zero.
            b_sum += tl.exp2(tl.load(p_sinks + o_head).to(tl.float32) * LOG2E - b_max)
        b_out = b_out * (value_scale / b_sum)[:, None]
        b_out = b_out.to(p_out.dtype.element_ty)
        p_row = p_out + o_query.to(tl.int64) * stride_out_row + o_head.to(tl.int64) * stride_out_head
        tl.store(p_row[:, None] + o_dim[None, :], b_out, mask=m_tile)
        if WITH_LSE:
            tl.store(p_lse + o_head.to(tl.int64) * num_rows + o_query, (b_max + tl.log2(b_sum)) * LN2, mask=m_row)


@dataclass(frozen=True)
class LaunchShape:
    """How one variant is launched; found with ``tools/kernel_account.py``, not yet timed on a GPU."""

    block_m: int
    block_n: int
    num_warps: int = 8
    num_stages: int = 2


def launch_shape(major: int, head_size: int) -> LaunchShape:
    """By compute capability and head size: the largest that does not spill registers."""
    if head_size > 128:
        return LaunchShape(block_m=64, block_n=32)
    return LaunchShape(block_m=128, block_n=32 if major < 9 and head_size > 64 else 64)


def compute_type(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """What queries, keys and values are multiplied in, given the queries' type; and the precision of float32."""
    types = {torch.float32: tl.float32, torch.float16: tl.float16}
    return types.get(dtype, tl.bfloat16), "ieee" if dtype == torch.float32 else "tf32"


def run(inputs: Inputs, index: SparseIndex, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """See ``kernels.kernel.Run``. The log-sum-exp includes the sink's share.

    Args:
        inputs: head sizes up to 256; the query may be FP8, its scale is then part of ``inputs.scale``; the cache of
            layout ``rows``, a head's elements side by side, of the query's type or FP8 with scales; ``sinks``
            contiguous.
        index: on the device of the query.
    """
    query, cache, sinks = inputs.query, inputs.cache, inputs.sinks
    if cache.layout != "rows":
        raise ValueError(f"the Triton kernel reads pages of plain rows, not {cache.layout!r}")
    chunk = len(query)
    major = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 9
    compute, precision = compute_type(query.dtype)
    launch = launch_shape(major, cache.head_size)
    packed = min(index.tiling.tile, chunk) * index.heads_per_list
    grid = (index.num_tiles, triton.cdiv(packed, launch.block_m), index.num_lists)
    launcher(sparse_attention_kernel, grid)(
        query, cache.key, cache.value, out, query if lse is None else lse, query if sinks is None else sinks,
        inputs.pages, index.tiling.starts, index.blocks, index.num_blocks, index.columns, index.num_columns,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        cache.key.stride(0), cache.key.stride(1), cache.key.stride(2),
        cache.value.stride(0), cache.value.stride(1), cache.value.stride(2),
        index.num_tiles, chunk, index.blocks.shape[2], index.columns.shape[2],
        inputs.scale * cache.key_scale * LOG2E.value, inputs.softcap * LOG2E.value, cache.value_scale,
        GROUP=inputs.group,
        HEADS_PER_LIST=index.heads_per_list,
        HEAD_SIZE=cache.head_size,
        D=max(16, triton.next_power_of_2(cache.head_size)),
        PAGE=cache.block_size,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        COMPUTE=compute,
        PRECISION=precision,
        WITH_SOFTCAP=inputs.softcap != 0.0,
        WITH_SINKS=sinks is not None,
        WITH_LSE=lse is not None,
        CAUSAL=index.causal,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )  # fmt: skip
