"""Seconds spent on each stage of sparse attention."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import LowRank
from minference_vllm.selection.score_bins import ScoreBins
from minference_vllm.selection.scores import Scores


@dataclass
class Timing:
    """Seconds per stage, summed over chunks. The time of a nested stage does not count towards the outer one."""

    estimate: float = 0.0
    index: float = 0.0
    audit: float = 0.0
    attend: float = 0.0
    device: torch.device | None = None
    """GPU to synchronise with before reading the clock; None: measure the host's time only."""
    _nested: list[float] = field(default_factory=list)
    """For every open stage, the seconds of the stages nested in it."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to the field ``name``."""
        begin = self._now()
        self._nested.append(0.0)
        try:
            yield
        finally:
            seconds = self._now() - begin
            setattr(self, name, getattr(self, name) + seconds - self._nested.pop())
            if self._nested:
                self._nested[-1] += seconds

    def _now(self) -> float:
        if self.device is not None:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class TimedScores:
    """``Scores`` whose estimates are timed."""

    def __init__(self, scores: Scores, timing: Timing) -> None:
        self._scores, self._timing = scores, timing
        self.select_bins = scores.select_bins

    def column_diagonal(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with self._timing.stage("estimate"):
            return self._scores.column_diagonal(heads)

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        with self._timing.stage("estimate"):
            return self._scores.pooled(heads, tiling)

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        with self._timing.stage("estimate"):
            return self._scores.peaks(heads, tiling)

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        with self._timing.stage("estimate"):
            return self._scores.antidiagonal(heads, tiling, stride)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
        with self._timing.stage("estimate"):
            return self._scores.low_rank(heads, tiling, pattern)
