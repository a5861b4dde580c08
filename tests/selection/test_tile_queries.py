"""Representative queries of tiles, and selections by them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from low_rank_inputs import TILINGS, lookups, neighbours
from score_inputs import scores_of

from minference_vllm import LowRank, reference
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.native import library
from minference_vllm.kernels.native import scores as native_scores
from minference_vllm.selection import tile_queries
from minference_vllm.selection.build import build_index
from minference_vllm.selection.tile_queries import ALIKE, LEAST_SIZE, TileQueries, candidate_step, num_candidates

COUNT = 16


Representatives = Callable[[torch.Tensor, torch.Tensor, Tiling, int], TileQueries]


def of(
    representatives: Representatives, low: torch.Tensor, key_size: torch.Tensor, tiling: Tiling
) -> list[list[torch.Tensor]]:
    """``[count, r]`` for every head and tile."""
    found, position, count = representatives(low, key_size, tiling, COUNT)
    rows = (position - tiling.context_len).long()[..., None].expand(found.shape)
    assert position.dtype == count.dtype == torch.int32 and torch.equal(low.gather(1, rows), found)
    by_tile = found.unflatten(1, (tiling.num_tiles, -1))
    assert by_tile.shape[2] == num_candidates(tiling.tile)
    return [
        [rows[:there] for rows, there in zip(*of_head, strict=True)] for of_head in zip(by_tile, count, strict=True)
    ]


def native(low: torch.Tensor, key_size: torch.Tensor, tiling: Tiling, count: int) -> TileQueries:
    if library.unavailable_reason():
        pytest.skip(str(library.unavailable_reason()))
    return native_scores.representatives(low, key_size, tiling, count)


BOTH = pytest.mark.parametrize("representatives", [tile_queries.representatives, native], ids=["torch", "native"])


@BOTH
@pytest.mark.parametrize("name", list(TILINGS))
def test_rows_are_taken_farthest_first(
    name: str, representatives: Representatives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_queries, "ALIKE", 1e9)
    context, length, page, tile = TILINGS[name]
    tiling = Tiling.of(context, length, page, tile)
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(2, length - context, 32, generator=generator) * torch.linspace(5, 0.5, 32) + 3
    key_size = torch.rand(2, 1, 32, generator=generator) * 40 + 10
    key_size[..., 5] = 0  # a dimension that tells no keys apart
    found, step = of(representatives, low, key_size, tiling), candidate_step(tile)
    monkeypatch.setattr(tile_queries, "ALIKE", 0.0)
    everything = of(representatives, low, key_size, tiling)
    assert step == (4 if tile == 512 else 2 if tile == 144 else 1)
    for i_tile, (begin, end) in enumerate(zip(tiling.starts[:-1], tiling.starts[1:], strict=True)):
        for head in range(2):
            rows = low[head, begin - context : end - context : step]
            size = key_size[head].double().clamp(min=LEAST_SIZE)
            apart = rows.double() * size
            left = list(range(len(rows)))
            farthest = int((apart - apart.mean(0)).norm(dim=1).argmax())
            for taken in range(min(COUNT, len(rows))):
                assert torch.equal(found[head][i_tile][taken], rows[farthest])
                left.remove(farthest)
                chosen = apart[[row for row in range(len(rows)) if row not in left]]
                if left:
                    farthest = left[int(torch.cdist(apart[left], chosen).amin(1).argmax())]
            assert len(found[head][i_tile]) == min(COUNT, len(rows))
            # Where the representatives do not suffice, all rows are taken.
            assert torch.equal(everything[head][i_tile] if len(rows) > COUNT else rows, rows)


@BOTH
def test_rows_that_are_alike_are_represented_by_themselves(representatives: Representatives) -> None:
    tiling = Tiling.of(100, 300, 16, 64)
    found = of(representatives, torch.full((1, 200, 16), 2.0), torch.ones(1, 1, 16), tiling)
    assert all(torch.equal(rows, torch.full((1, 16), 2.0)) for rows in found[0])


@BOTH
def test_all_rows_of_a_tile_whose_representatives_do_not_suffice(representatives: Representatives) -> None:
    """All rows are taken as soon as one is not represented, by the difference of scores in bits."""
    tiling = Tiling.of(128, 256, 64, 64)
    low = torch.zeros(1, 128, 16)
    # In one tile more rows differ than there are representatives.
    low[0, 64 : 64 + COUNT + 1, 0] = torch.arange(COUNT + 1) + 1.0
    for size, count in ((ALIKE * 1.01, 64), (ALIKE * 0.99, COUNT)):
        key_size = torch.full((1, 1, 16), size)
        assert representatives(low, key_size, tiling, COUNT).count.tolist() == [[1, count]]


@BOTH
def test_queries_that_are_not_numbers(representatives: Representatives) -> None:
    """The first such row is taken, and then the tile's first rows, since their distances are unknown."""
    tiling = Tiling.of(128, 320, 64, 64)
    low = torch.randn(2, 192, 16, generator=torch.Generator().manual_seed(0))
    low[1, 70], low[1, 80, 3] = torch.nan, torch.inf
    ours, right = (
        kind(low, torch.ones(2, 1, 16), tiling, COUNT) for kind in (representatives, tile_queries.representatives)
    )
    assert torch.equal(ours.count, right.count)
    of_ours, of_right = (found.position.view(2, 3, -1)[..., :COUNT] for found in (ours, right))
    assert torch.equal(of_ours, of_right)


def test_selections_follow_rows_that_are_alike_and_those_that_all_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of ``lookups`` attends a key of its own, which no representative covers, so all rows are scored.
    Otherwise the measured rows would show the loss, and the head would be dense."""
    pattern = LowRank(gamma=0.9, queries=COUNT)
    densities = []
    for query, keys in (neighbours(sink=False), lookups()):
        tiling = Tiling.of(keys.shape[1] - len(query), keys.shape[1], 32, 128)
        index = build_index(tiling, [pattern], scores_of(query, keys))
        densities.append(float(index.density()))
        recall = reference.attention_recall(query, keys, index.to_mask(), tiling.context_len, 1.0)
        assert recall.mean() > 0.9
    assert densities[0] < 0.25 and densities[1] < 0.1
    monkeypatch.setattr(tile_queries, "ALIKE", 1e9)
    assert float(build_index(tiling, [pattern], scores_of(query, keys)).density()) > 0.9
