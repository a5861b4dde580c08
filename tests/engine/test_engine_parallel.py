"""Two stages of a pipeline, and two data-parallel engines, on CPUs; tensor parallelism: ``test_engine_offline``."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_answers import assert_same_tokens

from minference_vllm.backend.counters import merged

# Prompts of more than 1,024 tokens are prefilled in chunks.
OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 1024,
}
LENGTHS = (2000, 300, 1501, 900)
SPARSE_CHUNKS = 5
"""For these prompts one by one; the second is shorter than ``min_context``."""
# Without compilation vLLM's CPU engine has no memory for what a stage receives. Dynamo alone computes the same as an
# eager engine, and starts faster than compiled code.
TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}


@pytest.fixture(scope="module")
def one_core_each() -> dict[str, str]:
    """The environment of two workers on this machine."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two workers need two cores")
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"}


@pytest.fixture(scope="module")
def batches(prompt: Callable[..., list[int]]) -> list[dict[str, Any]]:
    """Prompts one by one, so that all engines split them into the same chunks, and two that ask for other patterns."""
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    alone = [{"prompts": [tokens]} for tokens in prompts]
    return [*alone, {**alone[0], "asked": ["a_shape(64, 128)"]}, {**alone[3], "asked": ["dense"]}]


@pytest.fixture(scope="module")
def ours(with_minference: Callable[..., Any], sparse_patterns: str) -> dict[str, Any]:
    # With a floor, however low, every chunk is audited.
    options = with_minference(sparse_patterns, recall_floor=0.01)
    assert isinstance(options, dict)
    return options


@pytest.fixture(scope="module")
def one(llama: Path, run_engine: Callable[..., Any], batches: list[dict[str, Any]], ours: dict[str, Any]) -> Any:
    """Answers and counters of one engine with one worker."""
    return run_engine(llama, batches, {**OPTIONS, **ours}, VLLM_ENABLE_V1_MULTIPROCESSING="0")


def test_two_stages_of_a_pipeline_give_the_tokens_of_one(
    one: Any,
    llama: Path,
    run_engine: Callable[..., Any],
    batches: list[dict[str, Any]],
    ours: dict[str, Any],
    one_core_each: dict[str, str],
) -> None:
    """Two layers on the first, one on the second: patterns refer to layers of the model, not of the stage."""
    options = {**OPTIONS, **TRACED, **ours, "pipeline_parallel_size": 2}
    two = run_engine(llama, batches, options, **one_core_each)
    assert two.tokens == one.tokens
    assert [{head["layer"] for head in stats["heads"]} for stats in two.stats] == [{0, 1}, {2}]
    counted, expected = merged(two.stats), merged(one.stats)
    for name in ("sparse_chunks", "sparse_tokens", "dense_chunks", "dense_pairs"):
        assert counted[name] == expected[name], name
    assert counted["density"] == pytest.approx(expected["density"], rel=0.001) and counted["density"] < 0.9
    assert counted["asked_by_requests"] == expected["asked_by_requests"]


@pytest.mark.features
def test_two_compiled_stages_give_the_tokens_of_one(
    llama: Path,
    run_engine: Callable[..., Any],
    batches: list[dict[str, Any]],
    ours: dict[str, Any],
    one_core_each: dict[str, str],
) -> None:
    """In float32: compiled code rounds differently, which can change a selection in bfloat16."""
    options = {**OPTIONS, **ours, "dtype": "float32"}
    eager = run_engine(llama, batches, options, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    compiled = {**options, "enforce_eager": False, "pipeline_parallel_size": 2}
    two = run_engine(llama, batches, compiled, **one_core_each)
    assert two.density < 0.9 and [stats["sparse_chunks"] for stats in two.stats] == [SPARSE_CHUNKS + 2] * 2
    assert_same_tokens(two, eager, tie=0.005, at_least=20)


@pytest.mark.features
def test_two_data_parallel_engines_answer_as_one_and_both_are_counted(
    one: Any,
    llama: Path,
    batches: list[dict[str, Any]],
    ours: dict[str, Any],
    served_at: Any,
    tmp_path: Path,
    one_core_each: dict[str, str],
) -> None:
    """Every prompt is given to each of them."""
    arguments = ["--max-model-len", "4096", "--max-num-batched-tokens", "1024", "--data-parallel-size", "2"]
    arguments += ["--enforce-eager", "--no-enable-prefix-caching", "--attention-backend", "minference"]
    arguments += ["--additional-config", json.dumps(ours["additional_config"])]
    log = tmp_path / "log"
    with served_at(llama, arguments, log, VLLM_PLUGINS="minference", **one_core_each) as address:
        for batch, (expected,) in zip(batches[: len(LENGTHS)], one.tokens, strict=False):
            for engine in (0, 1):
                assert answer(address, batch["prompts"][0], engine) == expected
        dense = {"minference": "dense"}
        answer(address, batches[0]["prompts"][0], 1, vllm_xargs=dense)
        # Twice: there are two API servers.
        for _ in range(2):
            with urllib.request.urlopen(f"{address}/minference/stats", timeout=60) as reply:
                stats = json.load(reply)
            assert stats["engines"] == 2 and stats["sparse_chunks"] == 2 * SPARSE_CHUNKS
            assert stats["dense_chunks"]["the request asked for it"] == 2
            assert {head["layer"] for head in stats["heads"]} == {0, 1, 2} and 0.05 < stats["density"] < 0.9
            assert all(head["audited_chunks"] == 2 * SPARSE_CHUNKS for head in stats["heads"])
        with urllib.request.urlopen(f"{address}/minference/metrics", timeout=60) as reply:
            assert f"minference_sparse_chunks_total {2 * SPARSE_CHUNKS:.1f}" in reply.read().decode()


def answer(address: str, tokens: list[int], engine: int, **more: Any) -> list[int]:
    """Eight greedy tokens of one of the engines."""
    body = {"model": "tiny", "prompt": tokens, "max_tokens": 8, "temperature": 0}
    # Otherwise ``w0``, the unknown word, would be left out.
    body |= {"skip_special_tokens": False, **more}
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(engine)}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return [int(word.removeprefix("w")) for word in json.load(reply)["choices"][0]["text"].split()]
