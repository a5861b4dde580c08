"""Whole engines on a GPU: CUDA graphs, page sizes and FP8 caches. The other engine tests run there as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
OPTIONS = {"dtype": "bfloat16", "max_num_batched_tokens": 1024, "gpu_memory_utilization": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "CUDA graphs": {},
    "eager": {"enforce_eager": True},
    "pages of 16": {"block_size": 16},
    "pages of 64": {"block_size": 64},
}


@pytest.fixture(scope="module")
def answers(llama: Path, run_engine: Callable[..., Any], prompt: Callable[..., list[int]]) -> Callable[..., Any]:
    def run(**llm: Any) -> Any:
        prompts = [prompt(length, seed) for seed, length in enumerate((2000, 300, 1501, 900))]
        return run_engine(llama, [{"prompts": prompts}], {**OPTIONS, **llm}, max_tokens=12)

    return run


def agreement(found: Any, expected: Any) -> float:
    """Share of greedy tokens before the first that differs, over all prompts."""
    same = total = 0
    for ours, theirs in zip(found.tokens[0], expected.tokens[0], strict=True):
        total += len(theirs)
        same += next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
    return same / total


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", ["triton", "block_table"])
def test_full_patterns_answer_like_vllms_own_backend(
    kernel: str, variant: str, answers: Any, full_patterns: str, with_minference: Callable[..., dict[str, Any]]
) -> None:
    options = VARIANTS[variant]
    found = answers(**options, **with_minference(full_patterns, kernel=kernel))
    assert agreement(found, answers(**options)) > 0.8


def test_cuda_graphs_make_no_difference(
    answers: Any, sparse_patterns: str, with_minference: Callable[..., dict[str, Any]]
) -> None:
    graphs = answers(**with_minference(sparse_patterns))
    eager = answers(enforce_eager=True, **with_minference(sparse_patterns))
    assert agreement(graphs, eager) > 0.8
    assert graphs.density < 0.95


def test_fp8_caches_are_sparse_too(
    answers: Any, full_patterns: str, with_minference: Callable[..., dict[str, Any]]
) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FlashAttention serves FP8 caches on Hopper")
    fp8 = {"kv_cache_dtype": "fp8"}
    found = answers(**fp8, **with_minference(full_patterns))
    assert found.density > 0.9 and "KV cache of" not in found.log
    assert agreement(found, answers(**fp8)) > 0.6
