"""Score bins of keys by every implementation, against the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from low_rank_inputs import TILINGS, random_quantized
from score_inputs import scores_of

from minference_vllm import reference
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.native import library
from minference_vllm.kernels.native import scores as native_scores
from minference_vllm.kernels.native.scores import NativeScores
from minference_vllm.selection import score_bins
from minference_vllm.selection.compaction import EXACT_WIDTH, compact_keys
from minference_vllm.selection.measured_rows import calibration_rows
from minference_vllm.selection.projection import BINS_PER_BIT, QuantizedQK
from minference_vllm.selection.score_bins import (
    LOCAL_BIN,
    PEAK_KEYS,
    ScoreBins,
    covered,
    group_step,
    keys_above,
    lowest_bin,
    mean_share,
)
from minference_vllm.selection.torch_scores import TorchScores


@pytest.fixture(params=("torch", *library.INSTRUCTIONS))
def scores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TorchScores:
    """Torch, and each build of our CPU kernels that the processor can run. The tested methods read no inputs."""
    one_row = torch.zeros(1, 1, 16)
    if request.param == "torch":
        return scores_of(one_row, one_row)
    build = library.load(request.param)
    if build is None:
        pytest.skip(f"no kernels for {library.INSTRUCTIONS[request.param]} here")
    monkeypatch.setattr(library, "_best", lambda dtype: (request.param, build))
    return scores_of(one_row, one_row, kind=NativeScores)


@functools.cache
def quantized_and_exact(
    name: str, sharpness: float, rank: int, queries: int, all_groups: bool
) -> tuple[QuantizedQK, torch.Tensor]:
    """Random queries and keys, and their unrounded bins by the reference."""
    context, length, page, tile = TILINGS[name]
    tiling = Tiling.of(context, length, page, tile)
    quantized = random_quantized(2, tiling, rank, sharpness, queries)
    query, position = (part.unflatten(1, (tiling.num_tiles, -1)) for part in quantized[:2])
    # Queries past a tile's count are ignored: replace them with its first one.
    place = torch.arange(query.shape[2])
    place = torch.where(place < quantized.count[..., None], place, 0)
    query, position = query.gather(2, place[..., None].expand(query.shape)), position.gather(2, place)
    query = query.double() * quantized.bits().double()[..., None, None]
    steps = [1 if all_groups else group_step(own) for own in tiling.first_own().tolist()]
    exact = reference.low_rank_bins(query, position, quantized.keys, tiling, PEAK_KEYS, steps, BINS_PER_BIT)
    return quantized, exact.clamp(0, 254)


@pytest.mark.parametrize("queries", [0, 5, 32])
@pytest.mark.parametrize("rank", [16, 32, 80])
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("name", TILINGS)
def test_tile_bins(name: str, sharpness: float, rank: int, queries: int, scores: TorchScores) -> None:
    context, length, page, tile = TILINGS[name]
    tiling = Tiling.of(context, length, page, tile)
    # approx_lse of the second head uses all groups of keys.
    quantized, sampled = quantized_and_exact(name, sharpness, rank, queries, all_groups=False)
    _, whole = quantized_and_exact(name, sharpness, rank, queries, all_groups=True)
    exact = torch.stack([sampled[0], whole[1]])
    found = scores.tile_bins(quantized, tiling, torch.tensor([False, True]))
    assert found.dtype == torch.uint8 and found.shape == exact.shape
    places = torch.arange(length)
    own = places >= (tiling.starts[:-1] // tile * tile)[:, None]
    seen = places < tiling.starts[1:, None]
    assert (found[:, own & seen] == LOCAL_BIN).all() and (found[:, ~seen] == 0).all()
    # Bins are rounded to the nearest, approx_lse to half a unit of the products.
    slack = 0.5 + 1e-3 * BINS_PER_BIT + 0.5 * BINS_PER_BIT * quantized.bits().max().item()
    assert ((found[:, ~own].double() - exact[:, ~own]).abs() <= slack).all()


def test_group_step() -> None:
    """At least 64 groups of 32 keys, and a stride of 16 from 32,768 keys on."""
    assert [group_step(own) for own in (0, 2047, 4095, 4096, 8192, 32768, 1 << 20)] == [1, 1, 1, 2, 4, 16, 16]


def test_mass_by_bin(scores: TorchScores) -> None:
    generator = torch.Generator().manual_seed(0)
    bins = torch.randint(0, 256, (3, 5, 301), generator=generator).to(torch.uint8)
    weights = torch.rand(3, 7, 301, generator=generator)
    weights[:, :, 40:200] *= 1e-12
    # Values that our kernels hold exactly.
    weights = (weights / weights.sum(-1, keepdim=True)).bfloat16().float()
    bin_row = torch.tensor([[0, 0, 1, 3, 4, 4, 2], [1, 1, 1, 0, 2, 3, 4], [4, 3, 2, 1, 0, 0, 0]])
    exact = torch.zeros(3, 7, 256, dtype=torch.float64)
    for head in range(3):
        for row, which in enumerate(bin_row[head].tolist()):
            exact[head, row].index_add_(0, bins[head, which].long(), weights[head, row].double())
    found = scores.mass_by_bin(bins, bin_row, weights)
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.sum(2), weights.sum(2), atol=1e-5, rtol=0)
    assert torch.equal(scores.mass_by_bin(bins, bin_row[:, ::2], weights[:, ::2]), found[:, ::2])
    exact.zero_()
    for head in range(3):
        for row, which in enumerate(bin_row[head].tolist()):
            exact[head, row].index_add_(0, bins[head, which].long(), weights[head, row].double().square())
    found = scores.mass_by_bin(bins, bin_row, weights, squared=True)
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-3)


def threshold(mass: torch.Tensor, gamma: float, errors: float = 0.0) -> torch.Tensor:
    return lowest_bin(mean_share(covered(mass), errors), gamma)


def test_threshold() -> None:
    mass = torch.zeros(4, 256)
    mass[0, 255], mass[0, 100], mass[0, 0] = 0.5, 0.4, 0.1
    mass[1, 255] = 1.0
    mass[2, 200:220] = 0.05
    mass[3, 0] = 1.0
    assert threshold(mass[:, None], 0.85).tolist() == [100, 255, 203, 0]
    assert threshold(mass[:, None].expand(-1, 5, -1), 0.85, errors=3.0).tolist() == [100, 255, 203, 0]


def test_threshold_of_a_sample() -> None:
    """The mean less standard errors decides: where rows differ, more bins are needed than the mean alone says."""
    mass = torch.zeros(1, 16, 256)
    mass[0, :, 200] = 0.9
    mass[0, ::2, 200] = 1.0
    mass[0, 1::2, 100] = 0.1
    error = 0.05 / 4
    for errors, wanted in ((0.0, 0.949), (2.0, 0.949 - 2 * error)):
        assert threshold(mass, wanted, errors).tolist() == [200]
        assert threshold(mass, wanted + 0.002, errors).tolist() == [100]
    # All of the attention, which a sum of floats does not quite reach.
    assert threshold(torch.full((1, 16, 256), 0.1), 1 - 1e-9, errors=3.0).tolist() == [0]


@pytest.mark.parametrize("name", TILINGS)
def test_keys_from_one_bin_up(name: str, scores: TorchScores) -> None:
    context, length, page, tile = TILINGS[name]
    tiling = Tiling.of(context, length, page, tile)
    generator = torch.Generator().manual_seed(length)
    bins = torch.randint(0, 200, (5, tiling.num_tiles, length), generator=generator).to(torch.uint8)
    places = torch.arange(length)
    bins[1, :, : length // 2] += 50
    bins[:, places >= (tiling.starts[:-1] // tile * tile)[:, None]] = LOCAL_BIN
    bins[:, places >= tiling.starts[1:, None]] = 0
    # Few keys, half of the sequence whole, no threshold (dense), no keys, and nearly all.
    wanted = torch.tensor([195, 199, 0, 255, 2], dtype=torch.int32)
    marks = torch.zeros(5, tiling.num_tiles, tiling.num_key_blocks * page, dtype=torch.bool)
    marks[..., :length] = bins >= wanted[:, None, None].to(torch.uint8)
    count = native_scores.page_counts if isinstance(scores, NativeScores) else score_bins.page_counts
    counts = count(bins, wanted, page)
    assert counts.dtype == torch.int32 and torch.equal(counts.long(), marks.unflatten(2, (-1, page)).sum(3))
    found = scores.select_bins(tiling, ScoreBins(bins, wanted), EXACT_WIDTH)
    blocks, keys, crowded = compact_keys(tiling, *keys_above(tiling, bins, wanted), EXACT_WIDTH)
    assert keys is not None and found.keys is not None and crowded is None and found.crowded is None
    for ours, right in zip((found.blocks, *found.keys[:2]), (blocks, *keys[:2]), strict=True):
        assert ours.dtype == right.dtype and torch.equal(ours, right)
    columns, num_columns, _ = keys
    before = tiling.distance() > 0
    for head, lowest in enumerate(wanted.tolist()):
        by_page = marks[head].unflatten(1, (-1, page))
        whole = (2 * by_page.sum(2) >= page) | tiling.own()
        cost = torch.where(whole, page, by_page.sum(2)).sum(1)
        for number, reachable in enumerate(tiling.reachable()):
            if lowest == 0 or cost[number] > page * reachable.sum() / 2:
                assert torch.equal(blocks[head, number], reachable) and not num_columns[head, number]
                continue
            assert torch.equal(blocks[head, number], whole[number])
            single = (by_page[number] & (before & ~whole)[number][:, None]).flatten().nonzero()[:, 0]
            assert columns[head, number, : num_columns[head, number]].tolist() == single.tolist()


@pytest.mark.parametrize("chunk", [4096, 300, 20, 1])
@pytest.mark.parametrize("gamma", [0.5, 0.92, 0.999])
def test_thresholds_of_our_kernels(chunk: int, gamma: float) -> None:
    """Thresholds of a sample, of the last and outlier rows, and of rows without any attention."""
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(chunk)
    sample = calibration_rows(torch.rand(3, chunk, generator=generator), 4 * chunk)
    middle = torch.randint(60, 240, (3, sample.rows.shape[1], 1), generator=generator)
    mass = (-(((torch.arange(256) - middle) / 30.0) ** 2)).exp()
    mass[2, -1] = 0
    for rows in (sample, sample._replace(others=(), errors=0.0)):
        found, right = NativeScores.threshold(rows, mass, gamma), rows.threshold(mass, gamma)
        # Shares within rounding error of the target may fall on either side.
        assert found.dtype == right.dtype and int((found - right).abs().max()) <= 1
        assert (found == right).float().mean() > 0.6
    assert 0 < int(found[:2].min()) < 255
