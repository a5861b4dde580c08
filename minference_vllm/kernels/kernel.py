"""``Kernel``: one implementation of attention under a ``SparseIndex``, and its capabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import Remainder
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection.torch_scores import TorchScores


class Run(Protocol):
    """Attention of one chunk under an index."""

    def __call__(self, inputs: Inputs, index: SparseIndex, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """Write ``out`` (``[chunk, H, D]``) and, if it is given and the kernel ``gives_lse``, the log-sum-exp of each
        row's scores to ``lse`` (float32 ``[H, chunk]``, contiguous)."""


class RunWithRemainder(Protocol):
    """``Run`` with the remainder as one more key for every query tile."""

    def __call__(
        self, inputs: Inputs, index: SparseIndex, out: torch.Tensor, lse: torch.Tensor | None, remainder: Remainder
    ) -> None: ...


@dataclass(frozen=True)
class Kernel:
    """Chosen once for a layer, see ``choose``."""

    name: str
    """Its name in the setting ``kernel``."""
    run: Run
    scores: Callable[[Inputs], TorchScores]
    """Creates the scores of one chunk, with the fastest code for the kernel's device."""
    planned: bool = False
    """Whether list widths are planned from lengths, without a host synchronisation. Heads of a group may then share
    lists."""
    whole_pages: bool = False
    """Whether single columns must fill whole pages."""
    lists_everything: bool = False
    """Whether tiles that attend everything need a list, too."""
    gives_lse: bool = True
    """Whether ``run`` returns the log-sum-exp of rows, which is needed to merge the remainder afterwards."""
    run_with_remainder: RunWithRemainder | None = None
    """``run`` that also attends the remainder; None: it is merged afterwards."""
    remainder: Callable[[Inputs, SparseIndex, Sequence[int]], Remainder] | None = None
    """The fastest ``prefill.remainder.of_heads`` for the kernel's device; None: that function itself."""
    samples: bool = False
    """Whether it supports columns that count more than once."""
    softcap: bool = False
    """Whether it supports soft caps."""
    sinks: bool = False
    """Whether it supports attention sinks."""
    window: bool = False
    """Whether it supports sliding windows."""
    fp8: bool = False
    """Whether it supports FP8 caches with one scale per tensor."""

    def served(self, patterns: Sequence[HeadPattern]) -> Sequence[HeadPattern]:
        """The patterns, without sampling if the kernel does not support it."""
        return patterns if self.samples else [pattern.without_sampling() for pattern in patterns]
