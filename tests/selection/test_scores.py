"""``TorchScores``: every kind of scores against its float64 definition in ``reference.py``.

Budget: twice the error that the plain evaluation in the same precision makes, plus a floor for float32 sums.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from score_inputs import scores_of

from minference_vllm import reference
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import LowRank
from minference_vllm.selection.probe_queries import (
    PROBE_QUERIES,
    beyond_diagonals,
    column_diagonal_scores,
    probe_groups,
)

SIZES = {
    # name: (chunk, context, heads, KV heads, head size)
    "regular": (256, 0, 8, 2, 64),
    "odd_length": (301, 0, 8, 2, 64),
    "just_spread": (256, 77, 4, 2, 64),
    "not_yet_spread": (255, 77, 4, 2, 64),
    "context_before_chunk": (131, 517, 8, 2, 64),
    "exactly_64_queries": (64, 100, 4, 1, 64),
    "fewer_than_64_queries": (37, 211, 4, 1, 64),
    "one_query": (1, 99, 4, 1, 64),
    "one_token": (1, 0, 2, 2, 64),
    "gqa_1": (150, 75, 4, 4, 32),
    "gqa_7": (150, 75, 14, 2, 80),
    "gqa_8": (150, 75, 8, 1, 128),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT32_FLOOR = 1e-6
"""Absolute, for probabilities; sums of 64 of them get 64 times as much."""


def inputs(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int, float]:
    """Queries, keys, context length and scale; attention is peaked, so that columns and diagonals differ."""
    chunk, context, heads, kv_heads, dim = SIZES[name]
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(chunk, heads, dim, generator=generator) * 2
    keys = torch.randn(kv_heads, context + chunk, dim, generator=generator)
    return query.to(dtype), keys.to(dtype), context, dim**-0.5


def wanted_heads(heads: int) -> list[int]:
    """Some of the heads, out of order: a layer asks only for heads whose pattern needs the scores."""
    return [heads - 1, *range(0, heads - 1, 2)]


def assert_within(found: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, floor: float) -> None:
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert torch.isfinite(found).all()
    error = (found.double() - exact).abs()
    budget = 2 * float((eager.double() - exact).abs().max()) + floor
    worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    assert float(error.max()) <= budget, f"error {float(error.max()):.3g} at {worst}, budget {budget:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_column_diagonal_scores(name: str, dtype: torch.dtype) -> None:
    query, keys, _, scale = inputs(name, dtype)
    heads = wanted_heads(query.shape[1])
    columns, diagonals = scores_of(query, keys, scale).column_diagonal_scores(heads)
    groups = probe_groups(len(query))
    exact = reference.column_diagonal_scores(query, keys, scale, groups)
    # The same in low precision: scores are rounded once, to the inputs' type.
    length, rows = keys.shape[1], min(PROBE_QUERIES, len(query))
    context = length - len(query)
    scores = (query.transpose(0, 1) @ reference.repeat_heads(keys, query.shape[1]).transpose(1, 2)).float()
    weights = (scores * scale).masked_fill(~reference.causal_mask(context, length), -torch.inf).softmax(-1)
    eager_columns = torch.zeros(query.shape[1], length)
    eager_diagonals = torch.full((query.shape[1], length), torch.inf)
    for begin, end in groups:
        eager_columns += weights[:, begin:end].sum(1)
        mass = torch.zeros(query.shape[1], length)
        for row in range(begin, end):
            mass[:, : context + row + 1] += weights[:, row, : context + row + 1].flip(-1)
        reach = context + end
        eager_diagonals[:, :reach] = torch.minimum(eager_diagonals[:, :reach], mass[:, :reach] / (end - begin))
    eager_diagonals *= rows
    floor = FLOAT32_FLOOR * rows
    assert_within(columns, exact[0][heads], eager_columns[heads], floor)
    assert_within(diagonals, exact[1][heads], eager_diagonals[heads], floor)


@pytest.mark.parametrize("name", SIZES)
def test_every_query_spends_its_whole_mass(name: str) -> None:
    query, keys, _, scale = inputs(name, torch.bfloat16)
    rows = min(PROBE_QUERIES, query.shape[0])
    columns, diagonals = column_diagonal_scores(query, keys, range(query.shape[1]), scale)
    torch.testing.assert_close(columns.sum(-1), torch.full((query.shape[1],), float(rows)), rtol=1e-4, atol=0)
    assert (diagonals >= 0).all() and (diagonals.sum(-1) <= rows * 1.0001).all()


@pytest.mark.parametrize("name", SIZES)
def test_columns_beyond_diagonals(name: str) -> None:
    query, keys, _, scale = inputs(name, torch.float32)
    heads, context = range(query.shape[1]), keys.shape[1] - len(query)
    columns, diagonals = column_diagonal_scores(query, keys, heads, scale)
    groups = probe_groups(len(query))
    before = columns.clone()
    found = beyond_diagonals(columns, diagonals, groups, context)
    assert torch.equal(columns, before)
    exact = reference.beyond_diagonals(columns, diagonals, groups, context)
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)
    ours, same = scores_of(query, keys, scale).column_diagonal(heads)
    if len(groups) == 1:
        assert torch.equal(ours, columns) and not same.any()
    else:
        assert torch.equal(ours, found) and torch.equal(same, diagonals)


def test_a_diagonal_makes_no_columns_and_a_column_stays_one() -> None:
    groups, context, length = probe_groups(1024), 1024, 2048
    columns, diagonals = torch.zeros(1, length), torch.zeros(1, length)
    rows = [row for begin, end in groups for row in range(begin, end)]
    diagonals[0, 700] = 0.75 * len(rows)
    for row in rows:
        columns[0, context + row - 700] += 0.75
    columns[0, 30] = 0.25 * len(rows)
    rest = beyond_diagonals(columns, diagonals, groups, context)
    assert float(rest[0, 30]) == pytest.approx(16.0) and float(rest.sum()) == pytest.approx(16.0, abs=1e-3)


def test_a_strong_column_leaves_no_trace_in_the_diagonals() -> None:
    """Plain sums would spread it over 64 of them; a true diagonal keeps nearly all of its mass."""
    length, dim, column, offset = 1024, 64, 300, 700
    keys = torch.zeros(1, length, dim)
    query = torch.zeros(64, 1, dim)
    for row in range(64):
        # Each row attends the column (dimension 0) and, as strongly, the key 700 tokens back (its own dimension).
        place = length - 64 + row - offset
        query[row, 0, 0] = query[row, 0, 1 + row % 60] = 30.0
        keys[0, place, 1 + row % 60] = 10.0
    keys[0, column] = 0
    keys[0, column, 0] = 10.0
    columns, diagonals = column_diagonal_scores(query, keys, [0], 0.1)
    assert int(columns[0].argmax()) == column
    assert int(diagonals[0].argmax()) == offset
    traces = [length - 64 + row - column for row in range(64)]
    assert float(diagonals[0, [trace for trace in traces if trace != offset]].max()) < 0.1 * float(diagonals[0, offset])


@pytest.mark.parametrize("block_size, tile", [(16, 16), (32, 64), (64, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_pooled_scores(name: str, dtype: torch.dtype, block_size: int, tile: int) -> None:
    query, keys, context, scale = inputs(name, dtype)
    heads = wanted_heads(query.shape[1])
    tiling = Tiling.of(context, keys.shape[1], block_size, tile)
    found = scores_of(query, keys, scale, block_size).pooled(heads, tiling)
    exact = reference.pooled_scores(query, keys, tiling, scale)[heads]
    # Means are taken in float32 whatever the inputs are, so the plain evaluation is the float32 one.
    starts = (tiling.starts - context).tolist()
    queries = torch.stack([query[a:b].float().mean(0) for a, b in pairwise(starts)], 1)
    means = torch.stack([block.mean(1) for block in keys.float().split(block_size, 1)], 1)
    scores = queries @ reference.repeat_heads(means, query.shape[1]).transpose(1, 2) * scale
    eager = scores.masked_fill(~tiling.reachable(), -torch.inf).softmax(-1)[heads]
    assert_within(found, exact, eager, FLOAT32_FLOOR)
    assert not found[:, ~tiling.reachable()].any(), "a block out of reach has a score"


@pytest.mark.parametrize("block_size, tile", [(16, 16), (32, 64), (64, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_peak_scores(name: str, dtype: torch.dtype, block_size: int, tile: int) -> None:
    query, keys, context, scale = inputs(name, dtype)
    heads = wanted_heads(query.shape[1])
    tiling = Tiling.of(context, keys.shape[1], block_size, tile)
    found = scores_of(query, keys, scale, block_size).peaks(heads, tiling)
    exact = reference.peak_scores(query, keys, tiling, scale)[heads]
    # The same in low precision: means and logits are rounded once each, to the inputs' type.
    means = torch.stack([block.mean(1) for block in keys.float().split(block_size, 1)], 1).to(dtype)
    logits = (query.transpose(0, 1) @ reference.repeat_heads(means, query.shape[1]).transpose(1, 2)).float() * scale
    eager = torch.zeros(found.shape)
    for number, (first, last) in enumerate(pairwise((tiling.starts - context).tolist())):
        rows = logits[heads, first:last].masked_fill(~tiling.reachable()[number], -torch.inf)
        eager[:, number] = rows.softmax(-1).mean(1)
    assert_within(found, exact, eager, FLOAT32_FLOOR)
    assert not found[:, ~tiling.reachable()].any(), "a block out of reach has a score"
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))


@pytest.mark.parametrize("block_size, tile, stride", [(16, 16, 16), (32, 64, 8), (64, 128, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_antidiagonal_scores(name: str, dtype: torch.dtype, block_size: int, tile: int, stride: int) -> None:
    query, keys, context, scale = inputs(name, dtype)
    heads = wanted_heads(query.shape[1])
    tiling = Tiling.of(context, keys.shape[1], block_size, tile)
    found = scores_of(query, keys, scale, block_size).antidiagonal(heads, tiling, stride)
    exact = reference.antidiagonal_scores(query, keys, tiling, stride, scale)[heads]
    # Every logit is rounded once, to the inputs' type, which bounds a weight's relative error. (Masses add up to 1, so
    # an error is at most as large as that.)
    logits = query.double().transpose(0, 1) @ reference.repeat_heads(keys.double(), query.shape[1]).transpose(1, 2)
    rounding = torch.finfo(dtype).eps * float(logits.abs().max()) * scale
    assert_within(found, exact, exact, FLOAT32_FLOOR + rounding * float(exact.max()))
    assert not found[:, ~tiling.reachable()].any(), "a block out of reach has a score"
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))


@pytest.mark.parametrize("stride", [2, 8, 16, 64])
def test_antidiagonals_cross_every_column_and_the_diagonals_of_odd_distance(stride: int) -> None:
    length, block = 512, 64
    tiling = Tiling.of(0, length, block, block)
    keys = torch.zeros(1, length, length + 1)
    query = torch.zeros(length, 3, length + 1)
    # The first head attends one key, the others a key at a distance: every key has a dimension of its own.
    places = torch.arange(length)
    keys[0, places, places] = query[:, 0, 130] = 30.0
    for head, distance in ((1, 201), (2, 200)):
        query[places[distance:], head, places[:-distance]] = 30.0
    found = scores_of(query, keys, block_size=block).antidiagonal([0, 1, 2], tiling, stride)
    for number in range(4, 8):
        uniform = 1 / (number + 1)
        assert float(found[0, number, 2]) > 2 * uniform
        # Rows of the tile meet the diagonal 201 back in two blocks, most of them in the earlier one.
        assert float(found[1, number, number - 4 : number - 2].sum()) > 4 * uniform
        # Squares lie at even positions, and so do an antidiagonal's cells: every second diagonal is missed.
        assert float(found[2, number].max()) < 2 * uniform


@pytest.mark.parametrize("stride", [3, 24, 33, 64])
def test_a_stride_that_does_not_divide_the_page_is_refused(stride: int) -> None:
    query, keys, context, scale = inputs("regular", torch.float32)
    with pytest.raises(ValueError, match=f"antidiagonal stride must divide the page size 32, not {stride}"):
        scores_of(query, keys, scale).antidiagonal([0], Tiling.of(context, keys.shape[1], 32, 64), stride)


@pytest.mark.parametrize("name", ["regular", "context_before_chunk", "gqa_7"])
@pytest.mark.parametrize("window", [1, 50, 128, 200])
def test_block_scores_in_a_window(name: str, window: int) -> None:
    query, keys, context, scale = inputs(name, torch.float32)
    tiling, heads = Tiling.of(context, keys.shape[1], 32, 64, window=window), wanted_heads(query.shape[1])
    scores = scores_of(query, keys, scale, window=window)
    for kind, definition, stride in (
        ("pooled", reference.pooled_scores, ()),
        ("peaks", reference.peak_scores, ()),
        ("antidiagonal", reference.antidiagonal_scores, (16,)),
    ):
        found = getattr(scores, kind)(heads, tiling, *stride)
        exact = definition(query, keys, tiling, *stride, scale)[heads]
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)
        assert not found[:, ~tiling.reachable()].any()


@pytest.mark.parametrize("name", ["regular", "context_before_chunk", "gqa_7"])
def test_block_scores_with_a_soft_cap(name: str) -> None:
    """The scores of our CPU kernels are tested in ``tests/kernels/test_native_features.py``."""
    query, keys, context, scale = inputs(name, torch.float32)
    tiling, heads = Tiling.of(context, keys.shape[1], 32, 128), wanted_heads(query.shape[1])
    cap = 0.05  # means of random keys are short
    scores, plain = scores_of(query, keys, scale, softcap=cap), scores_of(query, keys, scale)
    definitions = {
        "pooled": (reference.pooled_scores, ()),
        "peaks": (reference.peak_scores, ()),
        "antidiagonal": (reference.antidiagonal_scores, (2,)),
    }
    for kind, (definition, stride) in definitions.items():
        found, without = (getattr(of, kind)(heads, tiling, *stride) for of in (scores, plain))
        exact = definition(query, keys, tiling, *stride, scale, cap)
        torch.testing.assert_close(found.double(), exact[heads], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found, without, rtol=1e-3, atol=1e-5)


def test_inputs_are_left_as_they_are() -> None:
    query, keys, context, scale = inputs("odd_length", torch.float32)
    scores, tiling = scores_of(query, keys, scale), Tiling.of(context, keys.shape[1], 32, 64)
    given = scores.query, scores.inputs.cache.key, scores.keys, scores.mean_keys
    before = [part.clone() for part in given]
    scores.column_diagonal([0, 1])
    scores.pooled([0, 1], tiling)
    scores.peaks([0, 1], tiling)
    scores.antidiagonal([0, 1], tiling, 16)
    scores.low_rank([0, 1], tiling, LowRank(rank=16, gamma=0.9))
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    assert torch.equal(scores.query, query) and torch.equal(scores.keys, keys)
