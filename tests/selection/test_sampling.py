"""Keys sampled by weight (``low_rank`` with ``noise``): what the drawn keys represent, and how many are drawn."""

from __future__ import annotations

import math

import pytest
import torch
from low_rank_inputs import CHUNK, DIM, LENGTH, TILINGS, lookups
from score_inputs import scores_of

from minference_vllm import LowRank, reference, sparse_prefill
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.sparse_index import CODES_PER_BIT, SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose_for
from minference_vllm.kernels.native import library
from minference_vllm.kernels.native.scores import NativeScores, sampled_keys
from minference_vllm.prefill.recall import chunk_recall
from minference_vllm.selection import score_bins
from minference_vllm.selection.build import build_index
from minference_vllm.selection.compaction import EXACT_WIDTH
from minference_vllm.selection.measured_rows import MOST_NOISE, CalibrationRows
from minference_vllm.selection.score_bins import LOCAL_BIN, MAX_CODE, ScoreBins
from minference_vllm.selection.torch_scores import TorchScores

ANY = torch.zeros(1, 1, 16)


def random_bins(tiling: Tiling, heads: int, seed: int = 0) -> torch.Tensor:
    """uint8 ``[h, T, S]``, of own pages and later ones as scores have them."""
    generator = torch.Generator().manual_seed(seed)
    shape = heads, tiling.num_tiles, tiling.seq_len
    bins = (torch.randn(shape, generator=generator) * 20 + 170).clamp(0, 254).to(torch.uint8)
    places = torch.arange(tiling.seq_len)
    bins.masked_fill_(places >= tiling.first_own()[:, None], LOCAL_BIN)
    bins.masked_fill_(places >= tiling.starts[1:, None], 0)
    return score_bins.hide_before_window(bins, tiling)


@pytest.mark.parametrize("window", [0, 150])
@pytest.mark.parametrize("name", TILINGS)
def test_native_samples_are_the_torch_ones(name: str, window: int) -> None:
    if library.unavailable_reason():
        pytest.skip(str(library.unavailable_reason()))
    context, length, page, tile = TILINGS[name]
    tiling = Tiling.of(context, length, page, tile, window=window)
    bins, threshold = random_bins(tiling, 3), torch.tensor([185, 230, 0], dtype=torch.int32)
    found = sampled_keys(tiling, bins, threshold)
    right = TorchScores.select_bins(scores_of(ANY, ANY), tiling, ScoreBins(bins, threshold, True), EXACT_WIDTH)
    assert torch.equal(found.blocks, right.blocks)
    assert found.keys is not None and right.keys is not None
    for ours, torchs in zip(found.keys, right.keys, strict=True):
        assert ours is not None and torchs is not None and torch.equal(ours, torchs)


def test_every_key_is_stood_for() -> None:
    tiling = Tiling.of(60000, 60200, 64, 128)
    bins, threshold = random_bins(tiling, 2), torch.tensor([200, 254], dtype=torch.int32)
    blocks, single, codes = score_bins.sampled_keys(tiling, bins, threshold)
    assert not (single & (bins == LOCAL_BIN)).any()
    counts = torch.exp2(codes.double() / CODES_PER_BIT)
    outside = (torch.arange(60200) < tiling.first_own()[:, None]) & ~blocks.repeat_interleave(64, 2)[..., :60200]
    # At the lower threshold that of its own is at least 1 in 64, and keys from it up are all there.
    assert torch.equal(single & (codes == 0), outside & (bins >= threshold[:, None, None]))
    for code in range(1, MAX_CODE + 1):
        of_code = outside & (codes == code)
        # A systematic sample of all codes together is off by little more than one draw.
        represented, there = (counts * (single & of_code)).sum(2), of_code.sum(2)
        spread = 2 ** (code / CODES_PER_BIT) * (4 + there.double().sqrt() * 2 ** (-code / 2 / CODES_PER_BIT) * 4)
        assert ((represented - there).abs() <= spread).all()
    total = (counts * single).sum(2)
    assert ((total / outside.sum(2)).log().abs() < 0.15).all()


def places(first: int, end: int) -> torch.Tensor:
    return torch.arange(first, end)[None]


def test_threshold() -> None:
    """The highest threshold at which the variance of the drawn keys stays within the noise, for every group."""
    rows = CalibrationRows(places(0, 24), places(0, 8), (places(8, 24),))
    squares = torch.zeros(1, 24, 256)
    squares[..., 180] = 1e-5
    # The variance, 2 ** (code / 6) - 1 times the squares, may reach the square of the noise.
    noise = math.sqrt(1e-5 * (2 ** (12 / 6) - 1)) * 1.0001
    assert rows.sampling_threshold(squares, noise).tolist() == [192]
    assert rows.sampling_threshold(squares, noise / 1.01).tolist() == [191]
    # A single last or outlier row may err three times as much; beyond that, keys like its one are not drawn.
    squares[0, 12, 240] = 0.06
    assert rows.sampling_threshold(squares, noise).tolist() == [192]
    squares[0, 8:, 180] = 0.0
    squares[0, 12, 180] = 1e-5 * MOST_NOISE**2 * 1.01
    assert rows.sampling_threshold(squares, noise).tolist() == [191]
    squares[0, 12, 150] = 0.06
    assert rows.sampling_threshold(squares, noise).tolist() == [150]
    squares[0, 3, 0] = torch.nan
    assert rows.sampling_threshold(squares, noise).tolist() == [0], "dense"


@pytest.mark.parametrize("kind", [TorchScores, NativeScores])
def test_rows_that_look_one_key_up_keep_it(kind: type[TorchScores]) -> None:
    if kind is NativeScores and library.unavailable_reason():
        pytest.skip(str(library.unavailable_reason()))
    query, keys = lookups()
    scores = scores_of(query, keys, kind=kind)
    tiling = Tiling.of(keys.shape[1] - len(query), keys.shape[1], 128, 128)
    index = build_index(tiling, [LowRank(noise=0.02)], scores)
    assert index.sampled == (0,) and float(index.density()) < 0.2
    looked_at = reference.logits(query, keys, 1.0)[0].argmax(1)
    tiles = torch.searchsorted(tiling.starts, torch.arange(len(query)) + tiling.context_len, right=True) - 1
    counts = index.tile_counts(tiles)[0].gather(1, looked_at[:, None])
    assert float((counts == 1).float().mean()) > 0.99


def flat_head(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries that attend all keys, some a little more."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = torch.randn(3, length, 1, 64, generator=generator)
    return query[-512:] * 1.5, keys, values + 0.3


def run(length: int, pattern: LowRank) -> tuple[SparseIndex, float]:
    """The index of the last 512 rows, and the output's error as a share of the values' norm."""
    query, keys, values = flat_head(length)
    pages = [part.view(-1, 64, 1, 64) for part in (keys, values)]
    table, ends = torch.arange(length // 64, dtype=torch.int32)[None], torch.tensor([length])
    out, index = sparse_prefill(query, *pages, table, torch.tensor([0, 512]), ends, pattern, return_index=True)
    mask = reference.causal_mask(length - 512, length)[None]
    exact = reference.masked_attention(query, keys.transpose(0, 1), values.transpose(0, 1), mask, 64**-0.5)
    error = (out.double() - exact).square().sum(2).mean().sqrt()
    return index[0], float(error / values.norm(dim=2).mean())


@pytest.mark.skipif(bool(library.unavailable_reason()), reason=str(library.unavailable_reason()))
def test_heads_that_look_everywhere_need_a_sample_whose_size_does_not_grow() -> None:
    keys = {}
    for length in (8192, 16384, 32768):
        index, error = run(length, LowRank(gamma=0.92, remainder=True, noise=0.05))
        assert index.sampled == (0,) and error <= 0.05
        keys[length] = float(index.density()) * length
    assert keys[32768] < 1.5 * keys[8192]
    index, _ = run(8192, LowRank(gamma=0.92, remainder=True))
    assert float(index.density()) == 1.0, "by its share it is dense"


def test_kernels_that_count_every_key_once_get_none() -> None:
    pattern = LowRank(gamma=0.92, remainder=True, noise=0.02)
    cache = scores_of(ANY, ANY).inputs.cache
    kernel, (served,), _ = choose_for([pattern], "block_table", torch.bfloat16, cache)
    assert not kernel.samples and isinstance(served, LowRank) and not served.noise
    assert pattern.without_sampling() == LowRank(gamma=0.92, remainder=True)
    # A pattern that is raised to more keys no longer samples.
    assert pattern.at_step(0) == pattern and pattern.at_step(1) == LowRank(gamma=0.98, remainder=True)


def test_recall_counts_what_drawn_keys_stand_for() -> None:
    query, keys, values = flat_head(8192)
    scores = TorchScores(Inputs.of_rows(query, keys.transpose(0, 1), values.transpose(0, 1), 64**-0.5, 64))
    tiling = Tiling.of(8192 - 512, 8192, 64, 128)
    index, rows = build_index(tiling, [LowRank(noise=0.05)], scores), torch.arange(0, 512, 7)
    assert index.sampled == (0,) and float(index.density()) < 0.7
    tiles = torch.searchsorted(tiling.starts, rows + tiling.context_len, right=True) - 1
    mask = reference.causal_mask(tiling.context_len, 8192)[rows]
    weights = reference.logits(query[rows], keys.transpose(0, 1), 64**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    exact = (weights * index.tile_counts(tiles)).sum(-1).clamp(max=1.0)
    found = chunk_recall(scores, index, rows)
    torch.testing.assert_close(found.mass.double(), exact, rtol=0, atol=1e-5)
    assert float(exact.mean()) > 0.95 > float((weights * index.tile_mask(tiles)).sum(-1).mean())
    # In pieces as all at once.
    pieces = [index.tile_counts(tiles, first=first, last=first + 1000) for first in range(0, 8000, 1000)]
    assert torch.equal(torch.cat(pieces, 2), index.tile_counts(tiles, last=8000))


def test_a_head_takes_as_many_dimensions_as_tell_its_keys_apart() -> None:
    """Where keys are drawn by their scores, a misjudged key costs all others."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(LENGTH, DIM, generator=generator), dim=1)
    target = (torch.rand(CHUNK, generator=generator) * torch.arange(LENGTH - CHUNK, LENGTH)).long()
    query, keys = 12 * keys[target][:, None].bfloat16(), keys[None].bfloat16()
    tiling = Tiling.of(LENGTH - CHUNK, LENGTH, 128, 128)
    densities = [
        float(build_index(tiling, [LowRank(rank=rank, noise=0.025)], scores_of(query, keys)).density())
        for rank in (32, 64)
    ]
    assert densities[1] < 0.08 and densities[1] < densities[0] / 2, densities
