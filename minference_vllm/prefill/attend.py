"""``attend_chunk``: sparse attention of one chunk in one layer: select keys, build the index, run the kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import Remainder
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling, whole_tile
from minference_vllm.kernels.kernel import Kernel
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.prefill import remainder
from minference_vllm.prefill.recall import Recall, RecallCheck, chunk_recall
from minference_vllm.prefill.timing import TimedScores, Timing
from minference_vllm.selection.build import build_index
from minference_vllm.selection.capacity import plan_capacity
from minference_vllm.selection.compaction import EXACT_WIDTH, Capacity
from minference_vllm.selection.torch_scores import TorchScores


def tiling_for(inputs: Inputs, kernel: Kernel, tile: int | None) -> Tiling:
    """The chunk's query tiles, with the kernel's multiple of columns.

    Args:
        tile: see ``Settings``.
    """
    size, chunk = inputs.cache.block_size, inputs.chunk
    multiple = size if kernel.whole_pages else 1
    return _tiling(
        chunk.context_len, chunk.seq_len, size, whole_tile(tile, size), multiple, inputs.query.device, inputs.window
    )


# All layers of a batch need the same ones.
_tiling = functools.lru_cache(maxsize=64)(Tiling.of)
_capacity = functools.lru_cache(maxsize=256)(plan_capacity)


def capacity_for(tiling: Tiling, patterns: Sequence[HeadPattern], kernel: Kernel) -> Capacity:
    """Capacity of a chunk's index; exact for kernels that do not take planned sizes."""
    if not kernel.planned:
        return EXACT_WIDTH
    sizes = tiling.context_len, tiling.seq_len, tiling.block_size, tiling.tile, tiling.column_multiple
    return _capacity(tuple(patterns), *sizes, kernel.lists_everything)


def select(
    inputs: Inputs,
    patterns: Sequence[HeadPattern],
    kernel: Kernel,
    scores: TorchScores,
    tile: int | None = None,
    timing: Timing | None = None,
) -> SparseIndex:
    """The index of one chunk. Other arguments are those of ``attend_chunk``.

    Args:
        scores: the kernel's scores of these inputs.
    """
    timing = timing or Timing()
    tiling = tiling_for(inputs, kernel, tile)
    capacity = capacity_for(tiling, patterns, kernel)
    with timing.stage("index"):
        return build_index(
            tiling, patterns, TimedScores(scores, timing), capacity, inputs.group if kernel.planned else 1
        )


def unknown_to(kernel: Kernel, inputs: Inputs) -> str | None:
    """A feature that these inputs need and the kernel does not support, or None."""
    asked = {
        "soft cap": bool(inputs.softcap) and not kernel.softcap,
        "attention sinks": inputs.sinks is not None and not kernel.sinks,
        "sliding windows": bool(inputs.window) and not kernel.window,
        "FP8 caches": inputs.cache.key.element_size() == 1 and not kernel.fp8,
    }
    return next((name for name, unknown in asked.items() if unknown), None)


def attend_chunk(
    inputs: Inputs,
    patterns: Sequence[HeadPattern],
    kernel: Kernel,
    out: torch.Tensor,
    tile: int | None = None,
    check: RecallCheck | None = None,
    timing: Timing | None = None,
) -> SparseIndex:
    """Sparse attention of one request's chunk, written to ``out``; returns the index that was used.

    Args:
        patterns: one per query head.
        kernel: see ``kernels.choose``.
        out: ``[chunk, H, D]``.
        tile: see ``Settings``.
        check: rows to audit and the recall floor, before attention runs; the results are stored in it.
        timing: stage times are added to it, if given.

    Raises:
        ValueError: the inputs need a feature that the kernel does not support.
    """
    unknown = unknown_to(kernel, inputs)
    if unknown:
        raise ValueError(f"kernel {kernel.name!r} knows no {unknown}")
    timing = timing or Timing()
    scores = kernel.scores(inputs)

    def build(patterns: Sequence[HeadPattern]) -> SparseIndex:
        return select(inputs, patterns, kernel, scores, tile, timing)

    def recall(index: SparseIndex, rows: torch.Tensor) -> Recall:
        with timing.stage("audit"):
            return chunk_recall(scores, index, rows)

    index = build(patterns) if check is None else check.run(patterns, build, recall)
    used = patterns if check is None else check.strengthened(patterns)
    with timing.stage("index"):
        left_out = left_out_by(inputs, index, kernel, used)
    with timing.stage("attend"):
        run_index(inputs, index, kernel, out, left_out)
    return index


def left_out_by(
    inputs: Inputs, index: SparseIndex, kernel: Kernel, patterns: Sequence[HeadPattern]
) -> Remainder | None:
    """The remainder of the heads whose patterns have one and that do not sample keys; None if there are none.

    Computed by the kernel's own implementation if it has one."""
    heads = [head for head, pattern in enumerate(patterns) if pattern.has_remainder and head not in index.sampled]
    return (kernel.remainder or remainder.of_heads)(inputs, index, heads) if heads else None


def run_index(
    inputs: Inputs, index: SparseIndex, kernel: Kernel, out: torch.Tensor, left_out: Remainder | None = None
) -> None:
    """Sparse attention of one chunk under a given index, written to ``out`` (``[chunk, H, D]``).

    Args:
        left_out: the remainder of every tile, added by the kernel or else merged with its output.
    """
    assert kernel.samples or not index.sampled
    if left_out is not None and kernel.run_with_remainder is not None:
        kernel.run_with_remainder(inputs, index, out, None, left_out)
        return
    lse = None if left_out is None else out.new_empty(inputs.num_heads, len(out), dtype=torch.float32)
    kernel.run(inputs, index, out, lse)
    if left_out is not None and lse is not None:
        remainder.add(inputs, index, left_out, out, lse)
