"""The Triton score bins of ``low_rank`` in the interpreter against torch's, and ``sparse_prefill`` through them.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")

CASES: dict[str, dict[str, Any]] = {
    "odd length": {"seq_len": 389, "context_len": 0, "page": 32, "tile": 64},
    "chunk inside a page, rank 32": {"seq_len": 600, "context_len": 301, "page": 32, "tile": 64, "rank": 32},
    "rank 48, tiles of three pages": {"seq_len": 400, "context_len": 150, "page": 48, "tile": 144, "rank": 48},
    "tiles of more rows than one step takes": {"seq_len": 700, "context_len": 401, "page": 128, "tile": 256},
    "chunk within one tile": {"seq_len": 190, "context_len": 130, "page": 32, "tile": 128},
    "one token": {"seq_len": 1, "context_len": 0, "page": 16, "tile": 16},
    "one token after context": {"seq_len": 301, "context_len": 300, "page": 16, "tile": 32},
    "a flat head": {"seq_len": 333, "context_len": 100, "page": 16, "tile": 64, "spread": 0.0},
    "each row looks at a key far before it": {"seq_len": 700, "context_len": 500, "page": 32, "tile": 64, "far": True},
    "bins that are not wanted": {"seq_len": 517, "context_len": 200, "page": 32, "tile": 64, "lowest_wanted": 230},
    "beyond the bins' reach": {"seq_len": 400, "context_len": 200, "page": 32, "tile": 64, "spread": 30.0},
}
INDEX_CASES = [(0, 389, 16), (301, 520, 32)]
"""(context, length, page size) of float32 chunks whose index must be the torch path's."""


@pytest.mark.parametrize("name", list(CASES))
def test_bins_are_the_torch_paths(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    # Sums in another order may round a bin the other way.
    assert found["largest_difference"] <= 1 and found["different"] < 0.01
    assert found["own_and_later"] == 0
    if name == "each row looks at a key far before it":
        assert found["wanted"] > 200, "the bins of the keys that are looked at"
        assert found["median"] < 150, "and of all others"
    if name == "beyond the bins' reach":
        assert found["median"] == 0


@pytest.mark.parametrize("case", ["bins of tiles", "bins for each row"])
def test_the_mass_by_bin_is_the_torch_paths(interpreted: dict[str, Any], case: str) -> None:
    error, sums = interpreted[f"mass: {case}"]
    assert error < 1e-6 and sums < 1e-5


@pytest.mark.parametrize("case", INDEX_CASES, ids=str)
def test_the_index_is_the_torch_paths(interpreted: dict[str, Any], case: tuple[int, int, int]) -> None:
    found = interpreted[f"index {list(case)}"]
    assert found["different"] < 0.002, "share of pairs, where bins round otherwise"
    assert max(found["density"]) < 0.7 and found["columns"] > 0
    assert found["error"] < 1e-5


@pytest.mark.parametrize("name", ["length", "rows", "scales", "type"])
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    import torch

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.projection import QuantizedQK
    from minference_vllm.triton_kernels import low_rank as kernels

    query, keys = torch.zeros(1, 64, 16, dtype=torch.int8), torch.zeros(1, 128, 16, dtype=torch.int8)
    scale = torch.ones(1, 63 if name == "scales" else 64, dtype=torch.int16)
    query = query[:, 1:] if name == "rows" else query
    keys = {"length": keys[:, 1:], "type": keys.float()}.get(name, keys)
    with pytest.raises(ValueError, match="must be int8" if name == "type" else "do not fit"):
        kernels.tile_bins(
            QuantizedQK(query, keys, scale), Tiling.of(64, 128, 32, 32), torch.zeros(1, dtype=torch.int32)
        )


def run_case(
    seq_len: int,
    context_len: int,
    page: int,
    tile: int,
    rank: int = 16,
    spread: float = 1.5,
    far: bool = False,
    lowest_wanted: int = 0,
) -> dict[str, float]:
    import torch
    from low_rank_inputs import as_quantized

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.score_bins import tile_bins
    from minference_vllm.triton_kernels import low_rank as kernels

    # So that short sequences have several, too.
    kernels.KEYS_PER_PART = kernels.STRIP = 256
    torch.manual_seed(0)
    tiling = Tiling.of(context_len, seq_len, page, tile)
    chunk = seq_len - context_len
    query, keys = torch.randn(2, chunk, rank) * spread, torch.randn(2, seq_len, rank)
    wanted = torch.randint(0, 400, (chunk,))
    if far:
        keys = torch.nn.functional.normalize(keys, dim=-1)
        query = 40 * keys[:, wanted]
    quantized = as_quantized(query, keys)
    lowest = torch.tensor([0, lowest_wanted], dtype=torch.int32)
    empty = torch.empty
    torch.empty = lambda *shape, **options: empty(*shape, **options).fill_(torch.nan)  # type: ignore[assignment]
    try:
        found = kernels.tile_bins(quantized, tiling, lowest)
    finally:
        torch.empty = empty
    right = tile_bins(quantized, tiling, lowest)
    assert found.shape == right.shape and found.dtype == right.dtype
    assert not ((found[1] > 0) & (found[1] < lowest_wanted)).any()
    # The lowest that is wanted may round to one that is not.
    least = torch.tensor([0, max(0, lowest_wanted - 1)])[:, None, None]
    difference = (found.int().maximum(least) - right.int().maximum(least)).abs()
    before = (torch.arange(seq_len) < (tiling.starts[:-1] // tile * tile)[:, None]).expand_as(difference)
    tiles = (torch.arange(chunk) + context_len) // tile - context_len // tile
    looked_at = found[:, tiles, wanted.clamp(max=seq_len - 1)] if far else found
    return {
        "largest_difference": int(difference.max()),
        "different": float((difference > 0).float().mean()),
        "own_and_later": int(difference[~before].sum()),
        "wanted": int(looked_at.min()),
        "median": int(found[before].median()) if before.any() else 0,
    }


def run_mass_case(bin_row: list[int]) -> tuple[float, float]:
    import torch

    from minference_vllm.selection.score_bins import mass_by_bin
    from minference_vllm.triton_kernels import low_rank as kernels

    torch.manual_seed(0)
    bins = torch.randint(0, 256, (3, max(bin_row) + 1, 1333), dtype=torch.uint8)
    weights = torch.randn(3, len(bin_row), 1333).mul_(3).softmax(-1)
    weights[:, :, 1000:] = 0
    weights /= weights.sum(-1, keepdim=True)
    # Of each head its own.
    given = bins, torch.stack([torch.tensor(bin_row).roll(head) for head in range(3)]), weights
    found, right = kernels.mass_by_bin(*given), mass_by_bin(*given)
    assert found.shape == right.shape
    return float((found - right).abs().max()), float((found.sum(-1) - 1).abs().max())


def run_index_case(context_len: int, seq_len: int, page: int) -> dict[str, Any]:
    """``sparse_prefill`` through the kernels, and the index that torch alone builds for it."""
    from triton_inputs import prefill

    from minference_vllm import LowRank
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.build import build_index
    from minference_vllm.selection.torch_scores import TorchScores

    class ScoringAlways(TorchScores):
        """As the kernels' path, which does not look whether columns and diagonals would do."""

        columns_first = False

    # Heads that are scored together are not all neighbours.
    patterns = [LowRank(gamma=0.4), LowRank(gamma=0.4), LowRank(rank=32, gamma=0.4), LowRank(gamma=0.4)]
    inputs, out, index, expected = prefill(context_len, seq_len, page, patterns, sharpness=4)
    by_torch = build_index(Tiling.of(context_len, seq_len, page, 128), patterns, ScoringAlways(inputs))
    return {
        "different": float((index.to_mask() != by_torch.to_mask()).float().mean()),
        "density": index.density().tolist(),
        "columns": int(index.num_columns.max()),
        "error": float((out.double() - expected).abs().max()),
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    results: dict[str, Any] = {name: run_case(**case) for name, case in CASES.items()}
    results["mass: bins of tiles"] = run_mass_case([0, 0, 1, 3])
    results["mass: bins for each row"] = run_mass_case([0, 1, 2])
    results |= {f"index {list(case)}": run_index_case(*case) for case in INDEX_CASES}
    print(json.dumps(results))
