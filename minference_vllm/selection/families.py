"""All kinds of patterns. A new kind is a model in ``patterns/kinds.py``, a file here, and its line below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection import (
    antidiagonal,
    block_sparse,
    coverage,
    low_rank,
    peak_threshold,
    static,
    vertical_slash,
)
from minference_vllm.selection.family import Family

FAMILIES: dict[str, Family[Any]] = {
    family.kind: family
    for family in (
        *static.FAMILIES,
        vertical_slash.FAMILY,
        block_sparse.FAMILY,
        coverage.FAMILY,
        antidiagonal.FAMILY,
        peak_threshold.FAMILY,
        low_rank.FAMILY,
    )
}


def family_of(pattern: HeadPattern) -> Family[Any]:
    """What is to be said of a pattern's kind."""
    return FAMILIES[pattern.kind]


def share_lists(patterns: Sequence[HeadPattern], group: int) -> bool:
    """Whether the ``group`` query heads of every KV head are known to select the same keys, whatever the scores say."""
    if any(family_of(pattern).reads_scores for pattern in patterns):
        return False
    return all(pattern == patterns[head - head % group] for head, pattern in enumerate(patterns))
