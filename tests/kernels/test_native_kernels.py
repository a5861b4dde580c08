"""Our CPU kernels on every page layout, against the float64 reference; their requirements and fallbacks."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_inputs import LAYOUTS, budget, in_layout, small_batch
from paged_inputs import PagedBatch

from minference_vllm import reference
from minference_vllm.core.paged_cache import Layout
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose
from minference_vllm.kernels.native import library
from minference_vllm.kernels.native.scores import NativeScores
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.selection import measured_rows
from minference_vllm.selection.probe_queries import probe_groups, unlikeness
from minference_vllm.selection.projection import MAX_KEY, MAX_KEY_NORM, fit, for_int8
from minference_vllm.selection.score_bins import MAX_CODE
from minference_vllm.selection.torch_scores import TorchScores

built = pytest.mark.skipif(bool(library.unavailable_reason()), reason=str(library.unavailable_reason()))


# All layouts and builds share one batch of each shape, and its reference.


@functools.cache
def exact_columns_and_diagonals(*shape: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = small_batch(*shape)
    return reference.column_diagonal_scores(batch.query, batch.keys(0), batch.scale, probe_groups(len(batch.query)))


@functools.cache
def exact_logits(*shape: Any) -> torch.Tensor:
    """float64 ``[H, chunk, S]``, including future keys."""
    batch = small_batch(*shape)
    keys = reference.repeat_heads(batch.keys(0), batch.query.shape[1])
    return batch.query.double().transpose(0, 1) @ keys.transpose(1, 2) * batch.scale


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "block_size, head_size",
    [(32, 64), (32, 80), (64, 96), (32, 112), (128, 128), (64, 160), (32, 192), (64, 224), (32, 256)],
)
def test_attention_and_log_sum_exp(layout: Layout, block_size: int, head_size: int, dtype: torch.dtype) -> None:
    shape = 301, 210, 8, 2, head_size, dtype, block_size
    batch = small_batch(*shape)
    inputs = batch.inputs(cache=in_layout(batch, layout))
    kernel = choose("native", dtype, inputs.cache)
    out = torch.full_like(batch.query, torch.nan)
    index = attend_chunk(inputs, batch.patterns, kernel, out)
    mask = index.to_mask()
    scores = exact_logits(*shape).masked_fill(~mask, -torch.inf)
    exact = (scores.softmax(-1) @ reference.repeat_heads(batch.values(0), 8)).transpose(0, 1)
    assert float((out.double() - exact).abs().max()) <= budget(dtype) * float(exact.abs().max())
    lse, again = torch.full((8, 301), torch.nan), torch.full_like(out, torch.nan)
    kernel.run(inputs, index, again, lse)
    assert torch.equal(again, out)
    torch.testing.assert_close(
        lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-3 if dtype == torch.bfloat16 else 5e-6
    )


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_columns_that_count_more_than_once(softcap: float, dtype: torch.dtype) -> None:
    batch = small_batch(301, 210, 8, 2, 64, dtype)
    inputs = dataclasses.replace(batch.inputs(cache=in_layout(batch, "transposed")), softcap=softcap)
    kernel, out = choose("native", dtype, inputs.cache), torch.full_like(batch.query, torch.nan)
    index = attend_chunk(inputs, batch.patterns, kernel, out)
    assert int(index.num_columns.max()) > 128
    codes = torch.randint(0, MAX_CODE + 1, index.columns.shape, dtype=torch.uint8)
    counted = dataclasses.replace(index, column_codes=codes, sampled=tuple(range(8)))
    lse = torch.full((8, 301), torch.nan)
    kernel.run(inputs, counted, out, lse)
    tiles = torch.searchsorted(index.tiling.starts, torch.arange(210, 511), right=True) - 1
    scores = reference.logits(batch.query, batch.keys(0), batch.scale, softcap)
    scores += counted.tile_counts(tiles).double().log()
    scores.masked_fill_(~reference.causal_mask(210, 511), -torch.inf)
    exact = reference.masked_attention(
        batch.query, batch.keys(0), batch.values(0), index.to_mask(), batch.scale, softcap,
        counts=counted.tile_counts(tiles),
    )  # fmt: skip
    assert float((out.double() - exact).abs().max()) <= budget(dtype) * float(exact.abs().max())
    torch.testing.assert_close(
        lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-3 if dtype == torch.bfloat16 else 5e-6
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk, context", [(301, 210), (64, 0), (64, 449), (37, 100), (5, 260), (1, 70)])
@pytest.mark.parametrize("heads, kv_heads, head_size", [(8, 2, 64), (4, 4, 80), (7, 1, 128)])
def test_column_diagonal_scores(
    layout: Layout, chunk: int, context: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> None:
    shape = chunk, context, heads, kv_heads, head_size, dtype
    batch, wanted = small_batch(*shape), list(range(0, heads, 2))
    found = NativeScores(batch.inputs(cache=in_layout(batch, layout))).column_diagonal_scores(wanted)
    for scores, expected in zip(found, exact_columns_and_diagonals(*shape), strict=True):
        # The remaining errors are those of float32 sums and of the kernel's exponential.
        torch.testing.assert_close(scores.double(), expected[wanted], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk, context", [(301, 210), (64, 0), (64, 449), (5, 260), (1, 70)])
@pytest.mark.parametrize("heads, kv_heads, head_size", [(8, 2, 64), (7, 1, 80)])
def test_row_shares(
    layout: Layout, chunk: int, context: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> None:
    shape = chunk, context, heads, kv_heads, head_size, dtype
    batch, length, wanted = small_batch(*shape), chunk + context, list(range(1, heads, 2))
    rows = measured_rows.calibration_rows(unlikeness(batch.query.transpose(0, 1)[wanted]), length).rows
    future = torch.arange(length) > (rows + context)[..., None]
    logits = exact_logits(*shape)[wanted].gather(1, rows[..., None].expand(-1, -1, length))
    exact = logits.masked_fill(future, -torch.inf).softmax(-1)
    norms = batch.values(0).double().norm(dim=2)
    shares = measured_rows.by_value(exact, norms[[head * kv_heads // heads for head in wanted]])
    found = NativeScores(batch.inputs(cache=in_layout(batch, layout))).row_shares(rows, wanted)
    # Rounded to bf16 twice.
    torch.testing.assert_close(found.double(), shares, rtol=2**-7, atol=1e-4 if dtype == torch.bfloat16 else 1e-5)
    assert not found[future].any()


def test_scores_do_not_depend_on_how_threads_share_the_work(
    dtype: torch.dtype, paged_batch: Callable[..., PagedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    # More keys than fit into one task; threads take tasks dynamically.
    batch = paged_batch([301], [4000], dtype=dtype)
    rows = measured_rows.calibration_rows(unlikeness(batch.query.transpose(0, 1)), 4301).rows

    def scores(threads: int) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        found = NativeScores(batch.inputs())
        return *found.column_diagonal_scores(range(8)), found.row_shares(rows, range(8))

    alone = scores(1)
    for threads in (2, 3, 5):
        for found, expected in zip(scores(threads), alone, strict=True):
            assert torch.equal(found, expected)


def test_scores_agree_with_the_portable_ones(dtype: torch.dtype) -> None:
    batch = small_batch(301, 210, 8, 2, 64, dtype)
    inputs = batch.inputs(cache=in_layout(batch, "transposed"))
    ours, portable = (kind(inputs).column_diagonal_scores(range(8)) for kind in (NativeScores, TorchScores))
    for found, expected in zip(ours, portable, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)


def test_without_the_kernels_everything_runs_through_vllms(
    monkeypatch: pytest.MonkeyPatch, paged_batch: Callable[..., PagedBatch]
) -> None:
    monkeypatch.setattr(library, "unavailable_reason", lambda dtype=None: "the processor has no AVX2")
    batch = paged_batch([301], [210])
    kernel = choose("auto", torch.bfloat16, batch.cache)
    assert kernel.name == "block_table" and kernel.scores is TorchScores
    with pytest.raises(ValueError, match="kernel 'native' cannot run: the processor has no AVX2"):
        choose("native", torch.bfloat16, batch.cache)
    out = torch.full_like(batch.query, torch.nan)
    index = attend_chunk(batch.inputs(), batch.patterns, kernel, out)
    exact = reference.masked_attention(batch.query, batch.keys(0), batch.values(0), index.to_mask(), batch.scale)
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.02)


def test_the_best_build_that_the_processor_can_run_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {build: ctypes.CDLL(None) for build in ("amx", "avx512bf16", "avx2")}
    monkeypatch.setattr(library, "load", libraries.get)
    best = library._best.__wrapped__
    assert best(torch.bfloat16) == ("amx", libraries["amx"])
    # The instructions of the other builds multiply bf16.
    assert best(torch.float32) == best(torch.float16) == ("avx2", libraries["avx2"])
    del libraries["amx"]
    assert best(torch.bfloat16) == ("avx512bf16", libraries["avx512bf16"])
    del libraries["avx512bf16"]
    assert best(torch.bfloat16) == ("avx2", libraries["avx2"])
    del libraries["avx2"]
    assert best(torch.bfloat16) is best(torch.float32) is None


@built
def test_amx_pages_go_to_vllms_kernel_where_ours_were_not_built_for_amx(
    paged_batch: Callable[..., PagedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = in_layout(paged_batch(), "amx")
    monkeypatch.setattr(library, "instructions", lambda dtype: "AMX")
    assert choose("auto", torch.bfloat16, cache).name == "native"
    monkeypatch.setattr(library, "instructions", lambda dtype: "AVX512-BF16")
    assert choose("auto", torch.bfloat16, cache).name == "block_table"
    assert choose("native", torch.bfloat16, cache).name == "native"
    assert choose("auto", torch.bfloat16, in_layout(paged_batch(), "transposed")).name == "native"


@built
def test_what_vllms_kernel_does_not_know_goes_to_ours(
    paged_batch: Callable[..., PagedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = in_layout(paged_batch(), "amx")
    monkeypatch.setattr(library, "instructions", lambda dtype: "AVX512-BF16")
    assert choose("auto", torch.bfloat16, cache, own=True).name == "native"
    with pytest.raises(ValueError, match="'block_table' cannot run: it knows no soft caps, sinks and windows; native"):
        choose("block_table", torch.bfloat16, cache, own=True)
    small = in_layout(paged_batch(block_size=16), "rows")
    with pytest.raises(ValueError, match=r"'block_table' cannot run: it knows no soft caps, .* page size 16"):
        choose("auto", torch.bfloat16, small, own=True)


def test_amx_pages_hold_bf16(paged_batch: Callable[..., PagedBatch]) -> None:
    cache = in_layout(paged_batch(), "amx")
    assert library.unsupported_cache_reason(torch.float32, cache)


@built
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": torch.float64}, "float64 is neither bfloat16, float16 nor float32"),
        ({"block_size": 16}, "page size 16 is not a multiple of 32"),
        ({"head_size": 72}, "head size 72 is not a multiple of 16"),
        ({"head_size": 512}, "head size 512 is not a multiple of 16 up to 256"),
    ],
)
def test_reasons(arguments: dict[str, Any], reason: str, paged_batch: Callable[..., PagedBatch]) -> None:
    batch = paged_batch(**arguments)
    dtype, cache = batch.query.dtype, in_layout(batch, "rows")
    assert reason in str(library.unsupported_cache_reason(dtype, cache))
    of_heads = library.unsupported_reason(dtype, cache.head_size)
    assert of_heads is None if "block_size" in arguments else reason in str(of_heads)


@built
def test_of_vllms_head_sizes_those_up_to_256_are_served() -> None:
    """512 goes to vLLM's own kernel, or runs densely."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    assert {64, 80, 96, 112, 128, 160, 192, 224, 256} <= set(sizes)
    for dtype in library.ELEMENTS:
        served = [size for size in sizes if library.unsupported_reason(dtype, size) is None]
        assert served == [size for size in sizes if size <= 256]


def test_index_and_tiling_fit_the_kernels_types(paged_batch: Callable[..., PagedBatch]) -> None:
    """ctypes passes addresses, not types: tensors that the kernels read as int32 and int64 must have these types."""
    batch = paged_batch([301], [210])
    inputs, kernel = batch.inputs(), choose("auto", torch.bfloat16, batch.cache)
    index = attend_chunk(inputs, batch.patterns, kernel, torch.empty_like(batch.query))
    assert inputs.pages.dtype == torch.int64 and inputs.pages.is_contiguous()
    assert index.tiling.starts.dtype == torch.int64
    for lists in (index.blocks, index.num_blocks, index.columns, index.num_columns):
        assert lists.dtype == torch.int32 and lists.is_contiguous()
    assert Tiling.of(0, 64, 32, 32).starts.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads, kv_heads, head_size, rank", [(8, 2, 64, 32), (7, 1, 80, 16), (4, 4, 128, 128)])
def test_key_codes(layout: Layout, heads: int, kv_heads: int, head_size: int, rank: int, dtype: torch.dtype) -> None:
    """The codes equal the torch definition's except for ties that float32 rounds differently, and stay in its range.
    NaN past the last token does not matter."""
    batch = small_batch(77, 340, heads, kv_heads, head_size, dtype)
    inputs = batch.inputs(cache=in_layout(batch, layout))
    native, torch_scores = NativeScores(inputs), TorchScores(inputs)
    wanted = [0, heads - 1]
    keys = torch_scores.some_keys(wanted, 3)
    queries = native.queries_of(wanted)
    projection = for_int8(fit(queries, keys, rank), keys)
    found, right = (scores.key_codes(wanted, projection).int() for scores in (native, torch_scores))
    assert found.shape == (2, 417, rank) and found.abs().max() <= MAX_KEY
    assert (found - right).abs().max() <= 1 and (found != right).float().mean() < 1e-3
    # Keys that are too long are scaled down, not clamped.
    longer = projection._replace(to_key=projection.to_key * 100)
    found, right = (scores.key_codes(wanted, longer).int() for scores in (native, torch_scores))
    assert (found - right).abs().max() <= 1 and found.float().norm(dim=2).max() < MAX_KEY_NORM + rank**0.5
