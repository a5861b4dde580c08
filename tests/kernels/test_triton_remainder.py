"""The remainder by Triton kernels in the interpreter: against torch's, and attention with it against the reference.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter.
Budget: a mean query is rounded to the queries' type, and so are weights and outputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from minference_vllm.core.inputs import Inputs

pytest.importorskip("triton")

CASES: dict[str, dict[str, Any]] = {
    "odd length, chunk begins in mid-tile": {"seq_len": 389, "context_len": 201, "page": 16, "tile": 32},
    "every key sampled": {"seq_len": 150, "context_len": 0, "page": 16, "tile": 32, "sampled": 2048},
    "steps wider than a page, tiles wider than a page": {
        "seq_len": 700,
        "context_len": 301,
        "page": 16,
        "tile": 128,
        "sampled": 16,
    },
    "bf16, head size 96, pages of 48": {
        "seq_len": 500,
        "context_len": 250,
        "page": 48,
        "tile": 144,
        "head_size": 96,
        "dtype": "bfloat16",
    },
    "one head of four, GQA 4": {
        "seq_len": 300,
        "context_len": 101,
        "page": 32,
        "tile": 64,
        "heads": [2],
        "kv_heads": 1,
    },
    "pages of 528": {"seq_len": 1500, "context_len": 1201, "page": 528, "tile": 528, "vertical": 300},
    "soft cap and sinks": {"seq_len": 333, "context_len": 140, "page": 32, "tile": 64, "softcap": 2.0, "sinks": True},
    "FP8 cache with scales, soft cap": {
        "seq_len": 300,
        "context_len": 140,
        "page": 32,
        "tile": 64,
        "dtype": "bfloat16",
        "fp8": True,
        "softcap": 3.0,
    },
    "FP8 cache with scales, values apart from keys": {
        "seq_len": 270,
        "context_len": 100,
        "page": 16,
        "tile": 32,
        "dtype": "float16",
        "fp8": True,
        "layout": "side by side",
    },
    "strides that 16 does not divide": {
        "seq_len": 300,
        "context_len": 140,
        "page": 32,
        "tile": 64,
        "layout": "gaps",
    },
    "a window, before it the pages of others": {
        "seq_len": 640,
        "context_len": 410,
        "page": 32,
        "tile": 64,
        "window": 200,
    },
    "shared lists, GQA 2, some tiles without a list": {
        "seq_len": 420,
        "context_len": 130,
        "page": 16,
        "tile": 32,
        "shared": True,
        "unlisted": 0.4,
    },
    "shared lists, GQA 7": {
        "seq_len": 290,
        "context_len": 101,
        "page": 32,
        "tile": 64,
        "heads": range(7),
        "num_heads": 7,
        "kv_heads": 1,
        "shared": True,
    },
    "one row": {"seq_len": 290, "context_len": 289, "page": 32, "tile": 64},
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_remainder_is_torchs(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    assert found["same_tiles"], "which tiles leave something out"
    assert found["tiles"] > 0 and found["empty"] >= (5 if "without a list" in name or "one head" in name else 0)
    assert max(found["remainder_errors"]) <= found["budget"], found
    assert found["others"] == 0, "zeros where nothing is left out"
    assert found["repeated"]


@pytest.mark.parametrize("name", [name for name in CASES if "window" not in name])
def test_attention_starts_from_it(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    assert found["merged_error"] <= found["out_budget"], "merged afterwards"
    assert found["lse_error"] <= found["lse_budget"]
    if "sinks" not in name:
        assert found["error"] <= found["out_budget"], "its definition"
        assert found["plain_error"] > 5 * found["out_budget"], "and without the remainder it is another"


@pytest.mark.parametrize("name", ["of scores", "shared"])
def test_served(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[f"served: {name}"]
    assert found["error"] < 1e-5 and found["plain_error"] > 0.05
    assert found["heads_per_list"] == (2 if name == "shared" else 1)


def run_case(
    seq_len: int,
    context_len: int,
    page: int,
    tile: int,
    heads: Any = range(4),
    num_heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 32,
    dtype: str = "float32",
    fp8: bool = False,
    softcap: float = 0.0,
    sinks: bool = False,
    window: int = 0,
    shared: bool = False,
    unlisted: float = 0.0,
    vertical: int = 20,
    sampled: int = 100,
    layout: str = "heads inside of tokens",
) -> dict[str, Any]:
    from dataclasses import replace

    import torch
    from triton_inputs import LAYOUTS, shuffled

    from minference_vllm import AShape, BlockSparse, VerticalSlash, reference
    from minference_vllm.core import remainder as core
    from minference_vllm.core.inputs import Inputs
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.prefill import remainder
    from minference_vllm.selection.build import build_index
    from minference_vllm.selection.torch_scores import TorchScores
    from minference_vllm.triton_kernels import attention
    from minference_vllm.triton_kernels import remainder as kernels

    # So that short sequences have steps too.
    core.SAMPLED_KEYS = sampled
    torch.manual_seed(0)
    kind, heads = getattr(torch, dtype), list(heads)
    stored = torch.float8_e4m3fn if fp8 else kind
    # Keep the tiles' means away from zero.
    query = (torch.randn(seq_len - context_len, num_heads, head_size) + torch.randn(num_heads, head_size)).to(kind)
    rows = [(torch.randn(seq_len, kv_heads, head_size) + torch.randn(head_size)).to(stored) for _ in range(2)]
    scales = (0.75, 2.0) if fp8 else (1.0, 1.0)
    keys, values = ((row.float() * factor).transpose(0, 1) for row, factor in zip(rows, scales, strict=True))
    scale = head_size**-0.5
    tiling = Tiling.of(context_len, seq_len, page, tile, window=window)
    patterns = [VerticalSlash(vertical=vertical, slash=16), BlockSparse(top_k=1), AShape(sink=16, local=16)]
    heads_per_list = num_heads // kv_heads if shared else 1
    lists = num_heads // heads_per_list
    scores = TorchScores(Inputs.of_rows(query.float()[:, ::heads_per_list], keys, values, scale, page))
    index = replace(build_index(tiling, (patterns * 2)[:lists], scores), heads_per_list=heads_per_list)
    without = torch.rand(index.num_blocks.shape) < unlisted
    reach = ((tiling.starts[1:] - 1) // page + 1).int()
    index = replace(
        index,
        blocks=index.blocks.masked_fill(without[..., None], -1),
        num_blocks=torch.where(without, reach, index.num_blocks),
        columns=index.columns.masked_fill(without[..., None], -1),
        num_columns=index.num_columns.masked_fill(without, 0),
    )
    sink = torch.randn(num_heads) if sinks else None
    inputs = shuffled(query, *rows, page, scale, *scales, softcap=softcap, sinks=sink)
    inputs = replace(inputs, cache=LAYOUTS[layout](inputs.cache), window=window)
    if window:
        gone = inputs.pages[: (context_len - window + 1) // page]
        for part in (inputs.cache.key, inputs.cache.value):
            part[gone] = torch.nan
    both = []
    for mark in range(2):
        with poisoned(inputs, mark):
            both.append(kernels.of_heads(inputs, index, heads))
    found, again = both
    right = remainder.of_heads(inputs, index, heads)
    there = right.bias > -torch.inf
    eps = torch.finfo(kind).eps
    result: dict[str, Any] = {
        "same_tiles": torch.equal(found.bias > -torch.inf, there),
        "tiles": int(there.sum()),
        "empty": int((~there).sum()),
        "remainder_errors": [
            float((ours - theirs)[there].abs().max() / theirs[there].abs().max())
            for ours, theirs in zip(found, right, strict=True)
        ],
        "budget": 2e-6 + eps,
        "others": float(torch.cat([found.key, found.value], 2)[~there].abs().sum()),
        "repeated": all(torch.equal(*pair) for pair in zip(found, again, strict=True)),
    }
    if window:
        return result
    out, merged = (torch.full(query.shape, torch.nan, dtype=kind) for _ in range(2))
    lse, own_lse = (torch.full((num_heads, len(query)), torch.nan) for _ in range(2))
    attention.run(inputs, index, out, lse, found)
    attention.run(inputs, index, merged, own_lse)
    plain = merged.clone()
    remainder.add(inputs, index, right, merged, own_lse)
    exact = reference.with_remainder(
        query, keys, values, index.to_mask(), tiling, scale, heads, core.sampled_positions(seq_len),
        core.sample_step(seq_len), softcap,
    )  # fmt: skip
    of_row = (torch.arange(len(query)) + context_len) // tile - context_len // tile
    logits = (query.float().transpose(0, 1) * right.key[:, of_row]).sum(2) * scale
    logits = reference.capped(logits, softcap) + right.bias[:, of_row]
    largest = float(exact.abs().max())
    return result | {
        "error": float((out.double() - exact).abs().max()),
        "plain_error": float((plain.double() - exact)[:, heads].abs().max()),
        "merged_error": float((out.double() - merged.double()).abs().max()),
        "lse_error": float((lse - torch.logaddexp(own_lse, logits)).abs().max()),
        # Rounded by the kernel, and again when the remainder is added; 16-bit types round weights too.
        "out_budget": 3 * eps * largest + 1e-5,
        "lse_budget": max(2e-5, eps),
    }


def run_served_case(shared: bool) -> dict[str, float]:
    """``sparse_prefill`` with planned sizes, some heads with the remainder; lists per pair of heads, or per head."""
    from triton_inputs import prefill

    from minference_vllm import AShape, Dense, VerticalSlash, reference
    from minference_vllm.core import remainder as core

    core.SAMPLED_KEYS = 50
    with_it = AShape(sink=16, local=64, remainder=True)
    patterns = [with_it, with_it, Dense(), Dense()]
    if not shared:
        patterns = [with_it, VerticalSlash(vertical=30, slash=32, remainder=True), AShape(sink=16, local=64), Dense()]
    inputs, out, index, plain = prefill(150, 470, 16, patterns)
    rows = (cached.transpose(0, 1).flatten(1, 2) for cached in (inputs.cache.key, inputs.cache.value))
    keys, values = (part[:, :470] for part in rows)
    exact = reference.with_remainder(
        inputs.query, keys, values, index.to_mask(), index.tiling, inputs.scale, [0, 1], core.sampled_positions(470),
        core.sample_step(470),
    )  # fmt: skip
    return {
        "error": float((out.double() - exact).abs().max()),
        "plain_error": float((plain - exact)[:, :2].abs().amax((0, 2)).min()),
        "heads_per_list": index.heads_per_list,
    }


@contextmanager
def poisoned(inputs: Inputs, mark: int) -> Iterator[None]:
    """New allocations hold NaN (float32), a slot that the sequence does not own (int32), or ``mark`` (uint8)."""
    import torch

    foreign = min({*range(len(inputs.cache.key))} - {*inputs.pages.tolist()})
    assert inputs.cache.key[foreign].float().isnan().all()
    empty = torch.empty

    def filled(*shape: int, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        slot = foreign * inputs.cache.block_size
        return made.fill_({torch.float32: torch.nan, torch.int32: slot, torch.uint8: mark}[made.dtype])

    with mock.patch("torch.empty", filled):
        yield


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    results: dict[str, Any] = {name: run_case(**case) for name, case in CASES.items()}
    results |= {f"served: {name}": run_served_case(name == "shared") for name in ("of scores", "shared")}
    print(json.dumps(results))
