"""Features of vLLM's own CPU kernel that ours serves as well, but vLLM's under an index does not; the remainder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_layer import PAGE, Layer
from layer_inputs import ADAPTIVE_KINDS, HEADS, KINDS, MIN_CONTEXT, MIXED, PEAKS, SPARSE, assert_right, record_once
from native_inputs import needs_native

FEATURES: dict[str, dict[str, Any]] = {
    "soft cap": {"logits_soft_cap": 1.0},
    "sinks": {"sinks": torch.linspace(-2, 8, HEADS)},
    "sinks in bfloat16": {"sinks": torch.linspace(-2, 8, HEADS).bfloat16()},
    "window": {"sliding_window": MIN_CONTEXT},
    "all": {"sliding_window": 333, "logits_soft_cap": 2.0, "sinks": torch.linspace(-2, 8, HEADS)},
}


@needs_native
@pytest.mark.parametrize("kinds", [KINDS, ADAPTIVE_KINDS], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_our_own_kernel(
    feature: str, dtype: torch.dtype, kinds: list[dict[str, Any]], make_cpu_layer: Callable[..., Layer]
) -> None:
    layer = make_cpu_layer(MIXED, dtype=dtype, patterns=kinds, options=FEATURES[feature])
    output = layer.run(layer.impl, layer.metadata())
    assert layer.impl.sparse_layer.kernel.name == "native" and len(layer.indices) == len(SPARSE)
    assert_right(layer, output, SPARSE)
    assert all(float(index.density().mean()) < 0.95 for index in layer.indices)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_mean_what_they_mean_to_vllm(
    feature: str, dtype: torch.dtype, make_cpu_layer: Callable[..., Layer]
) -> None:
    """With all keys selected the output equals that of vLLM's own kernel."""
    everything = [{"kind": "a_shape", "sink": 0, "local": 100_000}] * HEADS
    layer = make_cpu_layer(MIXED, dtype=dtype, patterns=everything, options=FEATURES[feature])
    metadata = layer.metadata()
    found, expected = (layer.run(impl, metadata) for impl in (layer.impl, layer.parent))
    assert len(layer.indices) == len(SPARSE) and float(layer.indices[0].density().mean()) == 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * max(torch.finfo(dtype).eps, 1e-6))


@needs_native
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"settings": {"kernel": "block_table"}}, None),
        ({"page": 16}, "kernel 'native' cannot run: page size 16 is not a multiple of 32"),
    ],
    ids=["block_table", "small pages"],
)
@pytest.mark.parametrize(
    ("feature", "named"), [("soft cap", "soft cap"), ("sinks", "attention sinks"), ("window", "sliding window")]
)
def test_without_our_own_kernel_such_layers_run_densely(
    feature: str,
    named: str,
    changes: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    make_cpu_layer: Callable[..., Layer],
) -> None:
    lines = record_once(monkeypatch)
    layer = make_cpu_layer(MIXED, options=FEATURES[feature], **changes)
    (line,) = [line for line in lines if "densely" in line]
    assert named in line and (reason or "") in line
    assert torch.equal(layer.run(layer.impl, layer.metadata()), layer.run(layer.parent, layer.metadata()))
    assert not layer.indices


@needs_native
def test_pages_before_a_window_are_never_read(make_cpu_layer: Callable[..., Layer]) -> None:
    """vLLM reuses them for other requests."""
    layer = make_cpu_layer([(600, 150)], patterns=KINDS, options=FEATURES["window"], settings={"tile": PAGE})
    output = layer.run(layer.impl, layer.metadata())
    assert_right(layer, output, [0])
    gone = (600 - MIN_CONTEXT + 1) // PAGE
    assert layer.indices[0].tiling.context_len == 600 - gone * PAGE
    layer.cache[layer.batch.block_table[0, :gone].long()] = torch.nan
    assert torch.equal(layer.run(layer.impl, layer.metadata()), output)


@needs_native
def test_short_windows_run_densely(monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]) -> None:
    """Their rows attend fewer keys than ``min_context``."""
    lines = record_once(monkeypatch)
    layer = make_cpu_layer(MIXED, options={"sliding_window": MIN_CONTEXT - 1})
    (line,) = [line for line in lines if "run densely:" in line]
    assert f"sliding window of {MIN_CONTEXT - 1} tokens, below min_context" in line
    assert torch.equal(layer.run(layer.impl, layer.metadata()), layer.run(layer.parent, layer.metadata()))


@needs_native
def test_heads_with_a_remainder_are_served(make_cpu_layer: Callable[..., Layer]) -> None:
    outputs = []
    for remainder in (True, False):
        layer = make_cpu_layer(MIXED, patterns=[{**PEAKS, "remainder": remainder}, *KINDS[1:]])
        outputs.append(layer.run(layer.impl, layer.metadata()))
        assert len(layer.indices) == len(SPARSE)
    starts, served = layer.batch.query_start_loc.tolist(), torch.zeros(len(outputs[0]), dtype=torch.bool)
    for request in SPARSE:
        served[starts[request] : starts[request + 1]] = True
    differs = (outputs[0] != outputs[1]).any(-1)
    assert not differs[:, 1:].any() and not differs[~served].any() and differs[served, 0].any()
