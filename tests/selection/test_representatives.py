"""Representative queries of tiles, and selections by them."""

from __future__ import annotations

import pytest
import torch
from low_rank_inputs import TILINGS, lookups, neighbours
from score_inputs import scores_of

from minference_vllm import LowRank, reference
from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.build import build_index
from minference_vllm.selection.representatives import LEAST_SIZE, SPREAD, representatives

COUNT = 16


def of(low: torch.Tensor, key_size: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """``[h, T, COUNT, r]``."""
    return representatives(low, key_size, tiling, COUNT).unflatten(1, (-1, COUNT))


@pytest.mark.parametrize("name", list(TILINGS))
def test_a_tile_is_its_mean_its_directions_and_its_most_unlike_row(name: str) -> None:
    context, length, page, tile = TILINGS[name]
    tiling = Tiling.of(context, length, page, tile)
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(2, length - context, 32, generator=generator) * torch.linspace(5, 0.5, 32) + 3
    key_size = torch.rand(2, 1, 32, generator=generator) * 40 + 10
    key_size[..., 5] = 0  # a dimension that tells no keys apart
    found = of(low, key_size, tiling)
    for i_tile, (begin, end) in enumerate(zip(tiling.starts[:-1], tiling.starts[1:], strict=True)):
        rows = low[:, begin - context : end - context].double()
        mean = rows.mean(1, keepdim=True)
        size = key_size.double().clamp(min=LEAST_SIZE)
        apart = (rows - mean) * size
        torch.testing.assert_close(found[:, i_tile, :1].double(), mean, atol=1e-4, rtol=1e-4)
        unlike = apart.square().sum(2).argmax(1)
        assert torch.equal(found[:, i_tile, -1], rows[torch.arange(2), unlike].float())
        plus, minus = (found[:, i_tile, part].double() - mean for part in (slice(1, 8), slice(8, 15)))
        torch.testing.assert_close(plus, -minus, atol=1e-3, rtol=1e-3)
        # Along each direction the rows' deviation, and in all of them nearly as much as in any seven.
        variance = ((plus * size).norm(dim=2) / SPREAD).square()
        along = torch.nn.functional.normalize(plus * size, dim=2)
        of_rows = (apart @ along.transpose(1, 2)).square().mean(1)
        there = variance > 1e-3 * variance.amax()  # a tile of few rows has fewer directions
        torch.testing.assert_close(variance[there], of_rows[there], atol=1e-3, rtol=1e-3)
        most = (torch.linalg.svdvals(apart)[:, :7].square() / (end - begin)).sum(1)
        assert (variance.sum(1) > 0.93 * most - 1e-3).all()


def test_rows_that_are_alike_are_represented_by_themselves() -> None:
    tiling = Tiling.of(100, 300, 16, 64)
    low = torch.full((1, 200, 16), 2.0)
    found = of(low, torch.ones(1, 1, 16), tiling)
    torch.testing.assert_close(found, torch.full_like(found, 2.0), atol=1e-2, rtol=0)


def test_selections_follow_rows_that_are_alike_and_are_dense_where_all_differ() -> None:
    """Every row of ``lookups`` looks at a key of its own, which no representative knows: the measured rows say so."""
    pattern = LowRank(gamma=0.9, queries=COUNT)
    densities = []
    for query, keys in (neighbours(sink=False), lookups()):
        tiling = Tiling.of(keys.shape[1] - len(query), keys.shape[1], 32, 128)
        index = build_index(tiling, [pattern], scores_of(query, keys))
        densities.append(float(index.density()))
        recall = reference.attention_recall(query, keys, index.to_mask(), tiling.context_len, 1.0)
        assert recall.mean() > 0.9
    assert densities[0] < 0.25 and densities[1] > 0.9
