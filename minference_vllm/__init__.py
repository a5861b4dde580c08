"""Sparse prefill for long prompts, as a vLLM attention backend.

``vllm serve MODEL --attention-backend minference`` needs nothing from here; the names below serve people who call the
parts themselves.
"""

from typing import TYPE_CHECKING

from minference_vllm.patterns.discovery import default_pattern
from minference_vllm.patterns.file import PatternFile, load_pattern_file
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
from minference_vllm.settings import Settings

if TYPE_CHECKING:
    from minference_vllm.core.sparse_index import SparseIndex as SparseIndex
    from minference_vllm.prefill.api import sparse_prefill as sparse_prefill

__version__ = "0.1.0"

__all__ = [
    "AShape",
    "Antidiagonal",
    "BlockSparse",
    "Coverage",
    "Dense",
    "HeadPattern",
    "LowRank",
    "PatternFile",
    "PeakThreshold",
    "Settings",
    "SparseIndex",
    "TriShape",
    "VerticalSlash",
    "__version__",
    "default_pattern",
    "load_pattern_file",
    "sparse_prefill",
]


def __getattr__(name: str) -> object:
    # torch loads only when something that computes is asked for: vLLM imports this package in every process to look
    # for plugins, whether or not the backend was selected.
    if name == "sparse_prefill":
        from minference_vllm.prefill.api import sparse_prefill

        return sparse_prefill
    if name == "SparseIndex":
        from minference_vllm.core.sparse_index import SparseIndex

        return SparseIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
