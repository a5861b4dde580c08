"""The bundled model in whole engines: right answers under adaptive patterns and under a recall floor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tasks

MODEL = Path(__file__).parent.parent.parent / "examples" / "demo" / "model"
PLACES = ((8192, 0.2), (8192, 0.7), (16384, 0.45))
"""Length of each prompt, and the relative depth of the needle."""
COVERAGE = {"kind": "coverage", "gamma": 0.95, "min_budget": 512}
BLIND = {"kind": "a_shape", "sink": 64, "local": 64}
FLOOR = 0.95
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


class Asked:
    """One engine's answers to the needle questions."""

    def __init__(self, engine: Any, right: list[bool]) -> None:
        self.tokens, self.log, self.right = engine.tokens, engine.log, right
        self.density, self.drafts = engine.density, engine.drafts


@pytest.fixture(scope="module")
def ask(run_engine: Callable[..., Any], with_minference: Callable[..., Any], tmp_path_factory: Any) -> Callable:
    """Start an engine with one pattern for all heads, and ask it for every needle."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [tasks.needle(tokens, depth, seed=number) for number, (tokens, depth) in enumerate(PLACES)]
    batches = [{"prompts": [tokenizer(prompt.text).input_ids]} for prompt in prompts]
    place = tmp_path_factory.mktemp("needles")

    def run(pattern: dict[str, Any], settings: dict[str, Any] | None = None, **llm: Any) -> Asked:
        path = place / "patterns.json"
        path.write_text(json.dumps({"schema_version": 1, "provenance": "written by a test", "default": pattern}))
        options = {
            "dtype": "bfloat16",
            "max_model_len": 16384 + 64,
            "max_num_batched_tokens": 4096,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            **with_minference(str(path), **(settings or {})),
        }
        found = run_engine(MODEL, batches, {**options, **llm}, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        texts = [tokenizer.decode(tokens) for (tokens,) in found.tokens]
        return Asked(found, [tasks.grade(text, prompt.answer) for text, prompt in zip(texts, prompts, strict=True)])

    return run


@pytest.fixture(scope="module")
def covered(ask: Callable) -> Asked:
    answers = ask(COVERAGE, {"audit_share": 1.0})
    assert isinstance(answers, Asked)
    return answers


def recall_in(log: str) -> tuple[float, float]:
    """Mean value recall, and that of the worst head, in the last line of statistics."""
    lines = re.findall(r"minference: .*, value recall ([\d.]+) \(least ([\d.]+), layer \d head \d\)", log)
    assert lines, "no recall in the log:\n" + log[-3000:]
    return float(lines[-1][0]), float(lines[-1][1])


def test_coverage_finds_every_needle(covered: Asked) -> None:
    assert covered.right == [True] * len(PLACES)
    assert covered.density < 0.9


def test_recall_is_in_the_log(covered: Asked) -> None:
    mean, least = recall_in(covered.log)
    assert 0.5 < mean <= 1.0 and 0.0 < least <= mean


def test_drafted_tokens_change_no_answer(covered: Asked, ask: Callable) -> None:
    """Verification steps have several tokens per request, but are not prefill."""
    drafted = ask(COVERAGE, speculative_config=NGRAMS, disable_log_stats=False)
    assert drafted.drafts > 0
    assert drafted.tokens == covered.tokens


def test_a_draft_model_runs_sparsely_as_well(ask: Callable, tmp_path: Path) -> None:
    """With our backend, which has to be selected for it separately. It has its own statistics."""
    (tmp_path / "draft").symlink_to(MODEL)
    draft = {"method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 3}
    drafted = ask(COVERAGE, speculative_config={**draft, "attention_backend": "MINFERENCE"}, disable_log_stats=False)
    assert drafted.drafts > 0 and drafted.right == [True] * len(PLACES)
    assert re.search(r"minference \(draft model\): [1-9]\d* prefill chunks .* density 0\.\d+", drafted.log)


def test_a_blind_pattern_loses_the_needles_and_the_log_says_so(ask: Callable) -> None:
    answers = ask(BLIND, {"audit_share": 1.0})
    assert not any(answers.right)
    assert recall_in(answers.log)[1] < FLOOR


def test_a_recall_floor_finds_them_again(ask: Callable) -> None:
    answers = ask(BLIND, {"recall_floor": FLOOR})
    assert answers.right == [True] * len(PLACES)
    assert recall_in(answers.log)[1] >= FLOOR
    assert re.search(rf"layer \d, head \d: value recall below the floor of {FLOOR}", answers.log)
    assert re.search(r"below the floor [1-9]\d* times given more keys", answers.log)
