"""Run a sparse index as a batch of short paged-attention requests on vLLM's FlashAttention: ``block_table`` on GPUs.

Blocks are read in place. Single columns are gathered into scratch pages, one per virtual request, attended in a second
call and merged by log-sum-exp. There is no host synchronisation: shapes come from the index's planned capacity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.block_table.virtual_requests import VirtualRequests, by_list, by_row

SCRATCH_BYTES = 128 << 20
"""Memory for the columns that are gathered at a time, keys and values together."""
DTYPES = (torch.bfloat16, torch.float16)
PAGE_MULTIPLE = 16
"""FlashAttention needs page sizes that are multiples of this."""
MAX_HEAD_SIZE = 256


def run(
    inputs: Inputs,
    index: SparseIndex,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> None:
    """See ``kernels.kernel.Run``; bf16 or fp16.

    Args:
        index: with a list for every tile (``plan_capacity(list_everything=True)``).
        attend: replaces vLLM's ``flash_attn_varlen_func``.
    """
    query, cache, pages = inputs.query, inputs.cache, inputs.pages
    attend = attend or _flash_attention()
    chunk, _, dim = query.shape
    requests = VirtualRequests.of(index, cache.num_kv_heads)
    key, value, page_step = pages_of_one_head(cache)
    queries = by_list(query, index)
    result, found_lse = attend(
        q=queries,
        k=key,
        v=value,
        cu_seqlens_q=requests.query_start_loc.to(torch.int32),
        max_seqlen_q=min(index.tiling.tile, chunk),
        seqused_k=requests.seq_lens(index.tiling.block_size),
        max_seqlen_k=index.blocks.shape[2] * index.tiling.block_size,
        block_table=requests.physical(pages, page_step),
        softmax_scale=inputs.scale,
        causal=True,
        return_softmax_lse=True,
    )
    width = -(-index.columns.shape[2] // PAGE_MULTIPLE) * PAGE_MULTIPLE
    if index.columns.shape[2] > 1:
        at_once = max(1, SCRATCH_BYTES // (2 * width * dim * query.element_size()))
        for first in range(0, index.num_lists * index.num_tiles, at_once):
            last = min(first + at_once, index.num_lists * index.num_tiles)
            _add_columns(queries, inputs, index, requests, (first, last), width, result, found_lse, attend)
    out.unflatten(1, (index.num_lists, -1)).copy_(by_row(result, index))
    if lse is not None:
        lse.unflatten(0, (index.num_lists, -1)).copy_(found_lse.unflatten(1, (index.num_lists, -1)).transpose(0, 1))


def unsupported_cache_reason(dtype: torch.dtype, cache: PagedCache) -> str | None:
    """Why FlashAttention cannot serve this cache, or None when it can."""
    if dtype not in DTYPES or cache.key.dtype != dtype:
        return f"queries in {dtype} and a cache in {cache.key.dtype}; FlashAttention takes both in bf16 or fp16"
    if cache.block_size % PAGE_MULTIPLE:
        return f"pages of {cache.block_size} tokens are no multiple of {PAGE_MULTIPLE}"
    if cache.head_size % 8 or cache.head_size > MAX_HEAD_SIZE:
        return f"heads of size {cache.head_size} are no multiple of 8 up to {MAX_HEAD_SIZE}"
    stride_page, stride_head, _, stride_dim = cache.key.stride()
    if cache.key.stride() != cache.value.stride() or stride_dim != 1:
        return "keys and values differ in strides, or a head's elements do not lie side by side"
    if cache.num_kv_heads > 1 and stride_page % stride_head:
        return f"a page's stride, {stride_page}, is no multiple of a head's, {stride_head}"
    if cache.key.shape[0] * stride_page // max(1, min(stride_page, stride_head)) >= 1 << 31:
        return "pages of one head would not be numbered in 32 bits"
    return None


def _flash_attention() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    def attend(**arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flash_attn_varlen_func(**arguments, fa_version=get_flash_attn_version())[:2]
        return out, lse

    return attend


def pages_of_one_head(cache: PagedCache) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Views of keys and values in pages of one head, ``[count, B, 1, D]``: head ``h`` of page ``p`` of the cache is
    page ``p * page_step + h`` of the view. The pages overlap if heads are interleaved within tokens (NHD).

    Returns:
        keys, values, page_step.

    Raises:
        ValueError: see ``unsupported_cache_reason``.
    """
    reason = unsupported_cache_reason(cache.key.dtype, cache)
    if reason:
        raise ValueError(f"kernel 'block_table' cannot run: {reason}")
    blocks, heads, size, dim = cache.key.shape
    stride_page, stride_head, stride_slot, _ = cache.key.stride()
    unit = stride_head if heads > 1 else stride_page
    count = ((blocks - 1) * stride_page + (heads - 1) * stride_head) // unit + 1
    shape, strides = (count, size, 1, dim), (unit, stride_slot, dim, 1)
    return cache.key.as_strided(shape, strides), cache.value.as_strided(shape, strides), stride_page // unit


def _add_columns(
    queries: torch.Tensor,
    inputs: Inputs,
    index: SparseIndex,
    requests: VirtualRequests,
    part: tuple[int, int],
    width: int,
    result: torch.Tensor,
    lse: torch.Tensor,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Merge the single columns of requests ``[first, last)`` into ``result`` and ``lse``, in place."""
    first, last = part
    size, tiles, chunk = index.tiling.block_size, index.num_tiles, index.tiling.seq_len - index.tiling.context_len
    begin, end = _first_row(index, first), _first_row(index, last)
    positions = index.columns.view(index.num_lists * tiles, -1)[first:last].long().clamp(min=0)
    positions = torch.nn.functional.pad(positions, (0, width - positions.shape[1]))
    kv_head = requests.kv_head[first:last, None].expand_as(positions)
    keys, values = inputs.cache.gather_rows(inputs.pages[positions // size], positions % size, kv_head)
    count = requests.num_columns[first:last]
    starts = requests.query_start_loc[first : last + 1]
    extra, extra_lse = attend(
        q=queries[begin:end],
        k=keys.unsqueeze(2),
        v=values.unsqueeze(2),
        cu_seqlens_q=(starts - begin).to(torch.int32),
        max_seqlen_q=min(index.tiling.tile, chunk),
        seqused_k=count.to(torch.int32),
        max_seqlen_k=width,
        block_table=torch.arange(last - first, dtype=torch.int32, device=queries.device)[:, None],
        softmax_scale=inputs.scale,
        causal=False,
        return_softmax_lse=True,
    )
    some = torch.repeat_interleave(count > 0, starts[1:] - starts[:-1], output_size=end - begin)
    share = torch.where(some, torch.sigmoid(extra_lse - lse[:, begin:end]), 0.0).T[:, :, None]
    own = result[begin:end]
    own += torch.where(some[:, None, None], (extra - own) * share, 0.0).to(own.dtype)
    own_lse = lse[:, begin:end]
    own_lse.copy_(torch.where(some, torch.logaddexp(own_lse, extra_lse), own_lse))


def _first_row(index: SparseIndex, request: int) -> int:
    """Row of a virtual request's first query, computed on the host."""
    which, tile = divmod(request, index.num_tiles)
    chunk = index.tiling.seq_len - index.tiling.context_len
    position = (index.tiling.context_len // index.tiling.tile + tile) * index.tiling.tile
    return which * chunk + max(position, index.tiling.context_len) - index.tiling.context_len
