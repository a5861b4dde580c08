"""The individual steps of building an index."""

from __future__ import annotations

import pytest
import torch
from index_inputs import TILINGS

from minference_vllm import reference
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import PeakThreshold
from minference_vllm.selection.antidiagonal import covering_blocks
from minference_vllm.selection.block_sparse import top_blocks
from minference_vllm.selection.compaction import Columns, columns_outside_blocks, compact, compact_exact
from minference_vllm.selection.peak_threshold import peak_blocks
from minference_vllm.selection.vertical_slash import FORCED_DIAGONALS, distance_scores, slash_blocks


@pytest.mark.parametrize("tau", [1e-6, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("tiling_name", TILINGS)
def test_covering_blocks_match_the_reference(tiling_name: str, tau: float) -> None:
    """Random scores, which do not tie, and some that are zero."""
    tiling = Tiling.of(*TILINGS[tiling_name])
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(3, tiling.num_tiles, tiling.num_key_blocks, generator=generator) ** 8 * tiling.reachable()
    scores[2] *= scores[2] > 0.3
    scores = (scores + tiling.own() * 1e-6).double()
    scores /= scores.sum(-1, keepdim=True)
    assert torch.equal(covering_blocks(tiling, scores, tau), reference.covering_blocks(tiling, scores, tau))


@pytest.mark.parametrize("alpha", [1e-6, 0.3, 0.999])
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (1, 1), (33, 100)])
@pytest.mark.parametrize("tiling_name", TILINGS)
def test_peak_blocks_match_the_reference(tiling_name: str, sink: int, window: int, alpha: float) -> None:
    tiling = Tiling.of(*TILINGS[tiling_name])
    scores = torch.rand(2, tiling.num_tiles, tiling.num_key_blocks, generator=torch.Generator().manual_seed(5))
    scores *= tiling.reachable()
    found = peak_blocks(tiling, scores, PeakThreshold(alpha=alpha, sink=sink, window=window))
    assert torch.equal(found, reference.peak_blocks(tiling, scores, alpha, sink, window))


@pytest.mark.parametrize("tiling_name", TILINGS)
def test_diagonal_mass_by_distance_matches_the_reference(tiling_name: str) -> None:
    tiling = Tiling.of(*TILINGS[tiling_name])
    by_offset = torch.rand(2, tiling.seq_len, generator=torch.Generator().manual_seed(3))
    found, expected = distance_scores(tiling, by_offset), reference.distance_scores(by_offset, tiling)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tiling_name", TILINGS)
def test_slash_blocks_are_those_at_the_best_distances(tiling_name: str) -> None:
    tiling = Tiling.of(*TILINGS[tiling_name])
    size, tile = tiling.block_size, tiling.tile
    by_offset = torch.rand(3, tiling.seq_len, generator=torch.Generator().manual_seed(3))
    nearest = -(-(FORCED_DIAGONALS - 1) // size)
    count = max(nearest, 3)
    mass = distance_scores(tiling, by_offset)
    mass[:, :nearest] = torch.inf
    best = mass.argsort(descending=True, stable=True) + 1
    found = slash_blocks(tiling, by_offset, count * size)
    for head in range(3):
        for number, start in enumerate(tiling.starts[:-1].tolist()):
            first = start // tile * tile // size
            last_block = (int(tiling.starts[number + 1]) - 1) // size
            reached = [distance for distance in best[head].tolist() if distance <= first]
            expected = {first - distance for distance in reached[:count]}
            assert len(expected) == min(count, first), "no tile loses budget to distances that it does not reach"
            expected |= set(range(first, last_block + 1))
            assert set(found[head, number].nonzero().view(-1).tolist()) == expected


def listed(columns: torch.Tensor, count: torch.Tensor, tile: int) -> list[int]:
    return sorted(columns[0, tile, : int(count[0, tile])].tolist())


def wanted(*columns: int) -> Columns:
    """Columns of one head."""
    return Columns(torch.tensor([columns]), torch.ones(1, len(columns), dtype=torch.bool))


def test_single_columns_are_exactly_those_asked_for() -> None:
    tiling = Tiling.of(0, 256, 32, 32)
    blocks = tiling.own()[None].clone()
    blocks[..., 0] = True
    more_blocks, (columns, count, _) = columns_outside_blocks(tiling, blocks, wanted(200, 5, 71, 100, 70))
    assert torch.equal(more_blocks, blocks)
    assert listed(columns, count, 7) == [70, 71, 100, 200]
    assert listed(columns, count, 3) == [70, 71], "the others lie in the tile or behind it"
    assert listed(columns, count, 2) == []


def test_pages_of_columns_are_filled_up_from_a_block_that_the_tile_lacks() -> None:
    tiling = Tiling.of(0, 256, 32, 32, column_multiple=32)
    blocks = tiling.own()[None].clone()
    asked = [200, 5, 71, 100, 70]
    more_blocks, (columns, count, _) = columns_outside_blocks(tiling, blocks, wanted(*asked))
    assert torch.equal(more_blocks[0, 7], blocks[0, 7])
    assert len(set(listed(columns, count, 7))) == 32 and set(asked) <= set(listed(columns, count, 7))
    # Only block 0 precedes the second tile; its 31 other keys fill the page of the one column.
    assert listed(columns, count, 1) == list(range(32))


def test_where_nothing_is_left_to_fill_a_page_blocks_are_taken_whole() -> None:
    tiling = Tiling.of(0, 96, 32, 32, column_multiple=64)
    blocks = tiling.own()[None].clone()
    more_blocks, (_, count, _) = columns_outside_blocks(tiling, blocks, wanted(5, 40))
    assert int(count[0, 1]) == 0, "33 keys lie before the second tile and outside its blocks: no 64"
    assert more_blocks[0, 1].nonzero().view(-1).tolist() == [0, 1]


def test_top_blocks_never_reach_past_the_tile() -> None:
    tiling = Tiling.of(0, 256, 32, 64)
    scores = torch.zeros(1, tiling.num_tiles, tiling.num_key_blocks)
    scores[..., -1] = 9.0  # the last block is the best, and out of reach for all tiles but the last
    chosen = top_blocks(tiling, scores, 1)
    assert not (chosen & ~tiling.reachable()).any()


def test_compact_lists_the_positions_of_true() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    for positions, count in (compact_exact(mask), compact(mask, 3)):
        assert positions.tolist() == [[0, 2, -1], [-1, -1, -1], [0, 1, 2]]
        assert count.tolist() == [2, 0, 3]
    positions, count = compact(mask, 2)
    assert positions.tolist() == [[0, 2], [-1, -1], [0, 1]]
    assert count.tolist() == [2, 0, 3], "also of what there is no room for"
