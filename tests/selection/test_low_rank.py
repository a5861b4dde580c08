"""``low_rank``: its calibration rows, and its selections for retrieval heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from low_rank_inputs import CHUNK, CONTEXT, DIM, LENGTH, PAGE, lookups, neighbours
from score_inputs import scores_of

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.block_table import gathered_columns as columns_module
from minference_vllm.kernels.block_table.gathered_columns import gather_columns
from minference_vllm.kernels.native import library
from minference_vllm.kernels.native.scores import NativeScores
from minference_vllm.patterns.kinds import Coverage, LowRank
from minference_vllm.selection import low_rank, measured_rows
from minference_vllm.selection.build import build_index
from minference_vllm.selection.probe_queries import unlikeness
from minference_vllm.selection.projection import Projection, for_int8
from minference_vllm.selection.score_bins import ScoreBins
from minference_vllm.selection.torch_scores import TorchScores


@pytest.mark.parametrize(
    ("chunk", "length", "count", "last", "unlike"),
    [
        (1, 9000, 1, 0, 0),
        (3, 9000, 3, 0, 1),
        (15, 9000, 15, 3, 7),
        (17, 9000, 16, 4, 8),
        (256, 9000, 16, 4, 8),
        (1000, 9000, 62, 15, 31),
        (1024, 9000, 64, 16, 32),
        (4096, 9000, 64, 16, 32),
        (8192, 9000, 128, 16, 64),
        (65536, 70000, 128, 16, 64),
        (8192, 1 << 20, 128, 16, 64),
        (4096, 1 << 22, 32, 8, 16),
        (4096, 1 << 24, 16, 4, 8),
    ],
)
def test_calibration_rows(chunk: int, length: int, count: int, last: int, unlike: int) -> None:
    query = torch.randn(2, chunk, 8, generator=torch.Generator().manual_seed(0))
    odd = [part * chunk // unlike + 1 for part in range(unlike)]
    query[1, odd] += 50.0
    found = measured_rows.calibration_rows(unlikeness(query), length)
    rows = found.rows[1].tolist()
    assert len(rows) == count and rows == sorted(rows)
    # When nearly all rows are measured anyway, a part may have no other row left.
    assert chunk < 64 or len(set(rows)) == count
    assert rows[0] >= 0 and rows[-1] == chunk - 1
    groups = [found.rows[1, places[1]].tolist() for places in (found.spread, *found.others)]
    assert sorted(row for group in groups for row in group) == rows
    assert [len(group) for group in groups[1:]] == [size for size in (last, unlike) if size]
    if last:
        assert groups[1] == list(range(chunk - 2 * last + 1, chunk, 2))
    # The outlier row of each part is measured; it may belong to another group that has drawn it.
    assert set(odd) <= set(rows)
    if count == 64 and chunk == 4096:
        assert len({row % 64 for row in groups[0]}) == 16  # no regular prompt hides from them


def test_every_group_of_rows_gets_its_share() -> None:
    def places(begin: int, end: int) -> torch.Tensor:
        return torch.arange(begin, end).expand(3, -1)

    CalibrationRows = measured_rows.CalibrationRows
    rows = CalibrationRows(places(0, 64), places(0, 48), (places(48, 64),))
    mass = torch.zeros(3, 64, 256)
    mass[0, :48, 200], mass[0, 48:, 150] = 1, 1
    mass[1, :48, 150], mass[1, 48:, 200] = 1, 1
    mass[2, :, 200], mass[2, 50, 200], mass[2, 50, 90] = 1, 0.93, 0.07
    assert rows.threshold(mass, 0.95).tolist() == [150, 150, 200]
    # A single one of them may miss 1.5 times as much as their mean.
    mass[2, 50, 200], mass[2, 50, 90] = 0.92, 0.08
    assert rows.threshold(mass, 0.95).tolist() == [150, 150, 90]
    mass[2, 50, 200], mass[2, 50, 90] = 1.0, 0.0
    # In a sample one row counts for more than its share of the mean.
    mass[2, 40, 200], mass[2, 40, 90] = 0.0, 1.0
    assert rows.threshold(mass, 0.95).tolist() == [150, 150, 90]
    whole = CalibrationRows(places(0, 64)[:1], places(0, 64)[:1], ())
    assert whole.threshold(mass[2:], 0.9).tolist() == [200] and not whole.alone().numel()
    assert rows.alone().tolist() == [list(range(48, 64))] * 3


# Heads

TILING = Tiling.of(CONTEXT, LENGTH, PAGE, 128)


def recall(index: SparseIndex, query: torch.Tensor, keys: torch.Tensor) -> float:
    return float(reference.attention_recall(query, keys, index.to_mask(), CONTEXT, 1.0).mean())


def build(pattern: LowRank | Coverage, query: torch.Tensor, keys: torch.Tensor) -> SparseIndex:
    return build_index(TILING, [pattern], scores_of(query, keys))


def test_a_question_at_the_end_is_heard() -> None:
    """Its rows attend one key that no other row attends; none of them need be sampled."""
    query, keys = neighbours(sink=True)
    keys[0, 777, :-1], keys[0, 777, -1] = 0, -90
    query[-12:-1, :, :-1], query[-12:-1, :, -1] = 0, -1
    index = build(LowRank(gamma=0.9), query, keys)
    assert index.to_mask()[0, -12:-1, 777].all()


@pytest.mark.parametrize("gamma", [0.8, 0.9, 0.97])
def test_a_head_that_looks_things_up(gamma: float) -> None:
    query, keys = lookups()
    index = build(LowRank(gamma=gamma, rank=32), query, keys)
    assert recall(index, query, keys) >= gamma - 0.02
    assert float(index.density()) < 0.2
    # Columns and diagonals cannot: those that the estimating rows attend serve no other row.
    blind = build(Coverage(gamma=gamma, min_budget=512), query, keys)
    assert recall(blind, query, keys) < gamma - 0.3


def test_more_dimensions_need_fewer_keys() -> None:
    query, keys = lookups()
    found = [float(build(LowRank(rank=rank), query, keys).density()) for rank in (16, 32, 64)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("inputs", "looks"), [(lookups(), True), (neighbours(sink=True), False)], ids=["apart", "near"]
)
def test_rows_that_look_at_single_keys_are_noticed(inputs: tuple[torch.Tensor, torch.Tensor], looks: bool) -> None:
    """A sample of key groups contains no such key, so that ``approx_lse`` would be too low."""
    measured = low_rank.Measured.of(scores_of(*inputs), [0], TILING)
    assert bool(low_rank.single_looks(measured, TILING) > low_rank.SINGLE_LOOKS) == looks


@pytest.mark.parametrize("dim", [8, 24, 40])
def test_head_sizes_that_are_no_multiple_of_16(dim: int) -> None:
    """With the native kernels too: the quantized queries and keys are padded with zeros."""
    generator = torch.Generator().manual_seed(dim)
    keys = torch.nn.functional.normalize(torch.randn(1, LENGTH, dim, generator=generator), dim=2)
    target = (torch.rand(CHUNK, generator=generator) * torch.arange(CONTEXT, LENGTH)).long()
    query = 40 * keys[0, target][:, None]
    kinds = [scores_of(query, keys)]
    if not library.unavailable_reason():
        kinds.append(NativeScores(kinds[0].inputs, from_pages=False))
    for scores in kinds:
        index = build_index(TILING, [LowRank(gamma=0.9)], scores)
        assert recall(index, query, keys) >= 0.9 - 0.02


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

    def bins(heads: Sequence[int], at_once: int) -> ScoreBins:
        class InPieces(TorchScores):
            def key_pieces(self, rows: int) -> Iterator[torch.Tensor]:
                yield from self.keys.split(at_once, 1)

        return scores_of(query, keys, kind=InPieces).low_rank(heads, TILING, LowRank(rank=16, gamma=0.9))

    both = bins([0, 1], LENGTH)
    for head in (0, 1):
        alone = bins([head], LENGTH)
        assert torch.equal(alone.bins[0], both.bins[head]) and alone.threshold[0] == both.threshold[head]
    # The fit samples other keys, so the bins differ, but are as good.
    pieces = bins([0, 1], 1000)
    assert ((pieces.bins > 0) == (both.bins > 0)).float().mean() > 0.9


@pytest.mark.parametrize("kind", [TorchScores, NativeScores])
def test_heads_do_not_depend_on_those_beside_them(kind: type[TorchScores], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many dimensions each of them takes."""
    if kind is NativeScores and library.unavailable_reason():
        pytest.skip(str(library.unavailable_reason()))
    heads = [lookups(1), neighbours(sink=True), lookups(2)]
    query, keys = (torch.cat([head[place].float() for head in heads], 1 - place) for place in (0, 1))
    monkeypatch.setattr(low_rank, "SCORE_ERROR", 2.0)
    pattern, ranks = LowRank(rank=64, noise=0.03, queries=32), []

    def noted(projection: Projection, sample: torch.Tensor) -> Projection:
        ranks.append((len(sample), projection.to_key.shape[2]))
        return for_int8(projection, sample)

    monkeypatch.setattr(low_rank, "for_int8", noted)
    together = build_index(TILING, [pattern] * 3, scores_of(query, keys, kind=kind))
    assert len(ranks) > 1 and sum(number for number, _ in ranks) == 3
    monkeypatch.setattr(low_rank, "BATCH_BYTES", 0)
    ranks.clear()
    apart = build_index(TILING, [pattern] * 3, scores_of(query, keys, kind=kind))
    assert [number for number, _ in ranks] == [1, 1, 1]
    assert torch.equal(together.to_mask(), apart.to_mask()) and together.sampled == apart.sampled


@pytest.mark.parametrize("tile", [32, 128])
def test_columns_fill_whole_pages_for_a_kernel_that_needs_it(tile: int) -> None:
    query, keys = lookups()
    tiling = Tiling.of(CONTEXT, LENGTH, PAGE, tile, column_multiple=PAGE)
    index = build_index(tiling, [LowRank(gamma=0.9)], scores_of(query, keys))
    exact = build_index(Tiling.of(CONTEXT, LENGTH, PAGE, tile), [LowRank(gamma=0.9)], scores_of(query, keys))
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


# What counts is the output


class ByWeight(TorchScores):
    """As if every value had the same norm."""

    def value_norms(self, heads: Sequence[int]) -> torch.Tensor:
        return torch.ones(len(heads), self.inputs.chunk.seq_len)


def sink_and_lookup(size_of_sink: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every row puts 0.97 on the first key, whose value has this norm, and the rest on one key of its own: much as
    layer 18, head 8 of SmolLM2-135M. Queries ``[CHUNK, 1, DIM]``, keys and values ``[1, S, DIM]``."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.nn.functional.normalize(torch.randn(LENGTH, DIM // 2 - 1, generator=generator), dim=1)
    keys = torch.nn.functional.pad(keys, (0, DIM // 2 + 1))
    target = 1 + (torch.rand(CHUNK, generator=generator) * torch.arange(CONTEXT - 1, LENGTH - 1)).long()
    query = 20 * keys[target]
    keys[0], query[:, -1] = 0, 20 + math.log(0.97 / 0.03)
    keys[0, -1] = 1
    values = torch.nn.functional.normalize(torch.randn(LENGTH, DIM, generator=generator), dim=1)
    values[0] *= size_of_sink
    return query[:, None], keys[None], values[None]


@pytest.mark.parametrize("kind", [TorchScores, NativeScores])
def test_a_sink_with_a_small_value_does_not_use_up_the_budget(kind: type[TorchScores]) -> None:
    if kind is NativeScores and library.unavailable_reason(torch.float32):
        pytest.skip(str(library.unavailable_reason(torch.float32)))
    query, keys, values = sink_and_lookup(0.01)
    inputs = Inputs.of_rows(query, keys, values, 1.0, PAGE)
    tiling = Tiling.of(CONTEXT, LENGTH, PAGE, 64)
    dense = reference.masked_attention(query, keys, values, reference.causal_mask(CONTEXT, LENGTH), 1.0)

    def error(scores: TorchScores) -> float:
        index = build_index(tiling, [LowRank(gamma=0.95)], scores)
        assert float(index.density()) < 0.2
        found = reference.masked_attention(query, keys, values, index.to_mask(), 1.0)
        return float((found - dense).norm() / dense.norm())

    assert error(kind(inputs)) < 0.25
    assert error(ByWeight(inputs)) > 0.8, "by weight the sink alone is enough"


def test_shares_of_the_output_for_any_norms() -> None:
    weights = torch.tensor([[[0.9, 0.1, 0.0]]])
    for norms, shares in (
        ([1.0, 1.0, 1.0], [0.9, 0.1, 0.0]),
        ([0.1, 0.9, 5.0], [0.5, 0.5, 0.0]),
        ([0.0, 0.0, 0.0], [0.9, 0.1, 0.0]),
        ([0.0, 1.0, 1.0], [0.0, 1.0, 0.0]),
        ([torch.inf, 1.0, 1.0], [1.0, 0.0, 0.0]),
    ):
        found = measured_rows.by_value(weights.clone(), torch.tensor([norms]))
        torch.testing.assert_close(found, torch.tensor([[shares]]))
