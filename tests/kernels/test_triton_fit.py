"""The dimensions, codes and representatives of ``low_rank`` by Triton in the interpreter against torch's.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")

CASES: dict[str, dict[str, Any]] = {
    "pages of 16": {"seq_len": 301, "page": 16, "context_len": 131},
    "head size 80, rank 48": {"seq_len": 200, "page": 32, "head_size": 80, "rank": 48},
    "FP8 keys with a scale": {"seq_len": 350, "page": 48, "fp8": True, "tile": 144, "context_len": 100},
    "a chunk within one tile": {"seq_len": 190, "page": 32, "tile": 128, "context_len": 130, "rank": 16},
    "rows that are much alike": {"seq_len": 301, "page": 16, "context_len": 131, "rank": 16, "spread": 0.05},
    "a few rows": {"seq_len": 67, "page": 32, "context_len": 60},
    "keys alike": {"seq_len": 200, "page": 32, "degenerate": "keys alike"},
    "queries of zero": {"seq_len": 200, "page": 32, "degenerate": "queries of zero"},
}


@pytest.mark.parametrize("name", list(CASES))
def test_rows_dimensions_and_codes_are_the_torch_paths(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    assert found["finite"] and found["rows"]
    # float32 instead of float64, and another order of the samples.
    assert found["scores"] < 0.01 and found["lost"][0] < found["lost"][1] * 1.01 + 3e-3
    if "degenerate" in CASES[name]:
        return
    # Elements near the middle between two integers may be rounded either way.
    assert found["largest_difference"] <= 1 and found["different"] < 0.005 and found["spread"] > 10
    assert 100 < found["longest_key"] < 160
    assert found["positions"] == 0 and found["queries"] <= 1 and found["scales"] < 1e-3
    # Elements are those of int8.
    assert found["their positions"] < 0.02
    assert max(found["representatives"]) < 0.02
    assert found["counts"][0] == found["counts"][1]
    assert (max(found["counts"][0]) > 16) == (name not in ("a few rows", "rows that are much alike"))


def run_case(
    seq_len: int,
    page: int,
    head_size: int = 64,
    rank: int = 32,
    fp8: bool = False,
    context_len: int = 0,
    tile: int = 64,
    degenerate: str = "",
    spread: float = 1.0,
) -> dict[str, Any]:
    """Codes of a chunk's queries and of the pages, by the kernels and by torch."""
    import torch
    from triton_inputs import shuffled

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.low_rank import fitted
    from minference_vllm.selection.measured_rows import calibration_rows, drawn_rows
    from minference_vllm.selection.probe_queries import unlikeness
    from minference_vllm.selection.projection import QuantizedQK, project_queries, quantize_keys
    from minference_vllm.selection.tile_queries import all_rows, representatives
    from minference_vllm.triton_kernels import chunk_queries, fit, key_codes
    from minference_vllm.triton_kernels import representatives as representatives_kernel

    torch.manual_seed(0)
    chunk, dtype = seq_len - context_len, torch.float8_e4m3fn if fp8 else torch.bfloat16
    mixed = torch.linalg.qr(torch.randn(head_size, head_size)).Q * torch.logspace(0.5, -1.5, head_size)[:, None]
    query = (torch.randn(chunk, 4, head_size) @ mixed * spread + 3).bfloat16()
    keys = (torch.randn(seq_len, 2, head_size) @ mixed.flip(0) + 1).to(dtype)
    if degenerate == "keys alike":
        keys = torch.ones_like(keys.float()).to(dtype)
    elif degenerate == "queries of zero":
        query.zero_()
    key_scale, heads = 0.75 if fp8 else 1.0, [3, 0]
    inputs = shuffled(query, keys, keys, page, 1.0, key_scale)
    tiling = Tiling.of(context_len, seq_len, page, tile)
    drawn = drawn_rows(chunk, seq_len, query.device)
    queries, of_heads = query[:, heads].transpose(0, 1), (keys.float() * key_scale)[:, [1, 0]].transpose(0, 1)
    rows = chunk_queries.measured_rows(query, heads, drawn)
    right_rows = calibration_rows(unlikeness(queries), seq_len)
    alone = rows[:, drawn.sampled :, None].expand(-1, -1, head_size)
    ((_, right),) = fitted(queries, queries.gather(1, alone), of_heads, rank)
    found = fit.fitted(inputs, query, heads, rows[:, drawn.sampled :], rank)

    def scores(projection: Any) -> torch.Tensor:
        low = (of_heads - projection.mean).double() @ projection.to_key.double()
        return queries.double() @ projection.to_query.double() @ low.transpose(1, 2)

    exact = queries.double() @ (of_heads - of_heads.mean(1, keepdim=True)).double().transpose(1, 2)
    size = exact.square().mean().sqrt().clamp(min=1e-9)
    # The other steps use the same projection for both.
    codes, right_codes = key_codes.key_codes(inputs, heads, right).int(), quantize_keys(of_heads, right).int()
    low = project_queries(queries, right, 1.0)
    factor = 1 / torch.tensor(2.0).log().item()
    expected = representatives(low, right.key_size, tiling, 16)
    right_chosen = expected.low
    ours = chunk_queries.query_codes(query, heads, right, factor, right_codes, tiling)
    chosen = representatives_kernel.representative_codes(query, heads, right, factor, right_codes, tiling, 16)
    theirs = QuantizedQK.of(*all_rows(low, tiling), right_codes)

    def by_tile(rows: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """``[h, T, n, ...]``, with a tile's first row repeated past its count."""
        rows = rows.unflatten(1, (tiling.num_tiles, -1))
        place = torch.arange(rows.shape[2])
        place = torch.where(place < count[..., None], place, 0).view(*rows.shape[:3], *[1] * (rows.dim() - 3))
        return rows.gather(2, place.expand(rows.shape))

    # Representatives of a tile may be in any order.
    in_bits = by_tile(chosen.query, chosen.count) * chosen.bits()[..., None, None]
    rows_of = (by_tile(chosen.position, chosen.count) - context_len).long().flatten(1)[..., None].expand(-1, -1, rank)
    apart = torch.cdist(in_bits, by_tile(right_chosen, expected.count), p=torch.inf) / right_chosen.abs().max()
    apart = torch.maximum(apart.amin(2).amax(2), apart.amin(3).amax(2))
    query_error = by_tile(ours.query.int(), theirs.count) - by_tile(theirs.query.int(), theirs.count)
    place_error = by_tile(ours.position, theirs.count) - by_tile(theirs.position, theirs.count)
    return {
        "finite": all(bool(torch.isfinite(part).all()) for part in found),
        "rows": bool(torch.equal(rows.sort(1).values, right_rows.rows)),
        "scores": float((scores(found) - scores(right)).square().mean().sqrt() / size),
        "lost": [float((scores(part) - exact).square().mean().sqrt() / size) for part in (found, right)],
        "longest_key": float(quantize_keys(of_heads, found).float().norm(dim=2).max()),
        "largest_difference": int((codes - right_codes).abs().max()),
        "different": float((codes != right_codes).float().mean()),
        "spread": float(right_codes.float().std()),
        "positions": int(place_error.abs().max()) + int((ours.count - theirs.count).abs().max()),
        "queries": int(query_error.abs().max()),
        "scales": float((ours.dequant_scale.float() / theirs.dequant_scale.float() - 1).abs().max()),
        "representatives": apart.flatten().tolist(),
        "counts": [chosen.count.flatten().tolist(), expected.count.flatten().tolist()],
        "their positions": float((in_bits.flatten(1, 2) - low.gather(1, rows_of)).abs().max() / low.abs().max()),
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    print(json.dumps({name: run_case(**case) for name, case in CASES.items()}))
