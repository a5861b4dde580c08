"""Run a sparse index as a batch of short paged-attention requests on vLLM's CPU kernel.

A page of one KV head is itself a page of a one-head cache, ``block * HK + kv_head``: a view, no copy. Single
columns are first copied into scratch pages of the same layout, and so is the sequence's last page, if it is not full.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.block_table import cpu_ops
from minference_vllm.kernels.block_table.gathered_columns import GatheredColumns, gather_columns
from minference_vllm.kernels.block_table.virtual_requests import VirtualRequests, by_list, by_row

SCRATCH_PAGES = 512
"""Pages of gathered columns at a time; more would be evicted from the last-level cache before they are read."""


def run(inputs: Inputs, index: SparseIndex, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """See ``kernels.kernel.Run``; the cache may have any layout, and ``lse`` is not supported.

    Raises:
        ValueError: ``lse`` is not None.
    """
    if lse is not None:
        raise ValueError("vLLM's CPU kernel gives no log-sum-exp")
    query, cache, pages = inputs.query, inputs.cache, inputs.pages
    size, kv_heads = cache.block_size, cache.num_kv_heads
    column_pages = index.num_columns.view(-1).long() // size
    slices = _slices(column_pages)
    scratch_pages = max(int(column_pages[first:last].sum()) for first, last in slices)
    if index.tiling.seq_len % size:
        scratch_pages += kv_heads
    memory = _in_place(cache, pages, scratch_pages) or _copied(cache, pages, scratch_pages)
    if index.tiling.seq_len % size:
        memory = _with_clean_end(memory, cache, pages, index.tiling.seq_len)
    queries = by_list(query, index)
    result = torch.empty_like(queries)

    requests = VirtualRequests.of(index, kv_heads)
    physical = requests.physical(memory.pages, kv_heads)
    seq_lens = requests.seq_lens(size, column_pages)
    query_start_loc = requests.query_start_loc
    columns = gather_columns(index, cache, pages)

    for first, last in slices:
        page_counts = column_pages[first:last]
        most = int(page_counts.max())
        table = torch.zeros(last - first, most + physical.shape[1], dtype=torch.int32)
        place = page_counts[:, None] + torch.arange(physical.shape[1])
        table.scatter_(1, place, physical[first:last])
        if most:
            _write_columns(index, columns, first, last, memory.scratch)
            own = torch.arange(most) < page_counts[:, None]
            table[:, :most][own] = memory.first_scratch + torch.arange(int(page_counts.sum()), dtype=torch.int32)
        rows = slice(int(query_start_loc[first]), int(query_start_loc[last]))
        cpu_ops.attend(
            queries[rows],
            memory.key,
            memory.value,
            table,
            (query_start_loc[first : last + 1] - query_start_loc[first]).to(torch.int32),
            seq_lens[first:last],
            inputs.scale,
            result[rows],
        )
    out.unflatten(1, (index.num_lists, -1)).copy_(by_row(result, index))


def _slices(column_pages: torch.Tensor) -> list[tuple[int, int]]:
    """Ranges of virtual requests whose gathered columns fit into the scratch pages together."""
    group = (column_pages.cumsum(0) - 1).clamp(min=0) // SCRATCH_PAGES
    borders = [0, *(torch.nonzero(group[1:] != group[:-1]).view(-1) + 1).tolist(), len(column_pages)]
    return list(itertools.pairwise(borders))


def _write_columns(index: SparseIndex, columns: GatheredColumns, first: int, last: int, scratch: torch.Tensor) -> None:
    """Write the columns of virtual requests ``[first, last)``, one after the other, into scratch pages."""
    tiles = index.num_tiles
    wanted = index.columns.view(index.num_heads * tiles, -1)[first:last]
    head = torch.arange(first, last) // tiles
    rows = columns.row_of[head[:, None], wanted.long().clamp(min=0)][wanted >= 0]
    _, _, twice_size, dim = scratch.shape
    cpu_ops.write_pages(
        columns.keys.index_select(0, rows).unsqueeze(1),
        columns.values.index_select(0, rows).unsqueeze(1),
        scratch,
        torch.arange(len(rows)),
        cpu_ops.isa_for(scratch.dtype, twice_size // 2, dim),
    )


@dataclass(frozen=True)
class _Memory:
    """A cache as the kernel sees it: pages of one head each, and scratch pages within reach of its page numbers."""

    key: torch.Tensor
    """``[num_blocks * HK, 1, B, D]``: page ``b * HK + h``."""
    value: torch.Tensor
    pages: torch.Tensor
    """int64 ``[N]``, physical page of each logical block."""
    scratch: torch.Tensor
    """``[count, 1, 2 * B, D]``."""
    first_scratch: int
    """Number of the first scratch page, relative to the first page of ``key``. A multiple of ``HK``, so that ``HK``
    scratch pages can serve as a page of the cache."""


MAX_PAGE_NUMBER = 1 << 31
_scratch: dict[torch.dtype, torch.Tensor] = {}


def _in_place(cache: PagedCache, pages: torch.Tensor, count: int) -> _Memory | None:
    """The cache in place, or None if the kernel cannot address it.

    The kernel computes a page's address as base + number * stride, with signed 32-bit numbers and 64-bit strides, so
    scratch memory outside the cache is addressable too, provided that it starts a whole number of the cache's pages
    away.
    """
    blocks, heads, size, dim = cache.key.shape
    stride = 2 * size * dim
    dtype, width = cache.key.dtype, cache.key.element_size()
    side_by_side = cache.value.data_ptr() - cache.key.data_ptr() == size * dim * width
    if cache.layout != cpu_ops.layout_for(dtype, size, dim) or not side_by_side:
        return None
    if cache.key.stride() != (heads * stride, stride, dim, 1):
        return None
    buffer = _scratch.get(dtype)
    if buffer is None or buffer.numel() < (count + heads) * stride:
        buffer = _scratch[dtype] = torch.empty((count + heads) * stride, dtype=dtype)
    base = cache.key.data_ptr()
    skip = -(buffer.data_ptr() - base) % (heads * stride * width) // width
    number = (buffer.data_ptr() + skip * width - base) // (stride * width)
    if not -MAX_PAGE_NUMBER <= number < MAX_PAGE_NUMBER - count:
        return None
    shape, strides = (blocks * heads, 1, size, dim), (stride, stride, dim, 1)
    scratch = buffer[skip : skip + count * stride].view(count, 1, 2 * size, dim)
    return _Memory(cache.key.as_strided(shape, strides), cache.value.as_strided(shape, strides), pages, scratch, number)


def _copied(cache: PagedCache, pages: torch.Tensor, count: int) -> _Memory:
    """A copy of the sequence's pages in the kernel's layout, followed by the scratch pages."""
    _, heads, size, dim = cache.key.shape
    memory = torch.empty(len(pages) * heads + count, 1, 2 * size, dim, dtype=cache.key.dtype)
    own, scratch = memory.split([len(pages) * heads, count])
    cpu_ops.pack(PagedCache(cache.key[pages], cache.value[pages], cache.layout), own.view(-1, heads, 2 * size, dim))
    key, value = memory.chunk(2, dim=2)
    return _Memory(key, value, torch.arange(len(pages)), scratch, len(pages) * heads)


def _with_clean_end(memory: _Memory, cache: PagedCache, pages: torch.Tensor, seq_len: int) -> _Memory:
    """Copy the last page of the sequence to the first scratch pages, with zeros behind its last token.

    The kernel multiplies the values behind it by weights of 0. In a cache they are stale data, and NaN or inf times 0
    is NaN.
    """
    _, heads, size, dim = cache.key.shape
    last, filled = divmod(seq_len, size)
    keys, values = cache.rows_by_head(pages[last : last + 1])
    end, scratch = memory.scratch.split([heads, len(memory.scratch) - heads])
    end.zero_()
    cpu_ops.write_pages(
        keys[:, :filled].transpose(0, 1),
        values[:, :filled].transpose(0, 1),
        end.view(1, heads, 2 * size, dim),
        torch.arange(filled),
        cpu_ops.isa_for(end.dtype, size, dim),
    )
    replaced = memory.pages.clone()
    replaced[last] = memory.first_scratch // heads
    return replace(memory, pages=replaced, scratch=scratch, first_scratch=memory.first_scratch + heads)
