"""Paged inputs for tests of the Triton kernels, which run in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from minference_vllm import SparseIndex, reference, sparse_prefill
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.patterns.kinds import HeadPattern


def paged(rows: torch.Tensor, pages: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[S, HK, D]`` rows as ``[num_blocks, HK, B, D]``; everything that the sequence does not own is NaN: other
    pages, and the last page past the end."""
    length, kv_heads, dim = rows.shape
    padded = torch.full((len(pages) * block_size, kv_heads, dim), torch.nan)
    padded[:length] = rows.float()
    cache = torch.full((len(pages) + 2, block_size, kv_heads, dim), torch.nan)
    cache[pages] = padded.view(len(pages), block_size, kv_heads, dim)
    return cache.to(rows.dtype).transpose(1, 2)


def side_by_side(cache: PagedCache) -> PagedCache:
    """Heads outside of tokens (HND), as vLLM lays them out in one tensor."""
    both = torch.cat([cache.key, cache.value], -1)
    return replace(cache, key=both[..., : cache.head_size], value=both[..., cache.head_size :])


def with_gaps(cache: PagedCache) -> PagedCache:
    """Strides that are multiples of 8 and not of 16; the gaps are NaN."""

    def spread(pages: torch.Tensor) -> torch.Tensor:
        blocks, heads, size, dim = pages.shape
        wide = torch.full((blocks, heads + 1, size + 1, dim + 8), torch.nan).to(pages.dtype)
        wide[:, :heads, :size, :dim] = pages
        return wide[:, :heads, :size, :dim]

    return replace(cache, key=spread(cache.key), value=spread(cache.value))


LAYOUTS: dict[str, Callable[[PagedCache], PagedCache]] = {
    "heads inside of tokens": lambda cache: cache,
    "side by side": side_by_side,
    "gaps": with_gaps,
}


def shuffled(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_size: int,
    scale: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> Inputs:
    """Inputs from rows ``[chunk, H, D]`` and ``[S, HK, D]``, in pages of random order; see ``paged`` for the rest."""
    blocks = -(-len(keys) // block_size)
    pages = torch.randperm(blocks + 2)[:blocks]
    cache = PagedCache(paged(keys, pages, block_size), paged(values, pages, block_size), "rows", key_scale, value_scale)
    chunk = Chunk(0, 0, len(keys) - len(query), len(keys))
    return Inputs(query, cache, pages, chunk, scale, softcap, sinks)


def row_counts(index: SparseIndex) -> torch.Tensor:
    """float32 ``[H, chunk, S]``: how often keys count in each row; includes keys up to the tile's last row."""
    tiling = index.tiling
    rows = torch.arange(tiling.context_len, tiling.seq_len)
    return index.tile_counts(torch.searchsorted(tiling.starts, rows, right=True) - 1, last=tiling.seq_len)


def prefill(
    context_len: int,
    seq_len: int,
    block_size: int,
    patterns: Sequence[HeadPattern],
    sharpness: float = 1.0,
    kv_heads: int = 2,
) -> tuple[Inputs, torch.Tensor, SparseIndex, torch.Tensor]:
    """``sparse_prefill`` through the Triton kernels on random float32 inputs: one query head of size 32 per pattern.

    Returns:
        the inputs as rows in order, for plain torch; the output and the index; and float64 attention under the index.
    """
    torch.manual_seed(1)
    dim = 32
    query = torch.randn(seq_len - context_len, len(patterns), dim) * sharpness
    keys, values = (torch.randn(seq_len, kv_heads, dim) for _ in range(2))
    inputs = shuffled(query, keys, values, block_size, dim**-0.5)
    out, (index,) = sparse_prefill(
        query,
        inputs.cache.key.transpose(1, 2),
        inputs.cache.value.transpose(1, 2),
        inputs.pages[None].to(torch.int32),
        torch.tensor([0, len(query)]),
        torch.tensor([seq_len]),
        patterns,
        kernel="triton",
        return_index=True,
    )
    rows = keys.transpose(0, 1), values.transpose(0, 1)
    counts = row_counts(index) if index.sampled else None
    expected = reference.masked_attention(query, *rows, index.to_mask(), inputs.scale, counts=counts)
    return Inputs.of_rows(query, *rows, inputs.scale, block_size), out, index, expected
