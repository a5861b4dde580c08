"""Requests that ask for dense attention or other patterns, in batches with others, in one layer of each backend."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_layer import FIRST, Layer
from gpu_layer import only
from layer_inputs import HEADS, MIXED, SPARSE, assert_right, planned

from minference_vllm.backend import runtime as runtimes
from minference_vllm.backend import vllm_requests
from minference_vllm.backend.request_patterns import ASKED_DENSE, CANNOT_RUN
from minference_vllm.core.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT
from minference_vllm.patterns.kinds import AShape

DENSE, ASKED, OWN = SPARSE
"""Rows that ask for dense attention, for ``A_SHAPE``, and for nothing (the server's patterns)."""
A_SHAPE = "a_shape(16, 100)"
NAME = str(AShape(sink=16, local=100))
BY_VLLM = [{"kind": "dense"}] * HEADS


def test_each_request_of_a_batch_runs_what_it_asked_for(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED)
    metadata = planned(layer, {DENSE: "dense", ASKED: A_SHAPE}, layer.metadata)
    assert [(chunk.request, chunk.patterns) for chunk, _ in metadata.sparse] == [(ASKED, NAME), (OWN, None)]
    output, indices = layer.run(layer.impl, metadata), list(layer.indices)
    assert_right(layer, output, (ASKED, OWN))
    counters = layer.counters
    assert counters.dense_chunks == {ASKED_DENSE: 1, BELOW_MIN_CHUNK: 2, BELOW_MIN_CONTEXT: 1}
    assert counters.sparse_chunks == 2 and counters.asked[NAME].chunks == 1
    asked = counters.report()["asked_by_requests"][NAME]
    assert asked["sparse_tokens"] == MIXED[ASKED][1] and asked["density"] == float(indices[0].density().mean())
    # The same as when served alone.
    dense = layer.run(layer.parent, layer.metadata())
    rows = layer.batch.rows(DENSE)
    torch.testing.assert_close(output[rows], dense[rows], rtol=0.01, atol=0.01)
    nobody = layer.run(layer.impl, layer.metadata())
    rows = layer.batch.rows(OWN)
    assert torch.equal(output[rows], nobody[rows]), "the server's patterns"
    alike = make_cpu_layer(MIXED, patterns=[{"kind": "a_shape", "sink": 16, "local": 100}] * HEADS)
    alike.run(alike.impl, alike.metadata())
    assert torch.equal(indices[0].to_mask(), alike.indices[SPARSE.index(ASKED)].to_mask())


def test_layers_that_are_dense_by_the_servers_patterns(make_cpu_layer: Callable[..., Layer]) -> None:
    """Dense for requests with the server's patterns; the density counts their heads if other layers are sparse."""
    layer = make_cpu_layer(MIXED, patterns=BY_VLLM)
    metadata = planned(layer, {ASKED: A_SHAPE}, layer.metadata)
    output = layer.run(layer.impl, metadata)
    assert len(layer.indices) == 1
    assert_right(layer, output, [ASKED])
    dense = layer.run(layer.parent, layer.metadata())
    for row in (DENSE, OWN):
        rows = layer.batch.rows(row)
        torch.testing.assert_close(output[rows], dense[rows], rtol=0.01, atol=0.01)
    assert layer.counters.dense_pairs == layer.counters.asked[NAME].dense_pairs > 0
    both = make_cpu_layer(MIXED, patterns=BY_VLLM)
    both.builder = both.make_builder(both.layer, both.make_layer(0, {}))
    chunks = [chunk for chunk, _ in planned(both, {ASKED: A_SHAPE}, both.metadata).sparse]
    pairs = HEADS * sum(chunk.dense_pairs for chunk in chunks if chunk.patterns is None)
    assert both.counters.dense_pairs == both.counters.computed_pairs == pairs > 0


def test_rows_that_cannot_be_told_are_dense(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED)

    def as_a_micro_batch() -> Any:
        layer.impl.runtime.requests.stand([])
        return layer.metadata()

    metadata = planned(layer, {ASKED: "dense"}, as_a_micro_batch)
    assert torch.equal(layer.run(layer.impl, metadata), layer.run(layer.parent, metadata))
    assert not layer.indices and layer.counters.sparse_chunks == 0


@pytest.mark.parametrize(
    ("asked", "settings", "problem"),
    [
        ("antidiagonal(48)", {}, "antidiagonal stride 48 must divide the page size, here 64"),
    ],
)
def test_patterns_that_cannot_run_here(
    asked: str, settings: dict[str, Any], problem: str, make_cpu_layer: Callable[..., Layer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The front end refuses them. If it was bypassed, the request is dense and a line is logged."""
    from vllm.exceptions import VLLMValidationError

    layer = make_cpu_layer(MIXED, settings=settings)
    lines: list[str] = []
    monkeypatch.setattr(runtimes.logger, "warning", lambda text, *values: lines.append(text % values))
    for _ in range(2):
        metadata = planned(layer, {DENSE: asked}, layer.metadata)
        assert [chunk.request for chunk, _ in metadata.sparse] == [ASKED, OWN]
    (line,) = lines
    assert problem in line and "are served densely" in line
    assert layer.counters.dense_chunks[CANNOT_RUN] == 2
    assert_right(layer, layer.run(layer.impl, metadata), [ASKED, OWN])
    monkeypatch.setattr(runtimes, "runtime_for", lambda config: layer.impl.runtime)
    monkeypatch.setattr(vllm_requests, "selects_minference", lambda config: True)
    with pytest.raises(VLLMValidationError, match=problem):
        vllm_requests.checked(SimpleNamespace(extra_args={"minference": asked}), layer.config)
    found = vllm_requests.checked(SimpleNamespace(extra_args={"minference": A_SHAPE}), layer.config)
    assert found is not None and found.name == NAME


def test_a_floor_holds_for_them_too(make_cpu_layer: Callable[..., Layer]) -> None:
    """Recall by layer and head covers the server's patterns only."""
    layer = make_cpu_layer([FIRST], settings={"recall_floor": 0.98})
    layer.run(layer.impl, planned(layer, {0: "a_shape(0, 1)"}, layer.metadata))
    assert layer.counters.raised.total() + layer.counters.raised_to_dense.total() == HEADS
    assert not layer.counters.recall
    layer = make_cpu_layer([FIRST])
    layer.run(layer.impl, planned(layer, {0: "a_shape(0, 1)"}, layer.metadata))
    assert layer.checks == [None] and layer.counters.audit_seconds == 0


def test_what_was_asked_for_is_not_kept_for_ever(
    make_cpu_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "MAX_ASKED", 2)
    layer = make_cpu_layer([FIRST])
    for local in (*range(1, 9), 1):
        metadata = planned(layer, {0: f"a_shape(0, {local})"}, layer.metadata)
        assert_right(layer, layer.run(layer.impl, metadata), [0])
        assert len(layer.impl.asked_layers) <= 3
    assert layer.counters.asked[str(AShape(sink=0, local=1))].chunks == 2


def test_backends_on_gpus(make_gpu_layer: Callable[..., Any]) -> None:
    layer = make_gpu_layer(MIXED)
    build = lambda: layer.builder.build(0, layer.common())  # noqa: E731
    metadata = planned(layer, {DENSE: "dense", ASKED: A_SHAPE}, build)
    assert [(chunk.request, chunk.patterns) for chunk, _ in metadata.sparse] == [(ASKED, NAME), (OWN, None)]
    assert_right(layer, layer.run(metadata), (ASKED, OWN))
    assert [call.seq_lens.tolist() for call in layer.dense_calls] == [[501, 400, 701, 50], [120, 640]]
    assert layer.impl.runtime.counters.dense_chunks[ASKED_DENSE] == 1


@only("FlashAttention")
def test_another_group_of_layers_takes_the_runs_over(make_gpu_layer: Callable[..., Any]) -> None:
    """Including the runs of single sparse chunks, for layers in which these are dense."""
    layer = make_gpu_layer(MIXED, patterns=BY_VLLM)
    metadata = planned(layer, {ASKED: A_SHAPE}, lambda: layer.builder.build(0, layer.common()))
    table, slots = layer.batch.block_table + 7, torch.arange(int(layer.batch.query_start_loc[-1]))
    other = layer.builder.update_block_table(metadata, table, slots)
    assert sorted(other.alone) == sorted(SPARSE)
    for request, (requests, rows, run) in other.alone.items():
        assert requests == (request, request + 1) and rows == layer.batch.rows(request)
        assert torch.equal(run.block_table, table[request : request + 1]) and torch.equal(run.slot_mapping, slots[rows])
    assert_right(layer, layer.run(metadata), [ASKED])
    lengths = [call.seq_lens.tolist() for call in layer.dense_calls]
    assert lengths == [[501], [701, 50], [120, 640], [400], [428]], "runs, then the dense ones of the sparse chunks"
