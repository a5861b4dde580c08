"""Properties of ``SparseIndex``: what every index promises, and what each pattern asks for, checked by brute force."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from minference_vllm import reference
from minference_vllm.estimate import Estimates
from minference_vllm.index import SparseIndex, build_index, columns_outside_blocks, compact
from minference_vllm.levels import OWN_LEVEL, Levels
from minference_vllm.patterns import (
    ESTIMATION_BLOCK,
    MAX_LEVEL,
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PeakThreshold,
    TriShape,
    VerticalSlash,
    at_level,
)
from minference_vllm.reference import causal_mask
from minference_vllm.selection import (
    DENSE_FROM,
    FORCED_COLUMNS,
    FORCED_DIAGONALS,
    Columns,
    covering_blocks,
    distance_scores,
    forced_distances,
    peak_blocks,
    slash_blocks,
    top_blocks,
)
from minference_vllm.tiling import Tiling

TILINGS = {
    # name: (context_len, seq_len, block_size, tile)
    "regular": (0, 512, 32, 64),
    "tile_is_a_page": (0, 512, 64, 64),
    "odd_length": (0, 517, 32, 64),
    "shorter_than_a_page": (0, 7, 32, 64),
    "one_token": (0, 1, 16, 32),
    "one_token_after_context": (300, 301, 16, 32),
    "last_tile_is_one_row": (0, 513, 32, 128),
    "last_tile_lacks_one_row": (0, 511, 32, 128),
    "chunk_at_a_tile_border": (256, 600, 32, 64),
    "chunk_at_a_page_border": (288, 600, 32, 64),
    "chunk_inside_a_page": (301, 600, 32, 64),
    "chunk_within_one_page": (299, 311, 32, 64),
    "chunk_ends_inside_its_first_tile": (130, 190, 32, 128),
    "long_context_short_chunk": (2000, 2100, 32, 128),
}
PATTERNS: dict[str, HeadPattern] = {
    "dense": Dense(),
    "a_shape": AShape(sink=40, local=100),
    "a_shape_nothing": AShape(sink=0, local=0),
    "a_shape_local_1": AShape(sink=1, local=1),
    "a_shape_everything": AShape(sink=10**6, local=10**6),
    "tri_shape": TriShape(sink=40, local=100, last=70),
    "tri_shape_last_0": TriShape(sink=40, local=100, last=0),
    "vertical_slash": VerticalSlash(vertical=60, slash=150),
    "vertical_many": VerticalSlash(vertical=300, slash=100),
    "vertical_alone": VerticalSlash(vertical=100, slash=0),
    "slash_alone": VerticalSlash(vertical=0, slash=200),
    "vertical_slash_everything": VerticalSlash(vertical=10**6, slash=10**6),
    "block_sparse": BlockSparse(top_k=3),
    "block_sparse_1": BlockSparse(top_k=1),
    "block_sparse_everything": BlockSparse(top_k=10**4),
    "coverage": Coverage(gamma=0.3, min_budget=0),
    "coverage_nothing": Coverage(gamma=1e-9, min_budget=0),
    "coverage_budget": Coverage(gamma=1e-9, min_budget=170),
    "coverage_half": Coverage(gamma=0.5, min_budget=100),
    "coverage_gamma": Coverage(gamma=0.999_999, min_budget=0),
    "coverage_everything": Coverage(gamma=0.5, min_budget=10**6),
    "antidiagonal": Antidiagonal(stride=16, tau=0.5),
    "antidiagonal_nothing": Antidiagonal(stride=2, tau=1e-9),
    "antidiagonal_most": Antidiagonal(stride=8, tau=0.9),
    "antidiagonal_everything": Antidiagonal(stride=16, tau=1 - 1e-9),
    "peak_threshold": PeakThreshold(alpha=0.7, sink=40, window=100),
    "peak_threshold_alone": PeakThreshold(alpha=0.95, sink=0, window=0),
    "peak_threshold_highest": PeakThreshold(alpha=1 - 1e-9, sink=0, window=1),
    "peak_threshold_everything": PeakThreshold(alpha=1e-9, sink=0, window=0),
    "low_rank": LowRank(gamma=0.2),
    "low_rank_nothing": LowRank(gamma=1e-9),
    "low_rank_half": LowRank(gamma=0.45),
    "low_rank_everything": LowRank(gamma=1 - 1e-9),
}
EVERYTHING = (
    "dense", "a_shape_everything", "vertical_slash_everything", "block_sparse_everything", "coverage_everything",
    "antidiagonal_everything", "peak_threshold_everything", "low_rank_everything",
)  # fmt: skip


@dataclass
class RandomScores:
    """Stands for the estimators; keeps what it said. Quantised, so that many scores tie."""

    seq_len: int
    seed: int = 0
    columns: dict[int, torch.Tensor] = field(default_factory=dict)
    diagonals: dict[int, torch.Tensor] = field(default_factory=dict)
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    levels: dict[int, torch.Tensor] = field(default_factory=dict)

    def draw(self, kind: int, head: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + kind * 100 + head)
        return torch.randint(0, 40, shape, generator=generator) / 40

    def last_query(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        for head in heads:
            self.columns[head] = self.draw(1, head, self.seq_len)
            self.diagonals[head] = self.draw(2, head, self.seq_len)
        return (
            torch.stack([self.columns[head] for head in heads]),
            torch.stack([self.diagonals[head] for head in heads]),
        )

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        for head in heads:
            scores = self.draw(3, head, tiling.num_tiles, tiling.num_key_blocks)
            self.blocks[head] = scores.masked_fill(~tiling.reachable(), 0)
        return torch.stack([self.blocks[head] for head in heads])

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        """Positive in reach, and each tile's sum to 1."""
        for head in heads:
            scores = (self.draw(4, head, tiling.num_tiles, tiling.num_key_blocks) + 1 / 40) * tiling.reachable()
            self.blocks[head] = scores / scores.sum(-1, keepdim=True)
        return torch.stack([self.blocks[head] for head in heads])

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return self.peaks(heads, tiling)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> Levels:
        """Levels from 0 to 40, and the lower a threshold, the more of the attention is wanted."""
        for head in heads:
            self.levels[head] = (self.draw(5, head, tiling.num_tiles, self.seq_len) * 40).to(torch.uint8)
            by_key = (
                mask.repeat_interleave(tiling.block_size, 1)[:, : self.seq_len]
                for mask in (tiling.own(), ~tiling.reachable())
            )
            own, later = by_key
            self.levels[head][own], self.levels[head][later] = OWN_LEVEL, 0
        thresholds = torch.full((len(heads),), int(41 * (1 - gamma)), dtype=torch.int32)
        return Levels(torch.stack([self.levels[head] for head in heads]), thresholds)


@dataclass(frozen=True)
class OneHead:
    """The scores of one head, for an index of one head."""

    scores: RandomScores
    head: int

    def last_query(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scores.last_query([self.head])

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return self.scores.pooled([self.head], tiling)

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return self.scores.peaks([self.head], tiling)

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return self.scores.antidiagonal([self.head], tiling, stride)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> Levels:
        return self.scores.low_rank([self.head], tiling, rank, gamma)


@dataclass(frozen=True)
class Built:
    """One index whose heads run all of PATTERNS, and the scores that it was built from."""

    tiling: Tiling
    index: SparseIndex
    scores: RandomScores
    mask: torch.Tensor

    def heads(self, *kinds: type) -> Iterator[tuple[int, HeadPattern]]:
        """Head and pattern, of the named kinds of pattern (all when none is named)."""
        for head, pattern in enumerate(PATTERNS.values()):
            if not kinds or isinstance(pattern, kinds):
                yield head, pattern

    def rows_of_tiles(self) -> list[range]:
        starts = self.index.tile_starts.tolist()
        return [range(a, b) for a, b in itertools.pairwise(starts)]

    def rows_and_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Absolute positions, shaped to broadcast to a mask."""
        return torch.arange(self.tiling.context_len, self.tiling.seq_len)[:, None], torch.arange(self.tiling.seq_len)


@functools.cache
def build(tiling_name: str, whole_pages: bool) -> Built:
    context_len, seq_len, block_size, tile = TILINGS[tiling_name]
    tiling = Tiling.of(context_len, seq_len, block_size, tile, block_size if whole_pages else 1)
    scores = RandomScores(seq_len)
    index = build_index(tiling, list(PATTERNS.values()), scores)
    return Built(tiling, index, scores, index.to_mask())


@pytest.fixture(params=[False, True], ids=["single_columns", "pages_of_columns"])
def whole_pages(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=TILINGS)
def built(request: pytest.FixtureRequest, whole_pages: bool) -> Built:
    return build(request.param, whole_pages)


def at_least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the entries that belong to the ``count`` best whichever way ties are broken."""
    if count >= scores.numel():
        return torch.ones(scores.shape, dtype=torch.bool)
    ranked = scores.flatten().sort(descending=True).values
    return scores > ranked[count] if count else torch.zeros(scores.shape, dtype=torch.bool)


# What every index promises


def test_lists_are_in_order_and_name_no_key_twice(built: Built) -> None:
    index, size = built.index, built.index.block_size
    assert (index.num_heads, index.num_tiles) == (len(PATTERNS), built.tiling.num_tiles)
    for head, pattern in built.heads():
        for tile, rows in enumerate(built.rows_of_tiles()):
            blocks, columns = index.blocks[head, tile].tolist(), index.columns[head, tile].tolist()
            num_blocks, num_columns = int(index.num_blocks[head, tile]), int(index.num_columns[head, tile])
            assert set(blocks[num_blocks:]) <= {-1} and set(columns[num_columns:]) <= {-1}, pattern
            blocks, columns = blocks[:num_blocks], columns[:num_columns]
            assert blocks == sorted(set(blocks)) and blocks[0] >= 0, pattern
            assert blocks[-1] == rows[-1] // size, f"{pattern}: the tile's own block is the last"
            own = set(range(rows[0] // size, rows[-1] // size + 1))
            assert own <= set(blocks), pattern
            assert num_columns % built.tiling.column_multiple == 0, pattern
            assert len(set(columns)) == num_columns, pattern
            assert all(0 <= column < rows[0] for column in columns), pattern
            assert not {column // size for column in columns} & set(blocks), f"{pattern}: a key twice"


def test_mask_is_causal_holds_every_row_itself_and_counts_as_density(built: Built) -> None:
    causal = causal_mask(built.tiling.context_len, built.tiling.seq_len)
    mask = built.mask
    assert mask.shape == (len(PATTERNS), *causal.shape)
    assert not (mask & ~causal).any(), "a row sees a later key"
    assert mask.diagonal(built.tiling.context_len, 1, 2).all(), "a row does not see itself"
    pairs = mask.sum((1, 2))
    assert built.index.computed_pairs().tolist() == pairs.tolist()
    assert built.index.dense_pairs() == int(causal.sum())
    assert built.index.density().tolist() == pytest.approx((pairs / causal.sum()).tolist())


def test_full_selection_is_the_causal_mask(built: Built) -> None:
    causal = causal_mask(built.tiling.context_len, built.tiling.seq_len)
    for head, name in enumerate(PATTERNS):
        if name in EVERYTHING:
            assert torch.equal(built.mask[head], causal), name


@pytest.mark.parametrize("tiling_name", ["odd_length", "chunk_inside_a_page"])
def test_a_heads_index_does_not_depend_on_its_neighbours(tiling_name: str, whole_pages: bool) -> None:
    together = build(tiling_name, whole_pages)
    for head, pattern in together.heads():
        alone = build_index(together.tiling, [pattern], OneHead(together.scores, head))
        assert torch.equal(alone.to_mask()[0], together.mask[head]), pattern


# What each pattern asks for


def test_a_shape_and_tri_shape(built: Built) -> None:
    row, key = built.rows_and_keys()
    size = built.tiling.block_size
    for head, pattern in built.heads(AShape, TriShape):
        assert isinstance(pattern, AShape | TriShape)
        last = pattern.last if isinstance(pattern, TriShape) else 0
        tail = row >= built.tiling.seq_len - last
        asked = ((key < pattern.sink) | (row - key < pattern.local) | (row == key) | tail) & (key <= row)
        assert not (asked & ~built.mask[head]).any(), f"{pattern}: a key that was asked for is missing"
        # No block without need: each holds a key that one of the tile's rows asks for, or is one of the tile's own.
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
    scores = SimpleNamespace(last_query=lambda heads: (worst_first.clone(), worst_first.clone()))
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
def mass_and_worth(tiling_name: str) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The coverage heads, and every key's mass and worth in them, float64 ``[heads, S]`` each."""
    built = build(tiling_name, whole_pages=False)
    heads = [head for head, _ in built.heads(Coverage)]
    by_column = torch.stack([built.scores.columns[head] for head in heads])
    by_offset = torch.stack([built.scores.diagonals[head] for head in heads])
    forced = forced_distances(built.tiling)
    return heads, *reference.coverage_worth(by_column, by_offset, built.tiling, FORCED_COLUMNS, forced)


@pytest.mark.parametrize("tiling_name", TILINGS)
def test_coverage_is_the_cheapest_that_reaches_mass_and_budget(tiling_name: str, whole_pages: bool) -> None:
    """As the last tile sees it. Keys are taken in whole bins of nearly equal worth, so equality is not asked for."""
    built, bin_width = build(tiling_name, whole_pages), 1 + 2**-7
    tiling, seq_len = built.tiling, built.tiling.seq_len
    tiles, blocks = torch.tensor([tiling.num_tiles - 1]), torch.arange(seq_len) // tiling.block_size
    for head, mass, worth in zip(*mass_and_worth(tiling_name), strict=True):
        pattern = list(PATTERNS.values())[head]
        assert isinstance(pattern, Coverage)
        taken = built.index.tile_mask(tiles, slice(head, head + 1))[0, 0]
        budget = min(pattern.min_budget, seq_len)
        assert float(mass[taken].sum()) >= pattern.gamma - 1e-5, pattern
        assert int(taken.sum()) >= budget, pattern
        # What the best keys hold and how many they are, by descending worth, and the worth of the last one needed.
        ranked = worth.sort(descending=True)
        held, count = mass[ranked.indices].cumsum(0), torch.arange(1, seq_len + 1)
        reached = (held >= pattern.gamma + 1e-5) & (count >= budget)
        last = float(ranked.values[reached.nonzero()[0]]) if reached.any() else 0.0
        assert not (~taken & (worth > last * bin_width)).any(), f"{pattern}: a key worth more than the last was left"
        if int(taken.sum()) > DENSE_FROM * seq_len or whole_pages:
            continue
        # No key without need: each is worth the last one's, or shares its block with one that is.
        needed = torch.zeros(tiling.num_key_blocks, dtype=torch.bool)
        needed[blocks[worth >= last / bin_width]] = True
        assert not (taken & ~needed[blocks]).any(), f"{pattern}: a key worth less than the last was taken"


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


# The builders' own steps


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
    best = mass.topk(min(count, mass.shape[1])).indices + 1
    found = slash_blocks(tiling, by_offset, count * size)
    for head in range(3):
        for number, start in enumerate(tiling.starts[:-1].tolist()):
            first = start // tile * tile // size
            last_block = (int(tiling.starts[number + 1]) - 1) // size
            expected = {first - distance for distance in best[head].tolist() if distance <= first}
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
    more_blocks, columns, count = columns_outside_blocks(tiling, blocks, wanted(200, 5, 71, 100, 70))
    assert torch.equal(more_blocks, blocks)
    assert listed(columns, count, 7) == [70, 71, 100, 200]
    assert listed(columns, count, 3) == [70, 71], "the others lie in the tile or behind it"
    assert listed(columns, count, 2) == []


def test_pages_of_columns_are_filled_up_from_a_block_that_the_tile_lacks() -> None:
    tiling = Tiling.of(0, 256, 32, 32, column_multiple=32)
    blocks = tiling.own()[None].clone()
    asked = [200, 5, 71, 100, 70]
    more_blocks, columns, count = columns_outside_blocks(tiling, blocks, wanted(*asked))
    assert torch.equal(more_blocks[0, 7], blocks[0, 7])
    assert len(set(listed(columns, count, 7))) == 32 and set(asked) <= set(listed(columns, count, 7))
    # In the second tile only block 0 lies before; its 31 other keys fill the page of the one column.
    assert listed(columns, count, 1) == list(range(32))


def test_where_nothing_is_left_to_fill_a_page_blocks_are_taken_whole() -> None:
    tiling = Tiling.of(0, 96, 32, 32, column_multiple=64)
    blocks = tiling.own()[None].clone()
    more_blocks, _, count = columns_outside_blocks(tiling, blocks, wanted(5, 40))
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
    positions, count = compact(mask)
    assert positions.tolist() == [[0, 2, -1], [-1, -1, -1], [0, 1, 2]]
    assert count.tolist() == [2, 0, 3]


def test_a_tile_is_whole_pages() -> None:
    with pytest.raises(ValueError, match="tile must be a multiple of the page size 32, not 48"):
        Tiling.of(0, 100, 32, 48)


def test_a_pattern_without_a_selection_is_an_error() -> None:
    with pytest.raises(TypeError, match="no selection for pattern 'dense'"):
        build_index(Tiling.of(0, 64, 32, 32), ["dense"], RandomScores(64))


# Levels: what a recall floor asks for


@pytest.mark.parametrize("tiling_name", TILINGS)
def test_a_higher_level_selects_no_fewer_keys_and_the_last_selects_all(tiling_name: str, whole_pages: bool) -> None:
    start = build(tiling_name, whole_pages)
    raised = build_index(start.tiling, [at_level(pattern, 1) for pattern in PATTERNS.values()], start.scores)
    dense = build_index(start.tiling, [at_level(pattern, MAX_LEVEL) for pattern in PATTERNS.values()], start.scores)
    assert dense.density().tolist() == [1.0] * len(PATTERNS)
    for head, (name, pattern) in enumerate(PATTERNS.items()):
        if not isinstance(pattern, LowRank):
            continue  # becomes another kind, which follows the attention
        assert int(raised.to_mask()[head].sum()) >= int(start.mask[head].sum()), name


def test_levels() -> None:
    for pattern in PATTERNS.values():
        assert at_level(pattern, 0) is pattern
        assert at_level(pattern, MAX_LEVEL) == at_level(pattern, MAX_LEVEL + 5) == Dense()
    assert at_level(Dense(), 1) == Dense()
    for pattern in PATTERNS.values():
        if not isinstance(pattern, Dense | LowRank):
            assert at_level(pattern, 1) == LowRank() and at_level(pattern, 2) == at_level(LowRank(), 1)
    gammas = []
    for level in range(MAX_LEVEL):
        raised = at_level(LowRank(rank=32, gamma=0.68), level)
        assert isinstance(raised, LowRank) and raised.rank == 32
        gammas.append(raised.gamma)
    assert gammas == pytest.approx([0.68, 0.92, 0.98])


# Coverage on attention of a known shape

TOKENS, CHUNK, DIM = 4096, 1024, 64


@dataclass(frozen=True)
class Shaped:
    """Queries ``[CHUNK, 1, D]`` and keys ``[1, TOKENS, D]`` of one head; its softmax scale is 1."""

    query: torch.Tensor
    keys: torch.Tensor

    def index(self, pattern: HeadPattern, rows: int = CHUNK, column_multiple: int = 1) -> SparseIndex:
        """Of the last ``rows`` rows."""
        tiling = Tiling.of(TOKENS - rows, TOKENS, 32, 128, column_multiple)
        return build_index(tiling, [pattern], Estimates(self.query[-rows:], self.keys, 1.0))

    def recall(self, index: SparseIndex) -> torch.Tensor:
        """float64, of every row."""
        rows = TOKENS - index.context_len
        return reference.attention_recall(self.query[-rows:], self.keys, index.to_mask(), index.context_len, 1.0)[0]


def window(distance: int, width: float) -> Shaped:
    """Logits of about 16 within ``width`` of the key ``distance`` back, and of about 0 elsewhere."""
    # Random frequencies make the mean of cos(w * distance) a Gaussian of the distance.
    frequency = torch.randn(DIM // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / width
    angle = torch.arange(TOKENS, dtype=torch.float64)[:, None] * frequency
    ahead = angle + distance * frequency
    query = torch.cat([angle.cos(), angle.sin()], 1)[-CHUNK:] * 16
    keys = torch.cat([ahead.cos(), ahead.sin()], 1) / (DIM // 2)
    return Shaped(query[:, None].float(), keys[None].float())


def columns(count: int) -> Shaped:
    """As many heavy keys, at random places before the chunk."""
    query, keys = torch.zeros(CHUNK, 1, DIM), torch.zeros(1, TOKENS, DIM)
    heavy = torch.randperm(TOKENS - CHUNK, generator=torch.Generator().manual_seed(0))[:count]
    query[..., 0], keys[0, heavy, 0] = 12.0, 1.0
    return Shaped(query, keys)


def single_diagonal(distance: int) -> Shaped:
    """Every row looks at the one key so far back."""
    directions = torch.nn.functional.normalize(
        torch.randn(TOKENS, 512, generator=torch.Generator().manual_seed(0)), dim=1
    )
    places = torch.arange(TOKENS - CHUNK, TOKENS) - distance
    return Shaped(30 * directions[places][:, None], directions[None])


SHAPES: dict[str, tuple[Shaped, float]] = {
    # name: (head, density that is enough)
    "columns": (columns(40), 0.12),
    "local_window": (window(0, 30), 0.15),
    "far_window": (window(2000, 300), 0.4),
    "far_narrow_window": (window(2000, 30), 0.2),
    "far_diagonal": (single_diagonal(2001), 0.2),
}


TAKEN_AS_COLUMNS = pytest.mark.xfail(
    strict=True,
    reason="what the choosing rows see of a single diagonal costs less as columns, which no other row looks at",
)


@pytest.mark.parametrize("column_multiple", [1, 32])
@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=[TAKEN_AS_COLUMNS] if shape == "far_diagonal" else []) for shape in SHAPES]
)
def test_coverage_finds_the_shape_at_low_density(shape: str, column_multiple: int) -> None:
    head, budget = SHAPES[shape]
    index = head.index(Coverage(gamma=0.95, min_budget=64), column_multiple=column_multiple)
    recall = head.recall(index)
    assert float(recall[-64:].mean()) >= 0.95 - 1e-3
    assert float(recall.mean()) >= 0.94
    assert float(index.density()) <= budget


def test_a_flat_head_comes_out_dense_by_itself() -> None:
    head = Shaped(torch.zeros(CHUNK, 1, DIM), torch.zeros(1, TOKENS, DIM))
    index = head.index(Coverage(gamma=0.95, min_budget=64))
    assert float(index.density()) == 1.0
    assert not index.num_columns.any()


def test_density_follows_gamma() -> None:
    head = window(0, 30)
    found = [float(head.index(Coverage(gamma=gamma, min_budget=0)).density()) for gamma in (0.5, 0.9, 0.99)]
    assert found == sorted(found)


@pytest.mark.parametrize("rows", [1, 2, 37, 63])
def test_coverage_of_fewer_rows_than_last_queries(rows: int) -> None:
    head = columns(40)
    index = head.index(Coverage(min_budget=64), rows)
    assert not (index.to_mask()[0] & ~causal_mask(TOKENS - rows, TOKENS)).any()
    assert float(head.recall(index).mean()) >= 0.95 - 1e-3
    assert float(index.density()) < 0.12


@pytest.mark.parametrize("rows", [1, 64, 200])
@pytest.mark.parametrize(
    "pattern",
    [Coverage(gamma=0.5, min_budget=0), Antidiagonal(tau=0.5), PeakThreshold(window=0, sink=0)],
    ids=lambda pattern: pattern.kind,
)
def test_the_strongest_key_stays_unseen_by_the_rows_before_it(pattern: HeadPattern, rows: int) -> None:
    length = 500
    keys, query = torch.zeros(1, length, DIM), torch.zeros(rows, 1, DIM)
    keys[0, length - 1, 0], query[..., 0] = 50.0, 1.0
    index = build_index(Tiling.of(length - rows, length, 32, 64), [pattern], Estimates(query, keys, 1.0))
    assert not (index.to_mask() & ~causal_mask(length - rows, length)).any()


def tile_starts(context_len: int, seq_len: int, tile: int) -> list[int]:
    return [int(start) for start in Tiling.of(context_len, seq_len, tile, tile).starts]


@pytest.mark.parametrize(
    ("context", "seq_len", "tile", "starts"),
    [
        (0, 256, 128, [0, 128, 256]),
        (0, 257, 128, [0, 128, 256, 257]),
        (0, 255, 128, [0, 128, 255]),
        (0, 1, 128, [0, 1]),
        (128, 384, 128, [128, 256, 384]),
        (127, 129, 128, [127, 128, 129]),
        (129, 255, 128, [129, 255]),
        (130, 400, 128, [130, 256, 384, 400]),
        (1000, 1001, 32, [1000, 1001]),
    ],
)
def test_tiles_begin_at_multiples_of_their_size(context: int, seq_len: int, tile: int, starts: list[int]) -> None:
    assert tile_starts(context, seq_len, tile) == starts


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 100, 256, 299])
def test_a_prompt_cut_in_two_has_the_same_borders(cut: int) -> None:
    whole, tile = tile_starts(0, 300, 32), 32
    pieces = tile_starts(0, cut, tile)[:-1] + tile_starts(cut, 300, tile)
    assert set(pieces) == set(whole) | {cut}
    assert pieces == sorted(set(pieces))
