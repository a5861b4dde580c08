"""Attention under an index without the rows' own keys, in Triton's interpreter, against float64.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")

CASES: dict[str, tuple[int, int, int, int, int, str]] = {
    "pages of 16": (640, 300, 16, 2, 1, "float16"),
    "pages of 16, shared lists": (640, 300, 16, 4, 4, "float16"),
    "pages of a step": (512, 203, 128, 2, 1, "bfloat16"),
    "pages larger than a step": (768, 203, 256, 2, 1, "bfloat16"),
    "pages that no step divides": (480, 203, 48, 2, 1, "float16"),
    "fewer keys than a step": (32, 140, 16, 2, 1, "float16"),
    "float32": (320, 203, 32, 2, 1, "float32"),
    "one row": (640, 1, 32, 2, 1, "float16"),
}
"""Keys, rows, page size, query heads per KV head, heads per list, type."""


@pytest.mark.parametrize("name", CASES)
def test_rows_attend_what_their_tile_has_and_nothing_else(name: str, interpreted: dict[str, Any]) -> None:
    found = interpreted[name]
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[CASES[name][-1]]
    assert found["error"] < tolerance and found["lse_error"] < tolerance
    assert found["columns"] > 0 and (found["unlisted"] > 0) == (name != "fewer keys than a step")


@pytest.mark.parametrize("name", CASES)
def test_a_tile_without_keys_has_zeros_and_a_log_sum_exp_of_minus_infinity(
    name: str, interpreted: dict[str, Any]
) -> None:
    found = interpreted[name]
    assert found["rows_without_keys"] > 0
    assert found["largest_without_keys"] == 0.0 and found["lse_without_keys"] == "-inf"


def run_case(length: int, rows: int, block_size: int, group: int, shared: int, dtype: str) -> dict[str, Any]:
    from dataclasses import replace

    import torch
    from triton_inputs import shuffled

    from minference_vllm.core.inputs import Inputs
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.patterns.kinds import BlockSparse, Dense, VerticalSlash
    from minference_vllm.selection.build import build_index
    from minference_vllm.selection.capacity import plan_capacity
    from minference_vllm.selection.torch_scores import TorchScores
    from minference_vllm.triton_kernels.attention import run

    torch.manual_seed(0)
    heads, dim = 2 * group, 32
    query = torch.randn(rows, heads, dim).to(getattr(torch, dtype))
    keys, values = (torch.randn(length + rows, 2, dim).to(query.dtype) for _ in range(2))
    tiling = Tiling.of(length, length + rows, block_size, max(128, block_size) // block_size * block_size)
    patterns = [
        VerticalSlash(vertical=200, slash=16),
        Dense(),
        BlockSparse(top_k=1),
        VerticalSlash(vertical=60, slash=16),
    ] * heads
    patterns = patterns[: heads // shared]
    # Heads that share a list use the selection of the first of them.
    chosen = Inputs.of_rows(query[:, ::shared].float(), *(keys.float().transpose(0, 1),) * 2, 1.0, block_size)
    capacity = plan_capacity(patterns, length, length + rows, block_size, tiling.tile)
    index = build_index(tiling, patterns, TorchScores(chosen), capacity).without_own_keys()
    index = replace(index, heads_per_list=shared)
    # The last tile of the first list is empty.
    index.blocks[0, -1], index.columns[0, -1] = -1, -1
    index.num_blocks[0, -1] = index.num_columns[0, -1] = 0

    inputs = shuffled(query, keys, values, block_size, dim**-0.5)
    out, lse = torch.full_like(query, torch.nan), torch.full((heads, rows), torch.nan)
    run(inputs, index, out, lse)
    by_head = (part.double().transpose(0, 1).repeat_interleave(group, 0) for part in (keys, values))
    (own_keys, own_values), mask = by_head, index.to_mask()
    scores = (query.double().transpose(0, 1) @ own_keys.transpose(1, 2) * inputs.scale).masked_fill(~mask, -torch.inf)
    some = mask.any(-1)
    exact = (scores.softmax(-1) @ own_values)[some]
    found = out.transpose(0, 1)
    return {
        "error": float((found[some].double() - exact).abs().max()),
        "lse_error": float((lse[some].double() - scores.logsumexp(-1)[some]).abs().max()),
        "columns": int(index.num_columns.sum()),
        "unlisted": int(((index.blocks[..., 0] < 0) & (index.num_blocks > 0)).sum()),
        "rows_without_keys": int((~some).sum()),
        "largest_without_keys": float(found[~some].abs().max()),
        "lse_without_keys": " ".join({str(value) for value in lse[~some].tolist()}),
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    print(json.dumps({name: run_case(*case) for name, case in CASES.items()}))
