"""Mean keys of pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.triton_kernels.launch import launcher

NUM_WARPS = 4


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


def mean_keys(cache: PagedCache, pages: torch.Tensor, seq_len: int, first: int, last: int) -> torch.Tensor:
    """``torch_scores.mean_keys`` of KV heads ``[first, last)`` straight from the pages: float32 ``[heads, N, D]``.

    Args:
        cache: layout ``rows``, contiguous along ``D``.
        pages: int64 ``[N]``, contiguous.
    """
    blocks = triton.cdiv(seq_len, cache.block_size)
    means = torch.empty(last - first, blocks, cache.head_size, device=pages.device)
    launcher(block_mean_kernel, (blocks, last - first))(
        cache.key, pages, means, *cache.key.stride()[:3], first, seq_len, cache.key_scale,
        HEAD_SIZE=cache.head_size,
        D=triton.next_power_of_2(cache.head_size),
        PAGE=cache.block_size,
        SLOTS=triton.next_power_of_2(cache.block_size),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return means
