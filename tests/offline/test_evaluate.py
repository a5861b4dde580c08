"""``evaluate``: how it judges the answers of a model, and what it refuses."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from language_inputs import byte_tokenizer

from minference_vllm.commands import cli
from minference_vllm.commands import evaluate as command
from minference_vllm.offline.evaluate import report, ruler, run
from minference_vllm.offline.evaluate.reader import Scored
from minference_vllm.offline.evaluate.report import Header, Row
from minference_vllm.offline.evaluate.run import EvaluationError, Prompts, agreement, measure, prompts, usable_lengths
from minference_vllm.offline.evaluate.tasks import Passages
from minference_vllm.settings import Settings

TOKENIZER = byte_tokenizer()
DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
needs_ruler = pytest.mark.skipif(bool(ruler.missing_packages()), reason=f"no {', '.join(ruler.missing_packages())}")


def arguments(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["model", *more])


class PretendedReader:
    """A reader whose losses depend on the pattern: others lose 0.1 nat more per token than dense."""

    tokenizer = TOKENIZER

    def __init__(self, lost: float = 0.1, sparse: bool = True) -> None:
        self.lost, self.sparse, self.used = lost, sparse, ""

    def use(self, patterns: str | None) -> str:
        self.used = patterns or "default"
        return self.used

    def pairs(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.used == "dense" or not self.sparse else (25.0, 100.0)

    def score(self, ids: Sequence[int]) -> Scored:
        lost = 0.0 if self.used == "dense" else self.lost
        loss = torch.arange(1.0, len(ids), dtype=torch.float64)
        return Scored(loss + lost, torch.full((len(ids) - 1,), not lost))

    def seconds(self, ids: Sequence[int]) -> float:
        return 2.0 if self.used == "dense" else 0.5

    def answer(self, ids: Sequence[int], tokens: int) -> list[int]:
        return list(TOKENIZER("7 and 8" if self.used == "dense" else "7 and 9").input_ids)


@pytest.fixture(scope="module")
def asked() -> Prompts:
    passages = Passages(TOKENIZER, "word after word " * 1000, "words")
    made = prompts(arguments("--samples", "0", "--chunk", "1024"), passages, 9000, True)
    sample = ruler.Sample("niah_multivalue", "question", "answer:", ["7", "8"])
    return made._replace(asked=[run.Asked(sample, [1, 2, 3])] * 2)


@pytest.fixture
def rows(asked: Prompts) -> list[Row]:
    return list(measure(PretendedReader(), asked, ["dense", "default", "a_shape"], 3))  # type: ignore[arg-type]


def row_of(rows: Sequence[Row], task: str) -> Row:
    (found,) = [row for row in rows if row.task == task and row.pattern == "default"]
    return found


def test_prompts_leave_room_for_the_token_that_is_generated(asked: Prompts) -> None:
    assert [len(prompt.ids) for prompt in asked.scored] == [8999, 8999] and len(asked.timed) == 8999
    assert {answer.task for prompt in asked.scored for answer in prompt.answers} == {"perplexity", *run.PLANTED}


def test_a_seed_changes_what_is_planted_and_the_same_one_does_not() -> None:
    passages = Passages(TOKENIZER, "word after word " * 1000, "words")
    once, again, other = (
        prompts(arguments("--samples", "0", "--seed", seed), passages, 9000, False).scored[1] for seed in "110"
    )
    assert torch.equal(once.ids, again.ids) and not torch.equal(once.ids, other.ids)


def test_losses_are_those_of_the_answers_tokens(rows: list[Row], asked: Prompts) -> None:
    text = row_of(rows, "perplexity")
    # The fake loss of the token at position p is p.
    assert text.dense == pytest.approx(sum(range(4499, 8999)) / 4500) and text.measured == 4500
    assert text.difference == pytest.approx(0.1) and text.standard_error == pytest.approx(0.0, abs=1e-9)
    inside = row_of(rows, "inside")
    answers = [answer for answer in asked.scored[1].answers if answer.task == "inside"]
    places = [place for answer in answers for place in range(answer.first, answer.first + answer.tokens)]
    assert inside.dense == pytest.approx(sum(places) / len(places))
    assert (inside.right_dense, inside.right_sparse) == (len(answers), 0)


def test_time_density_scores_and_agreement(rows: list[Row]) -> None:
    timed = row_of(rows, "time to first token")
    assert (timed.dense, timed.sparse, timed.measured, timed.density) == (2.0, 0.5, 3, 0.25)
    scores = row_of(rows, "niah_multivalue")
    assert (scores.dense, scores.sparse, scores.measured) == (1.0, 0.5, 2)
    assert row_of(rows, "agreement").sparse == pytest.approx(6 / 7)


def test_a_pattern_that_never_ran_sparsely_is_an_error(asked: Prompts) -> None:
    with pytest.raises(EvaluationError, match="pattern 'a_shape': no chunk ran sparsely"):
        list(measure(PretendedReader(sparse=False), asked, ["dense", "a_shape"], 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other", "share"), [([1, 2], [1, 2], 1.0), ([1, 2], [1, 2, 3, 4], 0.5), ([], [], 1.0), ([1], [2], 0.0)]
)
def test_agreement(one: list[int], other: list[int], share: float) -> None:
    assert agreement(one, other) == agreement(other, one) == share


def test_a_loss_above_the_limit_is_the_exit_code(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.too_much_lost(rows, None) == run.too_much_lost(rows, 0.2) == 0
    assert not capsys.readouterr().out
    assert run.too_much_lost(rows, 0.05) == 1
    assert "a_shape loses 0.1000 nats per token at 9000 tokens" in capsys.readouterr().out


def test_the_report_says_everything(rows: list[Row], tmp_path: Path) -> None:
    sources = {"dense": "dense", "default": "shipped 'low_rank'", "a_shape": "a_shape"}
    report.write(tmp_path, Header("some/model", sources, "words", 1024, {"min_context": 512}, 3, "no samples"), rows)
    with (tmp_path / "report.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["task"] for row in written] == [row.task for row in rows]
    assert float(written[0]["difference"]) == pytest.approx(0.1, abs=1e-5)
    text = (tmp_path / "report.md").read_text()
    assert "`default`: shipped 'low_rank'" in text and '{"min_context": 512}' in text and "seed 3" in text
    assert "| 9000 | a_shape | 2.00 -> 0.50 s (4.0x) | 0.250 | +0.1000 ± 0.0000 |" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_are_cut_to_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert usable_lengths(arguments("--lengths", "9000", "16384", "32768"), 12000) == [9000, 12000]
    assert "--lengths above 12000: cut" in capsys.readouterr().out


def test_prompts_that_would_run_densely_are_refused() -> None:
    assert Settings().min_context == 8192
    with pytest.raises(EvaluationError, match=r"4096 tokens is served densely.*--settings '\{\"min_context\": 1024\}'"):
        usable_lengths(arguments(), 4096)
    assert usable_lengths(arguments("--settings", '{"min_context": 1024}'), 4096) == [4096]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--settings", "5"], "must be a JSON object, not '5'"),
        (["--settings", "{"], "must be a JSON object, not '{'"),
        (["--lengths", "0"], "must be a whole number of at least 1, not '0'"),
        (["--samples", "-1"], "must be a whole number of at least 0, not '-1'"),
    ],
)
def test_wrong_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", "model", *options])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--settings", '{"min_contxt": 1}'], "unknown setting"),
        (["--patterns", "low_rnk(32, 0.95)"], "low_rnk"),
        (["--text", "no/such/text"], "text 'no/such/text'"),
        (["--lengths", "4096"], "served densely"),
    ],
)
def test_bad_input_is_refused_before_the_engine_starts(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(run.engine, "start", lambda *args: pytest.fail("the engine was started"))
    assert cli.main(["evaluate", str(DEMO), "-o", str(tmp_path / "report"), *options]) == 1
    assert message in capsys.readouterr().err


@needs_ruler
def test_ruler_samples_fit_and_hold_their_answers() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    found = ruler.samples(tokenizer, 8192, 2, seed=1)
    assert found == ruler.samples(tokenizer, 8192, 2, seed=1) != ruler.samples(tokenizer, 8192, 2, seed=2)
    assert [sample.task for sample in found] == [task for task in ruler.GENERATED for _ in range(2)]
    for sample in found:
        ids = run.question_ids(tokenizer, sample, False)
        assert len(ids) + ruler.GENERATED[sample.task] <= 8192 + 64
        assert all(word in sample.question for word in sample.expected)
        assert ruler.score(sample.expected, sample.prefix + " ".join(sample.expected)) == 1.0
        assert ruler.score(sample.expected, "nothing") == 0.0
