"""Which chunks are audited, and the results: recall in the counters, and heads raised to the floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_layer import FIRST, PAGE, SECOND, Layer, two_chunks
from layer_inputs import HEADS, MIXED, SPARSE, assert_right

from minference_vllm import reference
from minference_vllm.backend.counters import Counters
from minference_vllm.backend.runtime import Runtime
from minference_vllm.backend.serving import SparseLayer, audit_is_due
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.choose import NATIVE
from minference_vllm.patterns import kinds
from minference_vllm.patterns.file import PatternFile
from minference_vllm.patterns.kinds import MAX_STEP, Coverage
from minference_vllm.prefill import recall
from minference_vllm.prefill.recall import audit_frequency
from minference_vllm.settings import Settings


def runtime(sparse_seconds: float = 0.0, audit_seconds: float = 0.0, **settings: Any) -> Runtime:
    counters = Counters(sparse_seconds=sparse_seconds, audit_seconds=audit_seconds)
    return Runtime(Settings(**settings), PatternFile(), "a test", counters)


def is_due(runtime: Runtime, layer: int = 0, on_gpu: bool = False) -> bool:
    chunk = Chunk(request=0, query_start=0, context_len=24576, seq_len=32768)
    inputs: Any = SimpleNamespace(chunk=chunk, query=SimpleNamespace(is_cuda=on_gpu))
    return audit_is_due(runtime, SparseLayer(layer, 0, (Coverage(),) * HEADS, NATIVE), inputs)


def test_audits_keep_their_share_of_the_time() -> None:
    assert is_due(runtime()), "the first chunk, so that every short run shows some recall"
    assert is_due(runtime(sparse_seconds=100.0, audit_seconds=0.99))
    assert not is_due(runtime(sparse_seconds=100.0, audit_seconds=1.01))
    assert is_due(runtime(sparse_seconds=100.0, audit_seconds=1.01, audit_share=0.02))
    assert not is_due(runtime(sparse_seconds=100.0, audit_seconds=0.01, audit_share=0.0))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_without_rows_nothing_is_audited(on_gpu: bool) -> None:
    assert not is_due(runtime(audit_rows=0), on_gpu=on_gpu)
    assert not is_due(runtime(sparse_seconds=100.0, audit_rows=0, audit_share=1.0), on_gpu=on_gpu)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_under_a_floor_everything_is_audited(on_gpu: bool) -> None:
    assert is_due(runtime(recall_floor=0.9), on_gpu=on_gpu)
    assert is_due(runtime(sparse_seconds=1.0, audit_seconds=50.0, recall_floor=0.9, audit_share=0.0), on_gpu=on_gpu)


def test_on_a_gpu_audits_are_drawn_by_lot() -> None:
    """As often as their share of the planned work allows, in every layer, and identically in every rank."""
    layers, chunks = 32, 300
    found = torch.zeros(chunks, layers)
    for turn in range(2):
        served = runtime()
        for chunk in range(chunks):
            served.counters.sparse_chunks += 1
            for layer in range(layers):
                due = is_due(served, layer, on_gpu=True)
                assert not turn or due == bool(found[chunk, layer])
                found[chunk, layer] = due
    expected = audit_frequency([Coverage()], 24576, 32768, 4, 0.01)
    assert float(found.mean()) == pytest.approx(expected, rel=0.2)
    assert bool(found.any(0).all())
    assert not is_due(runtime(audit_share=0.0), on_gpu=True)


def test_recall_of_audited_chunks_is_counted_per_layer_and_head(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED, settings={"audit_share": 1.0})
    layer.counters.sparse_seconds = 1e6
    layer.run(layer.impl, layer.metadata())
    assert len(layer.checks) == len(SPARSE) and all(layer.checks)
    assert set(layer.counters.recall) == {(1, head) for head in range(HEADS)}
    exact, by_value = torch.zeros(2, len(SPARSE), HEADS, dtype=torch.float64)
    for number, (request, check, index) in enumerate(zip(SPARSE, layer.checks, layer.indices, strict=True)):
        assert check is not None and check.recall is not None and check.steps == (0,) * HEADS
        query, keys = layer.batch.query[layer.batch.rows(request)], layer.batch.keys(request)
        recall = reference.attention_recall(query, keys, index.to_mask(), index.tiling.context_len, layer.scale)
        exact[number] = recall[:, check.rows].mean(1)
        assert check.recall.mass.tolist() == pytest.approx(exact[number].tolist(), abs=0.01)
        values = layer.batch.values(request)
        recall = reference.attention_recall(query, keys, index.to_mask(), index.tiling.context_len, layer.scale, values)
        by_value[number] = recall[:, check.rows].mean(1)
        assert check.recall.value.tolist() == pytest.approx(by_value[number].tolist(), abs=0.01)
    for (_, head), found in layer.counters.recall.items():
        assert found.chunks == len(SPARSE)
        assert found.recall == pytest.approx(float(exact[:, head].mean()), abs=0.01)
        assert found.least_recall == pytest.approx(float(exact[:, head].min()), abs=0.01)
        assert found.value_recall == pytest.approx(float(by_value[:, head].mean()), abs=0.01)
        assert found.least_value_recall == pytest.approx(float(by_value[:, head].min()), abs=0.01)
    assert layer.counters.audit_seconds > 0
    assert not layer.counters.raised and not layer.counters.raised_to_dense, "there is no floor"


def test_audits_stop_when_they_have_had_their_share(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED)
    layer.counters.audit_seconds = 1e6
    layer.run(layer.impl, layer.metadata())
    assert layer.checks == [None] * len(SPARSE) and not layer.counters.recall
    assert layer.counters.sparse_seconds > 0


def test_the_audit_changes_no_answer(make_cpu_layer: Callable[..., Layer]) -> None:
    outputs = []
    for rows in (0, 64):
        layer = make_cpu_layer(MIXED, settings={"audit_rows": rows, "audit_share": 1.0})
        layer.counters.sparse_seconds = 1e6
        outputs.append(layer.run(layer.impl, layer.metadata()))
        assert [check is not None for check in layer.checks] == [rows > 0] * len(SPARSE)
    assert torch.equal(*outputs)


def test_a_ranks_recall_is_counted_under_its_own_heads(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer([(0, 400)], rank=1, ranks=2)
    layer.run(layer.impl, layer.metadata())
    assert set(layer.counters.recall) == {(1, head) for head in range(HEADS // 2, HEADS)}


MISFITS: list[dict[str, Any]] = [
    {"kind": "a_shape", "sink": 0, "local": 1},
    {"kind": "dense"},
    {"kind": "vertical_slash", "vertical": 0, "slash": 0},
    {"kind": "block_sparse", "top_k": 1},
    {"kind": "a_shape", "sink": 0, "local": 100_000},
    {"kind": "tri_shape", "sink": 0, "local": 1, "last": 0},
    {"kind": "peak_threshold", "alpha": 0.999999, "sink": 0, "window": 0},
    {"kind": "antidiagonal", "stride": 16, "tau": 0.01},
]
"""On nearly flat attention all but the second and the fifth miss the recall floor."""
FITTING = (1, 4)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 300}], ids=["plain", "window"])
@pytest.mark.parametrize("max_step", [1, MAX_STEP])
def test_heads_below_the_floor_are_served_right_and_stay_raised(
    max_step: int,
    options: dict[str, Any],
    make_cpu_layer: Callable[..., Layer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minference_vllm.backend import serving

    # With a single step, heads go straight to dense and never run low_rank.
    for module in (kinds, recall, serving):
        monkeypatch.setattr(module, "MAX_STEP", max_step)

    lines: list[str] = []
    monkeypatch.setattr(
        serving.logger, "warning_once", lambda message, *values: lines.append(message % values), raising=False
    )
    # With one-page tiles the second chunk of a layer with a window drops pages before the window.
    layer = make_cpu_layer([FIRST], patterns=MISFITS, options=options, settings={"recall_floor": 0.999, "tile": PAGE})
    raised = tuple(head not in FITTING for head in range(HEADS))
    for number, batch in enumerate(two_chunks(layer)):
        layer.fill(batch)
        output = layer.run(layer.impl, layer.metadata())
        index, check = layer.indices[number], layer.checks[number]
        assert check is not None and check.recall is not None
        assert tuple(step > 0 for step in check.steps) == raised
        assert float(check.recall.value.min()) >= 0.999
        assert_right(layer, output, [0])
        # Flat attention needs every key: heads that are not dense already were raised to dense.
        dense = [head for head in range(HEADS) if raised[head]]
        assert index.density()[dense].tolist() == [1.0] * len(dense)
        expected = layer.run(layer.parent, layer.metadata())
        torch.testing.assert_close(output[:, dense], expected[:, dense], rtol=0.02, atol=0.01)
    assert layer.steps_before == [(), layer.checks[0].steps]
    assert layer.indices[1].tiling.context_len == SECOND[0] - (PAGE if options else 0)
    # Both chunks count for each raised head, and the log names those heads.
    counters = layer.counters
    both = counters.raised + counters.raised_to_dense
    assert both == {(1, head): 2 for head in range(HEADS) if raised[head]}
    for head in range(HEADS):
        assert (
            any(f"layer 1, head {head}: value recall below the floor of 0.999" in line for line in lines)
            == raised[head]
        )
    done = "dense" if max_step == 1 else "more keys"
    assert any(f"layer 1, head 2: value recall below the floor of 0.999, {done} for the rest" in line for line in lines)


def test_another_request_begins_with_its_own_patterns(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer([FIRST], patterns=MISFITS, settings={"recall_floor": 0.98})
    layer.fill(two_chunks(layer)[0])
    layer.run(layer.impl, layer.metadata())
    assert any(layer.checks[0].steps)
    # The second chunk of a request with different pages: shift every page by one.
    other = two_chunks(layer)[1]
    other = dataclasses.replace(
        other,
        key_cache=other.key_cache.roll(1, 0),
        value_cache=other.value_cache.roll(1, 0),
        block_table=(other.block_table + 1) % other.key_cache.shape[0],
    )
    layer.fill(other)
    layer.run(layer.impl, layer.metadata())
    layer.fill(two_chunks(layer)[0])
    layer.run(layer.impl, layer.metadata())
    assert layer.steps_before == [(), (), ()], "and a request's first chunk begins anew"


def test_the_log_line_tells_recall_and_raised_heads(
    make_cpu_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minference_vllm.backend import metadata_builder

    lines: list[str] = []
    monkeypatch.setattr(
        metadata_builder.logger, "info", lambda message, *values, **options: lines.append(message % values)
    )
    layer = make_cpu_layer([FIRST], patterns=MISFITS, settings={"recall_floor": 0.98, "log_interval": 1e-9})
    for batch in two_chunks(layer):
        layer.fill(batch)
        layer.run(layer.impl, layer.metadata())
    (line,) = [line for line in lines if "density" in line]
    assert ", recall 0.9" in line or ", recall 1.0" in line
    assert "below the floor" in line and "times dense" in line
