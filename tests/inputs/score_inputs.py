"""``TorchScores`` of queries and keys given as rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.selection.torch_scores import TorchScores


def scores_of(
    query: torch.Tensor,
    keys: torch.Tensor,
    scale: float = 1.0,
    block_size: int = 32,
    kind: type[TorchScores] = TorchScores,
    **features: Any,
) -> TorchScores:
    """Scores of queries ``[chunk, H, D]``, the last of a sequence with keys ``[HK, S, D]``; values are not read.

    Args:
        kind: the class, or a subclass that stands in for a part of it.
        features: further fields of ``Inputs``.
    """
    return kind(replace(Inputs.of_rows(query, keys, keys, scale, block_size), **features))
