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
    "representatives": {"seq_len": 517, "context_len": 200, "page": 32, "tile": 64, "per_tile": 16},
    "representatives, chunk within one tile": {
        "seq_len": 190,
        "context_len": 130,
        "page": 32,
        "tile": 128,
        "rank": 32,
        "per_tile": 16,
    },
    "representatives, long": {"seq_len": 6300, "context_len": 6201, "page": 16, "tile": 48, "per_tile": 16},
    "all rows of some tiles": {
        "seq_len": 907,
        "context_len": 250,
        "page": 32,
        "tile": 64,
        "per_tile": 64,
        "few": 16,
        "window": 500,
    },
    "all rows of some tiles, rank 32": {
        "seq_len": 800,
        "context_len": 0,
        "page": 48,
        "tile": 144,
        "rank": 32,
        "per_tile": 72,
        "few": 32,
    },
    "long before a chunk, all rows": {"seq_len": 4400, "context_len": 4370, "page": 16, "tile": 48},
    "a window": {"seq_len": 700, "context_len": 401, "page": 32, "tile": 64, "window": 200},
    "beyond the bins' reach": {"seq_len": 400, "context_len": 200, "page": 32, "tile": 64, "spread": 30.0},
}
INDEX_CASES = [(0, 1000, 16), (301, 800, 32)]
"""(context, length, page size) of float32 chunks whose index must be the torch path's."""
MASS_CASES: dict[str, dict[str, Any]] = {
    "odd length": {"seq_len": 389, "context_len": 100, "page": 16},
    "soft cap": {"seq_len": 300, "context_len": 0, "page": 32, "softcap": 5.0},
    "window": {"seq_len": 420, "context_len": 250, "page": 48, "window": 180},
    "values of zero": {"seq_len": 200, "context_len": 64, "page": 32, "values": 0.0},
    "fewer rows than a power of two": {"seq_len": 400, "context_len": 100, "page": 128, "rows": 23},
    "squares": {"seq_len": 389, "context_len": 100, "page": 16, "squared": True},
    "squares, window": {"seq_len": 420, "context_len": 250, "page": 48, "window": 180, "squared": True},
}


@pytest.mark.parametrize("name", list(CASES))
def test_bins_are_the_torch_paths(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    # Sums in another order may round a bin differently.
    assert found["largest_difference"] <= 1 and found["different"] < 0.01
    assert found["own_and_later"] == 0
    if name == "each row looks at a key far before it":
        assert found["wanted"] > 200, "the bins of the keys that are looked at"
        assert found["median"] < 150, "and of all others"
    if name == "beyond the bins' reach":
        assert found["median"] == 0


@pytest.mark.parametrize("name", list(MASS_CASES))
def test_what_rows_miss_is_the_torch_paths(interpreted: dict[str, Any], name: str) -> None:
    error, repeated = interpreted[f"mass: {name}"]
    assert error < 2e-5 and repeated == 0


@pytest.mark.parametrize("case", INDEX_CASES, ids=str)
def test_the_index_is_the_torch_paths(interpreted: dict[str, Any], case: tuple[int, int, int]) -> None:
    found = interpreted[f"index {list(case)}"]
    assert found["different"] < 0.002, "share of pairs, where bins or thresholds round otherwise"
    assert found["repeated"] == 0, "the same index twice"
    # With representatives flat heads are dense.
    assert max(found["density"][:3]) < 0.7 and found["columns"] > 0
    # One key more or less shifts the sample of the following keys by one.
    assert found["sampled"] == [4, 5] and found["counts"] < 0.01 and (found["drawn"] > 0.01 or not case[0])
    assert found["error"] < 3e-5, "float32, of scores in the tens"


@pytest.mark.parametrize("name", ["length", "rows", "scales", "type"])
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    import torch

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.projection import QuantizedQK
    from minference_vllm.triton_kernels import low_rank as kernels

    query, keys = torch.zeros(1, 64, 16, dtype=torch.int8), torch.zeros(1, 128, 16, dtype=torch.int8)
    scale = torch.ones(1, 3 if name == "scales" else 2, dtype=torch.int16)
    query = query[:, 1:] if name == "rows" else query
    keys = {"length": keys[:, 1:], "type": keys.float()}.get(name, keys)
    position, count = torch.zeros(1, 64, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="must be int8" if name == "type" else "do not fit"):
        kernels.tile_bins(QuantizedQK(query, position, count, keys, scale), Tiling.of(64, 128, 32, 32))


def run_case(
    seq_len: int,
    context_len: int,
    page: int,
    tile: int,
    rank: int = 16,
    spread: float = 1.5,
    far: bool = False,
    per_tile: int = 0,
    few: int = 0,
    window: int = 0,
) -> dict[str, float]:
    import torch
    from low_rank_inputs import as_quantized

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.score_bins import hide_before_window, tile_bins
    from minference_vllm.triton_kernels import approx_lse, representative_bins
    from minference_vllm.triton_kernels import low_rank as kernels
    from minference_vllm.triton_kernels import tile_bins as bins_by_tile

    # So that short sequences have several too.
    bins_by_tile.STRIP = representative_bins.STRIP = 256
    approx_lse.GROUPS_PER_PART, approx_lse.BLOCK_M = 4, 32
    torch.manual_seed(0)
    tiling = Tiling.of(context_len, seq_len, page, tile, window=window)
    chunk = seq_len - context_len
    query, keys = torch.randn(2, chunk, rank) * spread, torch.randn(2, seq_len, rank)
    wanted = torch.randint(0, 400, (chunk,))
    if far:
        keys = torch.nn.functional.normalize(keys, dim=-1)
        query = 40 * keys[:, wanted]
    if per_tile:
        query = torch.randn(2, tiling.num_tiles * per_tile, rank) * spread
    quantized = as_quantized(query, keys, tiling, per_tile, few)
    empty = torch.empty

    def poisoned(*shape: int, **options: Any) -> torch.Tensor:
        found = empty(*shape, **options)
        return found.fill_(torch.nan if found.is_floating_point() else 77)

    torch.empty = poisoned  # type: ignore[assignment]
    try:
        found = kernels.tile_bins(quantized, tiling, few or per_tile)
    finally:
        torch.empty = empty
    right = hide_before_window(tile_bins(quantized, tiling, torch.zeros(2, dtype=torch.bool)), tiling)
    assert found.shape == right.shape and found.dtype == right.dtype
    difference = (found.int() - right.int()).abs()
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


def run_mass_case(
    seq_len: int,
    context_len: int,
    page: int,
    rows: int = 32,
    softcap: float = 0.0,
    window: int = 0,
    values: float = 1.0,
    squared: bool = False,
) -> tuple[float, float]:
    """The largest error of the missed shares below the levels, or of the squares by ramps; and the largest difference
    of the sums in a second run."""
    import dataclasses

    import torch
    from low_rank_inputs import missed_below, ramps
    from triton_inputs import shuffled

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.measured_rows import by_value, row_weights
    from minference_vllm.selection.score_bins import mass_by_bin
    from minference_vllm.triton_kernels import calibration

    calibration.KEYS_PER_PART = 192
    torch.manual_seed(0)
    chunk, heads = seq_len - context_len, [0, 3, 1]
    query, keys = torch.randn(chunk, 4, 64) * 2, torch.randn(seq_len, 2, 64)
    stored = torch.randn(seq_len, 2, 64) * torch.rand(seq_len, 2, 1) * values
    inputs = shuffled(query, keys, stored, page, 64**-0.5)
    inputs = dataclasses.replace(inputs, softcap=softcap, window=window)
    tiling = Tiling.of(context_len, seq_len, page, 2 * page)
    bins = torch.randint(0, 256, (3, tiling.num_tiles, seq_len), dtype=torch.uint8)
    chosen = torch.stack([torch.randperm(chunk)[:rows].sort().values for _ in heads])
    norms = calibration.value_norms(inputs)
    found, again = (
        calibration.share_levels(inputs, query, heads, chosen, tiling, bins, norms, squared) for _ in range(2)
    )
    of_heads = torch.stack([query[of_head, head] for of_head, head in zip(chosen, heads, strict=True)])
    kv_heads = torch.tensor(heads) // 2
    weights = row_weights(
        of_heads, [keys[:, kv_heads].transpose(0, 1)], chosen + context_len, 64**-0.5, softcap, window
    )
    weights = by_value(weights, stored.norm(dim=2)[:, kv_heads].T)
    tile = torch.searchsorted(tiling.starts, chosen + context_len, right=True) - 1
    right = missed_below(mass_by_bin(bins, tile, weights))[..., list(calibration.LEVELS.value)]
    if squared:
        right = mass_by_bin(bins, tile, weights, squared=True).double() @ ramps().T
    most = found[:, :, :1].double().exp2()
    total = (found[:, :, 1:2].double() * most).sum(1)
    below = (found[:, :, 2:].double() * (most**2 if squared else most)).sum(1)
    difference = (below / (total**2 if squared else total)).transpose(1, 2) - right
    return float(difference.abs().max()), float((again - found).nan_to_num().abs().max())


def run_index_case(context_len: int, seq_len: int, page: int) -> dict[str, Any]:
    """``sparse_prefill`` through the kernels, and the index that torch alone builds for it."""
    from low_rank_inputs import noise_threshold_of_levels, threshold_of_levels
    from triton_inputs import prefill

    from minference_vllm import LowRank
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.build import build_index
    from minference_vllm.selection.measured_rows import CalibrationRows
    from minference_vllm.selection.torch_scores import TorchScores

    # Thresholds from levels, like the kernel's.
    CalibrationRows.threshold = threshold_of_levels  # type: ignore[method-assign]
    CalibrationRows.sampling_threshold = noise_threshold_of_levels  # type: ignore[method-assign]

    # Not all heads that are scored together are neighbours.
    patterns = [
        LowRank(gamma=0.5),
        LowRank(gamma=0.5),
        LowRank(rank=32, gamma=0.5),
        LowRank(gamma=0.5, queries=16),
        LowRank(noise=0.5, queries=16),
        LowRank(rank=32, noise=0.5, remainder=True),
    ]
    inputs, out, index, expected = prefill(context_len, seq_len, page, patterns, sharpness=10)
    _, _, again, _ = prefill(context_len, seq_len, page, patterns, sharpness=10)
    by_torch = build_index(Tiling.of(context_len, seq_len, page, 128), patterns, TorchScores(inputs))
    return {
        "different": float((index.to_mask() != by_torch.to_mask()).float().mean()),
        "repeated": int((index.to_mask() != again.to_mask()).sum()),
        "density": index.density().tolist(),
        "columns": int(index.num_columns.max()),
        "sampled": list(index.sampled),
        "counts": float((counts_of(index) != counts_of(by_torch)).float().mean()),
        "drawn": float((counts_of(index)[4:] > 1).float().mean()),
        "error": float((out.double() - expected).abs().max()),
    }


def counts_of(index: Any) -> Any:
    import torch

    return index.tile_counts(torch.arange(index.num_tiles), last=index.tiling.seq_len)


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    results: dict[str, Any] = {name: run_case(**case) for name, case in CASES.items()}
    results |= {f"mass: {name}": run_mass_case(**case) for name, case in MASS_CASES.items()}
    results |= {f"index {list(case)}": run_index_case(*case) for case in INDEX_CASES}
    print(json.dumps(results))
