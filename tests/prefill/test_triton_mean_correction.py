"""Mean correction over the Triton kernels in the interpreter, against its float64 definition.

The interpreter must be chosen before triton is first imported, so these run in a process of their own: this file is
both the test and, run as a script, that process.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")

CASES: dict[str, dict[str, Any]] = {
    "odd length": {"seq_len": 517, "context_len": 0, "block_size": 16},
    "chunk starts inside a page, head size 80": {
        "seq_len": 500,
        "context_len": 301,
        "block_size": 32,
        "head_size": 80,
    },
    "bfloat16": {"seq_len": 500, "context_len": 256, "block_size": 32, "dtype": "bfloat16"},
    "soft cap": {"seq_len": 430, "context_len": 300, "block_size": 32, "softcap": 2.0},
    "sinks": {"seq_len": 430, "context_len": 300, "block_size": 32, "sinks": True},
    "soft cap and sinks, one KV head": {
        "seq_len": 600,
        "context_len": 300,
        "block_size": 64,
        "kv_heads": 1,
        "softcap": 2.0,
        "sinks": True,
    },
    "FP8 cache with scales": {"seq_len": 500, "context_len": 300, "block_size": 32, "fp8": True},
    "some tiles have no list": {"seq_len": 700, "context_len": 450, "block_size": 16, "room": 24},
}


@pytest.mark.parametrize("name", list(CASES))
def test_agrees_with_its_definition(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    exact = "bfloat16" not in name and "FP8" not in name
    assert found["error"] < (1e-5 if exact else 0.03), found
    assert found["left_out"][0] > 0 and found["left_out"][3] > 0, "the case must leave pages out"
    assert found["left_out"][1:3] == [0, 0], "heads that did not ask for it"
    assert found["by_correction"] > 10 * found["error"], "the correction must show"
    assert (found["unlisted"] > 0) == ("no list" in name)


def run_case(
    seq_len: int,
    context_len: int,
    block_size: int,
    kv_heads: int = 2,
    head_size: int = 32,
    dtype: str = "float32",
    softcap: float = 0.0,
    sinks: bool = False,
    fp8: bool = False,
    room: int | None = None,
) -> dict[str, Any]:
    """``attend_chunk`` with corrected and other heads; four query heads over the KV heads."""
    import dataclasses

    import torch
    from triton_inputs import shuffled

    from minference_vllm import reference
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.kernels.choose import choose
    from minference_vllm.patterns.kinds import Dense, HeadPattern, PeakThreshold
    from minference_vllm.prefill import attend

    if room is not None:
        plan = attend.plan_capacity
        attend._capacity = lambda *sizes: dataclasses.replace(plan(*sizes), blocks=room)
    torch.manual_seed(0)
    kind = torch.bfloat16 if fp8 else getattr(torch, dtype)
    stored = torch.float8_e4m3fn if fp8 else kind
    blocks = -(-seq_len // block_size)
    # Rows that want much the same, and pages that differ from each other.
    query = (torch.randn(seq_len - context_len, 4, head_size) + torch.randn(4, head_size)).to(kind)
    drift = torch.randn(blocks, kv_heads, head_size).repeat_interleave(block_size, 0)[:seq_len]
    rows = [(torch.randn(seq_len, kv_heads, head_size) + drift / 2).to(stored) for _ in range(2)]
    scales = (0.75, 2.0) if fp8 else (1.0, 1.0)
    keys, values = ((part.float() * factor).transpose(0, 1) for part, factor in zip(rows, scales, strict=True))
    scale, sink = head_size**-0.5, torch.randn(4) if sinks else None
    inputs = shuffled(query, *rows, block_size, scale, *scales, softcap=softcap, sinks=sink)
    corrected = PeakThreshold(alpha=0.5, sink=16, window=32, mean_correction=True)
    patterns: list[HeadPattern] = [corrected, Dense(), corrected.model_copy(update={"mean_correction": False})]
    patterns.append(PeakThreshold(alpha=0.3, sink=0, window=0, mean_correction=True))
    out = torch.full(query.shape, torch.nan, dtype=kind)
    kernel = choose("triton", kind, inputs.cache, with_lse=True)
    index = attend.attend_chunk(inputs, patterns, kernel, out)
    tiling = Tiling.of(context_len, seq_len, block_size, index.tiling.tile)

    def attention(heads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        extended = reference.with_mean_pages(keys, values, index.to_mask(), tiling, heads)
        all_keys, all_values = (reference.repeat_heads(part, 4) for part in extended[:2])
        logits = query.double().transpose(0, 1) @ all_keys.transpose(1, 2) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~extended[2], -torch.inf)
        total = logits.logsumexp(-1)
        if sink is not None:
            total = torch.logaddexp(total, sink.double()[:, None])
        return ((logits - total[..., None]).exp() @ all_values).transpose(0, 1), extended[2][..., seq_len:]

    (expected, left_out), (plain, _) = attention([0, 3]), attention([])
    return {
        "error": float((out.double() - expected).abs().max()),
        "by_correction": float((expected - plain).abs().max()),
        "left_out": left_out.sum((1, 2)).tolist(),
        "unlisted": int((index.blocks[[0, 3], :, 0] < 0).sum()),
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    print(json.dumps({name: run_case(**case) for name, case in CASES.items()}))
