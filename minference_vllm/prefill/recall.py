"""Attention recall while serving: how much of the dense attention the selected keys hold, on a few sampled rows.

Recall of a row is ``exp(lse_sparse - lse_dense)`` (Qwen2.5-1M, arXiv 2501.15383, section 4.2), computed here as the sum
of the dense weights on the selected keys, which is the same number. *Value recall* multiplies every weight by the norm
of its key's value: if most of the weight lies on a sink whose value is close to zero, it still shows how much of the
output is kept; recall does not. Both are computed from the index before attention runs, so that a head that falls short
can get more keys in the same chunk.

Sizes: ``H`` query heads over ``HK`` KV heads, ``R`` sampled rows, ``S`` tokens in the sequence, ``D`` head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.transfer import to_device
from minference_vllm.patterns.kinds import MAX_STEP, HeadPattern
from minference_vllm.selection.families import family_of
from minference_vllm.selection.measured_rows import bounded
from minference_vllm.selection.probe_queries import logits, most_unlike, unlikeness, unseen
from minference_vllm.selection.torch_scores import PIECE_BYTES, TorchScores

ROWS_AT_ONCE = 16
"""Maximum number of rows audited at once, since the lists of their tiles take memory, too."""
AUDITED_PAIR = 32
"""Cost of a query-key pair of an audit, in pairs of attention. Attention keeps its scores in registers; an audit writes
them to memory, and copies keys for only a few rows. Estimated from the bytes moved, not timed."""


class Recall(NamedTuple):
    """Recall of sampled rows of a chunk, or means over them."""

    mass: torch.Tensor
    """float32 ``[H, R]``: share of the weights."""
    value: torch.Tensor
    """float32 ``[H, R]``: share of the weights times the norms of values."""

    def mean(self) -> Recall:
        """Means over the rows, float32 ``[H]`` each."""
        return Recall(self.mass.mean(1), self.value.mean(1))


def chunk_recall(scores: TorchScores, index: SparseIndex, rows: torch.Tensor) -> Recall:
    """``sampled_recall`` of a chunk over its paged cache.

    Args:
        rows: int64 ``[R]``, rows of the chunk, on the query's device.
    """
    parts = [
        sampled_recall(
            scores.query,
            scores.audited_pieces(len(part)),
            index,
            part,
            scores.scale,
            scores.softcap,
            scores.inputs.window,
        )
        for part in rows.split(ROWS_AT_ONCE)
    ]
    return Recall(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def sampled_recall(
    query: torch.Tensor,
    pieces: Iterable[tuple[torch.Tensor, torch.Tensor]],
    index: SparseIndex,
    rows: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Recall:
    """Recall of sampled rows of a chunk. No host synchronisation.

    Args:
        query: ``[chunk, H, D]``.
        pieces: keys ``[HK, n, D]`` and norms of their values, float32 ``[HK, n]``, up to a common factor; together
            they are the sequence.
        rows: int64 ``[R]``, rows of the chunk, on the query's device.
        softcap, window: see ``Inputs``.
    """
    sums = RecallSums()
    sums.add(query, pieces, index, rows, scale, softcap, window)
    return sums.recall()


class RecallSums:
    """Online softmax of sampled rows over successive sets of keys: sums of all weights and of the kept ones, and both
    again with weights times the norms of values."""

    def __init__(self) -> None:
        self._largest: torch.Tensor | None = None
        """float32 ``[H, R, 1]``: the largest score so far."""
        self._sums = torch.empty(0)
        """float32 ``[4, H, R, 1]``."""
        self._sampled = False

    def add(
        self,
        query: torch.Tensor,
        pieces: Iterable[tuple[torch.Tensor, torch.Tensor]],
        index: SparseIndex,
        rows: torch.Tensor,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
    ) -> None:
        """Arguments as in ``sampled_recall``."""
        positions = rows + index.tiling.context_len
        tiles = torch.searchsorted(index.tiling.starts, positions, right=True) - 1
        sampled = query[rows].transpose(0, 1)  # [H, R, D]
        heads, count, dim = sampled.shape
        if self._largest is None:
            self._largest = torch.full((heads, count, 1), -torch.inf, device=rows.device)
            self._sums = torch.zeros(4, heads, count, 1, device=rows.device)
        sums, first, counts = self._sums, 0, index.tile_counts if index.sampled else index.tile_mask
        for piece, value_norms in pieces:
            # Query heads of a KV head form one matrix: [HK, H / HK * R, ...].
            by_kv_head = sampled.reshape(piece.shape[0], -1, dim)
            scores = logits(by_kv_head, piece, scale, softcap).view(heads, count, -1)
            last = first + piece.shape[1]
            scores.masked_fill_(unseen(positions - first, piece.shape[1], window), -torch.inf)
            new_largest = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
            # It is -inf until the row's window begins.
            shift = new_largest.masked_fill(new_largest == -torch.inf, 0.0)
            weights = scores.sub_(shift).exp_()
            sums *= (self._largest - shift).exp_()
            norms = bounded(value_norms)[:, None, None]
            sums[0] += weights.sum(-1, keepdim=True)
            sums[2] += _by_norm(weights, norms)
            weights.mul_(counts(tiles, first=first, last=last))
            sums[1] += weights.sum(-1, keepdim=True)
            sums[3] += _by_norm(weights, norms)
            self._largest, first = new_largest, last
        self._sampled |= bool(index.sampled)

    def recall(self) -> Recall:
        """Recall over all sets that were added. Sampled keys that count several times may overestimate it, so it is
        clamped to 1."""
        found = Recall((self._sums[1] / self._sums[0])[..., 0], (self._sums[3] / self._sums[2])[..., 0])
        return Recall(*(part.clamp_(max=1.0) for part in found)) if self._sampled else found


def _by_norm(weights: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """float32 ``[H, R, 1]``: sum of the weights ``[H, R, n]`` times their keys' norms ``[HK, 1, 1, n]``."""
    by_kv_head = weights.view(norms.shape[0], -1, *weights.shape[1:])
    return torch.matmul(by_kv_head, norms.transpose(-1, -2)).view(*weights.shape[:2], 1)


def sample_rows(rows: int, samples: int, seed: int) -> torch.Tensor:
    """Stratified random sample of a chunk's rows, int64 ``[min(samples, rows)]`` on the CPU, ascending: one row of each
    equal part of the chunk. The last of several parts gives its last row, where a question ends."""
    count = min(samples, rows)
    # On the CPU, whatever PyTorch's default device is.
    borders = torch.arange(count + 1, device="cpu") * rows // count
    place = torch.rand(count, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(seed))
    place[1:][-1:] = 1.0
    sizes = borders[1:] - borders[:-1]
    return borders[:-1] + (place * sizes).long().clamp(max=sizes - 1)


def audited_rows(query: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    """Rows to audit: half from ``sample_rows``, half outlier rows, whose queries differ most from the others.

    A random sample misses the few rows that look where no other row looks, as does an estimate that samples rows.

    Args:
        query: ``[chunk, H, D]``.

    Returns:
        int64 ``[min(samples, chunk)]``, on the query's device. No host synchronisation.
    """
    samples = min(samples, len(query))
    drawn = to_device(sample_rows(len(query), samples - samples // 2, seed), query.device, query.is_cuda)
    # Some heads at a time: each needs a float32 copy and one of its differences.
    heads_at_once = max(1, PIECE_BYTES // (2 * 4 * query[:, 0].numel()))
    unlike = [unlikeness(heads.transpose(0, 1)).amax(0) for heads in query.split(heads_at_once, 1)]
    return torch.cat([drawn, most_unlike(torch.stack(unlike).amax(0, keepdim=True), samples // 2, drawn)[0]])


@dataclass
class RecallCheck:
    """The recall check of one chunk in one layer, and its results."""

    rows: torch.Tensor
    """int64 ``[R]``: rows of the chunk that are audited, on the query's device."""
    floor: float | None = None
    """Mean value recall of these rows below which a head gets more keys."""
    steps: tuple[int, ...] = ()
    """Per head, the initial step of its pattern (``at_step``); empty: 0 for all. Afterwards: the final step."""
    recall: Recall | None = None
    """Afterwards: means over the rows, for the final index."""

    def strengthened(self, patterns: Sequence[HeadPattern]) -> list[HeadPattern]:
        """The patterns at their steps."""
        steps = self.steps or [0] * len(patterns)
        return [pattern.at_step(step) for pattern, step in zip(patterns, steps, strict=True)]

    def run(
        self,
        patterns: Sequence[HeadPattern],
        build: Callable[[Sequence[HeadPattern]], SparseIndex],
        recall_of: Callable[[SparseIndex, torch.Tensor], Recall],
    ) -> SparseIndex:
        """Build the index, with patterns strengthened until every head reaches the floor on the rows or is dense.

        Args:
            build: patterns -> index.
            recall_of: index and rows -> their recall.
        """
        self.steps = self.steps or (0,) * len(patterns)
        while True:
            index = build(self.strengthened(patterns))
            self.recall = recall_of(index, self.rows).mean()
            # Without a floor the values are not needed here, which saves a host synchronisation.
            found = [] if self.floor is None else self.recall.value.tolist()
            short = {head for head, share in enumerate(found) if share < self.floor and self.steps[head] < MAX_STEP}
            if not short:
                return index
            self.steps = tuple(step + (head in short) for head, step in enumerate(self.steps))


def audit_frequency(
    patterns: Sequence[HeadPattern], context_len: int, seq_len: int, audit_rows: int, share: float
) -> float:
    """The share of chunks to audit, 0 to 1, so that audits cost ``share`` of the attention.

    Args:
        patterns: one per query head.
        audit_rows: rows per audit.
    """
    rows, reach = seq_len - context_len, (context_len + seq_len) / 2
    computed = sum(rows * min(reach, family_of(pattern).tokens(pattern)) for pattern in patterns)
    sampled = len(patterns) * min(audit_rows, rows) * seq_len
    return min(1.0, share * computed / (AUDITED_PAIR * sampled))


class RaisedSteps:
    """Steps that the recall floor has raised, kept from one chunk of a request to the next.

    The layer path has no request ids. A chunk's successor is recognised by its start: the position and the physical
    page in which the chunk ended. If another request reuses that page, the worst case is budgets that are larger than
    it needs.
    """

    CAPACITY = 8192

    def __init__(self) -> None:
        self._by_end: OrderedDict[tuple[int, int, int], tuple[int, ...]] = OrderedDict()

    def at(self, layer: int, inputs: Inputs) -> tuple[int, ...]:
        """Steps of a layer's heads for the chunk that begins here; empty: none was raised."""
        if not inputs.chunk.context_len or not self._by_end:
            return ()
        return self._by_end.get(_place(layer, inputs, inputs.chunk.context_len), ())

    def keep(self, layer: int, inputs: Inputs, steps: tuple[int, ...]) -> None:
        """Remember the steps of the chunk that ends here."""
        if not any(steps):
            return
        self._by_end[_place(layer, inputs, inputs.chunk.seq_len)] = steps
        if len(self._by_end) > self.CAPACITY:
            self._by_end.popitem(last=False)


def _place(layer: int, inputs: Inputs, end: int) -> tuple[int, int, int]:
    """Layer, end position in the request, and physical page of the key before it."""
    return layer, inputs.first_key + end, int(inputs.pages[(end - 1) // inputs.cache.block_size])
