"""The counters and their log line."""

from __future__ import annotations

import json

import pytest
import torch

from minference_vllm.backend.counters import Counters, HeadRecall, added, merged
from minference_vllm.core.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT, plan_batch


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
    assert counters.line_when_due(10.0, now=1010.0) is None, "nothing has happened since"
    counters.count_layer(25.0, 100.0)
    assert counters.line_when_due(10.0, now=1009.9) is None, "the last one is too recent"
    assert counters.has_more_to_log
    assert counters.line_when_due(10.0, now=1010.0) == line
    assert not counters.has_more_to_log


def test_dense_chunks_are_listed_with_their_reasons() -> None:
    counters = Counters()
    counters.count_batch(plan_batch([0, 600, 700, 800], [600, 100, 100], min_context=300, min_chunk=1))
    counters.count_layer(1.0, 2.0)
    line = counters.line_when_due(1.0, now=5000.0)
    assert line is not None and line.endswith(f"density 0.5000; dense: 2 ({BELOW_MIN_CONTEXT})")


def test_recall_is_told_on_average_and_of_the_worst_head() -> None:
    counters = Counters()
    counters.count_layer(1.0, 2.0)
    for layer, first_head, recall in ((3, 0, [1.0, 0.9]), (3, 0, [0.8, 0.9]), (4, 2, [0.5])):
        by_value = [share / 2 for share in recall]
        counters.count_recall(layer, first_head, torch.tensor([recall, by_value], dtype=torch.float64))
    assert counters.recall[3, 0] == HeadRecall(2, 0.9, 0.8, 0.45, 0.4)
    assert set(counters.recall) == {(3, 0), (3, 1), (4, 2)}
    line = counters.line_when_due(1.0, now=5000.0)
    assert line is not None and line.endswith(
        "density 0.5000, recall 0.8200, value recall 0.4100 (least 0.2500, layer 4 head 2)"
    )
    counters.count_recall(3, 0, torch.tensor([[0.3], [0.2]], dtype=torch.float64))
    found = counters.recall[3, 0]
    assert (found.chunks, found.recall, found.least_recall) == (3, pytest.approx(0.7), 0.3), "a draft model's one head"


def test_raised_heads_are_counted_and_told() -> None:
    counters = Counters()
    counters.count_layer(1.0, 2.0)
    counters.count_raised(0, 1, dense=False)
    counters.count_raised(0, 1, dense=True)
    counters.count_raised(2, 5, dense=True)
    assert counters.raised == {(0, 1): 1} and counters.raised_to_dense == {(0, 1): 1, (2, 5): 1}
    line = counters.line_when_due(1.0, now=5000.0)
    assert line is not None and line.endswith("below the floor 1 times given more keys, 2 times dense")


def test_seconds_of_attention_and_audits_are_kept_apart() -> None:
    counters = Counters()
    counters.count_seconds(2.0, 0.5)
    counters.count_seconds(1.0, 0.0)
    assert (counters.sparse_seconds, counters.audit_seconds) == (3.0, 0.5)


def test_tiles_without_room_are_in_the_line() -> None:
    counters = Counters()
    counters.count_layer(1.0, 2.0, 0)
    assert "no room" not in str(counters.line_when_due(1.0, now=5000.0))
    counters.count_layer(1.0, 2.0, 3)
    assert counters.overflowed == 3
    assert "; 3 tiles had no room" in str(counters.line_when_due(1.0, now=6000.0))


def counted(first_head: int, recall: list[float]) -> Counters:
    """Counters of one rank with two heads from ``first_head`` on, after a chunk with one audited layer."""
    counters = Counters()
    counters.count_batch(plan_batch([0, 600, 700], [600, 100], min_context=300, min_chunk=1))
    counters.count_layer(25.0, 100.0, overflowed=3)
    counters.count_recall(1, first_head, torch.tensor([recall, recall], dtype=torch.float64))
    return counters


def test_a_report_is_json_and_has_everything() -> None:
    counters = counted(2, [0.5, 1.0])
    counters.count_raised(1, 2, dense=False)
    counters.count_raised(0, 3, dense=True)
    report = counters.report()
    assert json.loads(json.dumps(report)) == report
    assert (report["sparse_chunks"], report["sparse_tokens"], report["density"]) == (1, 600, 0.25)
    assert report["dense_chunks"] == {BELOW_MIN_CONTEXT: 1} and report["overflowed_tiles"] == 3
    heads = {(head["layer"], head["head"]): head for head in report["heads"]}
    assert set(heads) == {(0, 3), (1, 2), (1, 3)}
    assert heads[0, 3]["recall"] is None and heads[0, 3]["chunks_run_densely"] == 1
    assert heads[1, 2]["recall"] == heads[1, 2]["least_recall"] == 0.5 and heads[1, 2]["chunks_with_more_keys"] == 1


def test_reports_of_ranks_become_one() -> None:
    idle = Counters().report()
    report = merged([idle, counted(2, [0.5, 1.0]).report(), counted(0, [0.9, 0.8]).report()])
    assert (report["sparse_chunks"], report["sparse_tokens"]) == (1, 600), "every rank sees every chunk"
    assert (report["computed_pairs"], report["dense_pairs"], report["density"]) == (50.0, 200.0, 0.25)
    assert [(head["head"], head["recall"]) for head in report["heads"]] == [(0, 0.9), (1, 0.8), (2, 0.5), (3, 1.0)]
    assert merged([idle]) == idle


def test_reports_of_data_parallel_engines_become_one() -> None:
    """Each engine serves different chunks."""
    busy, other = counted(0, [0.5, 1.0]), counted(0, [0.8, 0.4])
    other.count_recall(1, 0, torch.tensor([[0.2, 0.4], [0.2, 0.4]], dtype=torch.float64))
    other.count_raised(1, 1, dense=True)
    other.count_raised(2, 0, dense=False)
    for counters in (busy, other):
        counters.count_layer(5.0, 20.0, name="a_shape")
    other.count_layer(5.0, 30.0, name="dense")
    report = added([busy.report(), other.report(), Counters().report()])
    assert json.loads(json.dumps(report)) == report
    assert (report["sparse_chunks"], report["sparse_tokens"], report["overflowed_tiles"]) == (2, 1200, 6)
    assert report["dense_chunks"] == {BELOW_MIN_CONTEXT: 2} and report["density"] == 65 / 270
    assert {name: work["density"] for name, work in report["asked_by_requests"].items()} == {
        "a_shape": 0.25,
        "dense": 5 / 30,
    }
    heads = {(head["layer"], head["head"]): head for head in report["heads"]}
    assert list(heads) == [(1, 0), (1, 1), (2, 0)]
    assert heads[1, 0]["audited_chunks"] == 3 and heads[1, 0]["recall"] == pytest.approx((0.5 + 0.8 + 0.2) / 3)
    assert heads[1, 0]["least_value_recall"] == 0.2 and heads[1, 1]["chunks_run_densely"] == 1
    assert heads[2, 0]["recall"] is None and heads[2, 0]["chunks_with_more_keys"] == 1
    assert added([busy.report()]) == busy.report()


def test_patterns_that_requests_asked_for_are_counted_by_themselves_too() -> None:
    plan = plan_batch([0, 600, 1000], [600, 400], min_context=1, min_chunk=1, patterns={1: "a_shape(sink=1, local=2)"})
    ranks = [Counters(), Counters()]
    for rank, counters in enumerate(ranks):
        counters.count_batch(plan)
        counters.count_layer(30.0, 100.0)
        counters.count_layer(torch.tensor(5.0 + rank), 50.0, name="a_shape(sink=1, local=2)")
    work = {"sparse_chunks": 1, "sparse_tokens": 400, "computed_pairs": 5.0, "dense_pairs": 50.0, "density": 0.1}
    assert ranks[0].report()["asked_by_requests"] == {"a_shape(sink=1, local=2)": work}
    assert (ranks[0].sparse_chunks, ranks[0].computed_pairs, ranks[0].dense_pairs) == (2, 35.0, 150.0)
    assert "density 0.2333; of these, as requests asked: 1 by a_shape(sink=1, local=2) (density 0.1000)" in (
        ranks[0].line()
    )
    both = merged([counters.report() for counters in ranks])
    json.dumps(both)
    assert both["asked_by_requests"] == {
        "a_shape(sink=1, local=2)": work | {"computed_pairs": 11.0, "dense_pairs": 100.0, "density": 0.11}
    }


def test_names_of_patterns_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients choose them."""
    monkeypatch.setattr("minference_vllm.backend.counters.MAX_NAMES", 2)
    counters = Counters()
    for name in ("one", "two", "three", "one", "four"):
        counters.count_layer(1.0, 2.0, name=name)
    found = {name: work.dense_pairs for name, work in counters.asked.items()}
    assert found == {"one": 4.0, "two": 2.0, "others": 4.0}
