"""Batches on every page layout that our CPU kernels read."""

from __future__ import annotations

import functools

import pytest
import torch
from paged_inputs import PagedBatch, make_batch

from minference_vllm.core.paged_cache import Layout, PagedCache, unpack_keys, unpack_values
from minference_vllm.kernels.native import library

needs_native = pytest.mark.skipif(library.unavailable_reason() is not None, reason=str(library.unavailable_reason()))
LAYOUTS: tuple[Layout, ...] = ("rows", "transposed", "amx")
BUILDS = (
    ("amx", torch.bfloat16),
    ("avx512bf16", torch.bfloat16),
    ("avx2", torch.bfloat16),
    ("avx2", torch.float16),
    ("avx2", torch.float32),
)
"""Builds of the kernels, and types that each serves."""


def in_layout(batch: PagedBatch, layout: Layout) -> PagedCache:
    """The batch's pages in a layout, keys and values of a page side by side as in vLLM's cache."""
    if layout == "amx" and batch.key_cache.dtype != torch.bfloat16:
        pytest.skip("pages in tiles of the AMX unit hold bfloat16")
    blocks, size, heads, dim = batch.key_cache.shape
    place = torch.arange(size * dim).view(size, dim)
    stored = torch.empty(blocks, heads, 2, size * dim, dtype=batch.key_cache.dtype)
    for half, unpack, cache in ((0, unpack_keys, batch.key_cache), (1, unpack_values, batch.value_cache)):
        stored[:, :, half, unpack(place, layout).flatten()] = cache.transpose(1, 2).flatten(2)
    pages = stored.view(blocks, heads, 2, size, dim)
    return PagedCache(pages[:, :, 0], pages[:, :, 1], layout)


@functools.cache
def small_batch(
    chunk: int, context: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, block_size: int = 32
) -> PagedBatch:
    """One request, with NaN past its last token."""
    return make_batch([chunk], [context], heads, kv_heads, head_size, block_size, dtype, behind=torch.nan)


def budget(dtype: torch.dtype) -> float:
    """Tolerance of an output, as a share of the largest: two roundings to the type (of the weights, where the
    build multiplies bf16, and of the output); in float32 the exponential's error, and a sum of hundreds."""
    return max(2 * torch.finfo(dtype).eps, 3e-6)
