"""The offline search: what it measures, what it chooses, and how it resumes after an interruption."""

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
from minference_vllm.offline import engine, texts
from minference_vllm.offline.calibrate import recorder, search
from minference_vllm.offline.calibrate import run as command
from minference_vllm.offline.calibrate.recorder import CalibrationError, Plan, Recorder, collect
from minference_vllm.offline.calibrate.search import CANDIDATES, DEFAULT, Measured, choose, measure
from minference_vllm.patterns.file import parse_patterns
from minference_vllm.patterns.kinds import AShape, Coverage, Dense, LowRank
from minference_vllm.prefill.recall import sample_rows
from minference_vllm.selection import low_rank
from minference_vllm.selection.build import build_index
from minference_vllm.selection.torch_scores import TorchScores

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
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
        assert torch.equal(found.computed[number], index.computed_pairs())
        assert torch.equal(found.cost[number], found.computed[number])
        assert found.pairs[number].tolist() == [index.dense_pairs()] * HEADS
        sparse = reference.masked_attention(query, keys, values, mask, SCALE)[rows]
        dense = reference.masked_attention(query, keys, values, reference.causal_mask(CONTEXT, LENGTH), SCALE)[rows]
        error = (sparse - dense).square().sum((0, 2)) / dense.square().sum((0, 2))
        torch.testing.assert_close(found.squared_error[number], error, rtol=1e-3, atol=1e-6)
        recall = reference.attention_recall(query, keys, mask, CONTEXT, SCALE)[:, rows].mean(1)
        torch.testing.assert_close(found.recall[number], recall, rtol=1e-4, atol=1e-4)
        by_value = value_recall(query, keys, values, mask)[:, rows].mean(1)
        torch.testing.assert_close(found.value_recall[number], by_value, rtol=1e-4, atol=1e-4)


def value_recall(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """float64 ``[H, chunk]``, computed from all weights."""
    group = query.shape[1] // len(keys)
    keys, norms = (part.double().repeat_interleave(group, 0) for part in (keys, values.norm(dim=-1)))
    logits = query.double().transpose(0, 1) @ keys.transpose(1, 2) * SCALE
    weights = logits.masked_fill(~reference.causal_mask(CONTEXT, LENGTH), -torch.inf).softmax(-1) * norms[:, None]
    return (weights * mask).sum(-1) / weights.sum(-1)


def test_low_rank_costs_its_scoring() -> None:
    """One head does look-ups; the other attends its neighbours and the first key."""
    (query, keys), (other_query, other_keys) = lookups(), neighbours(sink=True)
    both = torch.cat([query, other_query.bfloat16()], 1)
    rows, pattern = torch.cat([keys, other_keys.bfloat16()]), LowRank(gamma=0.9)
    inputs = Inputs.of_rows(both, rows, rows, 1.0, SIZE)
    found = measure(inputs, [pattern], kernel="block_table", tile=128)
    tiling = Tiling.of(inputs.chunk.context_len, inputs.chunk.seq_len, SIZE, 128, SIZE)
    index = build_index(tiling, [pattern] * 2, TorchScores(inputs))
    cost = low_rank.FAMILY.scoring_cost(pattern, keys.shape[2], len(query), keys.device)
    scoring = cost * index.dense_pairs()
    assert torch.equal(found.computed[0], index.computed_pairs())
    assert (found.cost[0] - found.computed[0]).tolist() == [pytest.approx(scoring)] * 2
    of_first = found.of(torch.tensor([0, 0]))
    for head, written in enumerate(command.measurements(of_first)):
        assert written.density == pytest.approx(float(index.density()[head]), abs=1e-5)
        assert written.cost == pytest.approx(written.density + scoring / index.dense_pairs(), abs=2e-5)


def test_a_head_whose_values_are_zero_loses_nothing() -> None:
    inputs = layer()
    inputs.cache.value.zero_()
    found = measure(inputs, [AShape(sink=32, local=64), LowRank()], kernel="block_table", tile=64)
    assert not found.squared_error.any() and (found.value_recall == 1).all()


def chunk(cost: list[float], error: list[float]) -> Measured:
    """A measured chunk of one head; the default is first."""
    found = Measured.nothing(len(cost), 1)
    found.cost[:, 0], found.squared_error[:, 0] = torch.tensor(cost), torch.tensor(error).square()
    found.pairs += 100
    return found


def test_a_head_gets_the_cheapest_candidate_that_errs_no_more_than_the_default() -> None:
    assert choose([chunk([30, 10, 20, 5], [0.04, 0.05, 0.04, 0.5])]).tolist() == [2]


def test_it_must_be_as_good_on_every_chunk() -> None:
    one, other = chunk([30, 10, 20], [0.04, 0.01, 0.03]), chunk([30, 10, 20], [0.04, 0.05, 0.03])
    assert choose([one]).tolist() == [1]
    assert choose([one, other]).tolist() == [2]


def test_the_default_stays_where_nothing_cheaper_is_as_good() -> None:
    assert choose([chunk([30, 10, 40], [0.04, 0.05, 0.01])]).tolist() == [0]


def test_the_default_is_the_first_candidate_and_none_is_there_twice() -> None:
    assert CANDIDATES[0] == DEFAULT and len(set(CANDIDATES)) == len(CANDIDATES)


def layers(chosen: Measured) -> dict[int, command.Layer]:
    """One layer with one head; its first measured chunk favours candidate 1, and ``chosen`` is the last chunk."""
    chunks = {(0, 50): chunk([30, 10], [0.04, 0.04]), (0, 100): chosen}
    return {0: command.Layer.of(chunks, [100])}


def test_the_check_sees_the_last_chunk_and_the_choice_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    found = layers(chunk([30, 10], [0.04, 0.03]))
    assert found[0].patterns == [CANDIDATES[1]] and found[0].chosen.cost_share == 0.1
    assert command.report(found)
    assert "67% cheaper than the default" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cost", "error", "why"), [(10, 0.05, "loses more of the output"), (29.5, 0.03, "saves 1.7% of its cost")]
)
def test_a_file_that_is_no_better_is_not_one(
    cost: float, error: float, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not command.report(layers(chunk([30, cost], [0.04, error])))
    out = capsys.readouterr().out
    assert "No file is better than the default" in out and why in out


# Interrupted and resumed


def plan(folder: Path, identity: str = "this") -> Plan:
    return Plan(identity, (LENGTH,), "block_table", str(folder / "out.json.partial"))


def record(folder: Path, layers: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record these layers; returns the ones that were measured."""
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


def test_the_heads_of_all_ranks_come_together_chunk_by_chunk(tmp_path: Path) -> None:
    for rank in (0, 1):
        lines: list[dict[str, Any]] = [{"identity": "this"}]
        for prompt in (0, 1):
            part = Measured.nothing(len(CANDIDATES), 2)
            part.recall += 1 + rank + 10 * prompt
            lines.append(
                {"prompt": prompt, "chunk_end": 9, "layer": 5, "first_head": 2 * rank, "measured": part.to_json()}
            )
        plan(tmp_path).path(rank).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = collect(plan(tmp_path), [0, 1], HEADS)[5]
    assert found[0, 9].recall[0].tolist() == [1, 1, 2, 2]
    assert found[1, 9].recall[0].tolist() == [11, 11, 12, 12]


# Prompts and files


def test_prompts_are_cut_in_the_middle_and_refused_when_too_short() -> None:
    assert command.cut(list(range(9000)), 8000, 0) == [*range(6000), *range(7000, 9000)]
    assert command.cut(list(range(8000)), 9000, 0) == list(range(8000))
    with pytest.raises(CalibrationError, match="prompt 3 has 100 tokens; calibration needs at least 8000"):
        command.cut(list(range(100)), 8000, 3)


def test_measured_chunks_lie_in_the_second_half_and_hold_the_end() -> None:
    assert command.chunk_ends([32768]) == (20480, 24576, 28672, 32768)
    assert command.chunk_ends([8000]) == (4096, 6144, 8000)
    assert command.chunk_ends([8000, 32768]) == (4096, 6144, 8000, 20480, 24576, 28672, 32768)


def test_prompt_files(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    assert texts.read_prompts(lines) == ["one", "two"]
    lines.write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match=r'must be a JSON object \{"prompt": "..."\}'):
        texts.read_prompts(lines)
    lines.write_text('{"prompt": "one"}\n{"prompt": 5}\n')
    with pytest.raises(ValueError, match=r'must be a JSON object \{"prompt": "..."\}'):
        texts.read_prompts(lines)
    lines.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        texts.read_prompts(lines)
    text = tmp_path / "prompt.txt"
    text.write_text("one\ntwo")
    assert texts.read_prompts(text) == ["one\ntwo"]


def test_one_prompt_is_not_enough_to_choose_by(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("one")
    found, source = command.prompts_for(mine, 1000)
    assert found[0] == "one" and "Key:" in found[1][-120:]
    assert source == "mine.txt (1 prompt), a generated key-value prompt"
    found, source = command.prompts_for(None, 1000)
    assert len(found) == 2 and source.startswith("a generated key-value prompt, pydoc topics")
    assert found == command.prompts_for(None, 1000)[0]
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert command.prompts_for(mine, 1000) == (["one", "two"], "mine.jsonl (2 prompts)")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 100}, "--tokens must be at least 8000"),
        ({"output": Path("no/such/folder/file.json")}, "is no directory"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(changed: dict[str, Any], message: str) -> None:
    options = {"tokens": 8192, "output": Path("file.json")}
    with pytest.raises(CalibrationError, match=message):
        command.run(argparse.Namespace(**(options | changed)))


def test_a_model_that_reads_no_long_prompts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "prepare", lambda: None)  # it sets the environment of all tests
    args = argparse.Namespace(
        model=str(DEMO), tokens=8192, output=tmp_path / "file.json", engine_args={"max_model_len": 4096}
    )
    with pytest.raises(CalibrationError, match="reads prompts of 4095 tokens; calibration needs at least 8000"):
        command.run(args)


def test_a_model_that_vllm_cannot_read_is_named() -> None:
    with pytest.raises(engine.EngineError, match="vLLM cannot read no/such/model"):
        engine.model_config("no/such/model", {})


def test_the_written_file_loads_and_names_every_layer() -> None:
    args = argparse.Namespace(model="some/model", engine_args={}, kernel="auto")
    wanted = CANDIDATES.index(Coverage(gamma=0.9, min_budget=512, remainder=True))
    found = Measured.nothing(len(CANDIDATES), 2)
    found.recall += 0.96
    found.pairs += 100
    numbers = torch.tensor([wanted, 0])
    layer = command.Layer(numbers, found.of(numbers), found.of(torch.zeros_like(numbers)))
    written = command.pattern_file(args, {1: layer}, 3, 2, [[1, 2, 3]], "mine.txt")
    loaded = parse_patterns(json.loads(written.model_dump_json()), "file")
    loaded.check_model(3, 2)
    assert loaded.for_layer(1, 2) == (CANDIDATES[wanted], DEFAULT)
    assert loaded.for_layer(0, 2) == loaded.for_layer(2, 2) == (Dense(), Dense())
    assert loaded.measured[1][0].recall == 0.96
    for fact in ("some/model", "mine.txt", "3 tokens", "low_rank", "sha256", "vllm"):
        assert fact in loaded.provenance
