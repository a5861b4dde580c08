"""Indices for timing kernels: as large as asked for, and built like any other index."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import AShape, BlockSparse, Coverage, Dense, HeadPattern, LowRank, VerticalSlash
from minference_vllm.selection import capacity
from minference_vllm.selection.capacity import plan_capacity
from minference_vllm.selection.spread import spread_index

PAGE, TILE, HEADS, GROUP = 16, 64, 4, 2
PATTERNS: dict[str, Sequence[HeadPattern]] = {
    "single keys and pages": [LowRank(), Coverage(), LowRank(remainder=True), LowRank()],
    "budgets": [VerticalSlash(vertical=40, slash=100), BlockSparse(top_k=1), AShape(sink=16, local=32), BlockSparse()],
    "shared": [AShape(sink=16, local=64)] * HEADS,
    "dense": [Dense(), LowRank(), AShape(), Dense()],
}


@pytest.mark.parametrize("list_everything", [False, True])
@pytest.mark.parametrize(("context", "length"), [(2048, 2304), (0, 200), (1000, 1070)])
@pytest.mark.parametrize("name", PATTERNS)
def test_an_index_like_any_other(name: str, context: int, length: int, list_everything: bool) -> None:
    patterns, tiling = PATTERNS[name], Tiling.of(context, length, PAGE, TILE)
    room = plan_capacity(patterns, context, length, PAGE, TILE, list_everything=list_everything)
    mask = None
    for density in (0.05, 0.25):
        index = spread_index(tiling, patterns, density, room, GROUP)
        assert index.num_heads == HEADS and index.heads_per_list == (GROUP if name == "shared" else 1)
        assert index.blocks.shape[2] == room.blocks and index.columns.shape[2] == room.columns
        for values, counts in ((index.blocks, index.num_blocks), (index.columns, index.num_columns)):
            listed = (values >= 0).sum(-1)
            without_list = values[..., 0] < 0
            assert torch.equal(torch.where(without_list, 0, counts), listed.to(counts.dtype))
        # Every counted pair is in the mask: no key is listed twice, none is missing, and own rows are included.
        found = index.to_mask()
        assert torch.equal(found.sum((1, 2)).double(), index.computed_pairs())
        rows = torch.arange(length - context)
        assert found[:, rows, context + rows].all()
        if list_everything:
            assert (index.blocks[..., 0] >= 0).all()
        for head, pattern in enumerate(patterns):
            if pattern == Dense():
                assert float(index.density()[head]) == 1.0
        assert mask is None or (found.sum() >= mask.sum())
        mask = found


@pytest.mark.parametrize("density", [0.05, 0.25])
def test_so_many_of_the_keys_before_a_tile(density: float) -> None:
    context, length = 8192, 8192 + 256
    patterns = [LowRank(), BlockSparse(top_k=1), VerticalSlash(vertical=64, slash=8192)]
    tiling = Tiling.of(context, length, PAGE, TILE)
    index = spread_index(tiling, patterns, density, plan_capacity(patterns, context, length, PAGE, TILE))
    before = tiling.starts[:-1]
    keys = (index.num_blocks * PAGE - TILE + index.num_columns) / before
    assert keys[0].tolist() == pytest.approx([density] * 4, abs=PAGE / context)
    assert index.num_columns[0].tolist() == pytest.approx((before * density / 2).tolist(), abs=1)
    assert (index.num_blocks[1] == (TILE + 64) // PAGE).all() and not index.num_columns[1].any(), "its budget"
    assert (index.num_columns[2] == 64).all()
    assert not torch.equal(index.blocks[0, :, 0], index.blocks[2, :, 0]), "other keys in every list"


def test_kernels_get_the_same_keys_whatever_room_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the lists of adaptive budgets have little capacity."""
    monkeypatch.setattr(capacity, "ADAPTIVE_BYTES", 4 * 64 * 16 * 100)
    patterns, tiling = [LowRank(), Coverage()] * 32, Tiling.of(16384, 16384 + 512, PAGE, 32)
    narrow, wide = (
        plan_capacity(patterns, 16384, 16384 + 512, PAGE, 32, list_everything=everything)
        for everything in (False, True)
    )
    assert narrow.blocks < wide.blocks
    found = [spread_index(tiling, patterns, 0.25, room) for room in (narrow, wide)]
    assert torch.equal(found[0].num_blocks, found[1].num_blocks)
    assert torch.equal(found[0].columns, found[1].columns)
    assert torch.equal(found[0].blocks, found[1].blocks[..., : narrow.blocks])
    assert not found[0].num_blocks.gt(narrow.blocks).any() and (found[1].blocks[..., narrow.blocks :] == -1).all()
