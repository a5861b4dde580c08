"""The two ways in which the block-table engine shows the kernel its memory: where it lies, and copied."""

from __future__ import annotations

import pytest
import torch

from minference_vllm import reference
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.block_table import cpu as block_table
from minference_vllm.kernels.block_table import cpu_ops as cpu_kernel
from minference_vllm.patterns.kinds import VerticalSlash
from minference_vllm.selection.build import SparseIndex, build_index
from minference_vllm.selection.probe_queries import Estimates

SIZE, HEADS, KV_HEADS, DIM, CONTEXT, LENGTH = 32, 4, 2, 64, 150, 700
SCALE = DIM**-0.5


def chunk() -> tuple[torch.Tensor, PagedCache, torch.Tensor, SparseIndex, torch.Tensor]:
    """Query, cache in the kernel's layout, pages, index with single columns, and the float64 answer."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(LENGTH - CONTEXT, HEADS, DIM, generator=generator).bfloat16()
    keys, values = (torch.randn(LENGTH, KV_HEADS, DIM, generator=generator).bfloat16() for _ in range(2))
    blocks = -(-LENGTH // SIZE)
    pages = torch.randperm(blocks + 3, generator=generator)[:blocks]
    memory = torch.zeros(blocks + 3, KV_HEADS, 2 * SIZE, DIM, dtype=torch.bfloat16)
    position = torch.arange(LENGTH)
    slots = pages[position // SIZE] * SIZE + position % SIZE
    cpu_kernel.write_pages(keys, values, memory, slots, cpu_kernel.isa_for(torch.bfloat16, SIZE, DIM))
    layout = cpu_kernel.layout_for(torch.bfloat16, SIZE, DIM)
    assert layout is not None
    key, value = memory.chunk(2, dim=2)
    by_head = keys.transpose(0, 1)
    tiling = Tiling.of(CONTEXT, LENGTH, SIZE, 128, column_multiple=SIZE)
    index = build_index(tiling, [VerticalSlash(vertical=60, slash=0)] * HEADS, Estimates(query, by_head, SCALE))
    assert bool(index.num_columns.any())
    expected = reference.masked_attention(query, by_head, values.transpose(0, 1), index.to_mask(), SCALE)
    return query, PagedCache(key, value, layout), pages, index, expected


def test_memory_is_used_in_place_and_copied_where_the_kernel_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    query, cache, pages, index, expected = chunk()
    copies: list[int] = []
    copied = block_table._copied
    monkeypatch.setattr(block_table, "_copied", lambda *arguments: copies.append(1) or copied(*arguments))

    in_place = torch.full_like(query, torch.nan)
    block_table.run(query, cache, pages, index, SCALE, in_place)
    assert not copies
    assert float((in_place.double() - expected).abs().max()) < 0.01

    monkeypatch.setattr(block_table, "MAX_PAGE_NUMBER", 0)
    far = torch.full_like(query, torch.nan)
    block_table.run(query, cache, pages, index, SCALE, far)
    assert copies
    assert torch.equal(far, in_place)
