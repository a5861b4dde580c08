"""The counters, and the line in the log that they become."""

from __future__ import annotations

from minference_vllm.audit import Counters
from minference_vllm.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT, plan_batch


def test_batches_and_layers_add_up() -> None:
    counters = Counters()
    assert counters.density == 1.0
    plan = plan_batch([0, 1, 401, 601, 701], [5000, 400, 5000, 5100], min_context=1000, min_chunk=150)
    counters.count_batch(plan)
    counters.count_batch(plan)
    counters.count_layer(10.0, 100.0)
    counters.count_layer(20.0, 50.0)
    assert (counters.sparse_chunks, counters.sparse_tokens) == (2, 400)
    assert counters.dense_chunks == {BELOW_MIN_CONTEXT: 2, BELOW_MIN_CHUNK: 2}
    assert counters.density == 0.2


def test_a_line_appears_only_when_it_is_due() -> None:
    counters = Counters()
    counters.count_batch(plan_batch([0, 600], [600], min_context=1, min_chunk=1))
    assert counters.line_when_due(10.0, now=1000.0) is None, "no layer has run yet"
    counters.count_layer(25.0, 100.0)
    assert counters.line_when_due(0.0, now=1000.0) is None, "an interval of 0 turns lines off"
    line = counters.line_when_due(10.0, now=1000.0)
    assert line == "minference: 1 prefill chunks (600 tokens) sparse, density 0.2500"
    assert counters.line_when_due(10.0, now=1009.9) is None
    assert counters.line_when_due(10.0, now=1010.0) == line


def test_dense_chunks_are_listed_with_their_reasons() -> None:
    counters = Counters()
    counters.count_batch(plan_batch([0, 600, 700, 800], [600, 100, 100], min_context=300, min_chunk=1))
    counters.count_layer(1.0, 2.0)
    line = counters.line_when_due(1.0, now=5000.0)
    assert line is not None and line.endswith(f"density 0.5000; dense: 2 ({BELOW_MIN_CONTEXT})")


def test_tiles_without_room_are_in_the_line() -> None:
    counters = Counters()
    counters.count_layer(1.0, 2.0, 0)
    assert "no room" not in str(counters.line_when_due(1.0, now=5000.0))
    counters.count_layer(1.0, 2.0, 3)
    assert counters.overflowed == 3
    assert "; 3 tiles had no room" in str(counters.line_when_due(1.0, now=6000.0))
