"""The Triton score bins of ``low_rank`` in the interpreter against torch's, and ``sparse_prefill`` through them.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    "beyond the bins' reach": {"seq_len": 400, "context_len": 200, "page": 32, "tile": 64, "spread": 30.0},
}
INDEX_CASES = [(0, 389, 16), (301, 520, 32)]
"""(context, length, page size) of float32 chunks whose index must be the torch path's."""
MASS_CASES: dict[str, dict[str, Any]] = {
    "odd length": {"seq_len": 389, "context_len": 100, "page": 16},
    "soft cap": {"seq_len": 300, "context_len": 0, "page": 32, "softcap": 5.0},
    "window": {"seq_len": 420, "context_len": 250, "page": 48, "window": 180},
    "values of zero": {"seq_len": 200, "context_len": 64, "page": 32, "values": 0.0},
    "fewer rows than a power of two": {"seq_len": 400, "context_len": 100, "page": 128, "rows": 23},
}
CODE_CASES: dict[str, dict[str, Any]] = {
    "pages of 16": {"seq_len": 301, "page": 16},
    "head size 80, rank 48": {"seq_len": 200, "page": 32, "head_size": 80, "rank": 48},
    "FP8 keys with a scale": {"seq_len": 150, "page": 48, "fp8": True},
}
LIST_CASES: dict[str, dict[str, Any]] = {
    "pages of 16": {"context_len": 100, "seq_len": 389, "page": 16, "tile": 64},
    "pages of 48": {"context_len": 300, "seq_len": 700, "page": 48, "tile": 144},
    "too little room": {"context_len": 200, "seq_len": 700, "page": 128, "tile": 128, "width": 20},
}


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


@pytest.mark.parametrize("name", list(MASS_CASES))
def test_the_mass_by_bin_is_the_torch_paths(interpreted: dict[str, Any], name: str) -> None:
    error, repeated = interpreted[f"mass: {name}"]
    assert error < 2e-5 and repeated == 0, "sums of whole numbers"


@pytest.mark.parametrize("name", list(CODE_CASES))
def test_codes_are_the_torch_paths(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[f"codes: {name}"]
    # Elements near the middle of two numbers may be rounded either way.
    assert found["largest_difference"] <= 1 and found["different"] < 0.005 and found["spread"] > 10
    assert found["queries"] < 1e-5 and found["distances"] < 1e-5


@pytest.mark.parametrize("name", list(LIST_CASES))
def test_lists_are_the_torch_paths(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[f"lists: {name}"]
    assert found["same"] == [True] * 3, "blocks, keys, counts"
    assert found["blocks"] > 0 and found["keys"] > 0 and found["dense"] > 0


@pytest.mark.parametrize("case", INDEX_CASES, ids=str)
def test_the_index_is_the_torch_paths(interpreted: dict[str, Any], case: tuple[int, int, int]) -> None:
    found = interpreted[f"index {list(case)}"]
    assert found["different"] < 0.002, "share of pairs, where bins round otherwise"
    assert found["repeated"] == 0, "the same index twice"
    # Flat heads are dense by representatives.
    assert max(found["density"][:3]) < 0.7 and found["columns"] > 0
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
        kernels.tile_bins(QuantizedQK(query, keys, scale), Tiling.of(64, 128, 32, 32))


def run_case(
    seq_len: int,
    context_len: int,
    page: int,
    tile: int,
    rank: int = 16,
    spread: float = 1.5,
    far: bool = False,
    per_tile: int = 0,
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
    if per_tile:
        query = torch.randn(2, tiling.num_tiles * per_tile, rank) * spread
    quantized = as_quantized(query, keys)._replace(per_tile=per_tile)
    empty = torch.empty
    torch.empty = lambda *shape, **options: empty(*shape, **options).fill_(torch.nan)  # type: ignore[assignment]
    try:
        found = kernels.tile_bins(quantized, tiling)
    finally:
        torch.empty = empty
    right = tile_bins(quantized, tiling, torch.zeros(2, dtype=torch.int32))
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
) -> tuple[float, float]:
    """The largest error of a share, and of the sums of a second run."""
    import dataclasses

    import torch
    from triton_inputs import shuffled

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.low_rank import by_value, row_weights
    from minference_vllm.selection.score_bins import mass_by_bin
    from minference_vllm.triton_kernels import calibration

    calibration.KEYS_PER_PART = 128
    torch.manual_seed(0)
    chunk, heads = seq_len - context_len, [0, 3, 1]
    query, keys = torch.randn(chunk, 4, 64) * 2, torch.randn(seq_len, 2, 64)
    stored = torch.randn(seq_len, 2, 64) * torch.rand(seq_len, 2, 1) * values
    inputs = shuffled(query, keys, stored, page, 64**-0.5)
    inputs = dataclasses.replace(inputs, softcap=softcap, window=window)
    tiling = Tiling.of(context_len, seq_len, page, 2 * page)
    bins = torch.randint(0, 256, (3, tiling.num_tiles, seq_len), dtype=torch.uint8)
    chosen = torch.stack([torch.randperm(chunk)[:rows].sort().values for _ in heads])
    found, again = (calibration.mass_by_bin(inputs, query, heads, chosen, tiling, bins) for _ in range(2))
    of_heads = torch.stack([query[of_head, head] for of_head, head in zip(chosen, heads, strict=True)])
    kv_heads = torch.tensor(heads) // 2
    weights = row_weights(
        of_heads, [keys[:, kv_heads].transpose(0, 1)], chosen + context_len, 64**-0.5, softcap, window
    )
    weights = by_value(weights, stored.norm(dim=2)[:, kv_heads].T)
    tile = torch.searchsorted(tiling.starts, chosen + context_len, right=True) - 1
    right = mass_by_bin(bins, tile, weights)
    found /= found.sum(-1, keepdim=True)
    return float((found - right).abs().max()), float((again / again.sum(-1, keepdim=True) - found).abs().max())


def run_code_case(seq_len: int, page: int, head_size: int = 64, rank: int = 32, fp8: bool = False) -> dict[str, float]:
    import torch
    from triton_inputs import shuffled

    from minference_vllm.selection.probe_queries import unlikeness
    from minference_vllm.selection.projection import fit, for_int8, project_queries, quantize_keys
    from minference_vllm.triton_kernels import chunk_queries
    from minference_vllm.triton_kernels.key_codes import key_codes

    torch.manual_seed(0)
    query = (torch.randn(170, 4, head_size) + 3).bfloat16()
    keys = torch.randn(seq_len, 2, head_size).to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
    key_scale, heads = 0.75 if fp8 else 1.0, [3, 0]
    inputs = shuffled(query, keys, keys, page, 1.0, key_scale)
    of_heads = (keys.float() * key_scale)[:, [1, 0]].transpose(0, 1)
    queries = query[:, heads].transpose(0, 1)
    projection = for_int8(fit(queries, of_heads, rank), of_heads)
    found, right = key_codes(inputs, heads, projection).int(), quantize_keys(of_heads, projection).int()
    low = project_queries(queries, projection, 1.0)
    ours = chunk_queries.project(query, heads, projection, 1 / torch.tensor(2.0).log().item())
    distance = chunk_queries.distances(query, heads)
    unlike = unlikeness(queries)
    return {
        "largest_difference": int((found - right).abs().max()),
        "different": float((found != right).float().mean()),
        "spread": float(right.float().std()),
        "queries": float((ours - low).abs().max() / low.abs().max()),
        "distances": float((distance / distance.mean(1, keepdim=True) - unlike).abs().max()),
    }


def run_list_case(context_len: int, seq_len: int, page: int, tile: int, width: int = 300) -> dict[str, Any]:
    import torch

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.compaction import Capacity, compact_keys
    from minference_vllm.selection.score_bins import LOCAL_BIN, ScoreBins, keys_above
    from minference_vllm.triton_kernels import key_lists

    torch.manual_seed(0)
    key_lists.KEYS = 256
    tiling = Tiling.of(context_len, seq_len, page, tile)
    pages = tiling.own().repeat_interleave(page, 1)[:, :seq_len]
    reach = tiling.reachable().repeat_interleave(page, 1)[:, :seq_len]
    # Some pages full of wanted keys; a head that wants nearly all, and one without a threshold.
    full = (torch.rand(4, tiling.num_tiles, tiling.num_key_blocks) < 0.15).repeat_interleave(page, 2)[..., :seq_len]
    bins = (torch.rand(4, tiling.num_tiles, seq_len) * 100).to(torch.uint8)
    bins = bins.masked_fill_(full, 120).masked_fill_(pages, LOCAL_BIN).mul_(reach)
    found = ScoreBins(bins, torch.tensor([93, 97, 10, 0], dtype=torch.int32))
    capacity = Capacity(tiling.num_key_blocks, width, 4)
    right = compact_keys(tiling, *keys_above(tiling, bins, found.threshold), capacity)
    ours = key_lists.select(tiling, found, width)
    assert right.keys is not None and ours.keys is not None
    return {
        "same": [
            torch.equal(ours.blocks, right.blocks),
            torch.equal(ours.keys.positions, right.keys.positions),
            torch.equal(ours.keys.count, right.keys.count),
        ],
        "blocks": int((ours.blocks & ~tiling.own())[:2].sum()),
        "keys": int(ours.keys.count[:2].sum()),
        "dense": int(ours.blocks[2:].sum() - tiling.own().sum() * 2),
    }


def run_index_case(context_len: int, seq_len: int, page: int) -> dict[str, Any]:
    """``sparse_prefill`` through the kernels, and the index that torch alone builds for it."""
    import torch
    from triton_inputs import prefill

    from minference_vllm import LowRank
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection import low_rank
    from minference_vllm.selection.build import build_index
    from minference_vllm.selection.projection import QuantizedQK
    from minference_vllm.selection.score_bins import ScoreBins
    from minference_vllm.selection.torch_scores import TorchScores

    low_rank.SCORE_ERROR = 1e-9

    class ScoringAlways(TorchScores):
        """As the kernels' path: whatever columns and diagonals hold, in all dimensions, and of all keys."""

        def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
            return low_rank.score_keys(self, low_rank.Measured.of(self, heads, tiling), heads, tiling, pattern)

        @staticmethod
        def row_mass(quantized: QuantizedQK, rows: torch.Tensor, tiling: Tiling, weights: torch.Tensor) -> torch.Tensor:
            mass = torch.zeros(*rows.shape, 256)
            mass[..., 0] = 1
            return mass

    # Heads that are scored together are not all neighbours.
    patterns = [
        LowRank(gamma=0.3),
        LowRank(gamma=0.3),
        LowRank(rank=32, gamma=0.3),
        LowRank(gamma=0.2, queries=16),
    ]
    inputs, out, index, expected = prefill(context_len, seq_len, page, patterns, sharpness=4)
    _, _, again, _ = prefill(context_len, seq_len, page, patterns, sharpness=4)
    by_torch = build_index(Tiling.of(context_len, seq_len, page, 128), patterns, ScoringAlways(inputs))
    return {
        "different": float((index.to_mask() != by_torch.to_mask()).float().mean()),
        "repeated": int((index.to_mask() != again.to_mask()).sum()),
        "density": index.density().tolist(),
        "columns": int(index.num_columns.max()),
        "error": float((out.double() - expected).abs().max()),
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    results: dict[str, Any] = {name: run_case(**case) for name, case in CASES.items()}
    results |= {f"mass: {name}": run_mass_case(**case) for name, case in MASS_CASES.items()}
    results |= {f"codes: {name}": run_code_case(**case) for name, case in CODE_CASES.items()}
    results |= {f"lists: {name}": run_list_case(**case) for name, case in LIST_CASES.items()}
    results |= {f"index {list(case)}": run_index_case(*case) for case in INDEX_CASES}
    print(json.dumps(results))
