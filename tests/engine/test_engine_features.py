"""Models with soft caps, attention sinks and sliding windows, and float16, in whole engines on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_decoders
from engine_answers import assert_same_tokens

OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 1024,
}
# The engine runs in this process, so that all requests are queued before the first step and steps are repeatable.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
EVERYTHING = "a_shape(0, 100000)"


class Served:
    """One model's answers, each engine run once."""

    def __init__(self, model: Path, run: Callable[..., Any], prompts: list[list[int]], **llm: Any) -> None:
        self.model, self.run, self.llm = model, run, llm
        self.batches = [{"prompts": prompts}]

    def by(self, **llm: Any) -> Any:
        return self.run(self.model, self.batches, {**OPTIONS, **self.llm, **llm}, max_tokens=12, **IN_PROCESS)


@pytest.fixture(scope="module", params=["gemma2", "gpt_oss"])
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    run_engine: Callable[..., Any],
    prompt: Callable[..., list[int]],
) -> Served:
    """Gemma 2's windows are longer than ``min_context``, gpt-oss's are not."""
    windows = {"gemma2": 1000, "gpt_oss": 128}
    folder = tmp_path_factory.mktemp("models") / request.param
    model = getattr(tiny_decoders, request.param)(folder, windows[request.param])
    return Served(model, run_engine, [prompt(length, seed) for seed, length in enumerate((3000, 300, 1501))])


def test_full_selection_gives_the_tokens_of_vllms_own_backend(
    served: Served, with_minference: Callable[..., dict[str, Any]]
) -> None:
    # In float32, since bfloat16 rounding sometimes routes a token to other experts.
    stock, answer = (served.by(dtype="float32", **llm) for llm in ({}, with_minference(EVERYTHING)))
    assert len({token for tokens in stock.tokens[0] for token in tokens}) > 5, "the answers say nothing"
    assert answer.density == 1.0 and "(kernel 'native')" in answer.log
    short = "some layers run densely: sliding window of 128 tokens, below min_context"
    assert (short in answer.log) == (served.model.name == "gpt_oss")
    assert answer.log.count("run densely:") == answer.log.count(short)
    assert_same_tokens(answer, stock, tie=0.005, at_least=30)


def test_low_rank_runs_sparsely(served: Served, with_minference: Callable[..., dict[str, Any]]) -> None:
    answer = served.by(**with_minference("low_rank(32, 0.95)"))
    assert 0.05 < answer.density < 0.98 and "(kernel 'native')" in answer.log


def test_float16_runs_on_our_kernels(
    llama: Path,
    run_engine: Callable[..., Any],
    prompt: Callable[..., list[int]],
    with_minference: Callable[..., dict[str, Any]],
    full_patterns: str,
) -> None:
    served = Served(llama, run_engine, [prompt(length, seed) for seed, length in enumerate((3000, 300, 1501))])
    stock = served.by(dtype="float16")
    answer = served.by(dtype="float16", **with_minference(full_patterns))
    assert answer.density == 1.0 and "attention by our AVX2 kernels (kernel 'native')" in answer.log
    assert_same_tokens(answer, stock, tie=0.05, at_least=18)
