"""Properties of ``SparseIndex`` that hold for every pattern."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from index_inputs import EVERYTHING, PATTERNS, TILINGS, Built, OneHead, RandomScores, build

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import KINDS, MAX_STEP, Dense, LowRank
from minference_vllm.reference import causal_mask
from minference_vllm.selection.build import build_index
from minference_vllm.selection.families import FAMILIES


def test_lists_are_in_order_and_name_no_key_twice(built: Built) -> None:
    index, size = built.index, built.index.tiling.block_size
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


def test_every_kind_of_pattern_has_a_selection_and_another_one_is_an_error() -> None:
    assert set(FAMILIES) == set(KINDS)
    assert all(family.pattern(kind=kind).kind == kind for kind, family in FAMILIES.items())
    with pytest.raises(KeyError, match="'star'"):
        build_index(Tiling.of(0, 64, 32, 32), [SimpleNamespace(kind="star")], RandomScores(64))


# Steps of a recall floor


@pytest.mark.parametrize("tiling_name", TILINGS)
def test_a_higher_step_selects_no_fewer_keys_and_the_last_selects_all(tiling_name: str, whole_pages: bool) -> None:
    start = build(tiling_name, whole_pages)
    raised = build_index(start.tiling, [pattern.at_step(1) for pattern in PATTERNS.values()], start.scores)
    dense = build_index(start.tiling, [pattern.at_step(MAX_STEP) for pattern in PATTERNS.values()], start.scores)
    assert dense.density().tolist() == [1.0] * len(PATTERNS)
    for head, (name, pattern) in enumerate(PATTERNS.items()):
        if not isinstance(pattern, LowRank):
            continue  # becomes low_rank, which adapts to the attention
        assert int(raised.to_mask()[head].sum()) >= int(start.mask[head].sum()), name


def test_steps() -> None:
    for pattern in PATTERNS.values():
        assert pattern.at_step(0) is pattern
        assert pattern.at_step(MAX_STEP) == pattern.at_step(MAX_STEP + 5) == Dense()
    assert Dense().at_step(1) == Dense()
    for pattern in PATTERNS.values():
        if not isinstance(pattern, Dense | LowRank):
            assert pattern.at_step(1) == LowRank() and pattern.at_step(2) == LowRank().at_step(1)
    gammas = []
    for step in range(MAX_STEP):
        raised = LowRank(rank=32, gamma=0.68).at_step(step)
        assert isinstance(raised, LowRank) and raised.rank == 32
        gammas.append(raised.gamma)
    assert gammas == pytest.approx([0.68, 0.92, 0.98])


def test_an_index_without_own_keys() -> None:
    """A tile with lists, one that attends everything without a list, and one that ends up empty."""
    tiling = Tiling.of(64, 160, 32, 32)  # two blocks of keys, three tiles
    blocks = torch.tensor([[[1, 2, -1, -1], [-1, -1, -1, -1], [2, 4, -1, -1]]], dtype=torch.int32)
    columns = torch.tensor([[[5, 70, 9], [-1, -1, -1], [66, -1, -1]]], dtype=torch.int32)
    counts = torch.tensor([[2, 4, 2]], dtype=torch.int32), torch.tensor([[3, 0, 1]], dtype=torch.int32)
    found = SparseIndex(tiling, blocks, counts[0], columns, counts[1]).without_own_keys()
    assert found.num_blocks.tolist() == [[1, 2, 0]] and found.num_columns.tolist() == [[2, 0, 0]]
    keys = found.to_mask()[0, ::32, :64]
    assert keys[0].nonzero()[:, 0].tolist() == [5, 9, *range(32, 64)]
    assert keys[1].all() and not keys[2].any()
    assert found.computed_pairs().tolist() == [32 * (34 + 64)] and found.dense_pairs() == 96 * 64
