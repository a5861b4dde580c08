"""Which requests of a batch are prefilled sparsely, decided once per batch from lengths alone.

A batch mixes decodes, short extends and prefill chunks of several requests. The plan lists the chunks that our path
takes, the runs of neighbouring requests that go to vLLM's own kernel, and the reason for every prefill chunk that is
left dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True)
class Chunk:
    """The new tokens of one request in one engine step, at absolute positions ``[context_len, seq_len)``."""

    request: int
    """Row of the block table."""
    query_start: int
    """First row of the chunk in the batch's concatenated queries."""
    context_len: int
    """Tokens of the request already in the cache before this step."""
    seq_len: int
    """Tokens in the cache after this step: context + chunk."""
    patterns: str | None = None
    """Name of the patterns that the request asked for; None: it runs the server's."""

    @property
    def query_len(self) -> int:
        return self.seq_len - self.context_len

    @property
    def dense_pairs(self) -> float:
        """Query-key pairs of one head that dense causal attention computes."""
        return dense_pairs(self.context_len, self.seq_len)


def dense_pairs(context_len: int, seq_len: int, window: int = 0) -> float:
    """Query-key pairs of one head that dense causal attention computes in rows ``[context_len, seq_len)``.

    Args:
        window: maximum number of keys that a row sees, itself included; 0: all before it.
    """
    full = min(max(window, context_len), seq_len) if window else seq_len  # from this row on the window is full
    return (full - context_len) * (context_len + full + 1) / 2 + (seq_len - full) * window


@dataclass(frozen=True)
class Plan:
    """How one batch is served."""

    sparse: tuple[Chunk, ...]
    """Chunks for the sparse path, in batch order."""
    dense_runs: tuple[tuple[int, int], ...]
    """Ranges ``[first, last)`` of neighbouring requests that vLLM's own kernel serves."""
    dense_reasons: tuple[str, ...]
    """Why a prefill chunk was left dense, one entry per such chunk. Decodes are no prefill and have no entry."""
    far: tuple[Chunk, ...] = ()
    """Other chunks, including decodes, that vLLM's own kernel cannot serve since they end beyond ``plain_len``."""


BELOW_MIN_CONTEXT = "prompt so far is shorter than min_context"
BELOW_MIN_CHUNK = "chunk is shorter than min_chunk"
NO_ROWS: Mapping[int, str] = MappingProxyType({})
PREFILL_FROM = 16
"""A chunk of fewer tokens is a decode or a verification of drafted tokens, not a prefill."""


def dense_reason(chunk: Chunk, min_context: int, min_chunk: int) -> str | None:
    """Why this chunk is served densely, or None when it goes to the sparse path."""
    if chunk.query_len < min_chunk:
        return BELOW_MIN_CHUNK
    if chunk.seq_len < min_context:
        return BELOW_MIN_CONTEXT
    return None


def plan_batch(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    min_context: int,
    min_chunk: int,
    plain_len: int | None = None,
    dense: Mapping[int, str] = NO_ROWS,
    patterns: Mapping[int, str] = NO_ROWS,
) -> Plan:
    """Split a batch into sparse chunks and dense runs.

    Args:
        query_start_loc: first query row of each request, and the end of the last; ``num_requests + 1`` entries.
        seq_lens: context plus new tokens of each request; ``num_requests`` entries.
        min_context, min_chunk: thresholds in tokens, see ``Settings``.
        plain_len: maximum tokens of a sequence that vLLM's own kernel can serve; None: no limit.
        dense: requests that are served densely regardless of their lengths, and why.
        patterns: requests that run other patterns than the server's, and the names of those patterns.
    """
    sparse: list[Chunk] = []
    dense_runs: list[tuple[int, int]] = []
    reasons: list[str] = []
    far: list[Chunk] = []
    for request, seq_len in enumerate(seq_lens):
        start, end = query_start_loc[request], query_start_loc[request + 1]
        chunk = Chunk(request, start, seq_len - (end - start), seq_len)
        reason = dense_reason(chunk, min_context, min_chunk) or dense.get(request)
        if reason is None:
            sparse.append(replace(chunk, patterns=patterns.get(request)))
            continue
        if chunk.query_len >= PREFILL_FROM:
            reasons.append(reason)
        if plain_len is not None and seq_len > plain_len:
            far.append(chunk)
            continue
        if dense_runs and dense_runs[-1][1] == request:
            dense_runs[-1] = (dense_runs[-1][0], request + 1)
        else:
            dense_runs.append((request, request + 1))
    return Plan(tuple(sparse), tuple(dense_runs), tuple(reasons), tuple(far))
