"""The two ways in which ``block_table`` passes memory to vLLM's CPU kernel: in place, and copied."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.block_table import cpu as block_table
from minference_vllm.kernels.block_table import cpu_ops
from minference_vllm.patterns.kinds import VerticalSlash
from minference_vllm.selection.build import build_index
from minference_vllm.selection.torch_scores import TorchScores

SIZE, HEADS, KV_HEADS, DIM, CONTEXT, LENGTH = 32, 4, 2, 64, 150, 700
SCALE = DIM**-0.5


@functools.cache
def chunk(
    dtype: torch.dtype = torch.bfloat16,
    size: int = SIZE,
    kv_heads: int = KV_HEADS,
    length: int = LENGTH,
    elsewhere: float = 0.0,
) -> tuple[Inputs, SparseIndex, torch.Tensor]:
    """Inputs with a cache in the kernel's layout, index with single columns, and the float64 answer.

    Args:
        elsewhere: value of the cache slots that hold no token of the sequence.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(length - CONTEXT, HEADS, DIM, generator=generator).to(dtype)
    keys, values = (torch.randn(length, kv_heads, DIM, generator=generator).to(dtype) for _ in range(2))
    blocks = -(-length // size)
    pages = torch.randperm(blocks + 3, generator=generator)[:blocks]
    memory = torch.full((blocks + 3, kv_heads, 2 * size, DIM), elsewhere, dtype=dtype)
    position = torch.arange(length)
    slots = pages[position // size] * size + position % size
    cpu_ops.write_pages(keys, values, memory, slots, cpu_ops.isa_for(dtype, size, DIM))
    layout = cpu_ops.layout_for(dtype, size, DIM)
    assert layout is not None
    key, value = memory.chunk(2, dim=2)
    inputs = Inputs(query, PagedCache(key, value, layout), pages, Chunk(0, 0, CONTEXT, length), SCALE)
    by_head = keys.transpose(0, 1), values.transpose(0, 1)
    tiling = Tiling.of(CONTEXT, length, size, 128, column_multiple=size)
    # Scores of the rows, since the pages may contain NaN.
    scores = TorchScores(Inputs.of_rows(query, *by_head, SCALE, size))
    index = build_index(tiling, [VerticalSlash(vertical=60, slash=0)] * HEADS, scores)
    assert bool(index.num_columns.any())
    return inputs, index, reference.masked_attention(query, *by_head, index.to_mask(), SCALE)


def attended(inputs: Inputs, index: SparseIndex) -> torch.Tensor:
    out = torch.full_like(inputs.query, torch.nan)
    block_table.run(inputs, index, out)
    return out


def test_memory_is_used_in_place_and_copied_where_the_kernel_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, index, expected = chunk()
    copies: list[object] = []
    copied = block_table._copied

    def watched(*arguments: Any) -> Any:
        copies.append(copied(*arguments))
        return copies[-1]

    monkeypatch.setattr(block_table, "_copied", watched)

    in_place = attended(inputs, index)
    assert not copies
    assert float((in_place.double() - expected).abs().max()) < 0.01

    monkeypatch.setattr(block_table, "MAX_PAGE_NUMBER", 0)
    far = attended(inputs, index)
    assert copies
    assert torch.equal(far, in_place)


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "copied"])
@pytest.mark.parametrize("elsewhere", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_lies_behind_the_last_token_makes_no_difference(
    dtype: torch.dtype, size: int, kv_heads: int, elsewhere: float, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_place:
        monkeypatch.setattr(block_table, "_copied", None)
    else:
        monkeypatch.setattr(block_table, "MAX_PAGE_NUMBER", 0)
    outputs = []
    for filled in (0.0, elsewhere):
        inputs, index, expected = chunk(dtype, size, kv_heads, elsewhere=filled)
        assert LENGTH % size, "the last page is not full"
        stored = inputs.cache.key, inputs.cache.value
        before = [part.clone() for part in stored]
        outputs.append(attended(inputs, index))
        for part, copy in zip(stored, before, strict=True):
            torch.testing.assert_close(part, copy, rtol=0, atol=0, equal_nan=True)
    clean, found = outputs
    assert float((clean.double() - expected).abs().max()) < 0.01
    assert torch.equal(found, clean)


def test_a_full_last_page_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory past its last token."""
    monkeypatch.setattr(block_table, "_with_clean_end", None)
    inputs, index, expected = chunk(length=22 * SIZE)
    assert float((attended(inputs, index).double() - expected).abs().max()) < 0.01
