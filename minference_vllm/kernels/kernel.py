"""``Kernel``: one way to run attention under a ``SparseIndex``, with everything the layer path must know of it."""

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
        """Write ``out`` (``[chunk, H, D]``) and, where it is given and the kernel ``gives_lse``, the log-sum-exp of
        each row's scores to ``lse`` (float32 ``[H, chunk]``, contiguous)."""


class RunWithRemainder(Protocol):
    """The same, with one more key for every query tile."""

    def __call__(
        self, inputs: Inputs, index: SparseIndex, out: torch.Tensor, lse: torch.Tensor | None, remainder: Remainder
    ) -> None: ...


@dataclass(frozen=True)
class Kernel:
    """Chosen once for a layer, see ``choose``."""

    name: str
    """As the setting ``kernel`` names it."""
    run: Run
    scores: Callable[[Inputs], TorchScores]
    """The scores of one chunk, from the fastest code that runs where the kernel does."""
    planned: bool = False
    """Sizes of an index are planned from lengths, so that nothing waits for a GPU; heads of a group may share lists."""
    whole_pages: bool = False
    """Single columns must fill pages."""
    lists_everything: bool = False
    """Also tiles that attend everything need a list."""
    gives_lse: bool = True
    """Whether ``run`` gives the log-sum-exp of rows, which the remainder needs where it is merged."""
    run_with_remainder: RunWithRemainder | None = None
    """Attends the remainder, too; None: it is merged afterwards."""
    remainder: Callable[[Inputs, SparseIndex, Sequence[int]], Remainder] | None = None
    """``prefill.remainder.of_heads`` by the fastest code that runs where the kernel does; None: by that itself."""
    samples: bool = False
    """Whether it knows columns that count more than once."""
    softcap: bool = False
    """Whether it knows soft caps."""
    sinks: bool = False
    """Whether it knows attention sinks."""
    window: bool = False
    """Whether it knows sliding windows."""
    fp8: bool = False
    """Whether it knows FP8 caches with one scale per tensor."""

    def served(self, patterns: Sequence[HeadPattern]) -> Sequence[HeadPattern]:
        """The patterns as it can serve them: without sampling where it does not know that."""
        return patterns if self.samples else [pattern.without_sampling() for pattern in patterns]
