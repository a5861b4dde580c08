"""One sparse chunk in one layer, served and accounted for: recall audit, floor, counters."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from vllm.logger import init_logger

from minference_vllm.backend.runtime import Runtime
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.patterns.kinds import MAX_LEVEL, Dense, HeadPattern
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.recall import Audit, sample_rows
from minference_vllm.selection.capacity import audit_frequency
from minference_vllm.selection.scores import Timing

logger = init_logger(f"vllm.{__name__}")


def serve_chunk(
    runtime: Runtime,
    layer: int,
    first_head: int,
    query: torch.Tensor,
    cache: PagedCache,
    pages: torch.Tensor,
    chunk: Chunk,
    patterns: Sequence[HeadPattern],
    out: torch.Tensor,
    **options: Any,
) -> None:
    """As ``attend_chunk``; audits recall when that is due, and counts what was done.

    Args:
        layer: the layer's number, or -1 when it has none.
        first_head: global number of the first of this rank's heads.
        options: more arguments of ``attend_chunk``.
    """
    settings, counters = runtime.settings, runtime.counters
    if runtime.recorder is not None:
        runtime.recorder.record(layer, first_head, query, cache, pages, chunk, options["scale"])
        dense = [Dense()] * query.shape[1]
        attend_chunk(
            query, cache, pages, chunk, dense, out=out, engine=settings.engine, tile=settings.tile, **options
        )  # fmt: skip
        return
    audit = None
    if audit_is_due(runtime, layer, chunk, patterns, query.is_cuda):
        # Other rows in every layer and chunk, the same ones whenever the same prompt comes in the same chunks.
        seed = zlib.crc32(f"{layer} {chunk.context_len} {chunk.seq_len}".encode())
        levels = runtime.raised.at(layer, chunk.context_len, pages, cache.block_size)
        audit = Audit(sample_rows(chunk.query_len, settings.audit_rows, seed), settings.recall_floor, levels)
    timing = Timing()
    index = attend_chunk(
        query, cache, pages, chunk, patterns, out=out, engine=settings.engine, tile=settings.tile, timing=timing,
        audit=audit, **options,
    )  # fmt: skip
    overflowed = 0 if index.overflowed is None else index.overflowed.sum() * index.heads_per_list
    counters.count_layer(index.computed_pairs().sum(), index.num_heads * index.dense_pairs(), overflowed)
    counters.count_seconds(timing.estimate + timing.index + timing.attend, timing.audit)
    if audit is None or audit.recall is None:
        return
    counters.count_recall(layer, first_head, audit.recall.double())
    runtime.raised.keep(layer, chunk.seq_len, pages, cache.block_size, audit.levels)
    for head, level in enumerate(audit.levels):
        if level:
            counters.count_raised(layer, first_head + head, dense=level == MAX_LEVEL)
            logger.warning_once(
                "minference: layer %d, head %d: recall below the floor of %s, %s for the rest of the request "
                "(counted from now on, not logged again)",
                layer, first_head + head, settings.recall_floor, "dense" if level == MAX_LEVEL else "more keys",
            )  # fmt: skip


def audit_is_due(runtime: Runtime, layer: int, chunk: Chunk, patterns: Sequence[HeadPattern], on_gpu: bool) -> bool:
    """Every chunk and layer under a floor; else as often as audits stay below their share of the time.

    The host's clock does not know a GPU's time; there the share is one of planned work.
    """
    settings, counters = runtime.settings, runtime.counters
    if not settings.audit_rows:
        return False
    if settings.recall_floor is not None:
        return True
    if not on_gpu:
        return counters.audit_seconds <= settings.audit_share * counters.sparse_seconds
    frequency = audit_frequency(patterns, chunk.context_len, chunk.seq_len, settings.audit_rows, settings.audit_share)
    # By lot: at even distances audits could fall into step with the layers and never reach some.
    return random.Random(f"{layer} {counters.sparse_chunks} {chunk.request}").random() < frequency
