"""Requests that ask for dense attention or other patterns, in engines with so few pages that one of them is
preempted: it is recomputed, and runs what it asked for again. With both of vLLM's model runners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OPTIONS = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 2048,
    "max_model_len": 2048,
    # One for vLLM itself, eight of 128 tokens for each of two prompts, and one for the prompt that grows first.
    "num_gpu_blocks_override": 18,
}
LENGTH = 1020
RUNNERS = {"V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "V2": {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}}


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_request_that_is_computed_anew_runs_what_it_asked_for(
    runner: str,
    llama: Path,
    run_engine: Callable[..., Any],
    prompt: Callable[..., list[int]],
    with_minference: Callable[..., Any],
    sparse_patterns: str,
) -> None:
    """It is the second of the two requests in each batch."""
    if runner == "V2":
        pytest.importorskip("triton")
    prompts = [prompt(LENGTH, seed) for seed in (1, 2)]
    batches = [{"prompts": prompts, "asked": asked} for asked in (["a_shape(64, 128)", "dense"], ["dense", None])]
    options = {**OPTIONS, **with_minference(sparse_patterns)}
    answer = run_engine(llama, batches, options, VLLM_ENABLE_V1_MULTIPROCESSING="0", **RUNNERS[runner])
    assert f"Using {runner} Model Runner" in answer.log or runner == "V1"
    (stats,) = answer.stats
    assert stats["dense_chunks"] == {"the request asked for it": 2 + 1}
    (asked,) = stats["asked_by_requests"].values()
    assert asked["sparse_chunks"] == 1 and asked["sparse_tokens"] == LENGTH
    assert stats["sparse_chunks"] == 1 + 2
    assert LENGTH < stats["sparse_tokens"] - 2 * LENGTH < LENGTH + 8, "the tokens of its answer so far, too"
    assert all(len(tokens) == 8 for batch in answer.tokens for tokens in batch)
