"""Patterns and random scores for tests of indices of planned size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PeakThreshold,
    TriShape,
    VerticalSlash,
)
from minference_vllm.selection.capacity import plan_capacity
from minference_vllm.selection.compaction import Capacity
from minference_vllm.selection.score_bins import LOCAL_BIN, ScoreBins
from minference_vllm.selection.torch_scores import TorchScores

PATTERNS: list[HeadPattern] = [
    Dense(),
    AShape(sink=40, local=100),
    AShape(sink=0, local=0),
    AShape(sink=10**6, local=10**6),
    VerticalSlash(vertical=60, slash=150),
    TriShape(sink=40, local=100, last=70),
    VerticalSlash(vertical=60, slash=150),
    VerticalSlash(vertical=300, slash=100),
    VerticalSlash(vertical=0, slash=200),
    VerticalSlash(vertical=10**6, slash=10**6),
    BlockSparse(top_k=3),
    BlockSparse(top_k=1),
    BlockSparse(top_k=10**4),
]
ADAPTIVE: list[HeadPattern] = [
    Coverage(gamma=0.3, min_budget=64),
    Coverage(gamma=0.95, min_budget=64),
    Antidiagonal(stride=16, tau=0.5),
    PeakThreshold(alpha=0.5, sink=16, window=32),
    LowRank(gamma=0.2),
    LowRank(gamma=0.999),
]


class RandomScores:
    """Random scores in place of real ones, the same for a head whichever heads are requested with it."""

    select_bins = TorchScores.select_bins

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def draw(self, kind: int, heads: Sequence[int], *shape: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(100 * kind + head) for head in heads]
        # The eighth power makes some stand out, as patterns with an adaptive budget expect.
        return torch.stack([torch.rand(shape, generator=generator) ** 8 for generator in generators])

    def column_diagonal(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.draw(1, heads, self.seq_len), self.draw(2, heads, self.seq_len)

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        scores = self.draw(3, heads, tiling.num_tiles, tiling.num_key_blocks) * tiling.reachable()
        return scores / scores.sum(-1, keepdim=True)

    peaks = pooled

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return self.pooled(heads, tiling)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
        pages = self.draw(5, heads, tiling.num_tiles, tiling.num_key_blocks)
        by_page, own, reach = (
            each.repeat_interleave(tiling.block_size, -1)[..., : self.seq_len]
            for each in (pages, tiling.own(), tiling.reachable())
        )
        bins = self.draw(6, heads, tiling.num_tiles, self.seq_len).maximum(by_page).mul_(255).to(torch.uint8)
        threshold = torch.full((len(heads),), round(255 * (1 - pattern.gamma)), dtype=torch.int32)
        return ScoreBins(bins.masked_fill_(own, LOCAL_BIN).mul_(reach), threshold)


def planned(tiling: Tiling, patterns: Sequence[HeadPattern], **options: Any) -> Capacity:
    lengths = tiling.context_len, tiling.seq_len, tiling.block_size, tiling.tile, tiling.column_multiple
    return plan_capacity(patterns, *lengths, **options)
