"""Indices, audits and mean correction at a million tokens wait for no data, and stay within the stated memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from capacity_inputs import RandomScores, planned
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import (
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
from minference_vllm.prefill import mean_correction, recall
from minference_vllm.prefill.recall import RecallCheck
from minference_vllm.selection import low_rank
from minference_vllm.selection.build import build_index
from minference_vllm.selection.capacity import MEMORY_LIMIT
from minference_vllm.selection.score_bins import ScoreBins
from minference_vllm.selection.scores import PagedEstimates
from minference_vllm.selection.torch_scores import PIECE_BYTES


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

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> ScoreBins:
        levels = torch.empty(len(heads), tiling.num_tiles, self.seq_len, dtype=torch.uint8, device="meta")
        return ScoreBins(levels, torch.empty(len(heads), dtype=torch.int32, device="meta"))


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
    audit = RecallCheck(torch.empty(rows, dtype=torch.int64, device="meta"))
    with LiveBytes() as live:
        audit.run(patterns, lambda _: index, scores.recall)
    assert audit.recall is not None and audit.recall.shape == (32,) and audit.levels == (0,) * 32
    assert live.peak <= 2 * PIECE_BYTES, f"{live.peak / 2**20:.0f} MiB"


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
