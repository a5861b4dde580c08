"""Run a sparse index as a batch of short paged-attention requests on vLLM's own dense kernel.

Attention does not care about the order of keys, so "query tile I of head h attends blocks {a, b, c}" is a request with
block table ``[a, b, c]`` whose last block is the causal one. There is one such *virtual request* per query head and
tile. A page of one KV head is itself a page of a one-head cache, ``block * HK + kv_head``: a view, no copy. Single
columns are first copied into scratch pages of the same layout.
"""

from __future__ import annotations

import itertools

import torch

from minference_vllm.engines import cpu_kernel
from minference_vllm.engines.columns import GatheredColumns, gather_columns
from minference_vllm.index import SparseIndex
from minference_vllm.paged_cache import PagedCache

SCRATCH_PAGES = 512
"""Pages of gathered columns in flight; more would fall out of the last-level cache between writing and reading."""


def run(
    query: torch.Tensor, cache: PagedCache, pages: torch.Tensor, index: SparseIndex, scale: float, out: torch.Tensor
) -> None:
    """Attention of one chunk under ``index``, written to ``out``.

    Args:
        query: ``[chunk, H, D]``.
        cache: the layer's cache, in any layout.
        pages: int64 ``[N]``, the physical page of each logical block.
        out: like ``query``.
    """
    if cache.layout != cpu_kernel.layout_for(query.dtype, cache.block_size, cache.head_size):
        cache = cpu_kernel.pack(PagedCache(cache.key[pages], cache.value[pages], cache.layout))
        pages = torch.arange(len(pages))
    chunk, heads, dim = query.shape
    size, kv_heads, tiles = cache.block_size, cache.num_kv_heads, index.num_tiles
    by_head = query.transpose(0, 1).reshape(heads * chunk, 1, dim)
    result = torch.empty_like(by_head)
    key, value = one_head_view(cache.key), one_head_view(cache.value)

    kv_head = (torch.arange(heads) // (heads // kv_heads)).repeat_interleave(tiles)
    blocks = index.blocks.view(heads * tiles, -1)
    num_blocks = index.num_blocks.view(-1).long()
    physical = pages[blocks.long().clamp(min=0)] * kv_heads + kv_head[:, None]
    column_pages = index.num_columns.view(-1).long() // size
    starts, ends = index.tile_starts[:-1], index.tile_starts[1:]
    in_last_block = (ends - (ends - 1) // size * size).repeat(heads)
    seq_lens = ((num_blocks - 1 + column_pages) * size + in_last_block).to(torch.int32)
    query_start_loc = torch.zeros(heads * tiles + 1, dtype=torch.int64)
    torch.cumsum((ends - starts).repeat(heads), 0, out=query_start_loc[1:])
    columns = gather_columns(index, cache, pages)

    for first, last in _slices(column_pages):
        page_counts = column_pages[first:last]
        most = int(page_counts.max())
        table = torch.zeros(last - first, most + blocks.shape[1], dtype=torch.int32)
        place = page_counts[:, None] + torch.arange(blocks.shape[1])
        table.scatter_(1, place, physical[first:last].to(torch.int32))
        if most:
            first_page = _write_columns(index, columns, first, last, key)
            own = torch.arange(most) < page_counts[:, None]
            table[:, :most][own] = torch.arange(first_page, first_page + int(page_counts.sum()), dtype=torch.int32)
        rows = slice(int(query_start_loc[first]), int(query_start_loc[last]))
        cpu_kernel.attend(
            by_head[rows],
            key,
            value,
            table,
            (query_start_loc[first : last + 1] - query_start_loc[first]).to(torch.int32),
            seq_lens[first:last],
            scale,
            result[rows],
        )
    out.copy_(result.view(heads, chunk, dim).transpose(0, 1))


def one_head_view(cache: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, HK, B, D]`` -> ``[num_blocks * HK, 1, B, D]``, a view: page ``b * HK + h``."""
    blocks, heads, size, dim = cache.shape
    head_stride = cache.stride(1)
    if cache.stride(0) != heads * head_stride:
        raise ValueError(f"the heads of a page must lie next to each other; strides are {cache.stride()}")
    return cache.as_strided((blocks * heads, 1, size, dim), (head_stride, head_stride, dim, 1))


def _slices(column_pages: torch.Tensor) -> list[tuple[int, int]]:
    """Ranges of virtual requests whose gathered columns fit into the scratch pages together."""
    group = (column_pages.cumsum(0) - 1).clamp(min=0) // SCRATCH_PAGES
    borders = [0, *(torch.nonzero(group[1:] != group[:-1]).view(-1) + 1).tolist(), len(column_pages)]
    return list(itertools.pairwise(borders))


def _write_columns(index: SparseIndex, columns: GatheredColumns, first: int, last: int, key_view: torch.Tensor) -> int:
    """Write the columns of virtual requests ``[first, last)`` into scratch pages; returns the first page's number as
    seen from ``key_view``'s base address."""
    tiles = index.num_tiles
    wanted = index.columns.view(index.num_heads * tiles, -1)[first:last]
    head = torch.arange(first, last) // tiles
    rows = columns.row_of[head[:, None], wanted.long().clamp(min=0)][wanted >= 0]
    size, dim = key_view.shape[2:]
    scratch, number = _scratch_beside(key_view, len(rows) // size)
    cpu_kernel.write_pages(
        columns.keys.index_select(0, rows).unsqueeze(1),
        columns.values.index_select(0, rows).unsqueeze(1),
        scratch,
        torch.arange(len(rows)),
        cpu_kernel.isa_for(key_view.dtype, size, dim),
    )
    return number


_scratch: dict[torch.dtype, torch.Tensor] = {}


def _scratch_beside(key_view: torch.Tensor, count: int) -> tuple[torch.Tensor, int]:
    """Scratch pages that the kernel can reach from the cache's base address by page number.

    The kernel computes a page's address as base + number * stride, with signed 32-bit numbers and 64-bit strides, so
    memory outside the cache is addressable too, provided that it starts a whole number of pages away.

    Returns:
        ``[count, 1, 2 * B, D]`` scratch pages of the cache's own structure, and the number of the first.
    """
    stride, (size, dim) = key_view.stride(0), key_view.shape[2:]
    if stride != 2 * size * dim:
        raise ValueError(f"a page must hold keys and values side by side; its stride is {stride} elements")
    buffer = _scratch.get(key_view.dtype)
    if buffer is None or buffer.numel() < (count + 1) * stride:
        buffer = _scratch[key_view.dtype] = torch.empty((count + 1) * stride, dtype=key_view.dtype)
    width = key_view.element_size()
    skip = -(buffer.data_ptr() - key_view.data_ptr()) % (stride * width) // width
    number = (buffer.data_ptr() + skip * width - key_view.data_ptr()) // (stride * width)
    if not -(1 << 31) <= number < (1 << 31) - count:
        raise MemoryError("scratch memory lies too far from the KV cache to be addressed by 32-bit page numbers")
    return buffer[skip : skip + count * stride].view(count, 1, 2 * size, dim), number
