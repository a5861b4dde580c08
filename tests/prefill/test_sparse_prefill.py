"""``sparse_prefill`` against float64 attention under the mask of the index that it used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prefill_checks import BFLOAT16, FLOAT16, FLOAT32, check

import minference_vllm
from minference_vllm import reference
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import whole_tile
from minference_vllm.patterns.kinds import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PeakThreshold,
    TriShape,
    VerticalSlash,
)
from minference_vllm.prefill.api import sparse_prefill

FULL: dict[str, HeadPattern] = {
    "dense": Dense(),
    "a_shape": AShape(sink=0, local=100_000),
    "tri_shape": TriShape(sink=0, local=0, last=100_000),
    "vertical": VerticalSlash(vertical=100_000, slash=100),
    "slash": VerticalSlash(vertical=30, slash=100_000),
    "block_sparse": BlockSparse(top_k=10_000),
    "coverage": Coverage(gamma=0.01, min_budget=100_000),
    "antidiagonal": Antidiagonal(tau=0.999_999),
    "peak_threshold": PeakThreshold(alpha=1e-9),
    "low_rank": LowRank(gamma=1 - 1e-9),
}
CASES: dict[str, dict[str, Any]] = {
    # Regular
    "whole_prompt": {"query_lens": [512], "context_lens": [0]},
    "second_chunk": {"query_lens": [256], "context_lens": [512]},
    # Lengths
    "one_token": {"query_lens": [1], "context_lens": [0]},
    "one_token_after_context": {"query_lens": [1], "context_lens": [300]},
    "odd_length": {"query_lens": [517], "context_lens": [0]},
    "page_borders": {"query_lens": [31, 32, 33, 63, 64, 65], "context_lens": [0] * 6},
    "tile_borders": {"query_lens": [127, 128, 129, 255, 256, 257], "context_lens": [0] * 6},
    "around_64_queries": {"query_lens": [63, 64, 65], "context_lens": [200, 200, 200]},
    # Context before the chunk
    "context_ends_at_a_page_border": {"query_lens": [200], "context_lens": [160]},
    "context_ends_at_a_tile_border": {"query_lens": [200], "context_lens": [256]},
    "context_ends_inside_a_page": {"query_lens": [201], "context_lens": [333]},
    "context_around_borders": {"query_lens": [100] * 4, "context_lens": [127, 129, 159, 161]},
    "chunk_within_one_page": {"query_lens": [9], "context_lens": [291]},
    "long_context_short_chunk": {"query_lens": [70], "context_lens": [1500]},
    # Several requests
    "several_requests": {"query_lens": [300, 1, 129, 45], "context_lens": [0, 77, 256, 13]},
    # Heads
    "gqa_1": {"heads": 4, "kv_heads": 4, "query_lens": [200], "context_lens": [150]},
    "gqa_4": {"heads": 8, "kv_heads": 2, "query_lens": [200], "context_lens": [150]},
    "gqa_7": {"heads": 14, "kv_heads": 2, "query_lens": [200], "context_lens": [150]},
    "gqa_8": {"heads": 8, "kv_heads": 1, "query_lens": [200], "context_lens": [150]},
    "one_head": {"heads": 1, "kv_heads": 1, "query_lens": [200], "context_lens": [150]},
    **{f"head_size_{size}": {"head_size": size, "context_lens": [100]} for size in (64, 80, 96, 128, 256)},
    # Pages and tiles
    **{f"pages_of_{size}": {"block_size": size, "context_lens": [211]} for size in (16, 32, 64, 128)},
    "tile_is_a_page": {"block_size": 64, "tile": 64, "context_lens": [211]},
    "large_tile": {"block_size": 32, "tile": 256, "context_lens": [211], "query_lens": [700]},
    "tile_is_rounded_up": {"block_size": 64, "tile": 100, "context_lens": [211]},
    "prompt_within_one_page": {"block_size": 128, "query_lens": [90]},
    # Types
    **{
        f"{str(dtype).removeprefix('torch.')}_head_size_{size}": {
            "dtype": dtype,
            "head_size": size,
            "query_lens": [200, 77],
            "context_lens": [0, 300],
        }
        for dtype in (BFLOAT16, FLOAT16, FLOAT32)
        for size in (64, 80)
    },
}


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_attention_under_its_own_mask(
    name: str, adaptive: bool, kernel_name: str, served_batch: Callable[..., Any]
) -> None:
    arguments = dict(CASES[name])
    tile = arguments.pop("tile", None)
    batch = served_batch(**arguments)
    patterns = batch.adaptive_patterns if adaptive else batch.patterns
    poisoned = torch.full_like(batch.query, torch.nan)
    before = [argument.clone() for argument in batch.arguments]
    out, indices = sparse_prefill(
        *batch.arguments, patterns, kernel=kernel_name, tile=tile, out=poisoned, return_index=True
    )
    assert out is poisoned
    check(batch, out, indices)
    for argument, copy in zip(batch.arguments, before, strict=True):
        torch.testing.assert_close(argument, copy, rtol=0, atol=0, equal_nan=True)
    for index in indices:
        assert index.tiling.block_size == batch.key_cache.shape[1]
        starts = index.tiling.starts[1:-1]
        assert not (starts % whole_tile(tile, index.tiling.block_size)).any()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("name", FULL)
def test_full_selection_is_dense_attention(
    name: str, dtype: torch.dtype, kernel_name: str, served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[333, 129], context_lens=[0, 211], dtype=dtype)
    out, indices = sparse_prefill(*batch.arguments, FULL[name], kernel=kernel_name, return_index=True)
    for request, index in enumerate(indices):
        causal = reference.causal_mask(batch.context_lens[request], int(batch.seq_lens[request]))
        assert torch.equal(index.to_mask(), causal.expand(8, -1, -1))
    check(batch, out, indices)


def test_where_a_prompt_is_cut_makes_no_difference_at_tile_borders(
    kernel_name: str, served_batch: Callable[..., Any]
) -> None:
    """For a pattern that reads no scores: tiles are aligned to the prompt, not to the chunk."""
    batch = served_batch(query_lens=[500], context_lens=[0])
    pattern = AShape(sink=32, local=64)
    whole = sparse_prefill(*batch.arguments, pattern, kernel=kernel_name)
    pieces = []
    for start, end in [(0, 128), (128, 384), (384, 500)]:
        starts, lengths = torch.tensor([0, end - start]), torch.tensor([end])
        caches = batch.key_cache, batch.value_cache, batch.block_table
        pieces.append(sparse_prefill(batch.query[start:end], *caches, starts, lengths, pattern, kernel=kernel_name))
    assert torch.equal(torch.cat(pieces), whole)


def test_one_pattern_serves_all_heads(kernel_name: str, served_batch: Callable[..., Any]) -> None:
    batch = served_batch()
    pattern = VerticalSlash(vertical=40, slash=100)
    one = sparse_prefill(*batch.arguments, pattern, kernel=kernel_name)
    assert torch.equal(one, sparse_prefill(*batch.arguments, [pattern] * 8, kernel=kernel_name))


def test_the_softmax_scale_is_the_callers(kernel_name: str, served_batch: Callable[..., Any]) -> None:
    batch = served_batch(query_lens=[300], context_lens=[100])
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, scale=0.3, kernel=kernel_name, return_index=True)
    check(batch, out, indices, scale=0.3)


def test_repeated_calls_agree(kernel_name: str, served_batch: Callable[..., Any]) -> None:
    batch = served_batch(query_lens=[400, 130], context_lens=[0, 300])
    first = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name)
    assert torch.equal(first, sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name))


def test_the_number_of_threads_makes_no_difference(kernel_name: str, served_batch: Callable[..., Any]) -> None:
    batch = served_batch(query_lens=[400, 130], context_lens=[0, 300])
    alone = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(together, alone, rtol=0.02, atol=0.01)


def test_auto_picks_a_kernel(paged_batch: Callable[..., Any]) -> None:
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        batch = paged_batch(dtype=dtype)
        out, indices = sparse_prefill(*batch.arguments, batch.patterns, return_index=True)
        check(batch, out, indices)


def test_the_package_offers_it() -> None:
    assert minference_vllm.sparse_prefill is sparse_prefill
    assert minference_vllm.SparseIndex is SparseIndex


def test_many_columns_need_several_rounds_of_scratch_pages(
    monkeypatch: pytest.MonkeyPatch, kernel_name: str, served_batch: Callable[..., Any]
) -> None:
    monkeypatch.setattr("minference_vllm.kernels.block_table.cpu.SCRATCH_PAGES", 5)
    batch = served_batch(query_lens=[600], context_lens=[200])
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name, return_index=True)
    assert any(bool(index.num_columns.any()) for index in indices)
    check(batch, out, indices)


@pytest.mark.parametrize("behind", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
def test_what_lies_behind_the_last_token_makes_no_difference(
    dtype: torch.dtype, block_size: int, behind: float, kernel_name: str, served_batch: Callable[..., Any]
) -> None:
    """These slots hold leftovers of other requests; multiplied by a weight of 0 they must not become NaN."""
    shape: dict[str, Any] = {"query_lens": [200, 65, 9, 64], "context_lens": [111, 0, 77, 64], "heads": 18}
    outputs = []
    for filled in (0.0, behind):
        batch = served_batch(**shape, block_size=block_size, dtype=dtype, behind=filled)
        patterns = [*batch.patterns[:8], *batch.adaptive_patterns[:10]]
        outputs.append(sparse_prefill(*batch.arguments, patterns, kernel=kernel_name))
    clean, found = outputs
    assert torch.isfinite(clean).all()
    assert torch.equal(found, clean)
