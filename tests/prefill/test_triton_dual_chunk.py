"""Dual chunk attention with the Triton kernels, in the interpreter, against its float64 definition.

The interpreter must be chosen before triton is first imported: this file is both the test and, run as a script, the
process that computes.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")

CASES: dict[str, tuple[int, int, int]] = {
    "dense": (500, 90, 16),
    "shared lists": (300, 200, 16),
    "selected": (150, 300, 32),
    "one row": (600, 1, 32),
}
"""Context, new tokens and page size; chunks of 256 tokens, so that tiles of 128 rows have two programs."""


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_definition(name: str, interpreted: dict[str, Any]) -> None:
    found = interpreted[name]
    assert found["error"] < 2e-5
    assert (found["kept"] == 1) == (name not in ("selected", "shared lists"))
    assert (found["unlisted"] > 0) == (name in ("dense", "one row"))
    assert name != "one row" or found["decoding_error"] < 2e-5
    assert found["heads_per_list"] == (1 if name == "selected" else 2)


def run_case(name: str, context_len: int, rows: int, block_size: int) -> dict[str, float]:
    import torch
    from dual_chunk_inputs import make_dual_chunk_batch

    from minference_vllm import AShape, Dense, VerticalSlash, reference
    from minference_vllm.kernels.choose import choose
    from minference_vllm.patterns.kinds import HeadPattern
    from minference_vllm.prefill.dual_chunk import DualChunk, attend_dual_chunk, decode_dual_chunk

    patterns: dict[str, list[HeadPattern]] = {
        "selected": [VerticalSlash(vertical=20, slash=32), AShape(sink=16, local=40)] * 2,
        "shared lists": [AShape(sink=16, local=40)] * 4,
    }
    batch = make_dual_chunk_batch(DualChunk(320, 64, original_len=150), context_len, rows, block_size=block_size)
    inputs = batch.inputs
    out = torch.full_like(inputs.query, torch.nan)
    kernel = choose("triton", torch.float32, inputs.cache, with_lse=True)
    parts = attend_dual_chunk(
        batch.rotated, inputs, batch.geometry, patterns.get(name, [Dense()] * 4), kernel, out, tile=128
    )
    mask, indices = batch.mask(parts), [part.index for part in parts]
    decoded = torch.full_like(out, torch.nan)
    if rows == 1:
        decode_dual_chunk(batch.rotated, inputs, batch.geometry, kernel, decoded)
    return {
        "decoding_error": float((decoded.double() - batch.exact()).abs().max()),
        "error": float((out.double() - batch.exact(mask)).abs().max()),
        "kept": float(mask.sum() / (4 * reference.causal_mask(context_len, context_len + rows).sum())),
        "unlisted": sum(int(((index.blocks[..., 0] < 0) & (index.num_blocks > 0)).sum()) for index in indices[1:]),
        "heads_per_list": indices[-1].heads_per_list,
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    print(json.dumps({name: run_case(name, *case) for name, case in CASES.items()}))
