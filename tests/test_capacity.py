"""Indices of planned size: the same selection without waiting for the device, within the stated memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minference_vllm import low_rank, mean_correction, recall
from minference_vllm.attend import PagedEstimates
from minference_vllm.capacity import AUDITED_PAIR, MEMORY_LIMIT, Capacity, audit_frequency, plan_capacity
from minference_vllm.index import SparseIndex, build_index
from minference_vllm.levels import OWN_LEVEL, Levels
from minference_vllm.paged_cache import PagedCache
from minference_vllm.patterns import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PeakThreshold,
    TriShape,
    VerticalSlash,
)
from minference_vllm.recall import PIECE_BYTES, Audit
from minference_vllm.tiling import Tiling

PATTERNS: list[HeadPattern] = [
    Dense(),
    AShape(sink=40, local=100),
    AShape(sink=0, local=0),
    AShape(sink=10**6, local=10**6),
    VerticalSlash(vertical=60, slash=150),
    TriShape(sink=40, local=100, last=70),
    VerticalSlash(vertical=60, slash=150),
    VerticalSlash(vertical=300, slash=100),
    VerticalSlash(vertical=0, slash=200),
    VerticalSlash(vertical=10**6, slash=10**6),
    BlockSparse(top_k=3),
    BlockSparse(top_k=1),
    BlockSparse(top_k=10**4),
]
ADAPTIVE: list[HeadPattern] = [
    Coverage(gamma=0.3, min_budget=64),
    Coverage(gamma=0.95, min_budget=64),
    Antidiagonal(stride=16, tau=0.5),
    PeakThreshold(alpha=0.5, sink=16, window=32),
    LowRank(gamma=0.2),
    LowRank(gamma=0.999),
]
TILINGS = {
    # name: (context_len, seq_len, block_size, tile)
    "regular": (0, 512, 32, 64),
    "odd_length": (0, 517, 32, 64),
    "one_token_after_context": (300, 301, 16, 32),
    "chunk_inside_a_page": (301, 600, 32, 64),
    "long_context_short_chunk": (2000, 2100, 32, 128),
}


class RandomScores:
    """Stands for the estimates: random, the same for a head whoever is asked for together with it."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def draw(self, kind: int, heads: Sequence[int], *shape: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(100 * kind + head) for head in heads]
        # To the eighth: some stand out, as the patterns whose budget the data decide expect.
        return torch.stack([torch.rand(shape, generator=generator) ** 8 for generator in generators])

    def last_query(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.draw(1, heads, self.seq_len), self.draw(2, heads, self.seq_len)

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        scores = self.draw(3, heads, tiling.num_tiles, tiling.num_key_blocks) * tiling.reachable()
        return scores / scores.sum(-1, keepdim=True)

    peaks = pooled

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return self.pooled(heads, tiling)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> Levels:
        pages = self.draw(5, heads, tiling.num_tiles, tiling.num_key_blocks)
        by_page, own, reach = (
            each.repeat_interleave(tiling.block_size, -1)[..., : self.seq_len]
            for each in (pages, tiling.own(), tiling.reachable())
        )
        levels = self.draw(6, heads, tiling.num_tiles, self.seq_len).maximum(by_page).mul_(255).to(torch.uint8)
        lowest = torch.full((len(heads),), round(255 * (1 - gamma)), dtype=torch.int32)
        return Levels(levels.masked_fill_(own, OWN_LEVEL).mul_(reach), lowest)


def planned(tiling: Tiling, patterns: Sequence[HeadPattern], **options: Any) -> Capacity:
    lengths = tiling.context_len, tiling.seq_len, tiling.block_size, tiling.tile, tiling.column_multiple
    return plan_capacity(patterns, *lengths, **options)


def assert_same(found: SparseIndex, exact: SparseIndex) -> None:
    assert torch.equal(found.to_mask(), exact.to_mask())
    assert torch.equal(found.num_blocks, exact.num_blocks) and torch.equal(found.num_columns, exact.num_columns)
    assert torch.equal(found.computed_pairs(), exact.computed_pairs())
    assert found.overflowed is not None and not bool(found.overflowed.any())


@pytest.mark.parametrize("whole_pages", [False, True])
@pytest.mark.parametrize("name", TILINGS)
def test_the_planned_index_selects_the_same_keys(name: str, whole_pages: bool) -> None:
    context_len, seq_len, block_size, tile = TILINGS[name]
    tiling = Tiling.of(context_len, seq_len, block_size, tile, column_multiple=block_size if whole_pages else 1)
    exact = build_index(tiling, PATTERNS, RandomScores(seq_len))
    capacity = planned(tiling, PATTERNS)
    assert_same(build_index(tiling, PATTERNS, RandomScores(seq_len), capacity), exact)
    one_by_one = Capacity(capacity.blocks, capacity.columns, heads_at_once=1)
    assert_same(build_index(tiling, PATTERNS, RandomScores(seq_len), one_by_one), exact)


@pytest.mark.parametrize("name", TILINGS)
def test_budgets_that_the_data_decide(name: str) -> None:
    """With room for all that they may want; what is dense is dense either way."""
    tiling = Tiling.of(*TILINGS[name])
    exact = build_index(tiling, ADAPTIVE, RandomScores(tiling.seq_len))
    roomy = Capacity(tiling.num_key_blocks, tiling.seq_len, heads_at_once=2)
    assert_same(build_index(tiling, ADAPTIVE, RandomScores(tiling.seq_len), roomy), exact)


@pytest.mark.parametrize("blocks", [1, 1000])
def test_coverage_without_room_for_its_columns_is_dense_and_counted(blocks: int) -> None:
    """Not so a head that is dense because it wants more than half of all keys."""
    tiling = Tiling.of(0, 1024, 32, 64)
    patterns = [Coverage(gamma=0.3, min_budget=64), Coverage(gamma=0.999, min_budget=1024)]
    exact = build_index(tiling, patterns, RandomScores(1024))
    assert int(exact.num_columns.max()) > 35 and float(exact.density()[0]) < 0.9 and float(exact.density()[1]) == 1.0
    found = build_index(tiling, patterns, RandomScores(1024), Capacity(blocks, 35, heads_at_once=1))
    assert found.density().tolist() == [1.0, 1.0]
    assert found.overflowed is not None and found.overflowed.all(1).tolist() == [True, False]
    assert not bool(found.overflowed[1].any())


@pytest.mark.parametrize("room", [(1000, 1000), (1000, 20), (3, 1000)], ids=["enough", "columns", "blocks"])
def test_single_keys_without_room_are_dense_tile_by_tile(room: tuple[int, int]) -> None:
    """With room for all, every head has what it wanted, whoever it was scored with; listed in order or not."""
    tiling = Tiling.of(301, 1200, 32, 64)
    patterns = [LowRank(gamma=0.2), LowRank(rank=32, gamma=0.25), LowRank(gamma=0.2)]
    exact = build_index(tiling, patterns, RandomScores(1200))
    assert int(exact.num_columns.min()) < 20 < int(exact.num_columns.max()) and float(exact.density().max()) < 0.9
    for heads_at_once in (1, 3):
        found = build_index(tiling, patterns, RandomScores(1200), Capacity(*room, heads_at_once))
        over = (exact.num_blocks > room[0]) | (exact.num_columns > room[1])
        assert found.overflowed is not None and bool(over.any()) == (room != (1000, 1000))
        reach = tiling.reachable().sum(1)
        assert torch.equal(found.overflowed, over & (exact.num_blocks < reach))
        everything = build_index(tiling, [Dense()] * 3, RandomScores(1200)).to_mask()
        rows = tiling.starts[1:] - tiling.starts[:-1]
        dense_rows = over.repeat_interleave(rows, dim=1)[..., None]
        assert torch.equal(found.to_mask(), torch.where(dense_rows, everything, exact.to_mask()))


def test_dense_tiles_are_listed_only_for_an_engine_that_reads_lists_alone() -> None:
    tiling = Tiling.of(1000, 2000, 32, 64)
    patterns = [Dense(), AShape(sink=32, local=64), TriShape(sink=32, local=64, last=64)]
    short = build_index(tiling, patterns, RandomScores(2000), planned(tiling, patterns))
    assert short.blocks.shape[2] < 10
    assert bool((short.blocks[0] == -1).all()) and bool((short.blocks[2, -1] == -1).all())
    assert bool((short.blocks[1, :, 0] >= 0).all()) and bool((short.blocks[2, 0, 0] >= 0).all())
    whole = build_index(tiling, patterns, RandomScores(2000), planned(tiling, patterns, list_everything=True))
    assert bool((whole.blocks[..., 0] >= 0).all())
    assert torch.equal(whole.to_mask(), short.to_mask())


@pytest.mark.parametrize(("blocks", "columns"), [(3, 1000), (1000, 20), (1, 1)])
def test_a_selection_without_room_is_dense_and_counted_never_cut(blocks: int, columns: int) -> None:
    tiling = Tiling.of(301, 1200, 32, 64)
    patterns = [VerticalSlash(vertical=60, slash=150), BlockSparse(top_k=3), AShape(sink=32, local=0), Dense()]
    exact = build_index(tiling, patterns, RandomScores(1200))
    found = build_index(tiling, patterns, RandomScores(1200), Capacity(blocks, columns, heads_at_once=4))
    assert found.overflowed is not None and bool(found.overflowed[:2].any())
    assert not bool(found.overflowed[3].any()), "a dense head is dense by intent"
    everything = build_index(tiling, [Dense()] * 4, RandomScores(1200)).to_mask()
    rows = tiling.starts[1:] - tiling.starts[:-1]
    dense_rows = (found.overflowed | (found.blocks[..., 0] < 0)).repeat_interleave(rows, dim=1)
    assert torch.equal(found.to_mask(), torch.where(dense_rows[..., None], everything, exact.to_mask()))


SHARING: list[HeadPattern] = [
    *[Dense()] * 3,
    *[AShape(sink=40, local=100)] * 3,
    *[TriShape(sink=40, local=100, last=70)] * 3,
]


@pytest.mark.parametrize("with_capacity", [False, True])
@pytest.mark.parametrize("name", TILINGS)
def test_lists_that_heads_share_are_the_ones_they_would_have_alone(name: str, with_capacity: bool) -> None:
    tiling = Tiling.of(*TILINGS[name])
    capacity = planned(tiling, SHARING) if with_capacity else None
    alone = build_index(tiling, SHARING, RandomScores(tiling.seq_len), capacity)
    shared = build_index(tiling, SHARING, RandomScores(tiling.seq_len), capacity, group=3)
    assert (shared.num_heads, shared.num_lists, shared.heads_per_list) == (9, 3, 3)
    assert torch.equal(shared.blocks, alone.blocks[::3]) and torch.equal(shared.num_blocks, alone.num_blocks[::3])
    assert torch.equal(shared.to_mask(), alone.to_mask())
    assert torch.equal(shared.computed_pairs(), alone.computed_pairs())
    tiles = torch.tensor([0, shared.num_tiles - 1, 0])
    assert torch.equal(shared.tile_mask(tiles, slice(2, 7)), alone.tile_mask(tiles)[2:7])


@pytest.mark.parametrize(
    ("patterns", "group"),
    [
        (SHARING, 1),
        ([AShape(), AShape(), AShape(local=64), AShape()], 2),
        ([VerticalSlash()] * 4, 2),
        ([Dense(), Dense(), Coverage(), Coverage()], 2),
    ],
    ids=["a KV head for every head", "unequal patterns", "chosen by scores", "partly chosen by scores"],
)
def test_other_heads_have_lists_of_their_own(patterns: list[HeadPattern], group: int) -> None:
    tiling = Tiling.of(0, 512, 32, 64)
    index = build_index(tiling, patterns, RandomScores(512), group=group)
    assert (index.num_lists, index.heads_per_list) == (len(patterns), 1)


class LiveBytes(TorchDispatchMode):
    """The most bytes that live tensors have held at once."""

    def __init__(self, *given: torch.Tensor) -> None:
        """``given``: tensors that do not count."""
        super().__init__()
        self.references = Counter(tensor.untyped_storage()._cdata for tensor in given)
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if not self.references[storage._cdata]:
                    self.live += storage.nbytes()
                self.references[storage._cdata] += 1
                weakref.finalize(tensor, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def release(self, storage: int, size: int) -> None:
        self.references[storage] -= 1
        if not self.references[storage]:
            self.live -= size


class EmptyScores(RandomScores):
    """Of the right shapes, without data."""

    def draw(self, kind: int, heads: Sequence[int], *shape: int) -> torch.Tensor:
        return torch.empty(len(heads), *shape, device="meta")

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> Levels:
        levels = torch.empty(len(heads), tiling.num_tiles, self.seq_len, dtype=torch.uint8, device="meta")
        return Levels(levels, torch.empty(len(heads), dtype=torch.int32, device="meta"))


MIXTURES: dict[str, list[HeadPattern]] = {
    "default": [VerticalSlash(vertical=1000, slash=6096)] * 32,
    "many columns": [VerticalSlash(vertical=3000, slash=200)] * 32,
    "block_sparse": [BlockSparse(top_k=100)] * 32,
    "dense": [Dense()] * 32,
    "coverage": [Coverage()] * 32,
    "antidiagonal": [Antidiagonal()] * 32,
    "peak_threshold": [PeakThreshold()] * 32,
    "low_rank": [LowRank()] * 32,
    "mixed": [VerticalSlash(), BlockSparse(), TriShape(), AShape()] * 8,
}


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("name", MIXTURES)
def test_memory_at_a_million_tokens(name: str, block_size: int) -> None:
    """32 heads, an 8K chunk at the end of 1M tokens, on a device that holds no data: what waits for data fails there.

    Counted are all tensors, the scores included; not the scratch that sorting takes inside a single operation.
    """
    seq_len = 1 << 20
    tiling = Tiling.of(seq_len - 8192, seq_len, block_size, 128, device="meta")

    capacity = planned(tiling, MIXTURES[name])
    with LiveBytes() as memory:
        index = build_index(tiling, MIXTURES[name], EmptyScores(seq_len), capacity)
    # The last-query estimate, per head and token: four groups' sums in two arrays and merged, columns, diagonals.
    lists = 4 * index.blocks.numel() + 4 * index.columns.numel()
    assert lists + capacity.heads_at_once * seq_len * 4 * (2 * 4 + 3) <= MEMORY_LIMIT
    assert index.blocks.shape[:2] == (32, 64)
    assert memory.peak <= MEMORY_LIMIT, f"{memory.peak / 2**20:.0f} MiB"


class NotLaunched:
    """In place of a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("stride", [2, 8, 16])
@pytest.mark.parametrize("block_size", [64, 128])
def test_memory_of_antidiagonal_scores_at_a_million_tokens(
    block_size: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, with all that the estimate on a GPU allocates; its kernels have no data here."""
    kernels = pytest.importorskip("minference_vllm.triton_kernels.antidiagonal")
    for kernel in ("square_lse_kernel", "square_mass_kernel"):
        monkeypatch.setattr(kernels, kernel, NotLaunched())
    seq_len, patterns = 1 << 20, [Antidiagonal(stride=stride)] * 32
    tiling = Tiling.of(seq_len - 8192, seq_len, block_size, 128, device="meta")
    query = torch.empty(8192, 32, 128, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(tiling.num_key_blocks, 8, block_size, 128, dtype=torch.bfloat16, device="meta")
    pages = torch.empty(tiling.num_key_blocks, dtype=torch.int64, device="meta")
    paged = query, PagedCache(keys, keys, "rows"), pages

    class FromPages(EmptyScores):
        def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
            return kernels.antidiagonal_scores(*paged, heads, tiling, stride, 0.1)

    capacity = planned(tiling, patterns)
    with LiveBytes() as memory:
        build_index(tiling, patterns, FromPages(seq_len), capacity)
    assert memory.peak <= MEMORY_LIMIT, f"{memory.peak / 2**20:.0f} MiB"


@pytest.mark.parametrize(("seq_len", "rank"), [(1 << 17, 16), (1 << 17, 128), (1 << 20, 16)])
def test_memory_of_low_rank_scores(seq_len: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above: the estimate from pages, and its index. On the longest contexts what the fewest rows need comes on
    top."""
    kernels = pytest.importorskip("minference_vllm.triton_kernels.low_rank")
    for kernel in ("peak_lse_kernel", "tile_levels_kernel", "mass_kernel"):
        monkeypatch.setattr(kernels, kernel, NotLaunched())
    patterns = [LowRank(rank=rank)] * 32
    tiling = Tiling.of(seq_len - 8192, seq_len, 128, 128, device="meta")
    query = torch.empty(8192, 32, 128, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(tiling.num_key_blocks, 8, 128, 128, dtype=torch.bfloat16, device="meta")
    pages = torch.empty(tiling.num_key_blocks, dtype=torch.int64, device="meta")
    capacity = planned(tiling, patterns)
    # Heads are alike, and a thousand steps each are slow to count: the lists of all, the work of some.
    some = [*patterns[: capacity.heads_at_once], *[Dense()] * (32 - capacity.heads_at_once)]
    with LiveBytes(query, keys, pages) as memory:
        scores = PagedEstimates(query, PagedCache(keys, keys, "rows"), pages, seq_len, 0.1, triton=True)
        build_index(tiling, some, scores, capacity)
    beside = 2 * low_rank.WEIGHTS_BYTES if 4 * low_rank.LEAST_ROWS * seq_len >= low_rank.WEIGHTS_BYTES else 0
    assert memory.peak <= MEMORY_LIMIT + beside, f"{memory.peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("block_size", [64, 128])
def test_an_audit_at_a_million_tokens_waits_for_nothing_and_stays_small(block_size: int, rows: int) -> None:
    """On the same device without data: 32 heads over 8, and never the keys of the whole prefix."""
    seq_len, chunk_len = 1 << 20, 8192
    tiling = Tiling.of(seq_len - chunk_len, seq_len, block_size, 128, device="meta")
    patterns = MIXTURES["coverage"]
    query = torch.empty(chunk_len, 32, 128, dtype=torch.bfloat16, device="meta")
    memory = torch.empty(seq_len // block_size, 8, block_size, 256, dtype=torch.bfloat16, device="meta")
    cache = PagedCache(memory[..., :128], memory[..., 128:], "rows")
    pages = torch.empty(seq_len // block_size, dtype=torch.int64, device="meta")
    scores = PagedEstimates(query, cache, pages, seq_len, 1.0, triton=True)
    index = build_index(tiling, patterns, EmptyScores(seq_len), planned(tiling, patterns))
    audit = Audit(torch.empty(rows, dtype=torch.int64, device="meta"))
    with LiveBytes() as live:
        audit.run(patterns, lambda _: index, scores.recall)
    assert audit.recall is not None and audit.recall.shape == (32,) and audit.levels == (0,) * 32
    assert live.peak <= 2 * PIECE_BYTES, f"{live.peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("block_size", [64, 128])
def test_mean_correction_at_a_million_tokens_waits_for_nothing_and_stays_small(block_size: int) -> None:
    """On the same device without data: scores of one head and of the one before, and their marks."""
    seq_len, chunk_len = 1 << 20, 8192
    tiling = Tiling.of(seq_len - chunk_len, seq_len, block_size, 128, device="meta")
    patterns: list[HeadPattern] = [PeakThreshold(mean_correction=True)] * 32
    index = build_index(tiling, patterns, EmptyScores(seq_len), planned(tiling, patterns))
    query = torch.empty(chunk_len, 32, 128, dtype=torch.bfloat16, device="meta")
    means = torch.empty(8, seq_len // block_size, 128, device="meta")
    lse = torch.empty(32, chunk_len, device="meta")
    out = torch.empty_like(query)
    with LiveBytes(query, means, lse, out) as live:
        mean_correction.add(query, means, means, index, [0, 31], 0.1, out, lse, softcap=30.0)
    assert live.peak <= 2.5 * mean_correction.PART_BYTES, f"{live.peak / 2**20:.0f} MiB"


def test_how_often_a_gpu_audits() -> None:
    patterns = [Coverage(min_budget=3072)] * 8
    often = audit_frequency(patterns, 24576, 32768, audit_rows=4, share=0.01)
    # 8192 rows of 3072 keys, against 4 rows of 32768.
    assert often == pytest.approx(0.01 * 8192 * 3072 / (AUDITED_PAIR * 4 * 32768))
    assert audit_frequency(patterns, 24576, 32768, audit_rows=8, share=0.01) == pytest.approx(often / 2)
    assert audit_frequency(patterns, 24576, 32768, audit_rows=4, share=0.02) == pytest.approx(often * 2)
    assert audit_frequency(patterns, 122880, 131072, audit_rows=4, share=0.01) == pytest.approx(often / 4)
    assert audit_frequency(patterns, 24576, 32768, audit_rows=4, share=0.0) == 0.0
    assert audit_frequency([Dense()], 0, 8192, audit_rows=1, share=1.0) == 1.0


@pytest.mark.parametrize("pattern", [*PATTERNS, *ADAPTIVE])
def test_every_pattern_is_audited_now_and_then(pattern: HeadPattern) -> None:
    assert 0 <= audit_frequency([pattern], 122880, 131072, audit_rows=4, share=0.01) < 1
    assert audit_frequency([pattern, Coverage()], 122880, 131072, audit_rows=4, share=0.01) > 0


def test_an_audit_reads_the_pages_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recall whether the keys come at once or a page at a time, FP8 caches with a scale included."""
    torch.manual_seed(0)
    seq_len, rows = 700, torch.tensor([0, 17, 130, 199])
    tiling = Tiling.of(500, seq_len, 32, 64)
    query = torch.randn(200, 4, 64)
    memory = torch.randn(25, 2, 32, 128).to(torch.float8_e4m3fn)
    cache = PagedCache(memory[..., :64], memory[..., 64:], "rows", key_scale=0.5)
    pages = torch.randperm(25)[: tiling.num_key_blocks]
    patterns = [AShape(sink=40, local=100), BlockSparse(top_k=3), VerticalSlash(vertical=60, slash=150), Dense()]
    index = build_index(tiling, patterns, RandomScores(seq_len), planned(tiling, patterns))
    whole = PagedEstimates(query, cache, pages, seq_len, 0.1).recall(index, rows)
    monkeypatch.setattr(recall, "PIECE_BYTES", 1)
    found = PagedEstimates(query, cache, pages, seq_len, 0.1, triton=True).recall(index, rows)
    assert torch.allclose(found, whole, atol=1e-6) and 0.0 < float(found[:3].min()) < 0.9
