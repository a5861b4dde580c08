"""The definition of each pattern, checked in its index by brute force."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from index_inputs import PATTERNS, TILINGS, Built, build

from minference_vllm import reference
from minference_vllm.patterns.kinds import (
    ESTIMATION_BLOCK,
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    PeakThreshold,
    TriShape,
    VerticalSlash,
)
from minference_vllm.reference import causal_mask
from minference_vllm.selection.build import build_index
from minference_vllm.selection.score_bins import DENSE_FROM
from minference_vllm.selection.vertical_slash import FORCED_COLUMNS, FORCED_DIAGONALS, distance_scores, forced_distances


def at_least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the entries that are among the ``count`` best however ties are broken."""
    if count >= scores.numel():
        return torch.ones(scores.shape, dtype=torch.bool)
    ranked = scores.flatten().sort(descending=True).values
    return scores > ranked[count] if count else torch.zeros(scores.shape, dtype=torch.bool)


def test_a_shape_and_tri_shape(built: Built) -> None:
    row, key = built.rows_and_keys()
    size = built.tiling.block_size
    for head, pattern in built.heads(AShape, TriShape):
        assert isinstance(pattern, AShape | TriShape)
        last = pattern.last if isinstance(pattern, TriShape) else 0
        tail = row >= built.tiling.seq_len - last
        asked = ((key < pattern.sink) | (row - key < pattern.local) | (row == key) | tail) & (key <= row)
        assert not (asked & ~built.mask[head]).any(), f"{pattern}: a key that was asked for is missing"
        # No unneeded block: each holds a key that one of the tile's rows asks for, or is one of the tile's own.
        for tile, rows in enumerate(built.rows_of_tiles()):
            own = rows[0] // built.tiling.tile * (built.tiling.tile // size)
            by_key = asked[rows[0] - built.tiling.context_len : rows[-1] + 1 - built.tiling.context_len].any(0)
            needed = {block for block, keys in enumerate(by_key.split(size)) if block >= own or keys.any()}
            chosen = built.index.blocks[head, tile, : int(built.index.num_blocks[head, tile])].tolist()
            assert set(chosen) <= needed, pattern


def test_vertical_slash_holds_the_best_columns_and_block_distances(built: Built) -> None:
    row, key = built.rows_and_keys()
    tiling = built.tiling
    per_tile = tiling.tile // tiling.block_size
    distance = row // tiling.tile * per_tile - key // tiling.block_size
    for head, pattern in built.heads(VerticalSlash):
        assert isinstance(pattern, VerticalSlash)
        columns = built.scores.columns[head].clone()
        columns[:FORCED_COLUMNS] = torch.inf
        mass = distance_scores(tiling, built.scores.diagonals[head][None].clone())[0]
        mass[: -(-(FORCED_DIAGONALS - 1) // tiling.block_size)] = torch.inf
        by_distance = at_least(mass, -(-pattern.slash // tiling.block_size))
        in_reach = (distance > 0) & (distance <= len(mass))
        asked = at_least(columns, pattern.vertical)[None] | (in_reach & by_distance[distance.clamp(1, len(mass)) - 1])
        missing = asked & (key <= row) & ~built.mask[head]
        assert not missing.any(), f"{pattern}: missing (row, key) {missing.nonzero()[:5].tolist()}"


@pytest.mark.parametrize("tiling_name", TILINGS)
def test_forced_columns_and_diagonals_are_there_whatever_their_scores(tiling_name: str, whole_pages: bool) -> None:
    tiling = build(tiling_name, whole_pages).tiling
    worst_first = torch.arange(float(tiling.seq_len))[None]
    pattern = VerticalSlash(vertical=FORCED_COLUMNS, slash=FORCED_DIAGONALS)
    scores = SimpleNamespace(column_diagonal=lambda heads: (worst_first.clone(), worst_first.clone()))
    mask = build_index(tiling, [pattern], scores).to_mask()[0]
    row, key = build(tiling_name, whole_pages).rows_and_keys()
    forced = (key < FORCED_COLUMNS) | (row - key < FORCED_DIAGONALS)
    assert not (forced & (key <= row) & ~mask).any()


def test_block_sparse_keeps_the_best_blocks_of_each_tile(built: Built) -> None:
    size = built.tiling.block_size
    for head, pattern in built.heads(BlockSparse):
        assert isinstance(pattern, BlockSparse)
        top_k = -(-pattern.top_k * ESTIMATION_BLOCK // size)
        for tile, rows in enumerate(built.rows_of_tiles()):
            own = rows[0] // built.tiling.tile * (built.tiling.tile // size)
            chosen = built.index.blocks[head, tile, : int(built.index.num_blocks[head, tile])].tolist()
            before = [block for block in chosen if block < own]
            assert len(before) == min(top_k, own), pattern
            # Compared by score: where scores tie, either block is right.
            scores = built.scores.blocks[head][tile]
            best = scores[:own].sort(descending=True).values[: len(before)]
            assert torch.equal(scores[before].sort(descending=True).values, best), pattern


@functools.cache
def mass_per_token(tiling_name: str) -> tuple[list[int], tuple[torch.Tensor, ...]]:
    """The coverage heads, and what ``reference.mass_per_token`` gives for them."""
    built = build(tiling_name, whole_pages=False)
    heads = [head for head, _ in built.heads(Coverage)]
    by_column = torch.stack([built.scores.columns[head] for head in heads])
    by_offset = torch.stack([built.scores.diagonals[head] for head in heads])
    forced = forced_distances(built.tiling)
    return heads, reference.mass_per_token(by_column, by_offset, built.tiling, FORCED_COLUMNS, forced)


@pytest.mark.parametrize("tiling_name", TILINGS)
def test_coverage_is_the_cheapest_that_reaches_mass_and_budget(tiling_name: str, whole_pages: bool) -> None:
    """Checked for the last tile. Keys are taken in bins of nearly equal mass per token, so the checks are not exact."""
    built, bin_width = build(tiling_name, whole_pages), 1 + 2**-7
    tiling, seq_len = built.tiling, built.tiling.seq_len
    tiles, blocks = torch.tensor([tiling.num_tiles - 1]), torch.arange(seq_len) // tiling.block_size
    first_own = int(tiling.starts[-2]) // tiling.tile * (tiling.tile // tiling.block_size)
    heads, found = mass_per_token(tiling_name)
    for slot, head in enumerate(heads):
        mass, of_key, at_distance, of_distance = (part[slot] for part in found)
        pattern = list(PATTERNS.values())[head]
        assert isinstance(pattern, Coverage)
        taken = built.index.tile_mask(tiles, slice(head, head + 1))[0, 0]
        budget = min(pattern.min_budget, seq_len)
        # Distances beyond the first block are seen by no tile.
        by_block = taken.clone().logical_or_(torch.arange(seq_len) > int(tiling.starts[-1]))
        whole = torch.stack([part.all() for part in by_block.split(tiling.block_size)])
        distance = (first_own - torch.arange(len(whole))).clamp(min=0)
        at_hand = torch.ones(len(at_distance), dtype=torch.bool)
        at_hand[distance] = whole
        assert float(mass[taken].sum() + at_distance[at_hand].sum()) >= pattern.gamma - 1e-5, pattern
        assert int(taken.sum()) >= budget, pattern
        # Mass and number of keys from each mass per token up. The highest value that reaches both targets is needed.
        steps = torch.cat([of_key, of_distance]).unique().flip(0)
        held = torch.stack([mass[of_key >= x].sum() + at_distance[of_distance >= x].sum() for x in steps])
        count = torch.stack([(of_key >= x).sum() for x in steps])
        reached = ((held >= pattern.gamma + 1e-5) & (count >= budget)).nonzero()
        last = float(steps[reached[0]]) if len(reached) else 0.0
        assert not (~taken & (of_key > last * bin_width)).any(), f"{pattern}: a key with more than the last was left"
        if int(taken.sum()) > DENSE_FROM * seq_len or whole_pages:
            continue
        # No unneeded key: each has about the last one's mass per token or more, or shares its block with one that has.
        needed = torch.zeros(tiling.num_key_blocks, dtype=torch.bool)
        needed[blocks[of_key >= last / bin_width]] = True
        assert not (taken & ~needed[blocks]).any(), f"{pattern}: a key with less than the last was taken"


def test_a_coverage_head_is_dense_for_all_tiles_or_needs_less_than_half_in_the_last(built: Built) -> None:
    causal = causal_mask(built.tiling.context_len, built.tiling.seq_len)
    tiles = torch.tensor([built.tiling.num_tiles - 1])
    for head, pattern in built.heads(Coverage):
        dense = torch.equal(built.mask[head], causal)
        share = float(built.index.tile_mask(tiles, slice(head, head + 1)).float().mean())
        if not dense and built.tiling.column_multiple == 1:
            assert share <= DENSE_FROM, pattern
        if dense and built.tiling.num_tiles > 1:
            assert not built.index.num_columns[head].any(), pattern


def test_antidiagonal_keeps_the_fewest_blocks_that_reach_tau(built: Built) -> None:
    for head, pattern in built.heads(Antidiagonal):
        assert isinstance(pattern, Antidiagonal)
        for tile, rows in enumerate(built.rows_of_tiles()):
            own = rows[0] // built.tiling.tile * (built.tiling.tile // built.tiling.block_size)
            chosen = built.index.blocks[head, tile, : int(built.index.num_blocks[head, tile])].tolist()
            scores = built.scores.blocks[head][tile].double()
            before = [block for block in chosen if block < own]
            held = float(scores[chosen].sum())
            assert held >= pattern.tau - 1e-6, pattern
            if before:
                assert held - float(scores[before].min()) < pattern.tau + 1e-6, f"{pattern}: more than needed"
            best = scores[:own].sort(descending=True).values[: len(before)]
            assert torch.equal(scores[before].sort(descending=True).values, best), f"{pattern}: not the best"


def test_peak_threshold_keeps_what_is_near_the_highest(built: Built) -> None:
    for head, pattern in built.heads(PeakThreshold):
        assert isinstance(pattern, PeakThreshold)
        scores = built.scores.blocks[head][None]
        expected = reference.peak_blocks(built.tiling, scores, pattern.alpha, pattern.sink, pattern.window)[0]
        for tile in range(built.tiling.num_tiles):
            chosen = built.index.blocks[head, tile, : int(built.index.num_blocks[head, tile])].tolist()
            assert chosen == expected[tile].nonzero().view(-1).tolist(), pattern
