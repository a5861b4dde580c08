"""Serve one sparse chunk in one layer, with recall audit, recall floor and counters."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import torch
from vllm.logger import init_logger

from minference_vllm.backend.runtime import Runtime
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.kernel import Kernel
from minference_vllm.patterns.kinds import MAX_STEP, Dense, HeadPattern
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.recall import RecallCheck, audit_frequency, audited_rows
from minference_vllm.prefill.timing import Timing

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class SparseLayer:
    """How the sparse chunks of one layer run. Created once."""

    number: int
    """The layer's number, or -1 if its name has none."""
    first_head: int
    """Global number of the first of this rank's heads."""
    patterns: tuple[HeadPattern, ...]
    """One per query head of this rank."""
    kernel: Kernel


def serve_chunk(runtime: Runtime, layer: SparseLayer, inputs: Inputs, out: torch.Tensor) -> None:
    """As ``attend_chunk``; also audits recall when that is due, and updates the counters."""
    settings, counters, chunk = runtime.settings, runtime.counters, inputs.chunk
    if runtime.recorder is not None:
        runtime.recorder.record(layer.number, layer.first_head, inputs)
        attend_chunk(inputs, [Dense()] * inputs.num_heads, layer.kernel, out, settings.tile)
        return
    check, timing = None, Timing()
    if audit_is_due(runtime, layer, inputs):
        seed = audit_seed(layer, chunk)
        steps = runtime.raised.at(layer.number, inputs)
        with timing.stage("audit"):
            rows = audited_rows(inputs.query, settings.audit_rows, seed)
        check = RecallCheck(rows, settings.recall_floor, steps)
    index = attend_chunk(inputs, layer.patterns, layer.kernel, out, settings.tile, check, timing)
    overflowed = 0 if index.overflowed is None else index.overflowed.sum() * index.heads_per_list
    pairs = index.num_heads * index.dense_pairs()
    counters.count_layer(index.computed_pairs().sum(), pairs, overflowed, chunk.patterns)
    counters.count_seconds(timing.estimate + timing.index + timing.attend, timing.audit)
    if check is None or check.recall is None:
        return
    if chunk.patterns is None:
        counters.count_recall(layer.number, layer.first_head, torch.stack(check.recall).double())
    runtime.raised.keep(layer.number, inputs, check.steps)
    for head, step in enumerate(check.steps, layer.first_head):
        if step:
            counters.count_raised(layer.number, head, dense=step == MAX_STEP)
            logger.warning_once(
                "minference: layer %d, head %d: value recall below the floor of %s, %s for the rest of the request "
                "(counted from now on, not logged again)",
                layer.number, head, settings.recall_floor, "dense" if step == MAX_STEP else "more keys",
            )  # fmt: skip


def audit_seed(layer: SparseLayer, chunk: Chunk) -> int:
    """Seed of the audited rows: differs by layer and chunk, repeats for the same prompt in the same chunks."""
    return zlib.crc32(f"{layer.number} {chunk.context_len} {chunk.seq_len}".encode())


def audit_is_due(runtime: Runtime, layer: SparseLayer, inputs: Inputs) -> bool:
    """Whether to audit this chunk in this layer.

    With a recall floor, always. Otherwise only chunks that run the server's patterns, as often as audits stay below
    ``audit_share`` of the time. On GPUs, whose time the host's clock does not measure, it is a share of planned work.
    """
    settings, counters, chunk = runtime.settings, runtime.counters, inputs.chunk
    if not settings.audit_rows:
        return False
    if settings.recall_floor is not None:
        return True
    if chunk.patterns is not None:
        return False
    if not inputs.query.is_cuda:
        return counters.audit_seconds <= settings.audit_share * counters.sparse_seconds
    frequency = audit_frequency(
        layer.patterns, chunk.context_len, chunk.seq_len, settings.audit_rows, settings.audit_share
    )
    # At random: with a fixed stride audits could align with the layers and never reach some.
    return random.Random(f"{layer.number} {counters.sparse_chunks} {chunk.request}").random() < frequency
