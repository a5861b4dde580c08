"""Soft caps, attention sinks and sliding windows in our CPU kernels, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_inputs import LAYOUTS, budget, in_layout, small_batch
from paged_inputs import PagedBatch

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import Layout
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import whole_tile
from minference_vllm.kernels.choose import choose
from minference_vllm.kernels.native import library
from minference_vllm.kernels.native.scores import NativeScores
from minference_vllm.patterns.kinds import Dense
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.recall import chunk_recall
from minference_vllm.selection import measured_rows
from minference_vllm.selection.probe_queries import probe_groups, unlikeness
from minference_vllm.selection.torch_scores import TorchScores

pytestmark = pytest.mark.skipif(bool(library.unavailable_reason()), reason=str(library.unavailable_reason()))

FEATURES: dict[str, dict[str, Any]] = {
    # The tests' scores are about normally distributed: 1 changes most of them.
    "soft cap": {"softcap": 1.0},
    "high soft cap": {"softcap": 50.0},
    # From a sink that takes nothing to one that takes nearly everything.
    "sinks": {"sinks": torch.tensor([-200.0, -3.0, 0.0, 2.0, 5.0, 8.0, 20.0, 200.0])},
    "short window": {"window": 60},
    "window": {"window": 307},
    "all": {"softcap": 3.0, "sinks": torch.linspace(-2, 9, 8).bfloat16(), "window": 129},
}


@pytest.fixture(params=FEATURES)
def features(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FEATURES[request.param]


def with_features(batch: PagedBatch, features: dict[str, Any], layout: Layout = "rows") -> Inputs:
    """Pages before the first row's window are NaN: vLLM may have given them to another request."""
    cache, others = in_layout(batch, layout), {name: value for name, value in features.items() if name != "window"}
    inputs = replace(batch.inputs(cache=cache), **others)
    if "window" not in features:
        return inputs
    oldest = max(0, inputs.chunk.context_len - features["window"] + 1)
    for stored in (cache.key, cache.value):
        stored[inputs.pages[: oldest // cache.block_size]] = torch.nan
    return inputs.in_window(features["window"], whole_tile(None, cache.block_size))


def mask_of(inputs: Inputs) -> torch.Tensor:
    """bool ``[chunk, S]``: keys of the inputs that each row sees."""
    return reference.causal_mask(inputs.chunk.context_len, inputs.chunk.seq_len, inputs.window)


def rows_of(batch: PagedBatch, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 ``[HK, S, D]``: keys and values of the inputs."""
    return batch.keys(0)[:, inputs.first_key :], batch.values(0)[:, inputs.first_key :]


def exact(batch: PagedBatch, inputs: Inputs, index: SparseIndex) -> torch.Tensor:
    """float64 ``[chunk, H, D]``: attention under the index."""
    mask = index.to_mask()
    assert not (mask & ~mask_of(inputs)).any()
    return reference.masked_attention(
        inputs.query, *rows_of(batch, inputs), mask, inputs.scale, inputs.softcap, inputs.sinks
    )


def exact_logits(batch: PagedBatch, inputs: Inputs) -> torch.Tensor:
    """float64 ``[H, chunk, S]``, -inf for keys that a row does not see."""
    logits = reference.logits(inputs.query, rows_of(batch, inputs)[0], inputs.scale, inputs.softcap)
    return logits.masked_fill(~mask_of(inputs), -torch.inf)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size, head_size", [(32, 80), (128, 64), (64, 256)])
def test_attention(
    layout: Layout, block_size: int, head_size: int, features: dict[str, Any], dtype: torch.dtype
) -> None:
    batch = small_batch(301, 210, 8, 2, head_size, dtype, block_size)
    inputs = with_features(batch, features, layout)
    kernel = choose("native", dtype, inputs.cache)
    out = torch.full_like(batch.query, torch.nan)
    index = attend_chunk(inputs, batch.patterns, kernel, out)
    expected = exact(batch, inputs, index)
    # For each head separately: the outputs of a head with a strong sink are small. In float16 they are subnormal.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    errors, largest = (part.transpose(0, 1).flatten(1).abs().amax(1) for part in (out.double() - expected, expected))
    assert bool((errors <= budget(dtype) * largest + smallest).all())
    lse, again = torch.full((8, 301), torch.nan), torch.full_like(out, torch.nan)
    kernel.run(inputs, index, again, lse)
    assert torch.equal(again, out)
    scores = exact_logits(batch, inputs).masked_fill(~index.to_mask(), -torch.inf)
    total = scores.logsumexp(-1)
    if inputs.sinks is not None:
        total = torch.logaddexp(total, inputs.sinks.double()[:, None])
    torch.testing.assert_close(lse.double(), total, rtol=1e-7, atol=1e-3 if dtype == torch.bfloat16 else 5e-6)


def test_any_number_of_threads_gives_the_same_bits(
    features: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = small_batch(301, 1100, 8, 2, 64, dtype)
    inputs = with_features(batch, features)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = torch.full_like(batch.query, torch.nan)
        attend_chunk(inputs, batch.adaptive_patterns, choose("native", dtype, inputs.cache), out)
        found.append(out)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk, context", [(301, 210), (64, 449), (5, 260)])
def test_scores(layout: Layout, chunk: int, context: int, features: dict[str, Any], dtype: torch.dtype) -> None:
    """Scores of our kernels, and the portable ones."""
    batch, heads = small_batch(chunk, context, 8, 2, 64, dtype), range(1, 8, 2)
    inputs = with_features(batch, features, layout)
    rows = measured_rows.calibration_rows(unlikeness(batch.query.transpose(0, 1)[1::2]), chunk + context).rows
    weights = exact_logits(batch, inputs)[1::2].softmax(-1)
    weights = weights.gather(1, rows[..., None].expand(-1, -1, inputs.chunk.seq_len))
    norms = rows_of(batch, inputs)[1].double().norm(dim=2)
    shares = measured_rows.by_value(weights, norms[[head // inputs.group for head in heads]])
    lines = reference.column_diagonal_scores(
        batch.query, rows_of(batch, inputs)[0], inputs.scale, probe_groups(chunk), inputs.softcap, inputs.window
    )
    for kind in (NativeScores, TorchScores):
        scores = kind(inputs)
        # Ours are rounded to bf16 twice.
        rtol = 2**-7 if kind is NativeScores else 1e-3
        atol = 1e-4 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(scores.row_shares(rows, heads).double(), shares, rtol=rtol, atol=atol)
        for found, expected in zip(scores.column_diagonal_scores(heads), lines, strict=True):
            torch.testing.assert_close(found.double(), expected[1::2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_a_soft_cap_at_every_size_of_scores(softcap: float, dtype: torch.dtype) -> None:
    """A row that sees one key has that key's score as its log-sum-exp."""
    batch = small_batch(1, 0, 8, 2, 64, dtype)
    for size in (1e-5, 1e-2, 0.3, 0.6, 0.7, 3.0, 30.0, 1e4):
        inputs = replace(batch.inputs(), scale=size * softcap, softcap=softcap)
        kernel, lse, out = choose("native", dtype, inputs.cache), torch.empty(8, 1), torch.empty_like(batch.query)
        kernel.run(inputs, attend_chunk(inputs, [Dense()] * 8, kernel, out), out, lse)
        expected = reference.logits(batch.query, batch.keys(0), inputs.scale, softcap)[..., 0]
        torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-7 * softcap)


def test_recall_is_that_of_the_weights_with_the_features(
    features: dict[str, Any], paged_batch: Callable[..., PagedBatch]
) -> None:
    batch = paged_batch([301], [210], dtype=torch.float32)
    inputs = with_features(batch, features)
    kernel = choose("native", torch.float32, inputs.cache)
    index = attend_chunk(inputs, batch.patterns, kernel, torch.empty_like(batch.query))
    rows, (keys, values_there) = torch.tensor([0, 7, 150, 300]), rows_of(batch, inputs)
    found = chunk_recall(kernel.scores(inputs), index, rows)
    for values, shares in ((None, found.mass), (values_there, found.value)):
        expected = reference.attention_recall(
            batch.query,
            keys,
            index.to_mask(),
            inputs.chunk.context_len,
            inputs.scale,
            values,
            inputs.softcap,
            inputs.window,
        )
        torch.testing.assert_close(shares.double(), expected[:, rows], rtol=1e-4, atol=1e-5)
