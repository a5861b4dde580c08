"""Low-rank scores: the fit, the levels by every implementation, and what a head that looks things up gets from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from minference_vllm import low_rank, reference
from minference_vllm.engines import columns as columns_module
from minference_vllm.engines import native
from minference_vllm.engines.columns import gather_columns
from minference_vllm.estimate import Estimates, line_levels
from minference_vllm.index import SparseIndex, build_index
from minference_vllm.low_rank import LEVELS_PER_BIT, OWN_LEVEL, PEAK_KEYS, Kernels
from minference_vllm.paged_cache import PagedCache
from minference_vllm.patterns import Coverage, LowRank
from minference_vllm.tiling import Tiling

IMPLEMENTATIONS = ("torch", *native.INSTRUCTIONS)


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Torch, and each build of our CPU kernels that the processor can run."""
    if request.param == "torch":
        yield Kernels()
        return
    library = native.load(request.param)
    if library is None:
        pytest.skip(f"no kernels for {native.INSTRUCTIONS[request.param]} here")
    monkeypatch.setattr(native, "_best", lambda: (request.param, library))
    yield Kernels(native.tile_levels, native.row_mass, native.mass_by_level)


def random_factors(heads: int, chunk: int, length: int, rank: int, sharpness: float) -> low_rank.Factors:
    generator = torch.Generator().manual_seed(length + rank)
    query = torch.randn(heads, chunk, rank, generator=generator) * sharpness
    return as_factors(query, torch.randn(heads, length, rank, generator=generator))


def as_factors(query: torch.Tensor, keys: torch.Tensor) -> low_rank.Factors:
    """Of queries ``[h, chunk, r]`` and keys ``[h, S, r]`` whose products are in bits."""
    same = torch.eye(query.shape[2]).expand(len(query), -1, -1)
    projection = low_rank.in_units(low_rank.Projection(same, same, torch.zeros(len(query), 1, query.shape[2])), keys)
    whole, step = low_rank.whole_queries(query, projection, math.log(2))
    return low_rank.Factors(whole, low_rank.whole_keys(keys, projection), step)


TILINGS = {
    # name: (context, sequence, page, tile)
    "regular": (512, 1024, 128, 128),
    "odd_length": (0, 517, 32, 128),
    "starts_inside_a_tile": (333, 700, 32, 128),
    "starts_inside_a_page": (205, 300, 32, 64),
    "one_row": (300, 301, 32, 32),
    "one_token": (0, 1, 32, 32),
    "first_tile": (0, 90, 128, 128),
    "large_tile": (700, 1500, 64, 512),
    "pages_of_16": (100, 250, 16, 48),
}


@pytest.mark.parametrize("rank", [16, 32, 80])
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("name", TILINGS)
def test_levels(name: str, sharpness: float, rank: int, kernels: Kernels) -> None:
    context, length, page, tile = TILINGS[name]
    tiling = Tiling.of(context, length, page, tile)
    factors = random_factors(2, length - context, length, rank, sharpness)
    lowest = torch.tensor([0, 200], dtype=torch.int32)
    found = kernels.tile_levels(factors, tiling, lowest)
    query = factors.query.double() * factors.bits().double()
    exact = reference.low_rank_levels(query, factors.keys, tiling, PEAK_KEYS, LEVELS_PER_BIT).clamp(0, 254)
    assert found.dtype == torch.uint8 and found.shape == exact.shape
    places = torch.arange(length)
    own = places >= (tiling.starts[:-1] // tile * tile)[:, None]
    seen = places < tiling.starts[1:, None]
    assert (found[:, own & seen] == OWN_LEVEL).all() and (found[:, ~seen] == 0).all()
    before, wanted = (found[:, ~own].double(), exact[:, ~own])
    # To the nearest, and norms to half a unit of the products.
    slack = 0.5 + 1e-3 * LEVELS_PER_BIT + 0.5 * LEVELS_PER_BIT * factors.bits().max().item()
    right = (before - wanted).abs() <= slack
    unwanted = (before == 0) & (wanted < lowest[:, None] + slack)
    assert right[0].all()
    assert (right | unwanted)[1].all() and ((before[1] == 0) | (before[1] >= 200)).all()


def test_a_row_gives_no_key_a_higher_level_than_its_tile() -> None:
    tiling = Tiling.of(333, 700, 32, 128)
    factors = random_factors(2, 367, 700, 16, 3.0)
    rows = low_rank.calibration_rows(367, 700, factors.keys.device)
    positions = rows + 333
    own = low_rank.row_levels(factors.rows(rows), positions, tiling)
    tiles = torch.searchsorted(tiling.starts, positions, right=True) - 1
    levels = low_rank.tile_levels(factors, tiling, torch.zeros(2, dtype=torch.int32))[:, tiles]
    future = torch.arange(700) > positions[:, None]
    assert ((own <= levels) | future).all()


@pytest.mark.parametrize("name", ["regular", "starts_inside_a_tile", "large_tile"])
def test_levels_of_lines(name: str) -> None:
    """Seen from the last tile they are the worth that ``coverage`` gives the keys; other tiles see pages shifted."""
    context, length, page, tile = TILINGS[name]
    tiling = Tiling.of(context, length, page, tile)
    generator = torch.Generator().manual_seed(0)
    by_column, by_offset = torch.rand(2, 2, length, generator=generator).pow(8)
    levels = line_levels(tiling, by_column, by_offset)
    _, worth = reference.coverage_worth(by_column, by_offset, tiling, 0, 0)
    exact = (254 + LEVELS_PER_BIT * worth.log2()).clamp(0, 254).floor()
    exact[worth.isinf()] = OWN_LEVEL
    assert (levels[:, -1] - exact).abs().max() <= 1
    own = tiling.own().repeat_interleave(page, 1)[:, :length]
    later = ~tiling.reachable().repeat_interleave(page, 1)[:, :length]
    assert (levels[:, own] == OWN_LEVEL).all() and (levels[:, later] == 0).all()
    # Without columns, what is at the same distance is worth the same.
    flat = line_levels(tiling, torch.full_like(by_column, 1e-9), by_offset)
    for number in range(tiling.num_tiles - 1):
        shift = (int(tiling.starts[-2]) // tile - int(tiling.starts[number]) // tile) * tile
        before = int(tiling.starts[number]) // tile * tile
        if before:
            assert torch.equal(flat[:, number, :before], flat[:, -1, shift : shift + before])


def test_mass_by_level(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (3, 5, 301), generator=generator).to(torch.uint8)
    weights = torch.rand(3, 7, 301, generator=generator)
    weights[:, :, 40:200] *= 1e-12
    weights /= weights.sum(-1, keepdim=True)
    lists = torch.tensor([0, 0, 1, 3, 4, 4, 2])
    exact = torch.zeros(3, 256, dtype=torch.float64)
    for head in range(3):
        for row, which in enumerate(lists.tolist()):
            exact[head].index_add_(0, levels[head, which].long(), weights[head, row].double() / 7)
    torch.testing.assert_close(kernels.mass_by_level(levels, lists, weights).double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [16, 80])
@pytest.mark.parametrize("name", TILINGS)
def test_mass_of_rows(name: str, rank: int, kernels: Kernels) -> None:
    context, length, page, tile = TILINGS[name]
    tiling = Tiling.of(context, length, page, tile)
    factors = random_factors(2, length - context, length, rank, 2.0)
    rows = low_rank.calibration_rows(length - context, length, factors.keys.device)
    positions = rows + context
    weights = torch.rand(2, len(rows), length, generator=torch.Generator().manual_seed(0)).pow(20)
    weights.masked_fill_(torch.arange(length) > positions[:, None], 0)
    weights /= weights.sum(-1, keepdim=True)
    found = kernels.row_mass(factors, rows, tiling, weights).double()
    levels = low_rank.row_levels(factors.rows(rows), positions, tiling)
    exact = torch.zeros(2, 256, dtype=torch.float64)
    for head in range(2):
        exact[head].index_add_(0, levels[head].flatten().long(), weights[head].flatten().double() / len(rows))
    # Where the level of a key is rounded otherwise, its mass moves to the next one.
    ours, right = found.cumsum(1), exact.cumsum(1)
    assert (ours[:, :-1] <= right[:, 1:] + 1e-4).all() and (ours[:, 1:] >= right[:, :-1] - 1e-4).all()
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[:, OWN_LEVEL], exact[:, OWN_LEVEL], atol=1e-4, rtol=0)


def test_threshold() -> None:
    mass = torch.zeros(4, 256)
    mass[0, 255], mass[0, 100], mass[0, 0] = 0.5, 0.4, 0.1
    mass[1, 255] = 1.0
    mass[2, 200:220] = 0.05
    mass[3, 0] = 1.0
    assert low_rank.threshold(mass, 0.85).tolist() == [100, 255, 203, 0]


@pytest.mark.parametrize(
    ("chunk", "length", "count"),
    [
        (1, 9000, 1),
        (15, 9000, 15),
        (17, 9000, 16),
        (256, 9000, 16),
        (1000, 9000, 62),
        (1024, 9000, 64),
        (4096, 9000, 64),
        (4096, 1 << 19, 32),
        (4096, 1 << 22, 16),
    ],
)
def test_calibration_rows(chunk: int, length: int, count: int) -> None:
    rows = low_rank.calibration_rows(chunk, length, torch.device("cpu")).tolist()
    assert len(rows) == len(set(rows)) == count and rows == sorted(rows)
    assert rows[0] >= 0 and rows[-1] == chunk - 1
    if count == 64 and chunk == 4096:
        assert len({row % 64 for row in rows}) > 30  # no regular prompt hides from them


# Whole numbers


@pytest.mark.parametrize("rank", [16, 32, 128])
@pytest.mark.parametrize("case", ["random", "along one dimension", "all the same", "tiny", "huge", "zeros", "outlier"])
def test_whole_numbers_keep_the_products(case: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    query, keys = torch.randn(2, 50, rank, generator=generator) * 3, torch.randn(2, 400, rank, generator=generator)
    if case == "along one dimension":
        query[..., 1:], keys[..., 1:] = 0, 0
    elif case == "all the same":
        query, keys = torch.full_like(query, 2.0), torch.full_like(keys, -1.0)
    elif case == "tiny":
        query *= 1e-12
    elif case == "huge":
        query *= 1e6
    elif case == "zeros":
        query, keys = query * 0, keys * 0
    elif case == "outlier":
        keys[:, 7] *= 4
    factors = as_factors(query, keys)
    assert factors.query.abs().max() <= low_rank.MOST_QUERY and factors.step.min() > 0
    products = factors.query.double() @ factors.keys.double().transpose(1, 2)
    assert products.abs().max() <= low_rank.MOST_PRODUCT * 1.1 < 1 << 15
    if case == "huge":
        return  # scores of a million bits are taken for smaller ones
    exact = query.double() @ keys.double().transpose(1, 2)
    most = query.double().norm(dim=2) * keys.double().norm(dim=2).amax(1)[:, None]
    error = (products * factors.bits() - exact) / most.clamp(min=low_rank.LEAST_RANGE)[..., None]
    # Where all elements are rounded alike, their errors add up.
    assert error.abs().max() < 0.04 and (error.square().mean().sqrt() < 0.004 or case == "all the same")


def test_longer_keys_than_sampled_are_shortened() -> None:
    keys = torch.randn(1, 100, 32, generator=torch.Generator().manual_seed(0))
    same = torch.eye(32)[None]
    projection = low_rank.in_units(low_rank.Projection(same, same, torch.zeros(1, 1, 32)), keys[:, :50])
    keys[:, 70] *= 50
    whole = low_rank.whole_keys(keys, projection).double()
    assert whole.norm(dim=2).max() < low_rank.KEY_NORM * 1.02
    assert torch.nn.functional.cosine_similarity(whole[0, 70], keys[0, 70].double(), dim=0) > 0.99


# The fit


def centred(scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.mean(-1, keepdim=True)


def products(projection: low_rank.Projection, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    low_query = query.double() @ projection.to_query.double()
    low_keys = (keys.double() - projection.mean.double()) @ projection.to_key.double()
    return low_query @ low_keys.transpose(1, 2)


def spread_inputs(rows: int = 300, tokens: int = 900, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of two heads whose dimensions differ in size, and are mixed; keys have a large common part."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(0.5, -1.5, dim)
    mixed = torch.linalg.qr(torch.randn(2, dim, dim, generator=generator)).Q
    query = torch.randn(2, rows, dim, generator=generator) * sizes @ mixed
    keys = torch.randn(2, tokens, dim, generator=generator) * sizes.flip(0).add(0.1) @ mixed + 5
    return query, keys


def test_at_full_rank_nothing_is_lost() -> None:
    query, keys = spread_inputs()
    found = centred(products(low_rank.fit(query, keys, 64), query, keys))
    exact = centred(query.double() @ keys.double().transpose(1, 2))
    assert float((found - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_no_other_dimensions_lose_less(rank: int) -> None:
    query, keys = spread_inputs()
    keys = keys.bfloat16()
    exact = query.double() @ (keys.double() - keys.double().mean(1, keepdim=True)).transpose(1, 2)
    error = (products(low_rank.fit(query, keys, rank), query, keys) - exact).norm(dim=(1, 2))
    # Of all matrices of this rank, the truncated singular value decomposition is nearest.
    least = torch.linalg.svdvals(exact)[:, rank:].norm(dim=1)
    assert (error >= least * (1 - 1e-6)).all() and (error <= least * 1.05).all(), (error / least).tolist()


def test_no_more_dimensions_than_are_needed() -> None:
    query, keys = spread_inputs()
    exact = query.double() @ (keys.double() - keys.double().mean(1, keepdim=True)).transpose(1, 2)

    def error(rank: int) -> float:
        return float(
            (products(low_rank.fit(query, keys, rank), query, keys) - exact).square().mean((1, 2)).max() ** 0.5
        )

    for enough, rank in ((1e9, 16), (error(16) * 1.01, 16), (error(32) * 1.01, 32), (error(48) * 0.99, 64), (0.0, 64)):
        assert low_rank.fit(query, keys, 64, enough).to_key.shape == (2, 64, rank)
    assert low_rank.fit(query, keys, 40, 0.0).to_key.shape == (2, 64, 40)
    assert low_rank.fit(query, keys, 16, 0.0).to_key.shape == (2, 64, 16)


@pytest.mark.parametrize("case", ["zeros", "constant keys", "one query", "few keys", "one dimension", "huge"])
def test_degenerate_inputs_stay_finite(case: str) -> None:
    query, keys = spread_inputs()
    if case == "zeros":
        query, keys = torch.zeros_like(query), torch.zeros_like(keys)
    elif case == "constant keys":
        keys = torch.ones_like(keys)
    elif case == "one query":
        query = query[:, :1]
    elif case == "few keys":
        keys = keys[:, :3]
    elif case == "one dimension":
        query, keys = query * (torch.arange(64) == 5), keys * (torch.arange(64) == 5)
    elif case == "huge":
        query, keys = query * 1e4, keys * 1e4
    projection = low_rank.fit(query, keys, 16)
    assert all(torch.isfinite(part).all() for part in projection)
    if case in ("one query", "one dimension"):
        exact = centred(query.double() @ keys.double().transpose(1, 2))
        assert float((centred(products(projection, query, keys)) - exact).norm() / exact.norm()) < 1e-3


# Heads

CONTEXT, CHUNK, DIM, PAGE = 3072, 1024, 64, 32
LENGTH = CONTEXT + CHUNK


def lookups(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row looks at one key of its own, anywhere before it; queries ``[CHUNK, 1, DIM]``, keys ``[1, S, DIM]``."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.nn.functional.normalize(torch.randn(LENGTH, DIM // 2, generator=generator), dim=1)
    target = (torch.rand(CHUNK, generator=generator) * torch.arange(CONTEXT, LENGTH)).long()
    noise = torch.randn(LENGTH + CHUNK, DIM // 2, generator=generator) * 0.05
    query = torch.cat([20 * keys[target], noise[:CHUNK]], 1)
    return query[:, None].bfloat16(), torch.cat([keys, noise[CHUNK:]], 1)[None].bfloat16()


def recall(index: SparseIndex, query: torch.Tensor, keys: torch.Tensor) -> float:
    return float(reference.attention_recall(query, keys, index.to_mask(), CONTEXT, 1.0).mean())


def build(pattern: LowRank | Coverage, query: torch.Tensor, keys: torch.Tensor) -> SparseIndex:
    return build_index(Tiling.of(CONTEXT, LENGTH, PAGE, 128), [pattern], Estimates(query, keys, 1.0))


def neighbours(sink: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row looks at the 150 keys before it, and at the first one, or not."""
    place = torch.arange(LENGTH, dtype=torch.float32)[:, None] / LENGTH * 3.0
    angle = place * torch.randn(DIM // 2 - 1, generator=torch.Generator().manual_seed(0)) * 20
    keys = torch.cat([angle.cos(), angle.sin(), torch.zeros(LENGTH, 2)], 1)
    query = keys[CONTEXT:] * 3
    if sink:
        keys[0], query[:, -1] = 0, 1
        keys[0, -1] = 90
    return query[:, None], keys[None]


@pytest.mark.parametrize("sink", [False, True])
def test_a_head_that_columns_and_diagonals_serve_is_not_scored(sink: bool) -> None:
    query, keys = neighbours(sink)

    def unexpected(*_: torch.Tensor | Tiling) -> torch.Tensor:
        raise AssertionError("scored")

    tiling = Tiling.of(CONTEXT, LENGTH, PAGE, 128)
    estimates = Estimates(query, keys, 1.0, Kernels(tile_levels=unexpected))
    index = build_index(tiling, [LowRank(gamma=0.9)], estimates)
    assert recall(index, query, keys) >= 0.9 - 0.01
    assert float(index.density()) < 0.2
    with pytest.raises(AssertionError, match="scored"):
        build_index(tiling, [LowRank(gamma=0.9)], Estimates(*lookups(), 1.0, Kernels(tile_levels=unexpected)))


@pytest.mark.parametrize("gamma", [0.8, 0.9, 0.97])
def test_a_head_that_looks_things_up(gamma: float) -> None:
    query, keys = lookups()
    index = build(LowRank(gamma=gamma, rank=32), query, keys)
    assert recall(index, query, keys) >= gamma - 0.02
    assert float(index.density()) < 0.2
    # Which no columns and diagonals do: those that the choosing rows look at serve nobody else.
    blind = build(Coverage(gamma=gamma, min_budget=512), query, keys)
    assert recall(blind, query, keys) < gamma - 0.3


def test_more_dimensions_need_fewer_keys() -> None:
    query, keys = lookups()
    found = [float(build(LowRank(rank=rank), query, keys).density()) for rank in (16, 32, 64)]
    assert found == sorted(found, reverse=True)


def test_a_flat_head_comes_out_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(CHUNK, 1, DIM, generator=generator).mul(1e-3)
    index = build(LowRank(), query, torch.randn(1, LENGTH, DIM, generator=generator))
    assert float(index.density()) == 1.0 and not index.num_columns.any()


def test_pages_full_of_wanted_keys_are_taken_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, LENGTH, DIM, generator=generator) * 0.05
    keys[0, 640:704, 0] += 20
    query = torch.zeros(CHUNK, 1, DIM)
    query[..., 0] = 1
    index = build(LowRank(gamma=0.9), query, keys)
    assert recall(index, query, keys) > 0.9
    assert not index.num_columns.any()
    assert {20, 21} <= set(index.blocks[0, 0].tolist())


def test_selection_is_the_same_for_keys_in_pieces_and_for_heads_apart() -> None:
    query, keys = (
        torch.cat(parts, dim) for parts, dim in zip(zip(lookups(1), lookups(2), strict=True), (1, 0), strict=True)
    )
    tiling = Tiling.of(CONTEXT, LENGTH, PAGE, 128)

    def estimate(heads: list[int], at_once: int) -> tuple[torch.Tensor, torch.Tensor]:
        return low_rank.estimate(query, lambda: keys.split(at_once, 1), heads, tiling, 16, 0.9, 1.0)

    both, thresholds = estimate([0, 1], LENGTH)
    for head in (0, 1):
        alone, threshold = estimate([head], LENGTH)
        assert torch.equal(alone[0], both[head]) and threshold[0] == thresholds[head]
    # Other keys are sampled for the fit, so the levels are others, of the same worth.
    pieces, _ = estimate([0, 1], 1000)
    assert ((pieces > 0) == (both > 0)).float().mean() > 0.9


@pytest.mark.parametrize("tile", [32, 128])
def test_columns_fill_whole_pages_for_an_engine_that_needs_it(tile: int) -> None:
    query, keys = lookups()
    tiling = Tiling.of(CONTEXT, LENGTH, PAGE, tile, column_multiple=PAGE)
    index = build_index(tiling, [LowRank(gamma=0.9)], Estimates(query, keys, 1.0))
    exact = build_index(Tiling.of(CONTEXT, LENGTH, PAGE, tile), [LowRank(gamma=0.9)], Estimates(query, keys, 1.0))
    assert index.num_columns.any() and not (index.num_columns % PAGE).any()
    assert not (exact.to_mask() & ~index.to_mask()).any()
    assert int(index.num_columns.sum()) <= int(exact.num_columns.sum()) + PAGE * tiling.num_tiles


def test_columns_are_gathered_alike_key_by_key_and_page_by_page(
    paged_batch: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, keys = lookups()
    index = build(LowRank(gamma=0.9), query, keys)
    generator = torch.Generator().manual_seed(0)
    pages = torch.randperm(LENGTH // PAGE + 3, generator=generator)[: LENGTH // PAGE]
    stored = torch.randn(2, LENGTH // PAGE + 3, 1, PAGE, DIM, generator=generator).bfloat16()
    cache = PagedCache(stored[0], stored[1], "transposed")
    gathered = []
    for share in (0.0, 2.0):
        monkeypatch.setattr(columns_module, "WHOLE_FROM", share)
        found = gather_columns(index, cache, pages)
        used = index.columns[index.columns >= 0].long().unique()
        rows = found.row_of[0, used]
        gathered.append((found.keys[rows], found.values[rows], len(found.keys)))
    assert gathered[0][2] == LENGTH > gathered[1][2]
    assert torch.equal(gathered[0][0], gathered[1][0]) and torch.equal(gathered[0][1], gathered[1][1])
