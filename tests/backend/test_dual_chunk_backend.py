"""Layers with dual chunk attention in a mixed batch, on the CPU backend and (with CPU tensors) the GPU backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dual_chunk_inputs import frequencies, turn
from layer_inputs import DIM, GPU_KINDS, HEADS, KINDS, KV_HEADS, planned
from native_inputs import needs_native

from minference_vllm import reference
from minference_vllm.kernels.native import library
from minference_vllm.patterns.file import PatternFile
from minference_vllm.patterns.kinds import LowRank
from minference_vllm.prefill.dual_chunk import ROTATIONS, DualChunk, attend_dual_chunk, decode_dual_chunk
from minference_vllm.reference import dual_chunk as reference_dual_chunk

CONFIG = {"chunk_size": 320, "local_size": 64, "original_max_position_embeddings": 200}
GEOMETRY = DualChunk.of(CONFIG)
MIXED = [(500, 1), (0, 150), (150, 1), (20, 30), (300, 250), (600, 40), (0, 700), (199, 1), (200, 1), (250, 20)]
"""(context, new tokens)."""
SPARSE, FAR = (1, 4, 6), (0, 4, 5, 6, 8, 9)
"""Sparse requests, and requests beyond plain attention."""
SETTINGS = {"min_context": 100}


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Collect the parts of each request that is attended from now on; an empty list for decodes."""
    from minference_vllm.backend import dual_chunk

    found = {}

    def watched(rotated: torch.Tensor, inputs: Any, *arguments: Any) -> Any:
        parts = found[inputs.chunk.request] = attend_dual_chunk(rotated, inputs, *arguments)
        return parts

    def watched_decode(rotated: torch.Tensor, inputs: Any, *arguments: Any) -> None:
        found[inputs.chunk.request] = []
        decode_dual_chunk(rotated, inputs, *arguments)

    monkeypatch.setattr(dual_chunk, "attend_dual_chunk", watched)
    monkeypatch.setattr(dual_chunk, "decode_dual_chunk", watched_decode)
    return found


def run(layer: Any, rotated: torch.Tensor, metadata: Any) -> torch.Tensor:
    """Call ``forward`` as vLLM's attention layer does, with padding after the batch."""
    tokens, padding = len(rotated), 3
    query = torch.full((tokens + padding, ROTATIONS, HEADS, DIM), torch.nan, dtype=rotated.dtype)
    query[:tokens] = rotated
    key = torch.zeros(tokens + padding, KV_HEADS, DIM, dtype=rotated.dtype)
    out = torch.full((tokens + padding, HEADS, DIM), torch.nan, dtype=rotated.dtype)
    layer.impl.forward(layer.layer, query.view(-1, HEADS, DIM), key, key, layer.cache, metadata, out)
    return out[:tokens]


def assert_all_right(
    layer: Any,
    out: torch.Tensor,
    keys: list[torch.Tensor],
    query: torch.Tensor,
    parts: dict[int, Any],
    sparse: Sequence[int] = SPARSE,
) -> None:
    """Every request matches the definition on the keys of its indices, or on all keys if it has none."""
    batch = layer.batch
    assert sorted(parts) == list(FAR)
    plain = {index.tiling.seq_len: index for index in layer.indices}
    for request, context_len in enumerate(batch.context_lens):
        seq_len = int(batch.seq_lens[request])
        mask = reference.causal_mask(context_len, seq_len).expand(HEADS, -1, -1)
        if parts.get(request):
            named = torch.zeros_like(mask)
            for part in parts[request]:
                rows = slice(*(position - context_len for position in part.rows))
                first, last = part.keys
                named[:, rows, first:last] = part.index.to_mask()[..., : last - first]
            assert torch.equal(named, mask) == (request not in sparse), f"request {request}"
            mask = named
        elif request in sparse:
            mask = plain[seq_len].to_mask()
        scores = reference_dual_chunk.dual_chunk_scores(
            query[batch.rows(request)], keys[request], context_len, layer.scale, frequencies(DIM),
            GEOMETRY.chunk_size, GEOMETRY.local_size, GEOMETRY.original_len,
        )  # fmt: skip
        exact = reference_dual_chunk.dual_chunk_attention(scores, batch.values(request), mask)
        found = out[batch.rows(request)]
        budget = (3e-5 if layer.dtype == torch.float32 else 0.03) * float(exact.abs().max())
        assert float((found.double() - exact).abs().max()) <= budget, f"request {request}"


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mixed_batch_on_the_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Any]
) -> None:
    from minference_vllm.backend import dual_chunk, serving

    for module in (dual_chunk, serving):
        monkeypatch.setattr(module, "audit_is_due", lambda *arguments: True)
    layer = make_cpu_layer(MIXED, dtype=dtype, dual_chunk=CONFIG, settings=SETTINGS)
    query = layer.batch.query.clone()
    rotated, keys = turn(layer.batch, GEOMETRY)
    layer.fill(layer.batch)
    parts = watch(monkeypatch)
    metadata = layer.metadata()
    assert [chunk.request for chunk, _ in metadata.sparse] == list(SPARSE)
    assert [chunk.request for chunk, _ in metadata.far] == [0, 5, 8, 9]
    out = run(layer, rotated, metadata)
    assert_all_right(layer, out, keys, query, parts)
    counters = layer.counters
    assert counters.sparse_chunks == len(SPARSE) and 0.1 < counters.density < 1
    recall = counters.recall
    assert sorted(recall) == [(1, head) for head in range(HEADS)]
    assert all(0 < found.recall <= 1 and found.chunks == len(SPARSE) for found in recall.values())


@needs_native
def test_requests_that_ask_for_other_patterns(
    monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Any]
) -> None:
    """Beyond plain attention: densely, or with patterns without their remainder."""
    layer = make_cpu_layer(MIXED, dtype=torch.float32, dual_chunk=CONFIG, settings=SETTINGS)
    query = layer.batch.query.clone()
    rotated, keys = turn(layer.batch, GEOMETRY)
    layer.fill(layer.batch)
    parts = watch(monkeypatch)
    metadata = planned(layer, {4: "dense", 6: "a_shape(16, 40)"}, layer.metadata)
    assert [(chunk.request, chunk.patterns is None) for chunk, _ in metadata.sparse] == [(1, True), (6, False)]
    assert [chunk.request for chunk, _ in metadata.far] == [0, 4, 5, 8, 9]
    assert_all_right(layer, run(layer, rotated, metadata), keys, query, parts, sparse=(1, 6))
    planned(layer, {6: "low_rank(32, 0.5, true)"}, layer.metadata)
    name = str(LowRank(rank=32, gamma=0.5, remainder=True))
    assert set(layer.impl.asked_layers[name].patterns) == {LowRank(rank=32, gamma=0.5, remainder=True)}
    assert set(layer.impl.dual_chunk.layers[name].patterns) == {LowRank(rank=32, gamma=0.75)}


@needs_native
def test_a_mixed_batch_on_the_gpu_backends(monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Any]) -> None:
    """With the CPU kernel, since tensors are on the CPU, and a stand-in for the parent's plain attention."""
    layer = make_gpu_layer(MIXED, dual_chunk=CONFIG, settings={**SETTINGS, "kernel": "auto"})
    query = layer.batch.query.clone()
    rotated, keys = turn(layer.batch, GEOMETRY)
    layer.cache = torch.cat([layer.batch.key_cache, layer.batch.value_cache], -1).transpose(1, 2).contiguous()
    layer.batch.query = rotated[:, 0]
    parts = watch(monkeypatch)
    out = run(layer, rotated, layer.builder.build(0, layer.common()))
    assert_all_right(layer, out, keys, query, parts)


@needs_native
def test_decodes_alone(monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Any]) -> None:
    """Up to the plain length vLLM serves them; beyond it only we can."""
    near = make_cpu_layer([(150, 1), (199, 1)], dtype=torch.float32, dual_chunk=CONFIG, settings=SETTINGS)
    assert not hasattr(near.metadata(), "far")
    far = make_cpu_layer([(150, 1), (200, 1), (1000, 1)], dtype=torch.float32, dual_chunk=CONFIG, settings=SETTINGS)
    metadata = far.metadata()
    assert [chunk.request for chunk, _ in metadata.far] == [1, 2] and not metadata.sparse
    assert [requests for requests, _, _ in metadata.dense_runs] == [(0, 1)]


@needs_native
def test_heads_that_are_all_dense(monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Any]) -> None:
    """The parent serves their plain chunks, whatever else is in the batch; nothing is counted."""
    patterns = [{"kind": "dense"}] * HEADS
    options = {"dtype": torch.float32, "patterns": patterns, "dual_chunk": CONFIG, "settings": SETTINGS}
    layer = make_cpu_layer([(0, 150), (300, 250)], **options)
    query = layer.batch.query.clone()
    rotated, keys = turn(layer.batch, GEOMETRY)
    layer.fill(layer.batch)
    parts = watch(monkeypatch)
    out = run(layer, rotated, layer.metadata())
    assert sorted(parts) == [1] and not layer.indices
    for request, context_len in enumerate((0, 300)):
        scores = reference_dual_chunk.dual_chunk_scores(
            query[layer.batch.rows(request)], keys[request], context_len, layer.scale, frequencies(DIM), 320, 64, 200
        )
        mask = reference.causal_mask(context_len, int(layer.batch.seq_lens[request]))
        exact = reference_dual_chunk.dual_chunk_attention(scores, layer.batch.values(request), mask)
        torch.testing.assert_close(out[layer.batch.rows(request)].double(), exact, rtol=1e-4, atol=1e-5)
    alone = make_cpu_layer([(0, 150)], **options)
    rotated, _ = turn(alone.batch, GEOMETRY)
    alone.fill(alone.batch)
    run(alone, rotated, alone.metadata())
    assert not alone.indices


@needs_native
def test_parts_run_the_default_without_its_remainder(
    monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Any]
) -> None:
    """Plain chunks keep it."""
    written = {"kind": "low_rank", "rank": 32, "gamma": 0.88, "remainder": True}
    layer = make_cpu_layer([(0, 150), (300, 250)], patterns=[written] * HEADS, dual_chunk=CONFIG, settings=SETTINGS)
    impl = layer.impl
    assert set(impl.sparse_layer.patterns) == {LowRank(rank=32, gamma=0.88, remainder=True)}
    assert set(impl.dual_chunk.layers[None].patterns) == {LowRank(rank=32, gamma=0.94)}
    rotated, _ = turn(layer.batch, GEOMETRY)
    layer.fill(layer.batch)
    parts = watch(monkeypatch)
    out = run(layer, rotated, layer.metadata())
    assert sorted(parts) == [1] and len(layer.indices) == 1 and torch.isfinite(out).all()


@pytest.mark.parametrize("rank", [0, 1])
@needs_native
def test_a_tensor_parallel_rank_runs_its_own_heads_patterns(rank: int, make_cpu_layer: Callable[..., Any]) -> None:
    layer = make_cpu_layer([(0, 10)], dual_chunk=CONFIG, rank=rank, ranks=2).impl.dual_chunk.layers[None]
    assert (layer.number, layer.first_head) == (1, 4 * rank)
    assert [pattern.kind for pattern in layer.patterns] == [entry["kind"] for entry in KINDS[4 * rank : 4 * rank + 4]]


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"sliding_window": 128}}, "with sliding window: choose another attention backend"),
        ({"settings": {"kernel": "block_table"}}, "with the kernel 'block_table': set kernel to 'auto'"),
        ({"settings": {"kernel": "fa4"}}, "with the kernel 'fa4': set kernel to 'auto'"),
        ({"settings": {"recall_floor": 0.9}}, "with a recall_floor"),
        ({"dual_chunk": {**CONFIG, "local_size": 70}}, "with pages of 64 tokens, since its chunks of 250 tokens"),
        ({"dual_chunk": {**CONFIG, "local_size": 320}}, "needs integers chunk_size > local_size >= 0"),
        ({"options": {"logits_soft_cap": 30.0}}, "with soft cap on logits: choose another attention backend"),
        ({"options": {"sinks": torch.zeros(HEADS)}}, "with attention sinks: choose another attention backend"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused_at_the_start(
    arguments: dict[str, Any], message: str, make_cpu_layer: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        make_cpu_layer([(0, 10)], **{"dual_chunk": CONFIG, **arguments})


def test_a_cpu_without_our_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Any]
) -> None:
    monkeypatch.setattr(library, "unsupported_reason", lambda *arguments: "the processor has no AVX2")
    message = "dual chunk attention needs kernel 'native', which cannot run here: the processor has no AVX2$"
    with pytest.raises(ValueError, match=message):
        make_cpu_layer([(0, 10)], dual_chunk=CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_dtype": "fp8"}, "with a KV cache of fp8: set kv_cache_dtype to 'auto'"),
        ({"speculative": 3}, "with speculative decoding: leave speculative_config out"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    from minference_vllm.backend.dual_chunk_limits import check_configuration
    from minference_vllm.settings import Settings

    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        speculative_config=changes.get("speculative"),
    )
    with pytest.raises(ValueError, match=message):
        check_configuration(config, Settings(), PatternFile())


def test_a_layer_without_it_in_a_model_that_has_it(make_cpu_layer: Callable[..., Any]) -> None:
    layer = make_cpu_layer([(0, 10)], dual_chunk=CONFIG)
    layer.dual_chunk = None
    with pytest.raises(ValueError, match="with some layers that do not have it"):
        layer.make_layer(0, {})


def test_it_is_not_calibrated_beyond_plain_attention(make_cpu_layer: Callable[..., Any]) -> None:
    layer = make_cpu_layer([(0, 400)], dual_chunk=CONFIG)
    layer.impl.runtime.recorder = object()
    rotated, _ = turn(layer.batch, GEOMETRY)
    with pytest.raises(ValueError, match="for prompts of up to 200 tokens"):
        run(layer, rotated, layer.metadata())


@needs_native
def test_kernels_for_parts_are_warmed_up(monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Any]) -> None:
    """All three parts, sparse and dense."""
    from minference_vllm.backend import dual_chunk, warmup

    layer = make_gpu_layer([(0, 10)], dual_chunk=CONFIG)
    ran = []
    watched = lambda *arguments: ran.append((arguments[3][0].kind, len(attend_dual_chunk(*arguments))))  # noqa: E731
    monkeypatch.setattr(dual_chunk, "attend_dual_chunk", watched)
    monkeypatch.setattr(warmup, "_ready", set())
    settings = layer.impl.runtime.settings
    for _ in range(2):
        warmup.warm_up([layer.layer], layer.spec, layer.dtype, settings, torch.device("cpu"))
    assert ran == [(GPU_KINDS[0]["kind"], 5), ("dense", 5)]


@needs_native
def test_memory_is_taken_for_plain_chunks_and_for_those_beyond(
    monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Any]
) -> None:
    """Each is the last chunk of the longest sequence of its kind, and audited."""
    from minference_vllm.backend import dual_chunk, warmup

    layer = make_gpu_layer([(0, 10)], dual_chunk=CONFIG, settings=SETTINGS)
    monkeypatch.setattr(warmup, "_profiled", {})
    monkeypatch.setattr(warmup, "MEMORY_LIMIT", 1)
    taken: list[tuple[str, int, int]] = []

    def watched(name: str, function: Callable[..., Any], inputs_at: int) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            chunk = arguments[inputs_at].chunk
            taken.append((name, chunk.context_len, chunk.seq_len))
            return function(*arguments, **keywords)

        return run

    audited = []
    audit = dual_chunk.audited_recall
    monkeypatch.setattr(
        dual_chunk, "audited_recall", lambda *arguments, **keywords: audited.append(audit(*arguments, **keywords))
    )
    monkeypatch.setattr(dual_chunk, "attend_dual_chunk", watched("far", attend_dual_chunk, 1))
    monkeypatch.setattr(warmup, "attend_chunk", watched("plain", warmup.attend_chunk, 0))
    layer.layer.get_kv_cache_spec = lambda config: layer.spec
    layer.config.model_config.max_model_len = 1000
    for _ in range(2):
        warmup.take_memory(layer.layer, layer.config, 150, torch.device("cpu"))
    assert taken == [("far", 850, 1000), ("plain", 50, 200)] and len(audited) == 1
    layer.config.model_config.max_model_len = 190
    warmup._profiled.clear()
    warmup.take_memory(layer.layer, layer.config, 150, torch.device("cpu"))
    assert taken[2:] == [("plain", 40, 190)]


def test_decodes_replay_no_cuda_graph(make_gpu_layer: Callable[..., Any]) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    layer = make_gpu_layer([(0, 10)], dual_chunk=CONFIG)
    support = layer.parent.our_builder.get_cudagraph_support(layer.config, layer.spec)
    assert support is AttentionCGSupport.NEVER
