"""Time the kernels that can serve a layer, on chunks like those that it will serve.

The time covers attention under an index, and the remainder if patterns have one. It does not cover the selection of
keys, which is the same code for all kernels on GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.autotune import Run, Trial
from minference_vllm.kernels.choice_cache import Choice
from minference_vllm.kernels.kernel import Kernel
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.prefill.attend import capacity_for, left_out_by, run_index, tiling_for
from minference_vllm.selection.spread import spread_index

CHUNK_LEN, SEQ_LEN = 8192, 65536
"""Tokens of the chunk and of the sequence that it ends; fewer if batches or prompts are limited to less."""
DENSITIES = (0.05, 0.25)
"""Selected shares of the keys before a tile: as in a long prompt's last chunks, and in its first sparse ones."""
PAGE_BYTES = 128 << 20
"""Bytes of the pages that stand in for the sequence's. Larger than the L2 cache of all but the largest GPUs."""
MEMORY = 2 * PAGE_BYTES
"""Bytes that a trial needs in addition to serving such a chunk: pages, and another kernel's index."""
MAX_DIFFERENCE = 0.05
"""Maximum relative difference of two kernels' outputs: ten times that of rounding to bf16."""
COMPARED_ROWS = 128


def trial_chunk(max_len: int, max_tokens: int) -> Chunk:
    """The chunk that kernels are timed on.

    Args:
        max_len: the longest sequence.
        max_tokens: the maximum number of tokens of a batch.
    """
    seq_len = min(SEQ_LEN, max_len)
    return Chunk(request=0, query_start=0, context_len=seq_len - min(CHUNK_LEN, max_tokens, seq_len), seq_len=seq_len)


def trial_pages(num_blocks: int, page_bytes: int, device: torch.device) -> tuple[int, torch.Tensor]:
    """The number of pages that stand in for a sequence's, and its block table.

    Blocks share pages, in a random order. For timing sparse attention that is as good as separate pages, as long as all
    pages together exceed the L2 cache.

    Returns:
        the number of pages; int64 ``[num_blocks]``, the page of each block.
    """
    count = max(1, min(num_blocks, PAGE_BYTES // page_bytes))
    generator = torch.Generator(device).manual_seed(0)
    return count, torch.randperm(num_blocks, generator=generator, device=device) % count


def run_trial(
    trial: Trial, kernels: Sequence[Kernel], inputs: Inputs, patterns: Sequence[HeadPattern], tile: int | None
) -> None:
    """Time the kernels on a chunk, at every density. A kernel that fails, or whose output differs from that of the
    first, is excluded.

    Args:
        trial: over the kernels' names.
        kernels: all take planned sizes.
        inputs: with random content.
        patterns: one per query head. Sampling is turned off, so that all kernels do the same work.
        tile: see ``Settings``.

    Raises:
        torch.OutOfMemoryError: see ``Trial.attempt``.
    """
    patterns = [pattern.without_sampling() for pattern in patterns]
    out = torch.empty_like(inputs.query)
    for density in DENSITIES:
        _run_case(trial, kernels, inputs, patterns, density, tile, out)


def _run_case(
    trial: Trial,
    kernels: Sequence[Kernel],
    inputs: Inputs,
    patterns: Sequence[HeadPattern],
    density: float,
    tile: int | None,
    out: torch.Tensor,
) -> None:
    """Time one density. Its indices are freed on return."""
    runs: dict[str, Run] = {}
    expected: torch.Tensor | None = None
    for kernel in kernels:
        if kernel.name in trial.failed:
            continue
        if trial.is_over:
            return
        step = functools.partial(_first_run, kernel, inputs, patterns, density, tile, out, expected)
        found = trial.attempt(kernel.name, step)
        if found is not None:
            runs[kernel.name], rows = found
            expected = rows if expected is None else expected
    trial.measure(runs)


def _first_run(
    kernel: Kernel,
    inputs: Inputs,
    patterns: Sequence[HeadPattern],
    density: float,
    tile: int | None,
    out: torch.Tensor,
    expected: torch.Tensor | None,
) -> tuple[Run, torch.Tensor]:
    """Run the kernel once and return the call, with all of its arguments bound, and some rows of its output.

    Raises:
        ValueError: the output is not finite, or differs from the expected one.
    """
    tiling = tiling_for(inputs, kernel, tile)
    index = spread_index(tiling, patterns, density, capacity_for(tiling, patterns, kernel), inputs.group)
    left_out = left_out_by(inputs, index, kernel, patterns)
    run = functools.partial(run_index, inputs, index, kernel, out, left_out)
    out.fill_(torch.nan)
    run()
    rows = _some_rows(out)
    if not rows.isfinite().all():
        raise ValueError("its output is not finite")
    if expected is not None:
        difference = float((rows - expected).norm() / expected.norm())
        if difference > MAX_DIFFERENCE:
            raise ValueError(f"its output differs by {difference:.3f} of its size from that of the first kernel")
    return run, rows


def _some_rows(out: torch.Tensor) -> torch.Tensor:
    """float32 CPU copy of rows from all over the chunk. Synchronises with the GPU, so its errors are raised here."""
    return out[:: max(1, len(out) // COMPARED_ROWS)].float().cpu()


def result_in_words(choice: Choice, chunk_len: int, seq_len: int) -> str:
    """Which kernel is the fastest, and by how much."""
    if choice.kernel not in choice.seconds:
        return f"{choice.kernel!r}, untimed"
    least = choice.seconds[choice.kernel]
    others = [
        f", {name!r} {1000 * seconds:.2f} ms ({seconds / least:.2f} times as long)"
        for name, seconds in choice.seconds.items()
        if name != choice.kernel
    ]
    densities = " and ".join(map(str, DENSITIES))
    chunks = f"the last {chunk_len} of {seq_len} tokens, at densities {densities} together"
    return f"{choice.kernel!r} {1000 * least:.2f} ms{''.join(others)}, for {chunks}"
