"""The kernels that can serve a layer, timed on chunks like those that it will serve.

Timed is attention under an index, with the remainder where patterns have one. Choosing the keys is left out: on GPUs it
is the same code for all kernels.
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
"""Tokens of the chunk, and of the sequence that it ends, where batches and prompts may be so long."""
DENSITIES = (0.05, 0.25)
"""Shares of the keys before a tile: of a long prompt's last chunks and of its first sparse ones."""
PAGE_BYTES = 128 << 20
"""Of the pages that stand for all of the sequence's: more than a GPU's L2 cache holds, except for the largest."""
MEMORY = 2 * PAGE_BYTES
"""Bytes that a trial takes beside what serving such a chunk takes: pages, and another kernel's index."""
MAX_DIFFERENCE = 0.05
"""Of two kernels' outputs, relative to their size: ten times what rounding to bf16 makes of it."""
COMPARED_ROWS = 128


def trial_chunk(max_len: int, max_tokens: int) -> Chunk:
    """The chunk that kernels are timed on.

    Args:
        max_len: the longest sequence.
        max_tokens: the most tokens of a batch.
    """
    seq_len = min(SEQ_LEN, max_len)
    return Chunk(request=0, query_start=0, context_len=seq_len - min(CHUNK_LEN, max_tokens, seq_len), seq_len=seq_len)


def trial_pages(num_blocks: int, page_bytes: int, device: torch.device) -> tuple[int, torch.Tensor]:
    """How many pages stand for those of a sequence, and which page each of its blocks has.

    Each page serves several blocks, in a random order. For sparse attention that is as good as pages of their own, as
    long as all of them together exceed the L2 cache.

    Returns:
        the number of pages; int64 ``[num_blocks]``.
    """
    count = max(1, min(num_blocks, PAGE_BYTES // page_bytes))
    generator = torch.Generator(device).manual_seed(0)
    return count, torch.randperm(num_blocks, generator=generator, device=device) % count


def run_trial(
    trial: Trial, kernels: Sequence[Kernel], inputs: Inputs, patterns: Sequence[HeadPattern], tile: int | None
) -> None:
    """Time the kernels on a chunk, at every density. One that fails, or whose output is not that of the first, is left
    out.

    Args:
        trial: of the kernels' names.
        kernels: that take planned sizes.
        inputs: of random content.
        patterns: one per query head. None samples: all kernels are timed on the same work.
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
    """One density; the indices are gone when it returns."""
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
    """A call of the kernel with everything that it reads, which has been made once, and rows of its output.

    Raises:
        ValueError: the output is not finite, or another than expected.
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
    """float32 copy of rows from all over the chunk. Waits for the GPU: what has failed there raises here."""
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
