"""What is left to vLLM's FlashAttention and Triton backends, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_layer import DTYPE, Layer, Parent, only
from layer_inputs import DIM, HEADS, KV_HEADS, MIXED, PAGE, record_once

from minference_vllm.settings import Settings


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"causal": False}, "not causal"),
        ({"mm_req_doc_ranges": {0: [(3, 9)]}}, "both ways"),
        ({"rswa_prefix_lens": torch.zeros(1, dtype=torch.int32)}, "reference sliding window"),
        ({"seq_lens_cpu_upper_bound": None, "seq_lens": torch.zeros(1, device="meta")}, "on the GPU only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches_that_we_do_not_serve(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Layer]
) -> None:
    layer = make_gpu_layer([(0, 400)])
    lines = record_once(monkeypatch)
    assert not getattr(layer.builder.build(0, layer.common(**change)), "sparse", ())
    assert len(lines) == 1 and reason in lines[0]


def test_a_draft_models_batches_on_a_gpu_are_not_ours(
    monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Layer]
) -> None:
    """vLLM lengthens them by a token without updating the lengths on the host."""
    layer = make_gpu_layer([(0, 400)])
    stale = {"seq_lens_cpu_upper_bound": layer.batch.seq_lens - 1}
    ((chunk, _),) = layer.builder.build(0, layer.common(**stale)).sparse
    assert (chunk.context_len, chunk.seq_len) == (0, 400), "lengths on the CPU are exact"
    layer.builder.runtime.is_draft = True
    assert layer.builder.build(0, layer.common(**stale)).sparse
    lines = record_once(monkeypatch)
    on_device = {**stale, "seq_lens": layer.batch.seq_lens.to("meta")}
    assert not getattr(layer.builder.build(0, layer.common(**on_device)), "sparse", ())
    assert len(lines) == 1 and "on the GPU only" in lines[0]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"sliding_window": (127, 0)}, "sliding window"),
        ({"alibi_slopes": [2.0**-head for head in range(HEADS)]}, "ALiBi"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache of fp8_e5m2"),
        ({"head_size": 512}, "head size 512 is above 256"),
    ],
    ids=["sliding_window", "alibi_slopes", "kv_cache_dtype", "head_size"],
)
def test_layers_that_we_do_not_serve_run_as_vllms(
    option: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    parent: Parent,
    make_gpu_layer: Callable[..., Layer],
) -> None:
    """In their own KV-cache group, whose batches the parent plans alone, and in a group with other layers."""
    (name, value), initialise = *option.items(), parent.impl.__init__

    def differs(impl: Any, *arguments: Any, **options: Any) -> None:
        initialise(impl, *arguments, **options)
        setattr(impl, name, value)

    layer = make_gpu_layer(MIXED)
    lines = record_once(monkeypatch)
    with monkeypatch.context() as patch:
        # As arguments, some of these would fail vLLM's own checks on this machine.
        patch.setattr(parent.impl, "__init__", differs)
        unserved = layer.make_layer(1)
    assert lines == [f"minference: some layers run densely: {reason}"]
    layer.impl = unserved.impl
    for others in ([], [layer.make_layer(0)]):
        layer.builder = layer.make_builder(unserved, *others)
        metadata = layer.builder.build(0, layer.common())
        assert type(metadata) is (layer.builder.metadata_cls if others else parent.metadata)
        layer.dense_calls.clear()
        layer.run(metadata)
        assert layer.dense_calls == [metadata] and not layer.indices


@pytest.mark.parametrize(
    "changes",
    [{"state_content_bytes": 2 * 2 * DIM + 8}, {"num_head_slots": 2 * KV_HEADS}, {"head_size_v": DIM // 2}],
    ids=["scales beside keys and values", "packed heads", "smaller values"],
)
def test_pages_with_something_else_in_them_run_densely(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Layer]
) -> None:
    """Padded pages are served sparsely."""
    layer = make_gpu_layer(MIXED)
    padded = dataclasses.replace(layer.spec, page_size_padded=2 * layer.spec.page_size_bytes)
    layer.impl.prepare(layer.layer, padded, DTYPE, torch.device("cpu"))
    assert layer.impl.sparse_layer is not None and not layer.impl.dense_only
    lines = record_once(monkeypatch)
    other = dataclasses.replace(layer.spec, **changes)
    layer.impl.prepare(layer.layer, other, DTYPE, torch.device("cpu"))
    assert layer.impl.sparse_layer is None and layer.impl.dense_only
    stored, plain = other.real_page_size_bytes, layer.spec.real_page_size_bytes
    assert lines == [
        f"minference: some layers run densely: pages of {stored} bytes, where keys and values take {plain}"
    ]


@only("FlashAttention")
@pytest.mark.parametrize("kernel", ["block_table", "fa4"])
def test_vllms_kernels_know_no_soft_caps_sinks_and_fp8_caches(
    kernel: str, monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Layer]
) -> None:
    layer = make_gpu_layer([(0, 400)])
    monkeypatch.setattr(layer.impl.runtime, "settings", Settings(kernel=kernel))
    model = SimpleNamespace(model_config=SimpleNamespace(dtype=DTYPE))
    assert not layer.impl.dense_reasons(model)
    monkeypatch.setattr(layer.impl, "logits_soft_cap", 20.0)
    monkeypatch.setattr(layer.impl, "sinks", torch.zeros(HEADS))
    monkeypatch.setattr(layer.impl, "kv_cache_dtype", "fp8")
    reasons = layer.impl.dense_reasons(model)
    assert "soft cap on logits" in reasons and "attention sinks" in reasons and "fp8" in " ".join(reasons)


@only("FlashAttention")
def test_what_flash_attention_4_does_not_take_is_refused(make_gpu_layer: Callable[..., Layer]) -> None:
    with pytest.raises(ValueError, match=f"kernel 'fa4' cannot run: pages of {PAGE} tokens; it takes pages of 128"):
        make_gpu_layer([(0, 400)], settings={"kernel": "fa4"})


@pytest.mark.parametrize("options", [{"logits_soft_cap": 20.0}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_our_kernel_knows_soft_caps_and_fp8_caches(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Layer]
) -> None:
    layer = make_gpu_layer([(0, 400)])
    for name, value in options.items():
        monkeypatch.setattr(layer.impl, name, value)
    assert not layer.impl.dense_reasons(SimpleNamespace(model_config=SimpleNamespace(dtype=DTYPE)))


def test_kernels_of_the_other_machine_are_refused(make_gpu_layer: Callable[..., Layer]) -> None:
    with pytest.raises(ValueError, match="kernel 'native' runs on CPUs"):
        make_gpu_layer([(0, 400)], settings={"kernel": "native"})


@only("TritonAttention")
@pytest.mark.parametrize("kernel", ["block_table", "fa4"])
def test_vllms_kernels_need_flash_attention(kernel: str, make_gpu_layer: Callable[..., Layer]) -> None:
    with pytest.raises(ValueError, match=f"'{kernel}' runs on vLLM's FlashAttention, which this GPU does not have"):
        make_gpu_layer([(0, 400)], settings={"kernel": kernel})
