"""The Triton kernels from measured rows to an index's lists, in the interpreter against torch's.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")

THRESHOLD_CASES = [(8192, 0.9, 1.0), (700, 0.94, 2.0), (20, 0.5, 0.5), (1, 0.9, 1.0), (4096, 0.99, 3.0)]
"""(rows of the chunk, gamma, how much bins differ)."""
NOISE_CASES = [(8192, 0.025, 1.0), (700, 0.05, 2.0), (20, 0.04, 0.5), (1, 0.04, 1.0), (4096, 0.01, 3.0)]
"""(rows of the chunk, noise, how much bins differ)."""
LIST_CASES: dict[str, dict[str, Any]] = {
    "pages of 16": {"context_len": 100, "seq_len": 389, "page": 16, "tile": 64},
    "pages of 48": {"context_len": 300, "seq_len": 700, "page": 48, "tile": 144},
    "a window": {"context_len": 300, "seq_len": 700, "page": 16, "tile": 64, "window": 230},
    "too little room": {"context_len": 200, "seq_len": 700, "page": 128, "tile": 128, "width": 20},
    "too little room for blocks": {"context_len": 200, "seq_len": 700, "page": 16, "tile": 64, "blocks": 9},
    "a sample": {"context_len": 100, "seq_len": 389, "page": 16, "tile": 64, "sampled": True},
    "a sample, pages of 48": {"context_len": 901, "seq_len": 1300, "page": 48, "tile": 144, "sampled": True},
    "a sample, a window": {
        "context_len": 300,
        "seq_len": 700,
        "page": 16,
        "tile": 64,
        "window": 230,
        "sampled": True,
    },
    "a sample, too little room": {
        "context_len": 200,
        "seq_len": 700,
        "page": 128,
        "tile": 128,
        "width": 20,
        "sampled": True,
    },
}


@pytest.mark.parametrize("case", THRESHOLD_CASES, ids=str)
def test_thresholds_are_the_torch_paths(interpreted: dict[str, Any], case: tuple[int, float, float]) -> None:
    found = interpreted[f"threshold {list(case)}"]
    assert max(found["differences"]) <= 1 and 0 < found["lowest"] <= found["highest"] < 255
    # Values between levels are not known, so thresholds tend to be too low.
    assert max(found["above"]) <= 2 and -16 < sum(found["above"]) / 3 < 1
    assert found["not numbers"] == found["nothing"] == 0 and found["little"] == found["highest level"]


@pytest.mark.parametrize("case", NOISE_CASES, ids=str)
def test_thresholds_keep_the_noise(interpreted: dict[str, Any], case: tuple[int, float, float]) -> None:
    found = interpreted[f"noise {list(case)}"]
    # Linear interpolation between levels, so thresholds tend to be too low.
    assert max(found["above"]) <= 1 and min(found["above"]) >= -3
    assert 148 < found["lowest"] <= found["highest"] < 232, "where the kernel has levels"
    assert found["not numbers"] == found["much"] == 0 and found["little"] == found["highest level"]


@pytest.mark.parametrize("name", list(LIST_CASES))
def test_lists_are_the_torch_paths(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[f"lists: {name}"]
    expected = [True] * (6 if "sample" in name else 5)
    assert found["same"] == expected, "blocks, their counts, keys, their counts, overflowed tiles, codes"
    assert found["untouched"]
    assert found["blocks"] > 0 and found["dense"] > 0
    assert found["overflowed"] > 0 if "room" in name else found["keys"] > 0 == found["overflowed"]
    if "sample" in name and "room" not in name:
        assert 36 < found["codes"] <= 60


def run_threshold_case(chunk: int, gamma: float, sharpness: float) -> dict[str, Any]:
    """How far the kernel's thresholds lie from torch's, and from those of all bins."""
    import torch
    from low_rank_inputs import threshold_of_levels

    from minference_vllm import LowRank
    from minference_vllm.selection.measured_rows import CalibrationRows, drawn_rows
    from minference_vllm.triton_kernels.calibration import LEVELS
    from minference_vllm.triton_kernels.thresholds import thresholds

    torch.manual_seed(0)
    drawn = drawn_rows(chunk, 4 * chunk, torch.device("cpu"))
    count = drawn.sampled + drawn.last + drawn.unlike
    # As in real heads, most of the attention lies 3 to 16 bits below the denominator, on different keys for every row.
    middle = torch.linspace(200, 185, count)[:, None] + sharpness * torch.randn(3, count, 1)
    mass = (-(((torch.arange(256) - middle) / 22) ** 2) + 0.2 * torch.randn(3, count, 256)).exp()
    places = torch.arange(count).expand(3, -1)
    sample, *others = places.split([drawn.sampled, drawn.last, drawn.unlike], 1)
    rows = CalibrationRows(places, sample, tuple(group for group in others if group.shape[1]))

    def levels_of(mass: Any) -> Any:
        """Levels of two parts of the keys, and of one that no row sees."""
        first = torch.rand(256)
        parts = torch.stack([first, 1 - first, torch.zeros(256)])[None, :, None] * mass[:, None]
        most = parts.amax(-1, keepdim=True)
        sums = [(parts / most).nan_to_num()[..., :high].sum(-1) for high in (256, *LEVELS.value)]
        return torch.stack([most[..., 0].log2(), *sums], 2)

    levels, pattern = levels_of(mass), LowRank(gamma=gamma)
    found, exact = thresholds(levels, drawn, pattern), rows.threshold(mass, gamma)
    low, high = (torch.zeros_like(mass).index_fill_(2, torch.tensor(bin_), 1.0) for bin_ in (3, 255))
    no_numbers = levels.clone()
    no_numbers[:, 1, 1:, -1] = torch.nan
    return {
        "differences": (found - threshold_of_levels(rows, mass, gamma)).abs().tolist(),
        "above": (found - exact).tolist(),
        "lowest": int(exact.min()),
        "highest": int(exact.max()),
        "not numbers": int(thresholds(no_numbers, drawn, pattern).max()),
        "nothing": int(thresholds(levels_of(low), drawn, pattern).max()),
        "little": int(thresholds(levels_of(high), drawn, pattern).min()),
        "highest level": LEVELS.value[-1],
    }


def run_noise_case(chunk: int, noise: float, sharpness: float) -> dict[str, Any]:
    """How far the kernel's thresholds of sampled heads lie from torch's."""
    import torch
    from low_rank_inputs import knots, ramps

    from minference_vllm import LowRank
    from minference_vllm.selection.measured_rows import CalibrationRows, drawn_rows
    from minference_vllm.triton_kernels.thresholds import thresholds

    torch.manual_seed(0)
    drawn = drawn_rows(chunk, 4 * chunk, torch.device("cpu"))
    count = drawn.sampled + drawn.last + drawn.unlike
    # Keys in every bin: lower bins have more keys with smaller shares.
    bins = torch.arange(256)
    share = torch.exp2((bins - 254 + sharpness * torch.randn(3, count, 1)) / 6)
    keys = torch.exp2((254 - bins) / 9) * (0.3 * torch.randn(3, count, 256)).exp() * (bins > 90) / 40
    total = (share * keys).sum(-1, keepdim=True)
    squares = share.square() * keys / total**2
    places = torch.arange(count).expand(3, -1)
    sample, *others = places.split([drawn.sampled, drawn.last, drawn.unlike], 1)
    rows = CalibrationRows(places, sample, tuple(group for group in others if group.shape[1]))

    def levels_of(squares: Any) -> Any:
        """Levels of two parts of the keys with their own maxima, and of one that no row sees."""
        first = torch.rand(256)
        parts = []
        for part, of_all, most in ((first, 0.3, 3.0), (1 - first, 0.7, -2.0), (0 * first, 0.0, -torch.inf)):
            unit = 2.0**most if most > -torch.inf else 1.0
            sums = (part * squares) @ ramps().float().T / unit**2
            head = torch.full((3, count, 1), most), torch.full((3, count, 1), of_all / unit)
            parts.append(torch.cat([*head, sums], -1).transpose(1, 2))
        return torch.stack(parts, 1)

    pattern = LowRank(noise=noise)
    levels = levels_of(squares)
    found, exact = thresholds(levels, drawn, pattern), rows.sampling_threshold(squares, noise)
    no_numbers = levels.clone()
    no_numbers[:, 1, 1:, -1] = torch.nan
    much, little = (torch.zeros_like(squares).index_fill_(2, torch.tensor(bin_), 1.0) for bin_ in (3, 255))
    return {
        "above": (found - exact).tolist(),
        "lowest": int(exact.min()),
        "highest": int(exact.max()),
        "not numbers": int(thresholds(no_numbers, drawn, pattern).max()),
        "much": int(thresholds(levels_of(much), drawn, pattern).max()),
        "little": int(thresholds(levels_of(little), drawn, pattern).min()),
        "highest level": int(knots()[-1]),
    }


def run_list_case(
    context_len: int,
    seq_len: int,
    page: int,
    tile: int,
    width: int = 300,
    blocks: int = 0,
    window: int = 0,
    sampled: bool = False,
) -> dict[str, Any]:
    import torch

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection import build
    from minference_vllm.selection.compaction import Capacity, Lists, compact_keys
    from minference_vllm.selection.score_bins import (
        LOCAL_BIN,
        ScoreBins,
        hide_before_window,
        keys_above,
        sampled_keys,
    )
    from minference_vllm.triton_kernels import key_lists

    torch.manual_seed(0)
    key_lists.KEYS = 256
    tiling = Tiling.of(context_len, seq_len, page, tile, window=window)
    pages = tiling.own().repeat_interleave(page, 1)[:, :seq_len]
    reach = tiling.reachable().repeat_interleave(page, 1)[:, :seq_len]
    # Some pages full of selected keys; a head that selects nearly all, and one without a threshold.
    full = (torch.rand(4, tiling.num_tiles, tiling.num_key_blocks) < 0.15).repeat_interleave(page, 2)[..., :seq_len]
    bins = (torch.rand(4, tiling.num_tiles, seq_len) * 100).to(torch.uint8)
    bins = bins.masked_fill_(full, 120).masked_fill_(pages, LOCAL_BIN).mul_(reach)
    bins = hide_before_window(bins, tiling).masked_fill_(pages, LOCAL_BIN)
    found = ScoreBins(bins, torch.tensor([93, 97, 10, 0], dtype=torch.int32))
    capacity = Capacity(blocks or tiling.num_key_blocks, width, 4)
    blocks_of, single, of_keys = (*keys_above(tiling, bins, found.threshold), None)
    if sampled:
        blocks_of, single, of_keys = sampled_keys(tiling, bins, found.threshold)
    selection = compact_keys(tiling, blocks_of, single, capacity)
    right = list(build._planned(tiling, 4, selection, capacity)[:5])
    if of_keys is not None:
        right.append(of_keys.gather(2, right[2].long().clamp(min=0)).masked_fill_(right[2] < 0, 0))
    heads = [4, 0, 1, 3]  # one list belongs to no head
    ours = Lists.empty((5, tiling.num_tiles), capacity.blocks, width, bins.device, 4 * sampled)
    key_lists.BinLists(tiling, bins, found.threshold, sampled).write(ours, heads)
    untouched = Lists.empty((2, tiling.num_tiles), capacity.blocks, width, bins.device, 1 * sampled)
    pairs = [(mine, empty) for mine, empty in zip(ours, untouched, strict=True) if mine is not None]
    return {
        "same": [torch.equal(mine[heads], other) for (mine, _), other in zip(pairs, right, strict=True)],
        "untouched": all(torch.equal(mine[2:3], empty[:1]) for mine, empty in pairs),
        "blocks": int(right[1][:2].sum() - 2 * tiling.own().sum()),
        "keys": int(right[3][:2].sum()),
        "dense": int(right[1][2:].sum() - tiling.own().sum() * 2),
        "overflowed": int(right[4].sum()),
        "codes": int(right[5].max()) if sampled else 0,
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    results: dict[str, Any] = {f"threshold {list(case)}": run_threshold_case(*case) for case in THRESHOLD_CASES}
    results |= {f"noise {list(case)}": run_noise_case(*case) for case in NOISE_CASES}
    results |= {f"lists: {name}": run_list_case(**case) for name, case in LIST_CASES.items()}
    print(json.dumps(results))
