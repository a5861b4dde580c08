"""``sparse_prefill`` against float64 attention under the mask of the index that it used.

Budget: an engine may be twice as far from float64 as plain eager attention in the inputs' type is, plus one rounding of
the largest output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import minference_vllm
from minference_vllm import reference
from minference_vllm.attend import choose_tile, sparse_prefill
from minference_vllm.engines import native
from minference_vllm.index import SparseIndex
from minference_vllm.patterns import (
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

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
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


def eager(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float) -> Any:
    """Attention as plain torch does it in the inputs' type: the yardstick for the error."""
    heads = query.shape[1]
    scores = query.transpose(0, 1) @ reference.repeat_heads(keys.to(query.dtype), heads).transpose(1, 2) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ reference.repeat_heads(values.to(query.dtype), heads)).transpose(0, 1)


def assert_close(found: torch.Tensor, exact: torch.Tensor, yardstick: torch.Tensor, what: str) -> None:
    finite = torch.isfinite(found)
    assert finite.all(), f"{what}: not finite at (row, head, dim) {(~finite).nonzero()[0].tolist()}"
    error = (found.double() - exact).abs()
    rounding = torch.finfo(found.dtype).eps * float(exact.abs().max())
    budget = 2 * float((yardstick.double() - exact).abs().max()) + rounding
    worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    assert float(error.max()) <= budget, (
        f"{what}: error {float(error.max()):.3g} at (row, head, dim) {worst}, budget {budget:.3g}"
    )


def check(batch: Any, out: torch.Tensor, indices: Sequence[SparseIndex], scale: float | None = None) -> None:
    """Every request's output against attention under the mask of its index."""
    scale = batch.scale if scale is None else scale
    assert len(indices) == len(batch.seq_lens)
    for request, index in enumerate(indices):
        assert (index.context_len, index.seq_len) == (batch.context_lens[request], int(batch.seq_lens[request]))
        query, mask = batch.query[batch.rows(request)], index.to_mask()
        keys, values = batch.keys(request), batch.values(request)
        exact = reference.masked_attention(query, keys, values, mask, scale)
        yardstick = eager(query, keys, values, mask, scale)
        assert_close(out[batch.rows(request)], exact, yardstick, f"request {request}")


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_attention_under_its_own_mask(
    name: str, adaptive: bool, engine_name: str, served_batch: Callable[..., Any]
) -> None:
    arguments = dict(CASES[name])
    tile = arguments.pop("tile", None)
    batch = served_batch(**arguments)
    patterns = batch.adaptive_patterns if adaptive else batch.patterns
    poisoned = torch.full_like(batch.query, torch.nan)
    before = [argument.clone() for argument in batch.arguments]
    out, indices = sparse_prefill(
        *batch.arguments, patterns, engine=engine_name, tile=tile, out=poisoned, return_index=True
    )
    assert out is poisoned
    check(batch, out, indices)
    for argument, copy in zip(batch.arguments, before, strict=True):
        torch.testing.assert_close(argument, copy, rtol=0, atol=0, equal_nan=True)
    for index in indices:
        assert index.block_size == batch.key_cache.shape[1]
        starts = index.tile_starts[1:-1]
        assert not (starts % choose_tile(tile, index.block_size)).any()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("name", FULL)
def test_full_selection_is_dense_attention(
    name: str, dtype: torch.dtype, engine_name: str, served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[333, 129], context_lens=[0, 211], dtype=dtype)
    out, indices = sparse_prefill(*batch.arguments, FULL[name], engine=engine_name, return_index=True)
    for request, index in enumerate(indices):
        causal = reference.causal_mask(batch.context_lens[request], int(batch.seq_lens[request]))
        assert torch.equal(index.to_mask(), causal.expand(8, -1, -1))
    check(batch, out, indices)


def test_where_a_prompt_is_cut_makes_no_difference_at_tile_borders(
    engine_name: str, served_batch: Callable[..., Any]
) -> None:
    """For a pattern without an estimate: tiles lie at multiples of their size in the prompt, not in the chunk."""
    batch = served_batch(query_lens=[500], context_lens=[0])
    pattern = AShape(sink=32, local=64)
    whole = sparse_prefill(*batch.arguments, pattern, engine=engine_name)
    pieces = []
    for start, end in [(0, 128), (128, 384), (384, 500)]:
        starts, lengths = torch.tensor([0, end - start]), torch.tensor([end])
        caches = batch.key_cache, batch.value_cache, batch.block_table
        pieces.append(sparse_prefill(batch.query[start:end], *caches, starts, lengths, pattern, engine=engine_name))
    assert torch.equal(torch.cat(pieces), whole)


def test_one_pattern_serves_all_heads(engine_name: str, served_batch: Callable[..., Any]) -> None:
    batch = served_batch()
    pattern = VerticalSlash(vertical=40, slash=100)
    one = sparse_prefill(*batch.arguments, pattern, engine=engine_name)
    assert torch.equal(one, sparse_prefill(*batch.arguments, [pattern] * 8, engine=engine_name))


def test_the_softmax_scale_is_the_callers(engine_name: str, served_batch: Callable[..., Any]) -> None:
    batch = served_batch(query_lens=[300], context_lens=[100])
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, scale=0.3, engine=engine_name, return_index=True)
    check(batch, out, indices, scale=0.3)


def test_repeated_calls_agree(engine_name: str, served_batch: Callable[..., Any]) -> None:
    batch = served_batch(query_lens=[400, 130], context_lens=[0, 300])
    first = sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name)
    assert torch.equal(first, sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name))


def test_the_number_of_threads_makes_no_difference(engine_name: str, served_batch: Callable[..., Any]) -> None:
    batch = served_batch(query_lens=[400, 130], context_lens=[0, 300])
    alone = sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(together, alone, rtol=0.02, atol=0.01)


def test_auto_picks_an_engine(paged_batch: Callable[..., Any]) -> None:
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        batch = paged_batch(dtype=dtype)
        out, indices = sparse_prefill(*batch.arguments, batch.patterns, return_index=True)
        check(batch, out, indices)


def test_the_package_offers_it() -> None:
    assert minference_vllm.sparse_prefill is sparse_prefill
    assert minference_vllm.SparseIndex is SparseIndex


def test_many_columns_need_several_rounds_of_scratch_pages(
    monkeypatch: pytest.MonkeyPatch, engine_name: str, served_batch: Callable[..., Any]
) -> None:
    monkeypatch.setattr("minference_vllm.engines.block_table.SCRATCH_PAGES", 5)
    batch = served_batch(query_lens=[600], context_lens=[200])
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name, return_index=True)
    assert any(bool(index.num_columns.any()) for index in indices)
    check(batch, out, indices)


# Memory layouts


def heads_before_slots(cache: torch.Tensor) -> torch.Tensor:
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def with_gaps(cache: torch.Tensor) -> torch.Tensor:
    """Every dimension but the last has room between its elements, and the room is NaN."""
    blocks, size, heads, dim = cache.shape
    wide = torch.full((blocks, 2 * size, heads + 1, dim + 16), torch.nan, dtype=cache.dtype)
    view = wide[:, ::2, 1:, 8 : 8 + dim]
    view.copy_(cache)
    return view


def dimensions_before_slots(cache: torch.Tensor) -> torch.Tensor:
    return cache.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


STRIDES = {
    "heads_before_slots": heads_before_slots,
    "gaps": with_gaps,
    "dimensions_before_slots": dimensions_before_slots,
}


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("layout", STRIDES)
def test_caches_of_any_strides(
    layout: str, dtype: torch.dtype, engine_name: str, served_batch: Callable[..., Any], skip_unless_served: Any
) -> None:
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0], dtype=dtype)
    batch.key_cache, batch.value_cache = STRIDES[layout](batch.key_cache), STRIDES[layout](batch.value_cache)
    skip_unless_served(engine_name, batch)
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name, return_index=True)
    check(batch, out, indices)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_keys_and_values_side_by_side_in_one_tensor(
    dtype: torch.dtype, engine_name: str, served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0], dtype=dtype)
    both = torch.cat([batch.key_cache, batch.value_cache], -1)
    batch.key_cache, batch.value_cache = both[..., :64], both[..., 64:]
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name, return_index=True)
    check(batch, out, indices)


def test_keys_and_values_of_different_strides(served_batch: Callable[..., Any], engine_name: str) -> None:
    batch = served_batch(query_lens=[200], context_lens=[100])
    batch.value_cache = heads_before_slots(batch.value_cache)
    engine = "auto" if engine_name == "native" else engine_name
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, engine=engine, return_index=True)
    check(batch, out, indices)


def test_queries_and_outputs_may_be_views(engine_name: str, served_batch: Callable[..., Any]) -> None:
    """Queries as a slice of a fused QKV projection, outputs as a slice of a wider buffer."""
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0])
    fused = torch.full((290, 12, 64), torch.nan, dtype=BFLOAT16)
    fused[:, :8] = batch.query
    wide = torch.full((290, 10, 80), torch.nan, dtype=BFLOAT16)
    out = wide[:, 1:9, 8:72]
    batch.query = fused[:, :8]
    _, indices = sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name, out=out, return_index=True)
    check(batch, out, indices)
    out.fill_(torch.nan)
    assert torch.isnan(wide).all(), "something was written beside the output"


def test_queries_and_outputs_with_the_head_dimension_outside(
    engine_name: str, served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0])
    batch.query = batch.query.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    out = torch.full((64, 290, 8), torch.nan, dtype=BFLOAT16).permute(1, 2, 0)
    _, indices = sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name, out=out, return_index=True)
    check(batch, out, indices)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_block_tables_and_lengths_of_any_integer_type_and_stride(
    dtype: torch.dtype, engine_name: str, served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0])
    wide = torch.full((2, 3 * batch.block_table.shape[1]), -7, dtype=dtype)
    wide[:, ::3] = batch.block_table
    batch.block_table = wide[:, ::3]
    batch.query_start_loc, batch.seq_lens = batch.query_start_loc.to(dtype), batch.seq_lens.to(dtype)
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, engine=engine_name, return_index=True)
    check(batch, out, indices)


# Bad arguments: each is a ValueError that names the argument

NAMES = ("query", "key_cache", "value_cache", "block_table", "query_start_loc", "seq_lens")


def cut_heads(query: torch.Tensor) -> torch.Tensor:
    return query[:, :7]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    # what is wrong: (argument -> value or function of the good value, message)
    "engine": ({"engine": "cuda"}, "engine must be one of auto, block_table"),
    "query_flat": ({"query": lambda q: q.flatten(1)}, r"query must be \[num_tokens, num_heads, head_size\]"),
    "query_heads": ({"query": cut_heads, "patterns": [Dense()] * 7}, "query has 7 heads.*multiple of KV heads"),
    "query_head_size": ({"query": lambda q: q[..., :32]}, "query has 8 heads of size 32, the cache 2 of size 64"),
    "query_dtype": ({"query": lambda q: q.double()}, "query and caches must share one of .*bfloat16.* not .*float64"),
    "cache_dtype": ({"key_cache": lambda k: k.half()}, "query and caches must share one of"),
    "value_dtype": ({"value_cache": lambda v: v.half()}, "query and caches must share one of"),
    "cache_flat": ({"key_cache": lambda k: k.flatten(2)}, "key_cache and value_cache must both be"),
    "cache_shapes": ({"value_cache": lambda v: v[:-1]}, "key_cache and value_cache must both be"),
    "patterns_too_few": ({"patterns": [Dense()] * 7}, "7 patterns for 8 query heads"),
    "patterns_too_many": ({"patterns": [Dense()] * 9}, "9 patterns for 8 query heads"),
    "patterns_none": ({"patterns": []}, "0 patterns for 8 query heads"),
    "out_shape": ({"out": torch.empty(289, 8, 64, dtype=BFLOAT16)}, "out must be like query"),
    "out_dtype": ({"out": torch.empty(290, 8, 64)}, "out must be like query"),
    "starts_too_few": ({"query_start_loc": lambda s: s[:-1]}, "2 seq_lens need 3 query_start_loc entries"),
    "starts_not_at_0": ({"query_start_loc": torch.tensor([1, 200, 290])}, "query_start_loc must rise from 0 to 290"),
    "starts_end_early": ({"query_start_loc": torch.tensor([0, 200, 280])}, "query_start_loc must rise from 0 to 290"),
    "starts_fall": ({"query_start_loc": torch.tensor([0, 300, 290])}, "query_start_loc must rise"),
    "no_new_tokens": ({"query_start_loc": torch.tensor([0, 290, 290])}, "request 1 has no new tokens"),
    "seq_len_short": ({"seq_lens": torch.tensor([300, 89])}, r"seq_lens\[1\] = 89 is less than"),
    "seq_len_long": ({"seq_lens": torch.tensor([300, 900])}, "request 1 needs 29 blocks, block_table has"),
    "seq_len_0": (
        {"seq_lens": torch.tensor([300, 0]), "query_start_loc": torch.tensor([0, 290, 290])},
        "request 1 has no new tokens",
    ),
    "table_rows": ({"block_table": lambda t: t[:1]}, "as many block_table rows as requests"),
    "table_flat": ({"block_table": lambda t: t[0]}, "as many block_table rows as requests"),
    "table_negative": ({"block_table": lambda t: -1 - t}, r"block_table\[0\] names blocks outside the cache's"),
    "table_too_large": ({"block_table": lambda t: t + 1000}, r"block_table\[0\] names blocks outside the cache's"),
    "tile_0": ({"tile": 0}, "tile"),
    "tile_negative": ({"tile": -128}, "tile"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str, paged_batch: Callable[..., Any]) -> None:
    changes, message = BAD[name]
    batch = paged_batch(query_lens=[200, 90], context_lens=[100, 0])
    arguments: dict[str, Any] = {**dict(zip(NAMES, batch.arguments, strict=True)), "patterns": Dense()}
    for argument, change in changes.items():
        arguments[argument] = change(arguments[argument]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        sparse_prefill(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"head_size": 72}, {"head_size": 8}, {"block_size": 8}, {"block_size": 24}, {"block_size": 1}],
    ids=str,
)
@pytest.mark.parametrize("engine", ["auto", "block_table", "native"])
def test_sizes_that_no_engine_serves_are_refused(
    engine: str, arguments: dict[str, int], paged_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether or not this machine could run it.
    monkeypatch.setattr(native, "unavailable_reason", lambda: None)
    batch = paged_batch(**arguments)
    with pytest.raises(ValueError, match=r"pages? .*|head size|heads of size"):
        sparse_prefill(*batch.arguments, Dense(), engine=engine)


@pytest.mark.parametrize(
    "arguments", [{"dtype": FLOAT32}, {"dtype": FLOAT16}, {"block_size": 16}], ids=["float32", "float16", "pages_of_16"]
)
def test_native_says_why_it_cannot(arguments: dict[str, Any], paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(**arguments)
    with pytest.raises(ValueError, match=r"engine 'native' cannot run: .+"):
        sparse_prefill(*batch.arguments, Dense(), engine="native")
