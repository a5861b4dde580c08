"""Tilings, patterns and random scores for tests of ``SparseIndex``, and the indices built from them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from minference_vllm.core.sparse_index import SparseIndex
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
from minference_vllm.selection.build import build_index
from minference_vllm.selection.score_bins import LOCAL_BIN, ScoreBins, hide_before_window
from minference_vllm.selection.torch_scores import TorchScores

TILINGS = {
    # name: (context_len, seq_len, block_size, tile)
    "regular": (0, 512, 32, 64),
    "tile_is_a_page": (0, 512, 64, 64),
    "odd_length": (0, 517, 32, 64),
    "shorter_than_a_page": (0, 7, 32, 64),
    "one_token": (0, 1, 16, 32),
    "one_token_after_context": (300, 301, 16, 32),
    "last_tile_is_one_row": (0, 513, 32, 128),
    "last_tile_lacks_one_row": (0, 511, 32, 128),
    "chunk_at_a_tile_border": (256, 600, 32, 64),
    "chunk_at_a_page_border": (288, 600, 32, 64),
    "chunk_inside_a_page": (301, 600, 32, 64),
    "chunk_within_one_page": (299, 311, 32, 64),
    "chunk_ends_inside_its_first_tile": (130, 190, 32, 128),
    "long_context_short_chunk": (2000, 2100, 32, 128),
}
WINDOWED = {
    # name: the same, and the window
    "window_of_some_tiles": (0, 517, 32, 64, 200),
    "window_of_whole_pages": (256, 600, 32, 64, 128),
    "window_within_a_page": (301, 600, 32, 64, 7),
    "window_of_one": (130, 190, 32, 128, 1),
    "window_shorter_than_a_tile": (2000, 2100, 32, 128, 70),
    "window_longer_than_the_prompt": (301, 600, 32, 64, 10**6),
    "window_that_ends_in_the_chunk": (100, 600, 32, 64, 290),
}
PATTERNS: dict[str, HeadPattern] = {
    "dense": Dense(),
    "a_shape": AShape(sink=40, local=100),
    "a_shape_nothing": AShape(sink=0, local=0),
    "a_shape_local_1": AShape(sink=1, local=1),
    "a_shape_everything": AShape(sink=10**6, local=10**6),
    "tri_shape": TriShape(sink=40, local=100, last=70),
    "tri_shape_last_0": TriShape(sink=40, local=100, last=0),
    "vertical_slash": VerticalSlash(vertical=60, slash=150),
    "vertical_many": VerticalSlash(vertical=300, slash=100),
    "vertical_alone": VerticalSlash(vertical=100, slash=0),
    "slash_alone": VerticalSlash(vertical=0, slash=200),
    "vertical_slash_everything": VerticalSlash(vertical=10**6, slash=10**6),
    "block_sparse": BlockSparse(top_k=3),
    "block_sparse_1": BlockSparse(top_k=1),
    "block_sparse_everything": BlockSparse(top_k=10**4),
    "coverage": Coverage(gamma=0.3, min_budget=0),
    "coverage_nothing": Coverage(gamma=1e-9, min_budget=0),
    "coverage_budget": Coverage(gamma=1e-9, min_budget=170),
    "coverage_half": Coverage(gamma=0.5, min_budget=100),
    "coverage_gamma": Coverage(gamma=0.999_999, min_budget=0),
    "coverage_everything": Coverage(gamma=0.5, min_budget=10**6),
    "antidiagonal": Antidiagonal(stride=16, tau=0.5),
    "antidiagonal_nothing": Antidiagonal(stride=2, tau=1e-9),
    "antidiagonal_most": Antidiagonal(stride=8, tau=0.9),
    "antidiagonal_everything": Antidiagonal(stride=16, tau=1 - 1e-9),
    "peak_threshold": PeakThreshold(alpha=0.7, sink=40, window=100),
    "peak_threshold_alone": PeakThreshold(alpha=0.95, sink=0, window=0),
    "peak_threshold_highest": PeakThreshold(alpha=1 - 1e-9, sink=0, window=1),
    "peak_threshold_everything": PeakThreshold(alpha=1e-9, sink=0, window=0),
    "low_rank": LowRank(gamma=0.2),
    "low_rank_nothing": LowRank(gamma=1e-9),
    "low_rank_half": LowRank(gamma=0.45),
    "low_rank_everything": LowRank(gamma=1 - 1e-9),
}
EVERYTHING = (
    "dense", "a_shape_everything", "vertical_slash_everything", "block_sparse_everything", "coverage_everything",
    "antidiagonal_everything", "peak_threshold_everything", "low_rank_everything",
)  # fmt: skip


@dataclass
class RandomScores:
    """Random scores in place of real ones, which are recorded. Quantised, so that many scores tie."""

    seq_len: int
    seed: int = 0
    columns: dict[int, torch.Tensor] = field(default_factory=dict)
    diagonals: dict[int, torch.Tensor] = field(default_factory=dict)
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    bins: dict[int, torch.Tensor] = field(default_factory=dict)
    select_bins = TorchScores.select_bins

    def draw(self, kind: int, head: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + kind * 100 + head)
        return torch.randint(0, 40, shape, generator=generator) / 40

    def column_diagonal(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        for head in heads:
            self.columns[head] = self.draw(1, head, self.seq_len)
            self.diagonals[head] = self.draw(2, head, self.seq_len)
        return (
            torch.stack([self.columns[head] for head in heads]),
            torch.stack([self.diagonals[head] for head in heads]),
        )

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        for head in heads:
            scores = self.draw(3, head, tiling.num_tiles, tiling.num_key_blocks)
            self.blocks[head] = scores.masked_fill(~tiling.reachable(), 0)
        return torch.stack([self.blocks[head] for head in heads])

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        """Positive in reach; the scores of each tile sum to 1."""
        for head in heads:
            scores = (self.draw(4, head, tiling.num_tiles, tiling.num_key_blocks) + 1 / 40) * tiling.reachable()
            self.blocks[head] = scores / scores.sum(-1, keepdim=True)
        return torch.stack([self.blocks[head] for head in heads])

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return self.peaks(heads, tiling)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
        """Bins from 0 to 40; the more attention the pattern asks for, the lower the threshold."""
        for head in heads:
            self.bins[head] = (self.draw(5, head, tiling.num_tiles, self.seq_len) * 40).to(torch.uint8)
            by_key = (
                mask.repeat_interleave(tiling.block_size, 1)[:, : self.seq_len]
                for mask in (tiling.own(), ~tiling.reachable())
            )
            own, later = by_key
            self.bins[head][own], self.bins[head][later] = LOCAL_BIN, 0
            hide_before_window(self.bins[head][None], tiling)
        thresholds = torch.full((len(heads),), int(41 * (1 - pattern.gamma)), dtype=torch.int32)
        return ScoreBins(torch.stack([self.bins[head] for head in heads]), thresholds)


@dataclass(frozen=True)
class OneHead:
    """The scores of one head, for an index of one head."""

    scores: RandomScores
    head: int
    select_bins = TorchScores.select_bins

    def column_diagonal(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scores.column_diagonal([self.head])

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return self.scores.pooled([self.head], tiling)

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return self.scores.peaks([self.head], tiling)

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return self.scores.antidiagonal([self.head], tiling, stride)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
        return self.scores.low_rank([self.head], tiling, pattern)


@dataclass(frozen=True)
class Built:
    """One index whose heads run all of PATTERNS, and the scores that it was built from."""

    tiling: Tiling
    index: SparseIndex
    scores: RandomScores
    mask: torch.Tensor

    def heads(self, *kinds: type) -> Iterator[tuple[int, HeadPattern]]:
        """Head and pattern, of the named kinds of pattern (all when none is named)."""
        for head, pattern in enumerate(PATTERNS.values()):
            if not kinds or isinstance(pattern, kinds):
                yield head, pattern

    def rows_of_tiles(self) -> list[range]:
        starts = self.index.tiling.starts.tolist()
        return [range(a, b) for a, b in itertools.pairwise(starts)]

    def rows_and_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Absolute positions of rows and keys, shaped to broadcast to a mask."""
        return torch.arange(self.tiling.context_len, self.tiling.seq_len)[:, None], torch.arange(self.tiling.seq_len)


@functools.cache
def build(tiling_name: str, whole_pages: bool) -> Built:
    context_len, seq_len, block_size, tile, *window = {**TILINGS, **WINDOWED}[tiling_name]
    tiling = Tiling.of(context_len, seq_len, block_size, tile, block_size if whole_pages else 1, "cpu", *window)
    scores = RandomScores(seq_len)
    index = build_index(tiling, list(PATTERNS.values()), scores)
    return Built(tiling, index, scores, index.to_mask())
