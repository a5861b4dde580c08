"""The Triton kernels in the interpreter, against the float64 reference.

The interpreter must be chosen before triton is first imported, so these run in a process of their own: this file is
both the test and, run as a script, that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

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
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_the_interpreter_multiplies_bf16_rightly(interpreted: dict[str, Any]) -> None:
    assert interpreted["bf16 dot"] < 1e-6


@pytest.mark.parametrize("name", list(CASES))
def test_sparse_attention_matches_the_reference(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    assert found["error"] <= 2 * found["eager_error"] + 1e-6, found
    assert found["lse_error"] < 2e-3 if "float32" not in name else found["lse_error"] < 1e-5, found
    assert found["columns"] > 0, "the case must exercise single columns"


def run_case(
    seq_len: int,
    context_len: int,
    block_size: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    dtype: str = "bfloat16",
) -> dict[str, float]:
    import torch

    from minference_vllm import AShape, BlockSparse, Dense, VerticalSlash, reference
    from minference_vllm.estimate import Estimates
    from minference_vllm.index import build_index
    from minference_vllm.paged_cache import PagedCache
    from minference_vllm.tiling import Tiling
    from minference_vllm.triton_kernels import sparse_attention

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    blocks = -(-seq_len // block_size)
    pages = torch.randperm(blocks + 2)[:blocks]
    query = torch.randn(seq_len - context_len, heads, head_size).to(kind)
    rows = [torch.randn(seq_len, kv_heads, head_size).to(kind) for _ in range(2)]
    caches = []
    for row in rows:
        # Everything the sequence does not own is NaN: pages of others, and the last page past the end.
        padded = torch.full((blocks * block_size, kv_heads, head_size), torch.nan, dtype=kind)
        padded[:seq_len] = row
        cache = torch.full((blocks + 2, block_size, kv_heads, head_size), torch.nan, dtype=kind)
        cache[pages] = padded.view(blocks, block_size, kv_heads, head_size)
        caches.append(cache.transpose(1, 2))
    keys, values = (row.transpose(0, 1) for row in rows)
    scale = head_size**-0.5
    tiling = Tiling.of(context_len, seq_len, block_size, max(128, block_size))
    patterns = [VerticalSlash(vertical=40, slash=16), BlockSparse(top_k=1), AShape(sink=16, local=64), Dense()]
    index = build_index(tiling, patterns[:heads], Estimates(query, keys, scale))
    out = torch.full_like(query, torch.nan)
    lse = torch.full((heads, len(query)), torch.nan)
    sparse_attention.run(query, PagedCache(caches[0], caches[1], "rows"), pages, index, scale, out, lse)
    mask = index.to_mask()
    expected = reference.masked_attention(query, keys, values, mask, scale)
    repeated = [reference.repeat_heads(row, heads) for row in (keys, values)]
    logits = (query.transpose(0, 1) @ repeated[0].transpose(1, 2)) * scale
    eager = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ repeated[1]
    exact = query.double().transpose(0, 1) @ repeated[0].double().transpose(1, 2) * scale
    expected_lse = exact.masked_fill(~mask, -torch.inf).logsumexp(-1)
    return {
        "error": float((out.double() - expected).abs().max()),
        "eager_error": float((eager.transpose(0, 1).double() - expected).abs().max()),
        "lse_error": float((lse.double() - expected_lse).abs().max()),
        "columns": int(index.num_columns.max()),
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

    print(json.dumps({name: run_case(**case) for name, case in CASES.items()} | {"bf16 dot": bf16_dot_error()}))
