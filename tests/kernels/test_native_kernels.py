"""Our CPU kernels on every page layout, against the float64 reference; what they need, and what runs without them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minference_vllm import reference
from minference_vllm.core.paged_cache import Layout, PagedCache, unpack_keys, unpack_values
from minference_vllm.core.plan import Chunk
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose
from minference_vllm.kernels.native import attention as native
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.selection import low_rank
from minference_vllm.selection import probe_queries as estimate

LAYOUTS: tuple[Layout, ...] = ("rows", "transposed", "amx")
BUILDS = (("avx512bf16", torch.bfloat16), ("avx2", torch.bfloat16), ("avx2", torch.float32))
built = pytest.mark.skipif(bool(native.unavailable_reason()), reason=str(native.unavailable_reason()))


@pytest.fixture(params=BUILDS, ids=lambda param: f"{param[0]}-{param[1]}".replace("torch.", ""))
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Served by each build of the kernels that the processor can run, not the best alone."""
    build, dtype = request.param
    library = native.load(build)
    if library is None:
        pytest.skip(f"no kernels for {native.INSTRUCTIONS[build]} here")
    monkeypatch.setattr(native, "_best", lambda dtype: (build, library))
    return dtype


def in_layout(batch: Any, layout: Layout) -> PagedCache:
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size, head_size", [(32, 64), (32, 80), (64, 96), (128, 128), (32, 256)])
def test_attention_and_log_sum_exp(
    layout: Layout, block_size: int, head_size: int, dtype: torch.dtype, paged_batch: Callable[..., Any]
) -> None:
    batch = paged_batch(query_lens=[301], context_lens=[210], block_size=block_size, head_size=head_size, dtype=dtype)
    last_page = batch.block_table[0, 510 // block_size]
    for unused in (batch.key_cache[last_page, 511 % block_size :], batch.value_cache[last_page, 511 % block_size :]):
        unused.fill_(torch.nan)
    cache, pages = in_layout(batch, layout), batch.block_table[0].long()
    out = torch.full_like(batch.query, torch.nan)
    index = attend_chunk(
        batch.query, cache, pages, Chunk(0, 0, 210, 511), batch.patterns, batch.scale, out, kernel="native"
    )
    mask, keys, values = index.to_mask(), batch.keys(0), batch.values(0)
    exact = reference.masked_attention(batch.query, keys, values, mask, batch.scale)
    # Two roundings to bf16 (of the weights and of the output) of values that are at most as large as the largest; in
    # float32 the exponential's error, and a sum of 511.
    budget = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 3e-6
    assert float((out.double() - exact).abs().max()) <= budget * float(exact.abs().max())
    lse = torch.full((8, 301), torch.nan)
    native.run(batch.query, cache, pages, index, batch.scale, out, lse)
    scores = batch.query.double().transpose(0, 1) @ reference.repeat_heads(keys, 8).transpose(1, 2) * batch.scale
    exact_lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-3 if dtype == torch.bfloat16 else 5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk, context", [(301, 210), (64, 0), (64, 449), (37, 100), (5, 260), (1, 70)])
@pytest.mark.parametrize("heads, kv_heads, head_size", [(8, 2, 64), (4, 4, 80), (7, 1, 128)])
def test_last_query_scores(
    layout: Layout,
    chunk: int,
    context: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    paged_batch: Callable[..., Any],
) -> None:
    batch = paged_batch([chunk], [context], heads, kv_heads, head_size, dtype=dtype)
    wanted = list(range(0, heads, 2))
    found = native.column_diagonal_scores(
        batch.query, in_layout(batch, layout), batch.block_table[0].long(), chunk + context, wanted, batch.scale
    )
    exact = reference.column_diagonal_scores(
        batch.query, batch.keys(0), batch.scale, estimate.probe_groups(len(batch.query))
    )
    for scores, expected in zip(found, exact, strict=True):
        # What is left are float32's sums and the kernel's exponential.
        torch.testing.assert_close(scores.double(), expected[wanted], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk, context", [(301, 210), (64, 0), (64, 449), (5, 260), (1, 70)])
@pytest.mark.parametrize("heads, kv_heads, head_size", [(8, 2, 64), (7, 1, 80)])
def test_row_weights(
    layout: Layout,
    chunk: int,
    context: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    paged_batch: Callable[..., Any],
) -> None:
    batch = paged_batch([chunk], [context], heads, kv_heads, head_size, dtype=dtype)
    length = chunk + context
    batch.key_cache[batch.block_table[0, (length - 1) // 32], (length - 1) % 32 + 1 :] = torch.nan
    wanted, rows = list(range(1, heads, 2)), low_rank.calibration_rows(chunk, length, batch.query.device).rows
    found = native.row_weights(
        batch.query, in_layout(batch, layout), batch.block_table[0].long(), length, rows, wanted, batch.scale
    )
    keys = reference.repeat_heads(batch.keys(0), heads)[wanted]
    scores = batch.query[rows].double().transpose(0, 1)[wanted] @ keys.transpose(1, 2) * batch.scale
    future = torch.arange(length) > (rows + context)[:, None]
    exact = scores.masked_fill(future, -torch.inf).softmax(-1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)
    assert not found[:, future].any()


def test_estimates_agree_with_the_portable_ones(dtype: torch.dtype, paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch([301], [210], dtype=dtype)
    pages = batch.block_table[0].long()
    cache = in_layout(batch, "transposed")
    ours = native.column_diagonal_scores(batch.query, cache, pages, 511, range(8), batch.scale)
    keys = cache.keys_by_head(pages)[:, :511]
    for found, expected in zip(
        ours, estimate.column_diagonal_scores(batch.query, keys, range(8), batch.scale), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)


def test_without_the_kernels_everything_runs_through_vllms(
    monkeypatch: pytest.MonkeyPatch, paged_batch: Callable[..., Any]
) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda dtype=None: "the processor has no AVX2")
    batch = paged_batch([301], [210])
    cache = in_layout(batch, "rows")
    assert choose("auto", torch.bfloat16, cache) == "block_table"
    with pytest.raises(ValueError, match="engine 'native' cannot run: the processor has no AVX2"):
        choose("native", torch.bfloat16, cache)
    out = torch.full_like(batch.query, torch.nan)
    index = attend_chunk(
        batch.query, cache, batch.block_table[0].long(), Chunk(0, 0, 210, 511), batch.patterns, batch.scale, out
    )
    exact = reference.masked_attention(batch.query, batch.keys(0), batch.values(0), index.to_mask(), batch.scale)
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.02)


def test_the_best_build_that_the_processor_can_run_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {"avx512bf16": ctypes.CDLL(None), "avx2": ctypes.CDLL(None)}
    monkeypatch.setattr(native, "load", libraries.get)
    best = native._best.__wrapped__
    assert best(torch.bfloat16) == ("avx512bf16", libraries["avx512bf16"])
    # The other one's instructions multiply bf16.
    assert best(torch.float32) == ("avx2", libraries["avx2"])
    del libraries["avx512bf16"]
    assert best(torch.bfloat16) == ("avx2", libraries["avx2"])
    del libraries["avx2"]
    assert best(torch.bfloat16) is best(torch.float32) is None


@built
def test_amx_pages_go_to_vllms_kernel_unless_ours_is_named(paged_batch: Callable[..., Any]) -> None:
    cache = in_layout(paged_batch(), "amx")
    assert choose("auto", torch.bfloat16, cache) == "block_table"
    assert choose("native", torch.bfloat16, cache) == "native"
    assert choose("auto", torch.bfloat16, in_layout(paged_batch(), "transposed")) == "native"


def test_amx_pages_hold_bf16(paged_batch: Callable[..., Any]) -> None:
    cache = in_layout(paged_batch(), "amx")
    assert native.unsupported_cache_reason(torch.float32, cache)


@built
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": torch.float16}, "float16 is neither bfloat16 nor float32"),
        ({"block_size": 16}, "page size 16 is not a multiple of 32"),
        ({"head_size": 72}, "head size 72 is not a multiple of 16"),
        ({"head_size": 512}, "head size 512 is not a multiple of 16 up to 256"),
    ],
)
def test_reasons(arguments: dict[str, Any], reason: str, paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(**arguments)
    cache = in_layout(batch, "rows")
    assert reason in str(native.unsupported_cache_reason(batch.query.dtype, cache))
    assert reason in str(native.unsupported_reason(batch.query.dtype, cache.block_size, cache.head_size))


def test_index_and_tiling_fit_the_kernels_types(paged_batch: Callable[..., Any]) -> None:
    """ctypes passes addresses, not types: what the kernels read as int32 and int64 must be that."""
    batch = paged_batch([301], [210])
    out = torch.empty_like(batch.query)
    pages = batch.block_table[0].long()
    index = attend_chunk(
        batch.query, in_layout(batch, "rows"), pages, Chunk(0, 0, 210, 511), batch.patterns, batch.scale, out
    )
    assert index.tiling.starts.dtype == torch.int64
    for lists in (index.blocks, index.num_blocks, index.columns, index.num_columns):
        assert lists.dtype == torch.int32 and lists.is_contiguous()
    assert Tiling.of(0, 64, 32, 32).starts.is_contiguous()
