"""Kernels timed on a chunk, with torch in place of a GPU's kernels: what runs, what is compared, what is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faked_cuda import flash_attention

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.autotune import ROUNDS, Budget, Run, Trial
from minference_vllm.kernels.block_table import flash
from minference_vllm.kernels.choice_cache import Choice
from minference_vllm.kernels.kernel import Kernel
from minference_vllm.patterns.kinds import AShape, HeadPattern, LowRank
from minference_vllm.prefill.kernel_trial import (
    DENSITIES,
    PAGE_BYTES,
    result_in_words,
    run_trial,
    trial_chunk,
    trial_pages,
)
from minference_vllm.selection.torch_scores import TorchScores

PAGE, DIM, HEADS = 16, 32, 4


def kernel(name: str, after: Callable[[torch.Tensor], Any] = lambda out: None) -> Kernel:
    """A kernel that takes planned sizes; ``after`` is called with its output."""

    def run(inputs: Inputs, index: Any, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        flash.run(inputs, index, out, lse, attend=lambda **given: flash_attention(**given))
        after(out)

    return Kernel(name, run, TorchScores, planned=True, lists_everything=True)


def inputs() -> Inputs:
    torch.manual_seed(0)
    count, pages = trial_pages(40, PAGE_BYTES // 7, torch.device("cpu"))
    memory = torch.randn(count, 2, PAGE, 2 * DIM).bfloat16()
    cache = PagedCache(memory[..., :DIM], memory[..., DIM:], "rows")
    query = torch.randn(128, HEADS, DIM).bfloat16()
    return Inputs.of(query, cache, pages, Chunk(0, 0, 512, 640), DIM**-0.5)


def tried(patterns: list[HeadPattern], *kernels: Kernel, seconds: float = 1e9, **times: float) -> Trial:
    """The trial of some kernels whose calls take the given times; 1 by default."""
    calls: list[str] = []

    def clock(run: Run) -> float:
        run()
        name = run.args[2].name  # type: ignore[attr-defined]
        calls.append(name)
        return times.get(name, 1.0)

    trial = Trial([one.name for one in kernels], clock, Budget(seconds))
    run_trial(trial, kernels, inputs(), patterns, 64)
    trial.calls = calls  # type: ignore[attr-defined]
    return trial


@pytest.mark.parametrize("pattern", [AShape(sink=16, local=64), LowRank(remainder=True)], ids=str)
def test_every_density_is_timed_and_the_faster_kernel_wins(pattern: HeadPattern) -> None:
    trial = tried([pattern] * HEADS, kernel("triton"), kernel("block_table"), block_table=0.5)
    assert trial.fastest() == "block_table" and not trial.failed
    assert trial.totals() == {"triton": len(DENSITIES), "block_table": len(DENSITIES) / 2}
    assert len(trial.calls) == 2 * ROUNDS * len(DENSITIES)  # type: ignore[attr-defined]


def fails(out: torch.Tensor) -> None:
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (fails, "RuntimeError: out of resource: shared memory"),
        (lambda out: out[:, 1].zero_(), "its output differs by 0.48"),
        (lambda out: out[-1].fill_(torch.nan), "its output is not finite"),
    ],
    ids=["raises", "another result", "nan"],
)
def test_a_kernel_that_cannot_be_right_is_left_out(after: Callable[[torch.Tensor], Any], reason: str) -> None:
    patterns: list[HeadPattern] = [LowRank()] * HEADS
    trial = tried(patterns, kernel("triton"), kernel("block_table", after), block_table=0.1)
    assert trial.fastest() == "triton" and reason in trial.failed["block_table"]
    assert trial.calls == ["triton"] * ROUNDS * len(DENSITIES)  # type: ignore[attr-defined]


def test_the_second_serves_where_the_first_fails() -> None:
    trial = tried([LowRank()] * HEADS, kernel("triton", fails), kernel("block_table"))
    assert trial.fastest() == "block_table"


def test_nothing_runs_without_time() -> None:
    trial = tried([LowRank()] * HEADS, kernel("triton", fails), kernel("block_table"), seconds=0.0)
    assert trial.fastest() == "triton" and trial.is_over and not trial.failed


@pytest.mark.parametrize(
    ("max_len", "max_tokens", "chunk"),
    [
        (1 << 20, 8192, (65536 - 8192, 65536)),
        (1 << 20, 65536, (65536 - 8192, 65536)),
        (32768, 2048, (32768 - 2048, 32768)),
        (4096, 8192, (0, 4096)),
    ],
)
def test_the_chunk(max_len: int, max_tokens: int, chunk: tuple[int, int]) -> None:
    assert trial_chunk(max_len, max_tokens) == Chunk(0, 0, *chunk)


def test_pages_are_used_several_times_in_a_random_order() -> None:
    device = torch.device("cpu")
    count, pages = trial_pages(1000, PAGE_BYTES // 300, device)
    assert count == 300 and pages.dtype == torch.int64 and len(pages) == 1000
    assert set(pages.bincount().tolist()) == {3, 4}
    assert not torch.equal(pages, torch.arange(1000) % count)
    assert trial_pages(4, 1, device)[0] == 4, "no more than there are blocks"
    assert trial_pages(4, 2 * PAGE_BYTES, device)[0] == 1


def test_what_is_said() -> None:
    assert result_in_words(Choice("triton", {"triton": 0.002, "block_table": 0.003}), 8192, 65536) == (
        "'triton' 2.00 ms, 'block_table' 3.00 ms (1.50 times as long), for the last 8192 of 65536 tokens, at densities "
        "0.05 and 0.25 together"
    )
    assert result_in_words(Choice("triton", {}), 1, 2) == "'triton', untimed"
