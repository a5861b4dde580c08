"""``Scores``: the estimates that patterns select by. Three classes compute them: ``TorchScores``, the definition,
``kernels.native.scores.NativeScores`` on CPUs and ``triton_kernels.scores.TritonScores`` on GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import LowRank
from minference_vllm.selection.compaction import Capacity, Selection, WritesLists
from minference_vllm.selection.score_bins import ScoreBins


class Scores(Protocol):
    """Scores of one chunk, each computed only when a head's pattern asks for it.

    Sizes: ``h`` query heads asked for, ``T`` query tiles, ``N`` key blocks, ``S`` tokens in the sequence.
    """

    def column_diagonal(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention mass of the probe queries on columns, minus what diagonals explain, and on diagonals: float32
        ``[h, S]`` each."""

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        """Block scores of mean queries and mean keys, float32 ``[h, T, N]``."""

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        """Block scores of single queries and mean keys, float32 ``[h, T, N]``."""

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        """Block scores along antidiagonals, float32 ``[h, T, N]``."""

    def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
        """Score bins of single keys from products in ``pattern.rank`` dimensions, and a threshold per head."""

    def select_bins(self, tiling: Tiling, found: ScoreBins, capacity: Capacity) -> Selection | WritesLists:
        """The keys of each tile at or above the threshold, as single keys and as whole pages."""
