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
LIST_CASES: dict[str, dict[str, Any]] = {
    "pages of 16": {"context_len": 100, "seq_len": 389, "page": 16, "tile": 64},
    "pages of 48": {"context_len": 300, "seq_len": 700, "page": 48, "tile": 144},
    "a window": {"context_len": 300, "seq_len": 700, "page": 16, "tile": 64, "window": 230},
    "too little room": {"context_len": 200, "seq_len": 700, "page": 128, "tile": 128, "width": 20},
    "too little room for blocks": {"context_len": 200, "seq_len": 700, "page": 16, "tile": 64, "blocks": 9},
}


@pytest.mark.parametrize("case", THRESHOLD_CASES, ids=str)
def test_thresholds_are_the_torch_paths(interpreted: dict[str, Any], case: tuple[int, float, float]) -> None:
    found = interpreted[f"threshold {list(case)}"]
    assert max(found["differences"]) <= 1 and 0 < found["lowest"] <= found["highest"] < 255
    # What lies between levels is not known: on the whole rather too low.
    assert max(found["above"]) <= 2 and -16 < sum(found["above"]) / 3 < 1
    assert found["not numbers"] == found["nothing"] == 0 and found["little"] == found["highest level"]


@pytest.mark.parametrize("name", list(LIST_CASES))
def test_lists_are_the_torch_paths(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[f"lists: {name}"]
    assert found["same"] == [True] * 5, "blocks, their counts, keys, their counts, overflowed tiles"
    assert found["untouched"]
    assert found["blocks"] > 0 and found["dense"] > 0
    assert found["overflowed"] > 0 if "room" in name else found["keys"] > 0 == found["overflowed"]


def run_threshold_case(chunk: int, gamma: float, sharpness: float) -> dict[str, Any]:
    """How far the kernel's thresholds lie from torch's, and from those of all bins."""
    import torch
    from low_rank_inputs import threshold_of_levels

    from minference_vllm.selection.measured_rows import CalibrationRows, drawn_rows
    from minference_vllm.triton_kernels.calibration import LEVELS
    from minference_vllm.triton_kernels.thresholds import thresholds

    torch.manual_seed(0)
    drawn = drawn_rows(chunk, 4 * chunk, torch.device("cpu"))
    count = drawn.sampled + drawn.last + drawn.unlike
    # Most of the attention, as of real heads, from 3 to 16 bits below the denominator, other keys of every row.
    middle = torch.linspace(200, 185, count)[:, None] + sharpness * torch.randn(3, count, 1)
    mass = (-(((torch.arange(256) - middle) / 22) ** 2) + 0.2 * torch.randn(3, count, 256)).exp()
    places = torch.arange(count).expand(3, -1)
    sample, *others = places.split([drawn.sampled, drawn.last, drawn.unlike], 1)
    rows = CalibrationRows(places, sample, tuple(group for group in others if group.shape[1]))

    def levels_of(mass: Any) -> Any:
        """In two parts of the keys, and one that no row sees."""
        first = torch.rand(256)
        parts = torch.stack([first, 1 - first, torch.zeros(256)])[None, :, None] * mass[:, None]
        most = parts.amax(-1, keepdim=True)
        sums = [(parts / most).nan_to_num()[..., low:].sum(-1) for low in (0, *LEVELS.value)]
        return torch.stack([most[..., 0].log2(), *sums], 2)

    levels = levels_of(mass)
    found, exact = thresholds(levels, drawn, gamma), rows.threshold(mass, gamma)
    low, high = (torch.zeros_like(mass).index_fill_(2, torch.tensor(bin_), 1.0) for bin_ in (3, 255))
    no_numbers = levels.clone()
    no_numbers[:, 1, 1:, -1] = torch.nan
    return {
        "differences": (found - threshold_of_levels(rows, mass, gamma)).abs().tolist(),
        "above": (found - exact).tolist(),
        "lowest": int(exact.min()),
        "highest": int(exact.max()),
        "not numbers": int(thresholds(no_numbers, drawn, gamma).max()),
        "nothing": int(thresholds(levels_of(low), drawn, gamma).max()),
        "little": int(thresholds(levels_of(high), drawn, gamma).min()),
        "highest level": LEVELS.value[-1],
    }


def run_list_case(
    context_len: int, seq_len: int, page: int, tile: int, width: int = 300, blocks: int = 0, window: int = 0
) -> dict[str, Any]:
    import torch

    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection import build
    from minference_vllm.selection.compaction import Capacity, Lists, compact_keys
    from minference_vllm.selection.score_bins import LOCAL_BIN, ScoreBins, hide_before_window, keys_above
    from minference_vllm.triton_kernels import key_lists

    torch.manual_seed(0)
    key_lists.KEYS, key_lists.STEP = 256, 8
    tiling = Tiling.of(context_len, seq_len, page, tile, window=window)
    pages = tiling.own().repeat_interleave(page, 1)[:, :seq_len]
    reach = tiling.reachable().repeat_interleave(page, 1)[:, :seq_len]
    # Some pages full of wanted keys; a head that wants nearly all, and one without a threshold.
    full = (torch.rand(4, tiling.num_tiles, tiling.num_key_blocks) < 0.15).repeat_interleave(page, 2)[..., :seq_len]
    bins = (torch.rand(4, tiling.num_tiles, seq_len) * 100).to(torch.uint8)
    bins = bins.masked_fill_(full, 120).masked_fill_(pages, LOCAL_BIN).mul_(reach)
    bins = hide_before_window(bins, tiling).masked_fill_(pages, LOCAL_BIN)
    found = ScoreBins(bins, torch.tensor([93, 97, 10, 0], dtype=torch.int32))
    capacity = Capacity(blocks or tiling.num_key_blocks, width, 4)
    selection = compact_keys(tiling, *keys_above(tiling, bins, found.threshold), capacity)
    right = build._planned(tiling, 4, selection, capacity)
    heads = [4, 0, 1, 3]  # one list is nobody's
    ours = Lists.empty((5, tiling.num_tiles), capacity.blocks, width, bins.device)
    key_lists.BinLists(tiling, bins, found.threshold).write(ours, heads)
    untouched = Lists.empty((1, tiling.num_tiles), capacity.blocks, width, bins.device)
    return {
        "same": [torch.equal(mine[heads], other) for mine, other in zip(ours, right, strict=True)],
        "untouched": all(torch.equal(mine[2:3], empty) for mine, empty in zip(ours, untouched, strict=True)),
        "blocks": int(right.num_blocks[:2].sum() - 2 * tiling.own().sum()),
        "keys": int(right.num_columns[:2].sum()),
        "dense": int(right.num_blocks[2:].sum() - tiling.own().sum() * 2),
        "overflowed": int(right.overflowed.sum()),
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    results: dict[str, Any] = {f"threshold {list(case)}": run_threshold_case(*case) for case in THRESHOLD_CASES}
    results |= {f"lists: {name}": run_list_case(**case) for name, case in LIST_CASES.items()}
    print(json.dumps(results))
