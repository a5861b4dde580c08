"""``LLM(..., attention_backend="minference")`` in whole engines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_answers import assert_same_tokens

Runner = Callable[..., Any]
EAGER = {"enforce_eager": True}
# Prompts of more than 1,024 tokens are prefilled in chunks, in batches with decodes and chunks of others.
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 1024}
MIXED = (2000, 300, 1501, 900)
# The engine runs in this process, so that all requests are queued before the first step and steps are repeatable.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def batch(*prompts: list[int], forget_prefixes: bool = False, asked: list[str | None] | None = None) -> dict[str, Any]:
    return {"prompts": list(prompts), "forget_prefixes": forget_prefixes, "asked": asked}


# Against vLLM's own backend. The model has a layer with a sliding window, which we do not serve.


@pytest.fixture(scope="module")
def run_hybrid(hybrid_llama: Path, run_engine: Runner, prompt: Callable[..., list[int]]) -> Callable[..., Any]:
    def run(asked: list[str | None] | None = None, **llm: Any) -> Any:
        prompts = [prompt(length, seed) for seed, length in enumerate(MIXED)]
        batches = [batch(*prompts, asked=asked), batch(prompt(1300, 7))]
        options = {"dtype": "bfloat16", "enable_prefix_caching": False, **EAGER, **CHUNKED}
        return run_engine(hybrid_llama, batches, {**options, **llm}, max_tokens=12, **IN_PROCESS)

    return run


@pytest.fixture(scope="module")
def stock(run_hybrid: Callable[..., Any]) -> Any:
    answer = run_hybrid()
    assert "minference:" not in answer.log, "we show although nobody selected us"
    return answer


def test_dense_patterns_give_the_tokens_of_vllms_own_backend(
    stock: Any, run_hybrid: Callable[..., Any], with_minference: Callable[..., Any]
) -> None:
    answer = run_hybrid(**with_minference("dense"))
    assert "Using MINFERENCE attention backend on CPU" in answer.log
    assert answer.tokens == stock.tokens, "the same kernel ran on the same batches"


def test_full_selection_gives_the_tokens_of_vllms_own_backend(
    stock: Any, run_hybrid: Callable[..., Any], with_minference: Callable[..., Any], full_patterns: str
) -> None:
    answer = run_hybrid(**with_minference(full_patterns))
    assert answer.density == 1.0
    assert_same_tokens(answer, stock, tie=0.1, at_least=30)
    assert "some layers run densely: sliding window" in answer.log


def test_a_request_that_asks_for_it_runs_densely_beside_sparse_ones(
    stock: Any, run_hybrid: Callable[..., Any], with_minference: Callable[..., Any], sparse_patterns: str
) -> None:
    """The first prompt runs densely, the third with other patterns, and the last with the server's."""
    answer = run_hybrid(asked=["dense", None, "a_shape(64, 128)", None], **with_minference(sparse_patterns))
    assert_same_prompt(answer, stock, prompt=0)
    (stats,) = answer.stats
    assert stats["dense_chunks"]["the request asked for it"] == 2
    (asked,) = stats["asked_by_requests"].values()
    assert asked["sparse_chunks"] == 2 and 0.05 < asked["density"] < 0.5
    assert stats["sparse_chunks"] >= 5 and 0.05 < stats["density"] < 0.9
    assert "a_shape(sink=64, local=128) (density 0." in answer.log


def assert_same_prompt(found: Any, expected: Any, prompt: int) -> None:
    """``assert_same_tokens`` for one prompt of the first batch."""

    def alone(answer: Any) -> Any:
        return SimpleNamespace(tokens=[[answer.tokens[0][prompt]]], leads=[[answer.leads[0][prompt]]])

    assert_same_tokens(alone(found), alone(expected), tie=0.1, at_least=8)


# Sparse patterns, several kinds in every layer


@pytest.fixture(scope="module")
def cached(
    llama: Path,
    run_engine: Runner,
    prompt: Callable[..., list[int]],
    with_minference: Callable[..., Any],
    sparse_patterns: str,
) -> Any:
    """Chunked prefill and prefix caching on, eager."""
    mixed = [prompt(length, seed) for seed, length in enumerate(MIXED)]
    shared = prompt(1024, 50)
    first, second = shared + prompt(600, 51), shared + prompt(700, 52)
    batches = [
        batch(*mixed),
        batch(*mixed, forget_prefixes=True),
        batch(second, forget_prefixes=True),
        batch(first, forget_prefixes=True),
        batch(second),
        batch(second, second, asked=["dense", "a_shape"]),
        batch(second, second, asked=["dense", None]),
    ]
    options = {"dtype": "bfloat16", "enable_prefix_caching": True, **EAGER, **CHUNKED}
    return run_engine(llama, batches, {**options, **with_minference(sparse_patterns)}, **IN_PROCESS)


def test_mixed_batches_run_sparsely(cached: Any) -> None:
    assert 0.05 < cached.density < 0.9
    assert all(len(tokens) == 8 for tokens in cached.tokens[0])


def test_repeated_batches_give_the_same_tokens(cached: Any) -> None:
    assert cached.tokens[0] == cached.tokens[1]


def test_a_cached_prefix_makes_no_difference(cached: Any) -> None:
    """The shared 1,024 tokens are one chunk, so the second prompt's next chunk is the same with and without them."""
    assert cached.cached[2:5] == [[0], [0], [1024]]
    assert cached.tokens[4] == cached.tokens[2]


def test_prefixes_are_shared_by_requests_that_ask_for_the_same(cached: Any) -> None:
    """Otherwise a dense request would attend keys of deeper layers that sparse requests wrote."""
    assert cached.cached[5] == [0, 0]
    assert cached.cached[6] == [1664, 1664], "whole pages of 128 tokens, all but the last"
    assert cached.tokens[6] == [cached.tokens[5][0], cached.tokens[4][0]]


@pytest.fixture(scope="module")
def compiled(
    llama: Path,
    run_engine: Runner,
    prompt: Callable[..., list[int]],
    with_minference: Callable[..., Any],
    sparse_patterns: str,
) -> Any:
    """torch.compile, whole prompts, no prefix caching, and the engine in its own process (the default)."""
    alone = [batch(prompt(length, seed)) for seed, length in enumerate(MIXED)]
    together = batch(*[prompt(length, seed) for seed, length in enumerate(MIXED)])
    options = {
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 4096,
    }
    return run_engine(llama, [*alone, *alone, together], {**options, **with_minference(sparse_patterns)})


def test_compiled_whole_prompts_run_sparsely(compiled: Any) -> None:
    assert "enforce_eager=False" in compiled.log
    assert 0.05 < compiled.density < 0.9


def test_compiled_repeated_prompts_give_the_same_tokens(compiled: Any) -> None:
    count = len(MIXED)
    assert compiled.tokens[:count] == compiled.tokens[count : 2 * count]


def test_compiled_concurrent_requests_are_all_answered(compiled: Any) -> None:
    assert [len(tokens) for tokens in compiled.tokens[-1]] == [8] * len(MIXED)


# Tensor parallelism


def test_two_ranks_give_the_tokens_of_one(
    llama: Path,
    run_engine: Runner,
    prompt: Callable[..., list[int]],
    with_minference: Callable[..., Any],
    sparse_patterns: str,
) -> None:
    """In float32: the sum over ranks rounds differently, which can change a selection in bfloat16."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two ranks need two cores")
    prompts = [prompt(length, seed) for seed, length in enumerate(MIXED)]
    batches = [*map(batch, prompts), batch(*prompts[:2], asked=["a_shape(64, 128)", "dense"])]
    options = {
        "dtype": "float32",
        "enable_prefix_caching": False,
        **EAGER,
        **CHUNKED,
        **with_minference(sparse_patterns),
    }
    one = run_engine(llama, batches, {**options, "tensor_parallel_size": 1})
    binding = f"{cores[0]}|{cores[1]}"
    two = run_engine(llama, batches, {**options, "tensor_parallel_size": 2}, VLLM_CPU_OMP_THREADS_BIND=binding)
    assert two.density < 0.9 and [len(stats["asked_by_requests"]) for stats in two.stats] == [1, 1]
    assert_same_tokens(two, one, tie=0.005, at_least=20)


# What we do not serve sparsely


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2", reason="vLLM has no FP8 caches on processors without AVX-512"
)
def test_a_quantised_cache_is_served_by_vllms_own_kernel(
    llama: Path,
    run_engine: Runner,
    prompt: Callable[..., list[int]],
    with_minference: Callable[..., Any],
    sparse_patterns: str,
) -> None:
    batches = [batch(*[prompt(length, seed) for seed, length in enumerate(MIXED)])]
    options = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "enable_prefix_caching": False, **EAGER, **CHUNKED}
    stock = run_engine(llama, batches, options, **IN_PROCESS)
    answer = run_engine(llama, batches, {**options, **with_minference(sparse_patterns)}, **IN_PROCESS)
    assert answer.tokens == stock.tokens, "the same kernel ran on the same batches"
    assert answer.log.count("some layers run densely: KV cache of fp8") == 1
    assert "density" not in answer.log, "nothing was sparse"
