"""``sparse_prefill``'s output against float64 attention under the mask of the index that it used.

Budget: an engine may be twice as far from float64 as plain eager attention in the inputs' type is, plus one rounding of
the largest output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minference_vllm import reference
from minference_vllm.index import SparseIndex
from minference_vllm.patterns import (
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

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
FULL: dict[str, HeadPattern] = {
    "dense": Dense(),
    "a_shape": AShape(sink=0, local=100_000),
    "tri_shape": TriShape(sink=0, local=0, last=100_000),
    "vertical": VerticalSlash(vertical=100_000, slash=100),
    "slash": VerticalSlash(vertical=30, slash=100_000),
    "block_sparse": BlockSparse(top_k=10_000),
    "coverage": Coverage(gamma=0.01, min_budget=100_000),
    "antidiagonal": Antidiagonal(tau=0.999_999),
    "peak_threshold": PeakThreshold(alpha=1e-9),
    "low_rank": LowRank(gamma=1 - 1e-9),
}
CASES: dict[str, dict[str, Any]] = {
    # Regular
    "whole_prompt": {"query_lens": [512], "context_lens": [0]},
    "second_chunk": {"query_lens": [256], "context_lens": [512]},
    # Lengths
    "one_token": {"query_lens": [1], "context_lens": [0]},
    "one_token_after_context": {"query_lens": [1], "context_lens": [300]},
    "odd_length": {"query_lens": [517], "context_lens": [0]},
    "page_borders": {"query_lens": [31, 32, 33, 63, 64, 65], "context_lens": [0] * 6},
    "tile_borders": {"query_lens": [127, 128, 129, 255, 256, 257], "context_lens": [0] * 6},
    "around_64_queries": {"query_lens": [63, 64, 65], "context_lens": [200, 200, 200]},
    # Context before the chunk
    "context_ends_at_a_page_border": {"query_lens": [200], "context_lens": [160]},
    "context_ends_at_a_tile_border": {"query_lens": [200], "context_lens": [256]},
    "context_ends_inside_a_page": {"query_lens": [201], "context_lens": [333]},
    "context_around_borders": {"query_lens": [100] * 4, "context_lens": [127, 129, 159, 161]},
    "chunk_within_one_page": {"query_lens": [9], "context_lens": [291]},
    "long_context_short_chunk": {"query_lens": [70], "context_lens": [1500]},
    # Several requests
    "several_requests": {"query_lens": [300, 1, 129, 45], "context_lens": [0, 77, 256, 13]},
    # Heads
    "gqa_1": {"heads": 4, "kv_heads": 4, "query_lens": [200], "context_lens": [150]},
    "gqa_4": {"heads": 8, "kv_heads": 2, "query_lens": [200], "context_lens": [150]},
    "gqa_7": {"heads": 14, "kv_heads": 2, "query_lens": [200], "context_lens": [150]},
    "gqa_8": {"heads": 8, "kv_heads": 1, "query_lens": [200], "context_lens": [150]},
    "one_head": {"heads": 1, "kv_heads": 1, "query_lens": [200], "context_lens": [150]},
    **{f"head_size_{size}": {"head_size": size, "context_lens": [100]} for size in (64, 80, 96, 128, 256)},
    # Pages and tiles
    **{f"pages_of_{size}": {"block_size": size, "context_lens": [211]} for size in (16, 32, 64, 128)},
    "tile_is_a_page": {"block_size": 64, "tile": 64, "context_lens": [211]},
    "large_tile": {"block_size": 32, "tile": 256, "context_lens": [211], "query_lens": [700]},
    "tile_is_rounded_up": {"block_size": 64, "tile": 100, "context_lens": [211]},
    "prompt_within_one_page": {"block_size": 128, "query_lens": [90]},
    # Types
    **{
        f"{str(dtype).removeprefix('torch.')}_head_size_{size}": {
            "dtype": dtype,
            "head_size": size,
            "query_lens": [200, 77],
            "context_lens": [0, 300],
        }
        for dtype in (BFLOAT16, FLOAT16, FLOAT32)
        for size in (64, 80)
    },
}


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` with sums in float32, rounded once to the inputs' type: as processors with instructions for the type do
    it. Torch takes ten times as long where there are none."""
    return (a.float() @ b.float()).to(a.dtype)


def eager(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float) -> Any:
    """Attention as plain torch does it in the inputs' type: the yardstick for the error."""
    heads = query.shape[1]
    scores = product(query.transpose(0, 1), reference.repeat_heads(keys.to(query.dtype), heads).transpose(1, 2)) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return product(weights, reference.repeat_heads(values.to(query.dtype), heads)).transpose(0, 1)


def assert_close(found: torch.Tensor, exact: torch.Tensor, yardstick: torch.Tensor, what: str) -> None:
    finite = torch.isfinite(found)
    assert finite.all(), f"{what}: not finite at (row, head, dim) {(~finite).nonzero()[0].tolist()}"
    error = (found.double() - exact).abs()
    rounding = torch.finfo(found.dtype).eps * float(exact.abs().max())
    budget = 2 * float((yardstick.double() - exact).abs().max()) + rounding
    worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    assert float(error.max()) <= budget, (
        f"{what}: error {float(error.max()):.3g} at (row, head, dim) {worst}, budget {budget:.3g}"
    )


def check(batch: Any, out: torch.Tensor, indices: Sequence[SparseIndex], scale: float | None = None) -> None:
    """Every request's output against attention under the mask of its index."""
    scale = batch.scale if scale is None else scale
    assert len(indices) == len(batch.seq_lens)
    for request, index in enumerate(indices):
        assert (index.context_len, index.seq_len) == (batch.context_lens[request], int(batch.seq_lens[request]))
        query, mask = batch.query[batch.rows(request)], index.to_mask()
        keys, values = batch.keys(request), batch.values(request)
        exact = reference.masked_attention(query, keys, values, mask, scale)
        yardstick = eager(query, keys, values, mask, scale)
        assert_close(out[batch.rows(request)], exact, yardstick, f"request {request}")
