"""The Triton kernels in the interpreter, against the float64 reference.

The interpreter must be chosen before triton is first imported, so these run in a process of their own: this file is
both the test and, run as a script, that process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from minference_vllm.core.inputs import Inputs

pytest.importorskip("triton")

CASES: dict[str, dict[str, Any]] = {
    "pages of 16, odd length": {"seq_len": 387, "context_len": 0, "block_size": 16},
    "chunk starts inside a page, GQA 4, head size 80": {
        "seq_len": 300,
        "context_len": 101,
        "block_size": 32,
        "kv_heads": 1,
        "head_size": 80,
        "dtype": "float16",
    },
    "pages of a tile, one over the border": {"seq_len": 257, "context_len": 128, "block_size": 128, "head_size": 128},
    "float32": {"seq_len": 330, "context_len": 150, "block_size": 32, "dtype": "float32", "head_size": 32},
    "planned sizes, dense tiles without a list": {
        "seq_len": 405,
        "context_len": 130,
        "block_size": 32,
        "planned": True,
    },
    "soft cap and sinks, head size 96": {
        "seq_len": 300,
        "context_len": 140,
        "block_size": 64,
        "head_size": 96,
        "softcap": 2.0,
        "sinks": True,
    },
    "FP8 cache with scales, head size 256": {
        "seq_len": 270,
        "context_len": 140,
        "block_size": 32,
        "head_size": 256,
        "fp8": True,
    },
    "FP8 queries, too": {"seq_len": 270, "context_len": 140, "block_size": 32, "fp8": True, "fp8_query": True},
    "shared lists, GQA 4, dense tiles without a list": {
        "seq_len": 325,
        "context_len": 130,
        "block_size": 16,
        "heads": 16,
        "kv_heads": 4,
        "head_size": 32,
        "planned": True,
        "shared": True,
    },
    "shared lists, GQA 7, chunk starts inside a page, head size 80": {
        "seq_len": 300,
        "context_len": 101,
        "block_size": 32,
        "heads": 7,
        "kv_heads": 1,
        "head_size": 80,
        "dtype": "float16",
        "shared": True,
    },
    "shared lists, GQA 8, soft cap and sinks": {
        "seq_len": 257,
        "context_len": 0,
        "block_size": 128,
        "heads": 8,
        "kv_heads": 1,
        "softcap": 2.0,
        "sinks": True,
        "shared": True,
    },
    "many columns": {"seq_len": 701, "context_len": 500, "block_size": 32, "vertical": 300, "dtype": "float16"},
    "many columns of pages of 16, shared lists, GQA 2": {
        "seq_len": 650,
        "context_len": 511,
        "block_size": 16,
        "vertical": 280,
        "shared": True,
    },
    "pages larger than a step, chunk starts inside a page": {"seq_len": 837, "context_len": 610, "block_size": 256},
    "pages that no step divides, dense tiles without a list": {
        "seq_len": 500,
        "context_len": 250,
        "block_size": 48,
        "planned": True,
    },
    "one row": {"seq_len": 290, "context_len": 289, "block_size": 32},
    "columns that count more than once": {"seq_len": 387, "context_len": 200, "block_size": 16, "counted": True},
    "many columns that count more than once, soft cap and sinks": {
        "seq_len": 701,
        "context_len": 500,
        "block_size": 32,
        "vertical": 300,
        "softcap": 2.0,
        "sinks": True,
        "counted": True,
    },
    "columns that count more than once, pages that no step divides, dense tiles without a list": {
        "seq_len": 500,
        "context_len": 250,
        "block_size": 48,
        "planned": True,
        "counted": True,
    },
    "keys and values side by side, heads outside of tokens": {
        "seq_len": 300,
        "context_len": 140,
        "block_size": 128,
        "layout": "side by side",
    },
    "strides that 16 does not divide": {"seq_len": 300, "context_len": 140, "block_size": 32, "layout": "gaps"},
    "as launched on Ampere": {"seq_len": 470, "context_len": 250, "block_size": 16, "vertical": 150, "major": 8},
    "as launched on Blackwell, head size 128": {
        "seq_len": 470,
        "context_len": 250,
        "block_size": 64,
        "head_size": 128,
        "vertical": 150,
        "major": 10,
    },
}
SHARED_CASES = [(1, 0, 300, 16), (4, 101, 390, 32), (7, 70, 301, 16)]
"""(query heads per KV head, context, length, page size) of ``sparse_prefill`` with patterns that need no scores."""


def test_the_interpreter_multiplies_bf16_rightly(interpreted: dict[str, Any]) -> None:
    assert interpreted["bf16 dot"] < 1e-6


@pytest.mark.parametrize("name", list(CASES))
def test_sparse_attention_matches_the_reference(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    assert found["error"] <= 2 * found["eager_error"] + 1e-6, found
    assert found["lse_error"] < 2e-3 if "float32" not in name else found["lse_error"] < 1e-5, found
    wanted = 128 if "many" in name else 1
    assert found["columns"] >= wanted, "the case must exercise single columns, and many of them whole steps"
    assert (found["unlisted"] > 0) == ("without a list" in name)


@pytest.mark.parametrize("case", SHARED_CASES, ids=str)
def test_a_group_of_heads_shares_lists_that_need_no_scores(
    interpreted: dict[str, Any], case: tuple[int, int, int, int]
) -> None:
    found = interpreted[f"shared {list(case)}"]
    assert found["heads_per_list"] == case[0]
    assert found["different"] == 0
    assert found["density"] < 0.95
    assert found["error"] < 1e-5


def run_case(
    seq_len: int,
    context_len: int,
    block_size: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    dtype: str = "bfloat16",
    planned: bool = False,
    softcap: float = 0.0,
    sinks: bool = False,
    fp8: bool = False,
    fp8_query: bool = False,
    shared: bool = False,
    vertical: int = 40,
    layout: str = "heads inside of tokens",
    major: int = 9,
    counted: bool = False,
) -> dict[str, float]:
    from dataclasses import replace

    import torch
    from triton_inputs import LAYOUTS, row_counts, shuffled

    from minference_vllm import AShape, BlockSparse, Dense, VerticalSlash
    from minference_vllm.core.inputs import Inputs
    from minference_vllm.core.tiling import Tiling, whole_tile
    from minference_vllm.reference import repeat_heads
    from minference_vllm.selection.build import build_index
    from minference_vllm.selection.capacity import plan_capacity
    from minference_vllm.selection.compaction import EXACT_WIDTH
    from minference_vllm.selection.torch_scores import TorchScores
    from minference_vllm.triton_kernels import attention

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    stored = torch.float8_e4m3fn if fp8 else kind
    query = torch.randn(seq_len - context_len, heads, head_size).to(torch.float8_e4m3fn if fp8_query else kind)
    rows = [torch.randn(seq_len, kv_heads, head_size).to(stored) for _ in range(2)]
    query_scale, *scales = (0.5 if fp8_query else 1.0, *((0.75, 2.0) if fp8 else (1.0, 1.0)))
    wide = query.float() * query_scale
    keys, values = ((row.float() * factor).transpose(0, 1) for row, factor in zip(rows, scales, strict=True))
    scale = head_size**-0.5
    tiling = Tiling.of(context_len, seq_len, block_size, whole_tile(None, block_size))
    patterns = [VerticalSlash(vertical=vertical, slash=16), BlockSparse(top_k=1), AShape(sink=16, local=64), Dense()]
    planned_capacity = plan_capacity(patterns, context_len, seq_len, block_size, tiling.tile)
    # Any patterns will do: the kernel sees only lists.
    heads_per_list = heads // kv_heads if shared else 1
    scores = TorchScores(Inputs.of_rows(wide[:, ::heads_per_list], keys, values, scale, block_size))
    capacity = planned_capacity if planned else EXACT_WIDTH
    index = build_index(tiling, patterns[: heads // heads_per_list], scores, capacity)
    index = replace(index, heads_per_list=heads_per_list)
    if counted:
        # Codes past a list's end are arbitrary.
        index = replace(index, column_codes=torch.randint(0, 61, index.columns.shape, dtype=torch.uint8))
    sink = torch.randn(heads) if sinks else None
    out = torch.full(query.shape, torch.nan, dtype=kind)
    lse = torch.full((heads, len(query)), torch.nan)
    inputs = shuffled(query, *rows, block_size, scale * query_scale, *scales, softcap=softcap, sinks=sink)
    inputs = replace(inputs, cache=LAYOUTS[layout](inputs.cache))
    with launched_as_on(major), unwritten_entries_lead_to_nan(inputs):
        attention.run(inputs, index, out, lse)
    mask, counts = index.to_mask(), row_counts(index).double() if counted else torch.ones(())

    def exact_or_eager(precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = wide, repeat_heads(keys, heads), repeat_heads(values, heads)
        one, all_keys, all_values = (part.to(precision) for part in wanted)
        logits = one.transpose(0, 1) @ all_keys.transpose(1, 2) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = (logits + counts.log().to(precision)).masked_fill(~mask, -torch.inf)
        total = logits.logsumexp(-1)
        if sink is not None:
            total = torch.logaddexp(total, sink.to(precision)[:, None])
        weights = (logits - total[..., None]).exp()
        return (weights @ all_values).transpose(0, 1).double(), total

    expected, expected_lse = exact_or_eager(torch.float64)
    return {
        "error": float((out.double() - expected).abs().max()),
        "eager_error": float((exact_or_eager(kind)[0] - expected).abs().max()),
        "lse_error": float((lse.double() - expected_lse).abs().max()),
        "columns": int(index.num_columns.max()),
        "unlisted": int((index.blocks[..., 0] < 0).sum()),
    }


@contextmanager
def launched_as_on(major: int) -> Iterator[None]:
    """Launch shapes as on GPUs of this compute capability."""
    from minference_vllm.triton_kernels import attention

    shape = attention.launch_shape
    attention.launch_shape = lambda _, *sizes: shape(major, *sizes)
    yield
    attention.launch_shape = shape


@contextmanager
def unwritten_entries_lead_to_nan(inputs: Inputs) -> Iterator[None]:
    """New allocations (the kernel's lists) refer to a page that the sequence does not own until they are written."""
    import torch

    page, _, slot, _ = inputs.cache.key.stride()
    foreign = min({*range(len(inputs.cache.key))} - {*inputs.pages.tolist()})
    assert inputs.cache.key[foreign].float().isnan().all()
    place = foreign * page // math.gcd(16, page, slot)
    with mock.patch("torch.empty", lambda size, **options: torch.full((size,), place, **options)):
        yield


def run_shared_case(group: int, context_len: int, seq_len: int, block_size: int) -> dict[str, Any]:
    """``sparse_prefill`` where all heads of a group select the same keys, and the index with a list per head."""
    from triton_inputs import prefill

    from minference_vllm import AShape, Dense, TriShape
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.build import build_index
    from minference_vllm.selection.torch_scores import TorchScores

    by_group = AShape(sink=32, local=64), TriShape(sink=32, local=64, last=40), Dense()
    patterns = [pattern for pattern in by_group for _ in range(group)]
    inputs, out, index, expected = prefill(context_len, seq_len, block_size, patterns, kv_heads=3)
    tiling = Tiling.of(context_len, seq_len, block_size, index.tiling.tile)
    alone = build_index(tiling, patterns, TorchScores(inputs))
    return {
        "heads_per_list": index.heads_per_list,
        "different": int((index.to_mask() != alone.to_mask()).sum()),
        "density": float(index.density().mean()),
        "error": float((out.double() - expected).abs().max()),
    }


def bf16_dot_error() -> float:
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def dot(p_a, p_b, p_c):  # type: ignore[no-untyped-def]
        o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(p_c + o, tl.dot(tl.load(p_a + o), tl.load(p_b + o)))

    a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    dot[(1,)](a, b, c)
    return float((c - a.float() @ b.float()).abs().max())


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    results: dict[str, Any] = {name: run_case(**case) for name, case in CASES.items()}
    results |= {f"shared {list(case)}": run_shared_case(*case) for case in SHARED_CASES}
    print(json.dumps(results | {"bf16 dot": bf16_dot_error()}))
