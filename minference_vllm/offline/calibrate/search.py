"""Cost and output error of every candidate pattern on a chunk of a layer, and the choice of one per head.

Sizes: ``C`` candidates, ``H`` query heads over ``HK`` KV heads, ``R`` sampled rows, ``S`` tokens in the sequence, ``D``
head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose_for
from minference_vllm.patterns.discovery import default_pattern
from minference_vllm.patterns.kinds import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    HeadPattern,
    LowRank,
    PeakThreshold,
    VerticalSlash,
)
from minference_vllm.prefill import remainder
from minference_vllm.prefill.attend import tiling_for
from minference_vllm.prefill.recall import sample_rows
from minference_vllm.selection.build import build_index
from minference_vllm.selection.families import family_of
from minference_vllm.selection.probe_queries import logits, unseen
from minference_vllm.selection.score_bins import ScoreBins
from minference_vllm.selection.scores import Scores

MAX_SAMPLES = 32
MAX_WEIGHTS = 1 << 26
"""Maximum attention weights held at once, ``H * R * S`` (256 MiB); fewer rows are sampled to stay below it."""


def _ladder(pattern: HeadPattern, *budgets: str) -> tuple[HeadPattern, ...]:
    """The pattern with the named budgets multiplied by 0.25, 0.5, 1, 2 and 4."""
    steps = (0.25, 0.5, 1, 2, 4)
    return tuple(
        pattern.model_copy(update={field: max(1, round(getattr(pattern, field) * step)) for field in budgets})
        for step in steps
    )


DEFAULT = default_pattern()
"""The pattern of every head without a file. A head keeps it if nothing cheaper is as good."""
CANDIDATES: tuple[HeadPattern, ...] = (
    DEFAULT,
    *_ladder(AShape(sink=1024, local=4096, remainder=True), "sink", "local"),
    # The paper's candidates (arXiv 2407.02490, Table 6), and what the released files give a head without an entry.
    *_ladder(VerticalSlash(vertical=30, slash=2048, remainder=True), "vertical", "slash"),
    *_ladder(VerticalSlash(vertical=100, slash=1800, remainder=True), "vertical", "slash"),
    *_ladder(VerticalSlash(vertical=500, slash=1500, remainder=True), "vertical", "slash"),
    *_ladder(VerticalSlash(vertical=3000, slash=200, remainder=True), "vertical", "slash"),
    *_ladder(VerticalSlash(vertical=1000, slash=6096, remainder=True), "vertical", "slash"),
    *_ladder(BlockSparse(top_k=100, remainder=True), "top_k"),
    *(
        Coverage(gamma=gamma, min_budget=budget, remainder=True)
        for gamma, budget in ((0.9, 512), (0.95, 1024), (0.95, 2048), (0.95, 3072), (0.98, 6144), (0.99, 12288))
    ),
    *(Antidiagonal(tau=tau, remainder=True) for tau in (0.8, 0.9, 0.95, 0.98)),
    *(PeakThreshold(alpha=alpha, remainder=True) for alpha in (0.3, 0.1, 0.03, 0.01)),
    *(
        LowRank(rank=rank, gamma=gamma, remainder=True)
        for rank, gamma in ((16, 0.9), (16, 0.95), (32, 0.85), (32, 0.95), (64, 0.9))
    ),
)


@dataclass
class Measured:
    """Measurements of one chunk in one layer, or of several; float64 ``[C, H]`` each."""

    computed: torch.Tensor
    """Computed query-key pairs."""
    cost: torch.Tensor
    """Computed pairs plus the cost of scoring keys, in pairs."""
    pairs: torch.Tensor
    """Query-key pairs of dense attention."""
    recall: torch.Tensor
    """Share of the dense weights that lies on the selected keys, mean over the sampled rows."""
    value_recall: torch.Tensor
    """The same with every weight multiplied by the norm of its key's value."""
    squared_error: torch.Tensor
    """Squared error of the attention output, summed over the sampled rows and ``D``, relative to the dense output's
    squares."""

    @classmethod
    def nothing(cls, candidates: int, heads: int) -> Measured:
        return cls(*(torch.zeros(candidates, heads, dtype=torch.float64) for _ in fields(cls)))

    @classmethod
    def together(cls, chunks: Sequence[Measured]) -> Measured:
        """Of several chunks: pairs and costs summed, shares and errors averaged."""
        total = cls(*(torch.stack(parts).mean(0) for parts in _side_by_side(chunks)))
        total.computed *= len(chunks)
        total.cost *= len(chunks)
        total.pairs *= len(chunks)
        return total

    @classmethod
    def joined(cls, layers: Sequence[Measured]) -> Measured:
        """The heads of several layers, concatenated."""
        return cls(*(torch.cat(parts, 1) for parts in _side_by_side(layers)))

    def of(self, numbers: torch.Tensor) -> Measured:
        """One candidate per head, ``[1, H]`` each; ``numbers``: int64 ``[H]``."""
        return Measured(*(values.gather(0, numbers[None]) for values in vars(self).values()))

    @property
    def density(self) -> float:
        """Overall computed pairs as a share of the dense ones, as a server logs it."""
        return float(self.computed.sum() / self.pairs.sum())

    @property
    def cost_share(self) -> float:
        """The same with the cost of scoring included, by which patterns are chosen."""
        return float(self.cost.sum() / self.pairs.sum())

    @property
    def output_error(self) -> float:
        """Root mean square over all heads of the error relative to the dense output."""
        return float(self.squared_error.mean().sqrt())

    def to_json(self) -> dict[str, Any]:
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Measured:
        return cls(**{name: torch.tensor(values, dtype=torch.float64) for name, values in content.items()})


def _side_by_side(parts: Sequence[Measured]) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(vars(part).values() for part in parts), strict=True)


class _Remembered:
    """A cache of ``Scores`` that many candidates need, each computed once for all heads."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores
        self.select_bins = scores.select_bins
        self._known: dict[tuple[object, ...], Any] = {}

    def _remember(self, name: str, heads: Sequence[int], *arguments: Any) -> Any:
        key = (name, *(argument for argument in arguments if not isinstance(argument, Tiling)))
        if key not in self._known:
            self._known[key] = getattr(self._scores, name)(heads, *arguments)
        return self._known[key]

    def column_diagonal(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        columns, diagonals = self._remember("column_diagonal", heads)
        return columns, diagonals

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return self._remember("pooled", heads, tiling)

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return self._remember("peaks", heads, tiling)

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return self._remember("antidiagonal", heads, tiling, stride)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
        return self._scores.low_rank(heads, tiling, pattern)


def measure(
    inputs: Inputs, candidates: Sequence[HeadPattern], kernel: str = "auto", tile: int | None = None, seed: int = 0
) -> Measured:
    """Cost, recall and output error of every candidate on one chunk, against exact attention on sampled rows.

    Args:
        candidates: one pattern at a time runs on all heads.
        kernel, tile: see ``Settings``; costs are those of this kernel.
        seed: decides which rows are sampled.
    """
    heads, chunk, device = inputs.num_heads, inputs.chunk, inputs.query.device
    own = bool(inputs.softcap or inputs.window) or inputs.sinks is not None
    cache = inputs.cache
    chosen, candidates, _ = choose_for(candidates, kernel, inputs.query.dtype, cache, own)
    tiling = tiling_for(inputs, chosen, tile)
    exact = chosen.scores(inputs)
    scores = _Remembered(exact)
    samples = max(1, min(MAX_SAMPLES, MAX_WEIGHTS // (heads * chunk.seq_len)))
    rows = sample_rows(chunk.query_len, samples, seed).to(device)
    positions = rows + chunk.context_len
    tiles = torch.searchsorted(tiling.starts, positions, right=True) - 1
    hidden = unseen(positions, chunk.seq_len, inputs.window)
    values = cache.values_by_head(inputs.pages)[:, : chunk.seq_len].float()
    norms = exact.kv_value_norms.unsqueeze(-1)  # [HK, S, 1]
    # Heads that share keys are in one matrix: [HK, H / HK * R, ...].
    by_kv_head = inputs.query[rows].transpose(0, 1).reshape(cache.num_kv_heads, -1, cache.head_size)
    weights = logits(by_kv_head, exact.keys, inputs.scale, inputs.softcap).view(heads, len(rows), -1)
    weights.masked_fill_(hidden, -torch.inf)
    lse = weights.logsumexp(-1)
    weights = weights.softmax(-1)

    def times(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (weights.view(cache.num_kv_heads, -1, chunk.seq_len) @ values).view(heads, len(rows), -1)

    dense, by_norm = times(weights, values), times(weights, norms)
    result = Measured.nothing(len(candidates), heads)
    for number, pattern in enumerate(candidates):
        index = build_index(tiling, [pattern] * heads, scores)
        kept = weights * index.tile_counts(tiles)
        recall = kept.sum(-1, keepdim=True)
        found = times(kept, values) / recall
        if pattern.has_remainder:
            remainder.add_to_rows(inputs, index, rows, found, lse + recall.squeeze(-1).log())
        error = found - dense
        pairs = index.dense_pairs()
        scoring = family_of(pattern).scoring_cost(pattern, cache.head_size, chunk.query_len, device)
        result.computed[number] = index.computed_pairs().cpu()
        result.cost[number] = result.computed[number] + pairs * scoring
        result.pairs[number] = pairs
        result.recall[number] = recall.clamp(max=1.0).double().mean((1, 2)).cpu()
        by_value = _share(times(kept, norms), by_norm, of_nothing=1.0).clamp(max=1.0)
        result.value_recall[number] = by_value.double().mean((1, 2)).cpu()
        lost, whole = (part.double().square().sum((1, 2)) for part in (error, dense))
        result.squared_error[number] = _share(lost, whole, of_nothing=0.0).cpu()
    return result


def _share(part: torch.Tensor, whole: torch.Tensor, of_nothing: float) -> torch.Tensor:
    """``part / whole``, or ``of_nothing`` for a head whose values are all zero."""
    return torch.where(whole == 0, of_nothing, part / whole)


def choose(chunks: Sequence[Measured]) -> torch.Tensor:
    """For every head, the cheapest candidate with no more error than the default on every chunk.

    The default is candidate 0, so there always is one. The error is that of the attention output: recall says little
    if most of the weight lies on a key whose value is close to zero.

    Returns:
        int64 ``[H]``, indices of candidates.
    """
    errors = torch.stack([chunk.squared_error for chunk in chunks])  # [chunks, C, H]
    as_good = (errors <= errors[:, :1]).all(0)
    return Measured.together(chunks).cost.masked_fill(~as_good, torch.inf).argmin(0)
