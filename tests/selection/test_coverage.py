"""Coverage and its neighbours on attention of a known shape."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from score_inputs import scores_of

from minference_vllm import reference
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import Antidiagonal, Coverage, HeadPattern, PeakThreshold
from minference_vllm.reference import causal_mask
from minference_vllm.selection.build import build_index

TOKENS, CHUNK, DIM = 4096, 1024, 64


@dataclass(frozen=True)
class Shaped:
    """Queries ``[CHUNK, 1, D]`` and keys ``[1, TOKENS, D]`` of one head; its softmax scale is 1."""

    query: torch.Tensor
    keys: torch.Tensor

    def index(self, pattern: HeadPattern, rows: int = CHUNK, column_multiple: int = 1) -> SparseIndex:
        """The index of the last ``rows`` rows."""
        tiling = Tiling.of(TOKENS - rows, TOKENS, 32, 128, column_multiple)
        return build_index(tiling, [pattern], scores_of(self.query[-rows:], self.keys))

    def recall(self, index: SparseIndex) -> torch.Tensor:
        """float64, for every row."""
        rows = TOKENS - index.tiling.context_len
        return reference.attention_recall(
            self.query[-rows:], self.keys, index.to_mask(), index.tiling.context_len, 1.0
        )[0]


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
    """``count`` heavy keys at random positions before the chunk."""
    query, keys = torch.zeros(CHUNK, 1, DIM), torch.zeros(1, TOKENS, DIM)
    heavy = torch.randperm(TOKENS - CHUNK, generator=torch.Generator().manual_seed(0))[:count]
    query[..., 0], keys[0, heavy, 0] = 12.0, 1.0
    return Shaped(query, keys)


def single_diagonal(distance: int) -> Shaped:
    """Every row attends the one key at this distance."""
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


@pytest.mark.parametrize("column_multiple", [1, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_finds_the_shape_at_low_density(shape: str, column_multiple: int) -> None:
    head, budget = SHAPES[shape]
    index = head.index(Coverage(gamma=0.95, min_budget=64), column_multiple=column_multiple)
    recall = head.recall(index)
    assert float(recall[-64:].mean()) >= 0.95 - 1e-3
    assert float(recall.mean()) >= 0.94
    assert float(index.density()) <= budget


@pytest.mark.parametrize("shape", ["columns", "local_window", "far_diagonal"])
def test_a_budget_beyond_what_is_attended_takes_the_nearest_keys(shape: str) -> None:
    """When all other keys have equal mass, or none, as with an attention sink."""
    head, budget = SHAPES[shape][0], 1024
    index = head.index(Coverage(gamma=0.95, min_budget=budget))
    assert float(head.recall(index).mean()) >= 0.94
    assert float(index.density()) < 0.4
    tiles = torch.tensor([index.num_tiles - 1])
    assert int(index.tile_mask(tiles)[0, 0].sum()) >= budget
    # A budget of more than half of all keys is computed densely.
    assert float(head.index(Coverage(gamma=0.95, min_budget=TOKENS // 2 + 1)).density()) == 1.0


def test_a_flat_head_comes_out_dense_by_itself() -> None:
    head = Shaped(torch.zeros(CHUNK, 1, DIM), torch.zeros(1, TOKENS, DIM))
    index = head.index(Coverage(gamma=0.95, min_budget=64))
    assert float(index.density()) == 1.0
    assert not index.num_columns.any()


def test_what_is_always_taken_is_taken_where_the_tiles_own_pages_suffice() -> None:
    head = window(0, 5)
    mask = head.index(Coverage(gamma=0.01, min_budget=0)).to_mask()[0]
    row, key = torch.arange(TOKENS - CHUNK, TOKENS)[:, None], torch.arange(TOKENS)
    assert mask[:, :30].all() and mask[(row - key < 100) & (key <= row)].all()


def test_density_follows_gamma() -> None:
    head = window(0, 30)
    found = [float(head.index(Coverage(gamma=gamma, min_budget=0)).density()) for gamma in (0.5, 0.9, 0.99)]
    assert found == sorted(found)


@pytest.mark.parametrize("rows", [1, 2, 37, 63])
def test_coverage_of_fewer_rows_than_probe_queries(rows: int) -> None:
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
    index = build_index(Tiling.of(length - rows, length, 32, 64), [pattern], scores_of(query, keys))
    assert not (index.to_mask() & ~causal_mask(length - rows, length)).any()


@pytest.mark.parametrize("budget", [200, 777, 1500])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tile_has_its_budget(shape: str, budget: int) -> None:
    """The first tiles too, for which part of the last tile's keys lies after them, or before the prompt."""
    index = SHAPES[shape][0].index(Coverage(gamma=0.9, min_budget=budget))
    for tile, end in enumerate(index.tiling.starts[1:].tolist()):
        found = int(index.tile_mask(torch.tensor([tile]))[0, 0, :end].sum())
        assert found >= min(budget, end), (tile, found)
