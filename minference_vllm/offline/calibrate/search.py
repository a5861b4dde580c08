"""What every candidate pattern costs and loses on a chunk of a layer, and which one a head should keep.

Sizes: ``C`` candidates, ``H`` query heads over ``HK`` KV heads, ``R`` sampled rows, ``S`` tokens in the sequence, ``D``
head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose as choose_kernel
from minference_vllm.patterns.kinds import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PeakThreshold,
    VerticalSlash,
)
from minference_vllm.prefill.attend import tiling_for
from minference_vllm.prefill.recall import sample_rows
from minference_vllm.selection.build import build_index
from minference_vllm.selection.families import family_of
from minference_vllm.selection.probe_queries import logits
from minference_vllm.selection.score_bins import ScoreBins
from minference_vllm.selection.scores import Scores

MAX_SAMPLES = 32
MAX_WEIGHTS = 1 << 26
"""Attention weights held at once, ``H * R * S``: fewer rows are sampled where there would be more (256 MiB)."""

Family = tuple[HeadPattern, ...]
"""Patterns of one kind and proportion, the cheapest first."""


def _ladder(pattern: HeadPattern, *fields: str) -> Family:
    """The pattern with the named budgets at a quarter, a half, once, twice and four times their value."""
    steps = (0.25, 0.5, 1, 2, 4)
    return tuple(
        pattern.model_copy(update={field: max(1, round(getattr(pattern, field) * step)) for field in fields})
        for step in steps
    )


FAMILIES: tuple[Family, ...] = (
    _ladder(AShape(sink=1024, local=4096), "sink", "local"),
    # The paper's candidates (arXiv 2407.02490, Table 6), and what the released files give a head without an entry.
    _ladder(VerticalSlash(vertical=30, slash=2048), "vertical", "slash"),
    _ladder(VerticalSlash(vertical=100, slash=1800), "vertical", "slash"),
    _ladder(VerticalSlash(vertical=500, slash=1500), "vertical", "slash"),
    _ladder(VerticalSlash(vertical=3000, slash=200), "vertical", "slash"),
    _ladder(VerticalSlash(vertical=1000, slash=6096), "vertical", "slash"),
    _ladder(BlockSparse(top_k=100), "top_k"),
    tuple(
        Coverage(gamma=gamma, min_budget=budget)
        for gamma, budget in ((0.9, 512), (0.95, 1024), (0.95, 2048), (0.95, 3072), (0.98, 6144), (0.99, 12288))
    ),
    tuple(Antidiagonal(tau=tau) for tau in (0.8, 0.9, 0.95, 0.98)),
    tuple(PeakThreshold(alpha=alpha) for alpha in (0.3, 0.1, 0.03, 0.01)),
    tuple(LowRank(gamma=gamma) for gamma in (0.9, 0.95, 0.97, 0.99, 0.995)),
)
CANDIDATES: tuple[HeadPattern, ...] = tuple(pattern for family in FAMILIES for pattern in family)


@dataclass
class Measured:
    """Sums over chunks and rows, float64 ``[C, H]`` each; divide to get means."""

    computed_pairs: torch.Tensor
    dense_pairs: torch.Tensor
    recall: torch.Tensor
    rows: torch.Tensor
    squared_error: torch.Tensor
    """Of the attention output against dense attention, summed over rows and ``D``."""
    squared_output: torch.Tensor

    @classmethod
    def nothing(cls, candidates: int, heads: int) -> Measured:
        return cls(*(torch.zeros(candidates, heads, dtype=torch.float64) for _ in range(6)))

    def add(self, other: Measured) -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine += theirs

    def to_json(self) -> dict[str, Any]:
        return {name: sums.tolist() for name, sums in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Measured:
        return cls(**{name: torch.tensor(sums, dtype=torch.float64) for name, sums in content.items()})


class _Remembered:
    """``Scores`` that many candidates ask for, each computed once for all heads."""

    def __init__(self, scores: Scores, heads: int) -> None:
        self._scores = scores
        self.select_bins = scores.select_bins
        self.scored = torch.zeros(heads, dtype=torch.bool)
        """Whether the last ``low_rank`` of each head has scored its keys."""
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

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> ScoreBins:
        found = self._scores.low_rank(heads, tiling, rank, gamma)
        self.scored[list(heads)] = found.scored
        return found


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
    cache, chosen = inputs.cache, choose_kernel(kernel, inputs.query.dtype, inputs.cache)
    tiling = tiling_for(inputs, chosen, tile)
    exact = chosen.scores(inputs)
    scores = _Remembered(exact, heads)
    samples = max(1, min(MAX_SAMPLES, MAX_WEIGHTS // (heads * chunk.seq_len)))
    rows = sample_rows(chunk.query_len, samples, seed).to(device)
    positions = rows + chunk.context_len
    tiles = torch.searchsorted(tiling.starts, positions, right=True) - 1
    future = torch.arange(chunk.seq_len, device=device) > positions[:, None]
    values = cache.values_by_head(inputs.pages)[:, : chunk.seq_len].float()
    # Heads that share keys stand in one matrix: [HK, H / HK * R, ...].
    by_kv_head = inputs.query[rows].transpose(0, 1).reshape(cache.num_kv_heads, -1, cache.head_size)
    weights = logits(by_kv_head, exact.keys, inputs.scale).view(heads, len(rows), -1)
    weights = weights.masked_fill_(future, -torch.inf).softmax(-1)

    def output(weights: torch.Tensor) -> torch.Tensor:
        return (weights.view(cache.num_kv_heads, -1, chunk.seq_len) @ values).view(heads, len(rows), -1)

    dense = output(weights)
    result = Measured.nothing(len(candidates), heads)
    result.rows += len(rows)
    result.squared_output += dense.double().square().sum((1, 2)).cpu()
    for number, pattern in enumerate(candidates):
        index = build_index(tiling, [pattern] * heads, scores)
        kept = weights * index.tile_mask(tiles)
        recall = kept.sum(-1, keepdim=True)
        error = output(kept) / recall - dense
        result.computed_pairs[number] += index.computed_pairs().cpu()
        cost = family_of(pattern).scoring_cost(pattern, cache.head_size, chunk.query_len, device)
        if cost:
            result.computed_pairs[number] += index.dense_pairs() * cost * scores.scored
        result.dense_pairs[number] += index.dense_pairs()
        result.recall[number] += recall.double().sum((1, 2)).cpu()
        result.squared_error[number] += error.double().square().sum((1, 2)).cpu()
    return result


@dataclass(frozen=True)
class Choice:
    """The pattern that one head keeps, and what it was measured to do."""

    pattern: HeadPattern
    density: float
    recall: float
    output_error: float


def choose(measured: Measured, head: int, families: Sequence[Family], budget: float, target: float) -> Choice:
    """The pattern of one head: the best family at equal cost, at the smallest budget that reaches the target recall.

    From every family the most expensive member within the budget competes (its cheapest, where even that exceeds it),
    and the smallest output error wins (MInference, arXiv 2407.02490, Algorithm 1). In the winning family the cheapest
    member with the target recall is taken, more budget or less (Qwen2.5-1M, arXiv 2501.15383, Algorithm 1); where none
    reaches it, the head is dense.

    Args:
        measured: of all members of all families, in order.
        budget: share of the query-key pairs at which families are compared.
        target: mean recall of the sampled rows.
    """
    density = (measured.computed_pairs / measured.dense_pairs)[:, head].tolist()
    recall = (measured.recall / measured.rows)[:, head].tolist()
    error = (measured.squared_error / measured.squared_output).sqrt()[:, head].tolist()
    members, first = [], 0
    for family in families:
        members.append(range(first, first + len(family)))
        first += len(family)

    def at_budget(family: range) -> int:
        within = [number for number in family if density[number] <= budget]
        return max(within, key=density.__getitem__) if within else min(family, key=density.__getitem__)

    winner = min(members, key=lambda family: error[at_budget(family)])
    good = [number for number in winner if recall[number] >= target]
    if not good:
        return Choice(Dense(), 1.0, 1.0, 0.0)
    best = min(good, key=density.__getitem__)
    patterns = [pattern for family in families for pattern in family]
    return Choice(patterns[best], density[best], recall[best], error[best])
