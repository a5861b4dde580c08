"""Layers with a sliding window: their chunks, and properties of every index there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from index_inputs import EVERYTHING, PATTERNS, WINDOWED, Built, build

from minference_vllm.core.plan import Chunk
from minference_vllm.core.tiling import Tiling
from minference_vllm.reference import causal_mask


@pytest.fixture(params=WINDOWED)
def windowed(request: pytest.FixtureRequest) -> Built:
    return build(request.param, False)


def test_reachable_blocks_hold_a_key_that_some_row_sees(windowed: Built) -> None:
    tiling, seen = windowed.tiling, causal_mask(*sizes(windowed.tiling))
    for tile, rows in enumerate(windowed.rows_of_tiles()):
        of_tile = seen[rows[0] - tiling.context_len : rows[-1] + 1 - tiling.context_len].any(0)
        blocks = torch.stack([block.any() for block in of_tile.split(tiling.block_size)])
        assert torch.equal(tiling.reachable()[tile], blocks)
        assert int(tiling.first_seen()[tile]) == int(of_tile.nonzero()[0])


def test_nothing_outside_the_window_is_selected(windowed: Built) -> None:
    index, reachable, first = windowed.index, windowed.tiling.reachable(), windowed.tiling.first_seen()
    for head, pattern in windowed.heads():
        for tile in range(index.num_tiles):
            blocks = index.blocks[head, tile, : int(index.num_blocks[head, tile])]
            columns = index.columns[head, tile, : int(index.num_columns[head, tile])]
            assert bool(reachable[tile, blocks.long()].all()), pattern
            assert bool((columns >= first[tile]).all()), pattern
            assert blocks.tolist() == sorted(set(blocks.tolist())), pattern
            assert not set((columns // windowed.tiling.block_size).tolist()) & set(blocks.tolist()), "a key twice"


def test_mask_is_of_the_window_holds_every_row_itself_and_counts_as_density(windowed: Built) -> None:
    seen = causal_mask(*sizes(windowed.tiling))
    assert not (windowed.mask & ~seen).any()
    assert windowed.mask.diagonal(windowed.tiling.context_len, 1, 2).all(), "a row does not see itself"
    pairs = windowed.mask.sum((1, 2))
    assert windowed.index.computed_pairs().tolist() == pairs.tolist()
    assert windowed.index.dense_pairs() == int(seen.sum())


def test_full_selection_is_the_mask_of_the_window(windowed: Built) -> None:
    seen = causal_mask(*sizes(windowed.tiling))
    for head, name in enumerate(PATTERNS):
        if name in EVERYTHING:
            assert torch.equal(windowed.mask[head], seen), name


def sizes(tiling: Tiling) -> tuple[int, int, int]:
    return tiling.context_len, tiling.seq_len, tiling.window


@pytest.mark.parametrize(
    ("context", "window", "first_key", "gone"),
    [
        (640, 1000, 0, 0),  # the first row sees everything
        (640, 641, 0, 0),
        (640, 640, 0, 0),  # all but the first key, whose page others share
        (640, 580, 0, 1),  # from key 61 on: page 0 has no visible key
        (640, 513, 128, 0),
        (640, 400, 128, 3),  # from key 241 on
        (640, 1, 640, 0),
        (700, 1, 640, 1),
    ],
)
def test_a_chunk_in_a_window(
    context: int, window: int, first_key: int, gone: int, paged_batch: Callable[..., Any]
) -> None:
    batch = paged_batch([300], [context], block_size=32)
    inputs = batch.inputs()
    found = inputs.in_window(window, 128)
    assert (found.window, found.first_key) == (window, first_key)
    assert found.chunk == Chunk(0, 0, context - first_key, context + 300 - first_key)
    kept = inputs.pages[first_key // 32 :]
    assert torch.equal(found.pages[gone:], kept[gone:])
    assert (found.pages[:gone] == kept[gone]).all(), "pages that may be another request's are not read"
    assert replace(found, pages=inputs.pages, chunk=inputs.chunk, window=0, first_key=0) == replace(
        inputs, pages=inputs.pages
    )
