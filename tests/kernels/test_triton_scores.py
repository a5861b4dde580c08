"""``TritonScores`` in the interpreter, and ``sparse_prefill`` through them, against float64 and the torch path.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from minference_vllm.selection.torch_scores import TorchScores
    from minference_vllm.triton_kernels.scores import TritonScores

pytest.importorskip("triton")

CASES: dict[str, dict[str, Any]] = {
    "pages of 16, odd length": {"seq_len": 333, "context_len": 0, "block_size": 16},
    "spread over the chunk": {"seq_len": 500, "context_len": 77, "block_size": 32},
    "spread, rows at the sequence's start": {"seq_len": 256, "context_len": 0, "block_size": 64, "dtype": "float32"},
    "chunk inside a page, GQA 7, head size 80": {
        "seq_len": 260,
        "context_len": 101,
        "block_size": 48,
        "heads": 7,
        "kv_heads": 1,
        "head_size": 80,
        "dtype": "float16",
    },
    "fewer than 64 queries": {"seq_len": 211, "context_len": 174, "block_size": 32},
    "two queries": {"seq_len": 130, "context_len": 128, "block_size": 32, "dtype": "float32"},
    "one query": {"seq_len": 100, "context_len": 99, "block_size": 32},
    "one token": {"seq_len": 1, "context_len": 0, "block_size": 32},
    "float32, pages of 128": {"seq_len": 400, "context_len": 200, "block_size": 128, "dtype": "float32"},
    "FP8 cache with scales": {"seq_len": 250, "context_len": 100, "block_size": 32, "fp8": True},
}
ANTIDIAGONAL_CASES: dict[str, dict[str, Any]] = {
    "pages of 16, stride 8, odd length": {"seq_len": 333, "context_len": 0, "block_size": 16, "stride": 8},
    "chunk inside a square, GQA 7, head size 80": {
        "seq_len": 260,
        "context_len": 101,
        "block_size": 32,
        "stride": 16,
        "heads": 7,
        "kv_heads": 1,
        "head_size": 80,
        "dtype": "float16",
    },
    "pages of 48 and tiles of 144, stride 24": {
        "seq_len": 411,
        "context_len": 150,
        "block_size": 48,
        "tile": 144,
        "stride": 24,
    },
    "tiles and pages of more squares than one step takes": {
        "seq_len": 600,
        "context_len": 301,
        "block_size": 256,
        "tile": 512,
        "stride": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_size": 32,
    },
    "float32, pages of 128": {"seq_len": 400, "context_len": 200, "block_size": 128, "stride": 16, "dtype": "float32"},
    "one token": {"seq_len": 1, "context_len": 0, "block_size": 32, "stride": 16},
    "FP8 cache with scales": {"seq_len": 250, "context_len": 100, "block_size": 32, "stride": 16, "fp8": True},
}
INDEX_CASES = [(0, 517, 16), (301, 700, 32), (200, 500, 128)]
"""(context, length, page size) of float32 chunks whose index must be the torch path's."""


@pytest.mark.parametrize("score", ["columns", "diagonals", "means"])
@pytest.mark.parametrize("name", list(CASES))
def test_scores_match_the_reference(interpreted: dict[str, Any], name: str, score: str) -> None:
    error, eager_error, largest = interpreted[name][score]
    # Floors for sums of 64 probabilities in float32; diagonals count their smallest group four times.
    assert error <= 2 * eager_error + 64e-6, (error, eager_error)
    assert largest > 0


@pytest.mark.parametrize("name", list(ANTIDIAGONAL_CASES))
def test_antidiagonal_scores_match_the_reference(interpreted: dict[str, Any], name: str) -> None:
    error, eager_error, out_of_reach, sums = interpreted[f"antidiagonal {name}"]
    # The torch path rounds logits to the inputs' type; the kernel does not.
    assert error <= eager_error + 2e-6, (error, eager_error)
    assert out_of_reach == 0
    assert sums < 1e-5, "the scores of a tile add up to 1"


@pytest.mark.parametrize("case", INDEX_CASES, ids=str)
def test_the_index_is_the_torch_paths(interpreted: dict[str, Any], case: tuple[int, int, int]) -> None:
    found = interpreted[f"index {list(case)}"]
    assert found["different"] == [0] * 8, "by head"
    assert found["density"] < 0.9
    assert found["error"] < 1e-5


def scores_in_both(
    query: torch.Tensor, rows: torch.Tensor, block_size: int, fp8: bool
) -> tuple[TritonScores, TorchScores, torch.Tensor]:
    """Scores by the kernels and by torch, and the keys that both see, float32 ``[HK, S, D]``.

    Args:
        rows: ``[S, HK, D]``, keys and values alike.
        fp8: whether they are stored in FP8, with a scale.
    """
    import torch
    from triton_inputs import shuffled

    from minference_vllm.core.inputs import Inputs
    from minference_vllm.selection.torch_scores import TorchScores
    from minference_vllm.triton_kernels.scores import TritonScores

    scale = query.shape[2] ** -0.5
    stored = rows.to(torch.float8_e4m3fn if fp8 else query.dtype)
    key_scale = 0.75 if fp8 else 1.0
    keys = (stored.float() * key_scale).transpose(0, 1)
    ours = TritonScores(shuffled(query, stored, stored, block_size, scale, key_scale))
    plain = keys.to(query.dtype)
    return ours, TorchScores(Inputs.of_rows(query, plain, plain, scale, block_size)), keys


def run_case(
    seq_len: int,
    context_len: int,
    block_size: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    dtype: str = "bfloat16",
    fp8: bool = False,
) -> dict[str, tuple[float, float, float]]:
    import torch

    from minference_vllm import reference
    from minference_vllm.selection.probe_queries import probe_groups

    torch.manual_seed(0)
    query = (torch.randn(seq_len - context_len, heads, head_size) * 2).to(getattr(torch, dtype))
    rows = torch.randn(seq_len, kv_heads, head_size)
    ours, eager, keys = scores_in_both(query, rows, block_size, fp8)
    wanted = [heads - 1, *range(0, heads - 1, 2)]
    both = [(*scores.column_diagonal_scores(wanted), scores.mean_keys) for scores in (ours, eager)]
    exact = reference.column_diagonal_scores(query, keys, ours.scale, probe_groups(len(query)))
    exact = *(part[wanted] for part in exact), reference.page_means(keys, block_size)
    errors = {}
    for name, found, plain, right in zip(("columns", "diagonals", "means"), *both, exact, strict=True):
        assert found.shape == right.shape and torch.isfinite(found).all()
        differences = [float((scores.double() - right).abs().max()) for scores in (found, plain)]
        errors[name] = (differences[0], differences[1], float(found.max()))
    return errors


def run_antidiagonal_case(
    seq_len: int,
    context_len: int,
    block_size: int,
    stride: int,
    tile: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    dtype: str = "bfloat16",
    fp8: bool = False,
) -> tuple[float, float, float, float]:
    import torch

    from minference_vllm import reference
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.triton_kernels import antidiagonal as kernels

    # So that short sequences have several too.
    kernels.SQUARES_PER_PART = kernels.BLOCK_C
    torch.manual_seed(0)
    # Means over antidiagonals are small unless neighbours are similar.
    query = torch.randn(seq_len - context_len, heads, head_size) + 3 * torch.randn(heads, head_size)
    query, rows = query.to(getattr(torch, dtype)), torch.randn(seq_len, kv_heads, head_size)
    ours, eager, keys = scores_in_both(query, rows, block_size, fp8)
    wanted = [heads - 1, *range(0, heads - 1, 2)]
    tiling = Tiling.of(context_len, seq_len, block_size, tile)
    found, plain = (scores.antidiagonal(wanted, tiling, stride) for scores in (ours, eager))
    exact = reference.antidiagonal_scores(query, keys, tiling, stride, ours.scale)[wanted]
    assert found.shape == exact.shape and torch.isfinite(found).all()
    errors = [float((scores.double() - exact).abs().max()) for scores in (found, plain)]
    out_of_reach = float(found.masked_fill(tiling.reachable(), 0.0).abs().max())
    return errors[0], errors[1], out_of_reach, float((found.sum(-1) - 1).abs().max())


def run_index_case(context_len: int, seq_len: int, block_size: int) -> dict[str, Any]:
    """``sparse_prefill`` through every kernel, and the index that torch alone builds for it."""
    from triton_inputs import prefill

    from minference_vllm import AShape, BlockSparse, Dense, VerticalSlash
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.patterns.kinds import Antidiagonal, Coverage, PeakThreshold
    from minference_vllm.selection.build import build_index
    from minference_vllm.selection.torch_scores import TorchScores

    patterns = [VerticalSlash(vertical=40, slash=32), BlockSparse(top_k=1), AShape(sink=16, local=32), Dense()]
    patterns += [Coverage(gamma=0.5, min_budget=64), PeakThreshold(alpha=0.5, sink=16, window=32)]
    patterns += [Antidiagonal(stride=8, tau=0.5), Antidiagonal(stride=16, tau=0.5)]
    inputs, out, index, expected = prefill(context_len, seq_len, block_size, patterns, sharpness=2)
    by_torch = build_index(Tiling.of(context_len, seq_len, block_size, 128), patterns, TorchScores(inputs))
    return {
        "different": (index.to_mask() != by_torch.to_mask()).sum((1, 2)).tolist(),
        "density": float(index.density()[0]),
        "error": float((out.double() - expected).abs().max()),
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    results: dict[str, Any] = {name: run_case(**case) for name, case in CASES.items()}
    results |= {f"antidiagonal {name}": run_antidiagonal_case(**case) for name, case in ANTIDIAGONAL_CASES.items()}
    results |= {f"index {list(case)}": run_index_case(*case) for case in INDEX_CASES}
    print(json.dumps(results))
