"""Float64 definitions of every estimate and of attention under an index's mask; for tests and benchmarks only."""

from minference_vllm.reference.attention import (
    attention_recall,
    capped,
    causal_mask,
    gather_sequence,
    logits,
    masked_attention,
    repeat_heads,
    with_remainder,
)
from minference_vllm.reference.scores import (
    antidiagonal_scores,
    beyond_diagonals,
    column_diagonal_scores,
    distance_scores,
    low_rank_bins,
    mass_per_token,
    page_means,
    peak_scores,
    pooled_scores,
)
from minference_vllm.reference.selection import (
    covering_blocks,
    peak_blocks,
)

__all__ = [
    "antidiagonal_scores",
    "attention_recall",
    "beyond_diagonals",
    "capped",
    "causal_mask",
    "column_diagonal_scores",
    "covering_blocks",
    "distance_scores",
    "gather_sequence",
    "logits",
    "low_rank_bins",
    "masked_attention",
    "mass_per_token",
    "page_means",
    "peak_blocks",
    "peak_scores",
    "pooled_scores",
    "repeat_heads",
    "with_remainder",
]
