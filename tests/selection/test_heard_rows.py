"""The default pattern serves every row: a few rows that attend a key that no other row attends keep it.

The head attends the 150 keys before each row; some rows also attend one far key, with a given weight.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from low_rank_inputs import CHUNK, CONTEXT, DIM, LENGTH, PAGE, neighbours

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.discovery import default_pattern
from minference_vllm.selection.build import build_index
from minference_vllm.selection.torch_scores import TorchScores

SCALE = DIM**-0.5


class Look(NamedTuple):
    """Some neighbouring rows of the chunk, and the far key that they attend."""

    rows: range
    key: int


def head(looks: list[Look], weight: float, seed: int) -> Inputs:
    """A head in which every look has a direction of its own and ``weight`` of its rows' attention."""
    generator = torch.Generator().manual_seed(seed)
    query, keys = neighbours(sink=False)
    query, keys = query + torch.randn(query.shape, generator=generator) * 0.3, keys.clone()
    size = float(keys[0].norm(dim=1).mean())
    ways = torch.nn.functional.normalize(torch.randn(len(looks), DIM, generator=generator), dim=1)
    for look, way in zip(looks, ways, strict=True):
        keys[0, look.key] = way * size
    for look, way in zip(looks, ways, strict=True):
        for row in look.rows:
            along, across = (keys[0, : CONTEXT + row + 1] @ part * SCALE for part in (way, query[row, 0]))
            low, high = 0.0, 200.0
            for _ in range(25):
                middle = (low + high) / 2
                reached = float((across + middle * along).softmax(0)[look.key]) >= weight
                low, high = (low, middle) if reached else (middle, high)
            query[row, 0] += high * way
    pages = keys.view(1, -1, PAGE, DIM).transpose(0, 1)
    cache = PagedCache(pages, pages, "rows")
    return Inputs(query, cache, torch.arange(len(pages)), Chunk(0, 0, CONTEXT, LENGTH), SCALE)


def kept(looks: list[Look], weight: float, seed: int) -> tuple[float, float]:
    """Share of the rows that keep their key, and the index's density."""
    tiling = Tiling.of(CONTEXT, LENGTH, PAGE, 128, 1)
    index = build_index(tiling, [default_pattern()], TorchScores(head(looks, weight, seed)))
    found = []
    for look in looks:
        rows = torch.arange(look.rows.start, look.rows.stop)
        tiles = torch.searchsorted(tiling.starts, rows + CONTEXT, right=True) - 1
        found += index.tile_mask(tiles)[0, :, look.key].tolist()
    return sum(found) / len(found), float(index.density().mean())


@pytest.mark.parametrize(("weight", "least"), [(0.99, 1.0), (0.5, 1.0), (0.25, 0.9)])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_rows_in_mid_chunk(rows: int, weight: float, least: float) -> None:
    found = []
    for seed in range(10):
        rng = random.Random(seed)
        first = rng.randrange(100, CHUNK - 164)
        found.append(kept([Look(range(first, first + rows), rng.randrange(50, 2800))], weight, seed))
    assert sum(share for share, _ in found) / len(found) >= least
    assert sum(density for _, density in found) / len(found) <= 0.13


@pytest.mark.parametrize("weight", [0.99, 0.5, 0.25])
def test_any_of_the_last_rows(weight: float) -> None:
    rows = range(CHUNK - 64, CHUNK, 3)
    found = [kept([Look(range(row, row + 1), 100 + 100 * number)], weight, number) for number, row in enumerate(rows)]
    assert [row for row, (share, _) in zip(rows, found, strict=True) if share < 1.0] == []
    assert sum(density for _, density in found) / len(found) <= 0.1


def test_questions_in_a_prompt_of_many() -> None:
    """Sixteen questions of eight rows each, as in a few-shot prompt."""
    shares = []
    for seed in range(3):
        rng = random.Random(seed)
        firsts = [int(CHUNK * (number + 0.8 * rng.random()) / 16) for number in range(16)]
        looks = [Look(range(first, first + 8), 60 + 170 * number) for number, first in enumerate(firsts)]
        share, density = kept(looks, 0.9, seed)
        shares.append(share)
        assert density <= 0.1
    assert sum(shares) / len(shares) >= 0.98
