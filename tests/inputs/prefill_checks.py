"""``sparse_prefill``'s output against float64 attention under the mask of the index that it used.

Budget: a kernel may be twice as far from float64 as plain eager attention in the inputs' type is, plus one rounding of
the largest output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minference_vllm import reference
from minference_vllm.core.sparse_index import SparseIndex

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` with sums in float32, rounded once to the inputs' type: as processors with instructions for the type do
    it. Torch takes ten times as long where there are none."""
    return (a.float() @ b.float()).to(a.dtype)


def eager(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float) -> Any:
    """Attention by plain torch in the inputs' type: the yardstick for the error."""
    heads = query.shape[1]
    scores = product(query.transpose(0, 1), reference.repeat_heads(keys.to(query.dtype), heads).transpose(1, 2)) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return product(weights, reference.repeat_heads(values.to(query.dtype), heads)).transpose(0, 1)


def assert_close(
    found: torch.Tensor, exact: torch.Tensor, yardstick: torch.Tensor, what: str, roundings: int = 1
) -> None:
    finite = torch.isfinite(found)
    assert finite.all(), f"{what}: not finite at (row, head, dim) {(~finite).nonzero()[0].tolist()}"
    error = (found.double() - exact).abs()
    rounding = roundings * torch.finfo(found.dtype).eps * float(exact.abs().max())
    budget = 2 * float((yardstick.double() - exact).abs().max()) + rounding
    worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    assert float(error.max()) <= budget, (
        f"{what}: error {float(error.max()):.3g} at (row, head, dim) {worst}, budget {budget:.3g}"
    )


def check(
    batch: Any, out: torch.Tensor, indices: Sequence[SparseIndex], scale: float | None = None, roundings: int = 1
) -> None:
    """Every request's output against attention under the mask of its index.

    Args:
        roundings: allowed roundings of the largest output. With few rows, eager attention may happen to be exact.
    """
    scale = batch.scale if scale is None else scale
    assert len(indices) == len(batch.seq_lens)
    for request, index in enumerate(indices):
        assert (index.tiling.context_len, index.tiling.seq_len) == (
            batch.context_lens[request],
            int(batch.seq_lens[request]),
        )
        query, mask = batch.query[batch.rows(request)], index.to_mask()
        keys, values = batch.keys(request), batch.values(request)
        exact = reference.masked_attention(query, keys, values, mask, scale)
        yardstick = eager(query, keys, values, mask, scale)
        assert_close(out[batch.rows(request)], exact, yardstick, f"request {request}", roundings)
