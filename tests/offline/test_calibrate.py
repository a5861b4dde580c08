"""The offline search: what it measures, what it chooses, and how it goes on after an interruption."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from low_rank_inputs import lookups, neighbours

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.tiling import Tiling
from minference_vllm.offline.calibrate import recorder, search
from minference_vllm.offline.calibrate import run as command
from minference_vllm.offline.calibrate.recorder import CalibrationError, Plan, Recorder, collect
from minference_vllm.offline.calibrate.search import CANDIDATES, FAMILIES, Measured, choose, measure
from minference_vllm.patterns.file import parse_patterns
from minference_vllm.patterns.kinds import AShape, Coverage, Dense, LowRank, VerticalSlash
from minference_vllm.prefill.recall import sample_rows
from minference_vllm.selection.build import build_index
from minference_vllm.selection.low_rank import scoring_cost
from minference_vllm.selection.torch_scores import TorchScores

SIZE, DIM, HEADS, KV_HEADS, CONTEXT, LENGTH = 32, 64, 4, 2, 300, 620
SCALE = DIM**-0.5


def layer() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    blocks = -(-LENGTH // SIZE)
    query = torch.randn(LENGTH - CONTEXT, HEADS, DIM, generator=generator) * 2
    key, value = (torch.randn(blocks + 2, KV_HEADS, SIZE, DIM, generator=generator) for _ in range(2))
    pages = torch.randperm(blocks + 2, generator=generator)[:blocks]
    return Inputs(query, PagedCache(key, value, "rows"), pages, Chunk(0, 0, CONTEXT, LENGTH), SCALE)


def test_measured_recall_error_and_cost_are_those_of_the_reference() -> None:
    inputs = layer()
    query, patterns = inputs.query, [AShape(sink=32, local=64), Dense()]
    found = measure(inputs, patterns, kernel="block_table", tile=64, seed=3)
    rows = sample_rows(len(query), search.MAX_SAMPLES, 3)
    keys, values = (part[:, :LENGTH] for part in inputs.cache.rows_by_head(inputs.pages))
    for number, pattern in enumerate(patterns):
        index = build_index(Tiling.of(CONTEXT, LENGTH, SIZE, 64, SIZE), [pattern] * HEADS, None)  # type: ignore[arg-type]
        mask = index.to_mask()
        assert torch.equal(found.computed_pairs[number], index.computed_pairs())
        assert found.dense_pairs[number].tolist() == [index.dense_pairs()] * HEADS
        sparse = reference.masked_attention(query, keys, values, mask, SCALE)[rows]
        dense = reference.masked_attention(query, keys, values, reference.causal_mask(CONTEXT, LENGTH), SCALE)[rows]
        error = (sparse - dense).square().sum((0, 2))
        torch.testing.assert_close(found.squared_error[number], error, rtol=1e-3, atol=1e-6)
        recall = reference.attention_recall(query, keys, mask, CONTEXT, SCALE)[:, rows].sum(1)
        torch.testing.assert_close(found.recall[number], recall, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.squared_output[number], dense.square().sum((0, 2)), rtol=1e-3, atol=1e-6)
        assert found.rows[number].tolist() == [len(rows)] * HEADS


def test_low_rank_costs_its_scoring_where_it_scores() -> None:
    """Of two heads, one looks things up and the other at its neighbours and the first key."""
    (query, keys), (other_query, other_keys) = lookups(), neighbours(sink=True)
    both = torch.cat([query, other_query.bfloat16()], 1)
    rows, pattern = torch.cat([keys, other_keys.bfloat16()]), LowRank(gamma=0.9)
    inputs = Inputs.of_rows(both, rows, rows, 1.0, SIZE)
    found = measure(inputs, [pattern], kernel="block_table", tile=128)
    tiling = Tiling.of(inputs.chunk.context_len, inputs.chunk.seq_len, SIZE, 128, SIZE)
    index = build_index(tiling, [pattern] * 2, TorchScores(inputs))
    scoring = scoring_cost(pattern.rank, keys.shape[2], len(query), keys.device) * index.dense_pairs()
    assert (found.computed_pairs[0] - index.computed_pairs()).tolist() == [pytest.approx(scoring), 0]


FAMILY_A = (AShape(sink=1, local=1), AShape(sink=2, local=2), AShape(sink=3, local=3))
FAMILY_B = (VerticalSlash(vertical=1, slash=1), VerticalSlash(vertical=2, slash=2))


def table(density: list[float], recall: list[float], error: list[float]) -> Measured:
    """Of one head, two rows and 100 dense pairs."""
    column = [torch.tensor(values, dtype=torch.float64)[:, None] for values in (density, recall, error)]
    ones = torch.ones_like(column[0])
    return Measured(100 * column[0], 100 * ones, 2 * column[1], 2 * ones, column[2].square(), ones)


def test_the_family_with_the_least_error_at_equal_cost_wins_and_is_refined() -> None:
    measured = table([0.1, 0.2, 0.4, 0.2, 0.5], [0.5, 0.6, 0.99, 0.8, 0.97], [0.9, 0.5, 0.0, 0.3, 0.1])
    # At a budget of 0.2 the second family has the smaller error (0.3 against 0.5); it reaches 0.95 with its second.
    chosen = choose(measured, 0, (FAMILY_A, FAMILY_B), budget=0.2, target=0.95)
    assert (chosen.pattern, chosen.density, chosen.recall) == (FAMILY_B[1], 0.5, 0.97)
    # At a budget of 0.4 the first one does, with its third.
    assert choose(measured, 0, (FAMILY_A, FAMILY_B), budget=0.4, target=0.95).pattern == FAMILY_A[2]
    # A target that less budget reaches gets less.
    assert choose(measured, 0, (FAMILY_A, FAMILY_B), budget=0.4, target=0.55).pattern == FAMILY_A[1]


def test_a_head_that_reaches_the_target_nowhere_is_dense() -> None:
    measured = table([0.1, 0.2, 0.4, 0.2, 0.5], [0.5] * 5, [0.5] * 5)
    assert choose(measured, 0, (FAMILY_A, FAMILY_B), budget=0.2, target=0.95).pattern == Dense()


def test_candidates_are_the_families_in_order_cheapest_first() -> None:
    assert [pattern for family in FAMILIES for pattern in family] == list(CANDIDATES)
    assert len(set(CANDIDATES)) == len(CANDIDATES)


# Interrupted and resumed


def plan(folder: Path, identity: str = "this") -> Plan:
    return Plan(identity, (LENGTH,), "block_table", str(folder / "out.json.partial"))


def record(folder: Path, layers: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record these layers; the ones that were measured."""
    measured: list[int] = []

    def watched(*arguments: Any, **keywords: Any) -> Measured:
        measured.append(1)
        return Measured.nothing(len(CANDIDATES), HEADS)

    monkeypatch.setattr(recorder, "measure", watched)
    inputs = layer()
    recording = Recorder(plan(folder), process=0, layers=3)
    before = 0
    done = []
    for number in layers:
        recording.record(number, 0, inputs)
        if len(measured) > before:
            done.append(number)
        before = len(measured)
    return done


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record(tmp_path, [0, 1], monkeypatch) == [0, 1]
    path = plan(tmp_path).path(0)
    # Cut off in the middle of layer 1's line.
    path.write_text(path.read_text()[:-20])
    assert record(tmp_path, [0, 1, 2], monkeypatch) == [1, 2]
    assert sorted(collect(plan(tmp_path), [0], HEADS)) == [0, 1, 2]


def test_results_of_another_calibration_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, [0], monkeypatch)
    with pytest.raises(CalibrationError, match="another calibration"):
        Recorder(plan(tmp_path, "other"), process=0, layers=3)


def test_ranks_and_prompts_come_together(tmp_path: Path) -> None:
    for rank in (0, 1):
        lines: list[dict[str, Any]] = [{"identity": "this"}]
        for prompt in (0, 1):
            part = Measured.nothing(len(CANDIDATES), 2)
            part.rows += 1 + rank
            lines.append(
                {"prompt": prompt, "chunk_end": 9, "layer": 5, "first_head": 2 * rank, "measured": part.to_json()}
            )
        plan(tmp_path).path(rank).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert collect(plan(tmp_path), [0, 1], HEADS)[5].rows[0].tolist() == [2, 2, 4, 4]


# Prompts and files


def test_prompts_are_cut_in_the_middle_and_refused_when_too_short() -> None:
    assert command.cut(list(range(9000)), 8000, 0) == [*range(6000), *range(7000, 9000)]
    assert command.cut(list(range(5000)), 8000, 0) == list(range(5000))
    with pytest.raises(CalibrationError, match="prompt 3 has 100 tokens; calibration needs at least 4096"):
        command.cut(list(range(100)), 8000, 3)


def test_measured_chunks_lie_in_the_second_half_and_hold_the_end() -> None:
    assert command.chunk_ends([32768]) == (20480, 24576, 28672, 32768)
    assert command.chunk_ends([5000]) == (4096, 5000)
    assert command.chunk_ends([4096]) == (4096,)


def test_prompt_files(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    assert command.read_prompts(lines, 8) == ["one", "two"]
    lines.write_text('{"text": "one"}\n')
    with pytest.raises(CalibrationError, match=r'must be a JSON object \{"prompt": "..."\}'):
        command.read_prompts(lines, 8)
    text = tmp_path / "prompt.txt"
    text.write_text("one\ntwo")
    assert command.read_prompts(text, 8) == ["one\ntwo"]
    generated = command.read_prompts(None, 1000)[0]
    assert generated == command.read_prompts(None, 1000)[0] and "Key:" in generated[-120:]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"target_recall": 1.0}, "--target-recall must lie between 0 and 1"),
        ({"budget": 0}, "--budget must be at least 1"),
        ({"tokens": 100}, "--tokens must be at least 4096"),
        ({"output": Path("no/such/folder/file.json")}, "is no directory"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(changed: dict[str, Any], message: str) -> None:
    options = {"target_recall": 0.9, "budget": 100, "tokens": 8192, "output": Path("file.json")}
    with pytest.raises(CalibrationError, match=message):
        command.run(argparse.Namespace(**(options | changed)))


def test_the_written_file_loads_and_names_every_layer() -> None:
    args = argparse.Namespace(
        model="some/model", prompts=None, engine_args={}, budget=5120, target_recall=0.95, kernel="auto"
    )
    choice = search.Choice(Coverage(gamma=0.9, min_budget=512), 0.1, 0.96, 0.02)
    written = command.pattern_file(args, {1: [choice] * 2}, num_layers=3, num_heads=2, prompts=[[1, 2, 3]])
    loaded = parse_patterns(json.loads(written.model_dump_json()), "file")
    loaded.check_model(3, 2)
    assert loaded.for_layer(1, 2) == (choice.pattern, choice.pattern)
    assert loaded.for_layer(0, 2) == loaded.for_layer(2, 2) == (Dense(), Dense())
    assert loaded.measured[1][0].recall == 0.96
    for fact in ("some/model", "5120", "0.95", "sha256", "vllm"):
        assert fact in loaded.provenance
