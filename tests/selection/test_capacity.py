"""Indices of planned size: the same selection without a host synchronisation; and how often a GPU audits."""

from __future__ import annotations

import index_inputs
import pytest
import torch
from capacity_inputs import ADAPTIVE, PATTERNS, RandomScores, planned

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import (
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    TriShape,
    VerticalSlash,
)
from minference_vllm.prefill.recall import AUDITED_PAIR, audit_frequency
from minference_vllm.selection.build import build_index
from minference_vllm.selection.compaction import EXACT_WIDTH, Capacity

NAMES = ("regular", "odd_length", "one_token_after_context", "chunk_inside_a_page", "long_context_short_chunk")
TILINGS = {name: index_inputs.TILINGS[name] for name in NAMES}


def assert_same(found: SparseIndex, exact: SparseIndex) -> None:
    assert torch.equal(found.to_mask(), exact.to_mask())
    assert torch.equal(found.num_blocks, exact.num_blocks) and torch.equal(found.num_columns, exact.num_columns)
    assert torch.equal(found.computed_pairs(), exact.computed_pairs())
    assert found.overflowed is not None and not bool(found.overflowed.any())


@pytest.mark.parametrize("whole_pages", [False, True])
@pytest.mark.parametrize("name", TILINGS)
def test_the_planned_index_selects_the_same_keys(name: str, whole_pages: bool) -> None:
    context_len, seq_len, block_size, tile = TILINGS[name]
    tiling = Tiling.of(context_len, seq_len, block_size, tile, column_multiple=block_size if whole_pages else 1)
    exact = build_index(tiling, PATTERNS, RandomScores(seq_len))
    capacity = planned(tiling, PATTERNS)
    assert_same(build_index(tiling, PATTERNS, RandomScores(seq_len), capacity), exact)
    one_by_one = Capacity(capacity.blocks, capacity.columns, heads_at_once=1)
    assert_same(build_index(tiling, PATTERNS, RandomScores(seq_len), one_by_one), exact)


@pytest.mark.parametrize("name", TILINGS)
def test_budgets_that_the_data_decide(name: str) -> None:
    """With capacity for everything that they may select; dense tiles stay dense."""
    tiling = Tiling.of(*TILINGS[name])
    exact = build_index(tiling, ADAPTIVE, RandomScores(tiling.seq_len))
    roomy = Capacity(tiling.num_key_blocks, tiling.seq_len, heads_at_once=2)
    assert_same(build_index(tiling, ADAPTIVE, RandomScores(tiling.seq_len), roomy), exact)


@pytest.mark.parametrize("blocks", [1, 1000])
def test_coverage_without_room_for_its_columns_is_dense_and_counted(blocks: int) -> None:
    """A head that is dense because it needs more than half of all keys does not count as overflowed."""
    tiling = Tiling.of(0, 1024, 32, 64)
    patterns = [Coverage(gamma=0.3, min_budget=64), Coverage(gamma=0.999, min_budget=1024)]
    exact = build_index(tiling, patterns, RandomScores(1024))
    assert int(exact.num_columns.max()) > 35 and float(exact.density()[0]) < 0.9 and float(exact.density()[1]) == 1.0
    found = build_index(tiling, patterns, RandomScores(1024), Capacity(blocks, 35, heads_at_once=1))
    assert found.density().tolist() == [1.0, 1.0]
    assert found.overflowed is not None and found.overflowed.all(1).tolist() == [True, False]
    assert not bool(found.overflowed[1].any())


@pytest.mark.parametrize("room", [(1000, 1000), (1000, 20), (3, 1000)], ids=["enough", "columns", "blocks"])
def test_single_keys_without_room_are_dense_tile_by_tile(room: tuple[int, int]) -> None:
    """With enough capacity heads get their whole selection, whichever heads they are scored with."""
    tiling = Tiling.of(301, 1200, 32, 64)
    patterns = [LowRank(gamma=0.2), LowRank(rank=32, gamma=0.25), LowRank(gamma=0.2)]
    exact = build_index(tiling, patterns, RandomScores(1200))
    assert int(exact.num_columns.min()) < 20 < int(exact.num_columns.max()) and float(exact.density().max()) < 0.9
    for heads_at_once in (1, 3):
        found = build_index(tiling, patterns, RandomScores(1200), Capacity(*room, heads_at_once))
        over = (exact.num_blocks > room[0]) | (exact.num_columns > room[1])
        assert found.overflowed is not None and bool(over.any()) == (room != (1000, 1000))
        reach = tiling.reachable().sum(1)
        assert torch.equal(found.overflowed, over & (exact.num_blocks < reach))
        everything = build_index(tiling, [Dense()] * 3, RandomScores(1200)).to_mask()
        rows = tiling.starts[1:] - tiling.starts[:-1]
        dense_rows = over.repeat_interleave(rows, dim=1)[..., None]
        assert torch.equal(found.to_mask(), torch.where(dense_rows, everything, exact.to_mask()))


def test_dense_tiles_are_listed_only_for_a_kernel_that_reads_lists_alone() -> None:
    tiling = Tiling.of(1000, 2000, 32, 64)
    patterns = [Dense(), AShape(sink=32, local=64), TriShape(sink=32, local=64, last=64)]
    short = build_index(tiling, patterns, RandomScores(2000), planned(tiling, patterns))
    assert short.blocks.shape[2] < 10
    assert bool((short.blocks[0] == -1).all()) and bool((short.blocks[2, -1] == -1).all())
    assert bool((short.blocks[1, :, 0] >= 0).all()) and bool((short.blocks[2, 0, 0] >= 0).all())
    whole = build_index(tiling, patterns, RandomScores(2000), planned(tiling, patterns, list_everything=True))
    assert bool((whole.blocks[..., 0] >= 0).all())
    assert torch.equal(whole.to_mask(), short.to_mask())


@pytest.mark.parametrize(("blocks", "columns"), [(3, 1000), (1000, 20), (1, 1)])
def test_a_selection_without_room_is_dense_and_counted_never_cut(blocks: int, columns: int) -> None:
    tiling = Tiling.of(301, 1200, 32, 64)
    patterns = [VerticalSlash(vertical=60, slash=150), BlockSparse(top_k=3), AShape(sink=32, local=0), Dense()]
    exact = build_index(tiling, patterns, RandomScores(1200))
    found = build_index(tiling, patterns, RandomScores(1200), Capacity(blocks, columns, heads_at_once=4))
    assert found.overflowed is not None and bool(found.overflowed[:2].any())
    assert not bool(found.overflowed[3].any()), "a dense head is dense by intent"
    everything = build_index(tiling, [Dense()] * 4, RandomScores(1200)).to_mask()
    rows = tiling.starts[1:] - tiling.starts[:-1]
    dense_rows = (found.overflowed | (found.blocks[..., 0] < 0)).repeat_interleave(rows, dim=1)
    assert torch.equal(found.to_mask(), torch.where(dense_rows[..., None], everything, exact.to_mask()))


SHARING: list[HeadPattern] = [
    *[Dense()] * 3,
    *[AShape(sink=40, local=100)] * 3,
    *[TriShape(sink=40, local=100, last=70)] * 3,
]


@pytest.mark.parametrize("with_capacity", [False, True])
@pytest.mark.parametrize("name", TILINGS)
def test_lists_that_heads_share_are_the_ones_they_would_have_alone(name: str, with_capacity: bool) -> None:
    tiling = Tiling.of(*TILINGS[name])
    capacity = planned(tiling, SHARING) if with_capacity else EXACT_WIDTH
    alone = build_index(tiling, SHARING, RandomScores(tiling.seq_len), capacity)
    shared = build_index(tiling, SHARING, RandomScores(tiling.seq_len), capacity, group=3)
    assert (shared.num_heads, shared.num_lists, shared.heads_per_list) == (9, 3, 3)
    assert torch.equal(shared.blocks, alone.blocks[::3]) and torch.equal(shared.num_blocks, alone.num_blocks[::3])
    assert torch.equal(shared.to_mask(), alone.to_mask())
    assert torch.equal(shared.computed_pairs(), alone.computed_pairs())
    tiles = torch.tensor([0, shared.num_tiles - 1, 0])
    assert torch.equal(shared.tile_mask(tiles, slice(2, 7)), alone.tile_mask(tiles)[2:7])


@pytest.mark.parametrize(
    ("patterns", "group"),
    [
        (SHARING, 1),
        ([AShape(), AShape(), AShape(local=64), AShape()], 2),
        ([VerticalSlash()] * 4, 2),
        ([Dense(), Dense(), Coverage(), Coverage()], 2),
    ],
    ids=["a KV head for every head", "unequal patterns", "chosen by scores", "partly chosen by scores"],
)
def test_other_heads_have_lists_of_their_own(patterns: list[HeadPattern], group: int) -> None:
    tiling = Tiling.of(0, 512, 32, 64)
    index = build_index(tiling, patterns, RandomScores(512), group=group)
    assert (index.num_lists, index.heads_per_list) == (len(patterns), 1)


def test_how_often_a_gpu_audits() -> None:
    patterns = [Coverage(min_budget=3072)] * 8
    often = audit_frequency(patterns, 24576, 32768, audit_rows=4, share=0.01)
    # 8192 rows of 3072 keys, against 4 rows of 32768.
    assert often == pytest.approx(0.01 * 8192 * 3072 / (AUDITED_PAIR * 4 * 32768))
    assert audit_frequency(patterns, 24576, 32768, audit_rows=8, share=0.01) == pytest.approx(often / 2)
    assert audit_frequency(patterns, 24576, 32768, audit_rows=4, share=0.02) == pytest.approx(often * 2)
    assert audit_frequency(patterns, 122880, 131072, audit_rows=4, share=0.01) == pytest.approx(often / 4)
    assert audit_frequency(patterns, 24576, 32768, audit_rows=4, share=0.0) == 0.0
    assert audit_frequency([Dense()], 0, 8192, audit_rows=1, share=1.0) == 1.0


@pytest.mark.parametrize("pattern", [*PATTERNS, *ADAPTIVE])
def test_every_pattern_is_audited_now_and_then(pattern: HeadPattern) -> None:
    assert 0 <= audit_frequency([pattern], 122880, 131072, audit_rows=4, share=0.01) < 1
    assert audit_frequency([pattern, Coverage()], 122880, 131072, audit_rows=4, share=0.01) > 0
