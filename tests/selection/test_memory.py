"""Indices and audits at a million tokens need no host synchronisation and stay within the stated memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from capacity_inputs import RandomScores, planned
from live_bytes import LiveBytes

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.sparse_index import SparseIndex
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
from minference_vllm.prefill.recall import RecallCheck, chunk_recall
from minference_vllm.selection import torch_scores
from minference_vllm.selection.build import build_index
from minference_vllm.selection.capacity import MEMORY_LIMIT
from minference_vllm.selection.score_bins import ScoreBins
from minference_vllm.selection.torch_scores import PIECE_BYTES, TorchScores


class EmptyScores(RandomScores):
    """Of the right shapes, without data."""

    def draw(self, kind: int, heads: Sequence[int], *shape: int) -> torch.Tensor:
        return torch.empty(len(heads), *shape, device="meta")

    def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
        bins = torch.empty(len(heads), tiling.num_tiles, self.seq_len, dtype=torch.uint8, device="meta")
        return ScoreBins(bins, torch.empty(len(heads), dtype=torch.int32, device="meta"))


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


MILLION, CHUNK, TILE = 1 << 20, 8192, 128


def meta_tiling(block_size: int, seq_len: int = MILLION) -> Tiling:
    """The tiling of a sequence's last chunk on the meta device, where reading data fails."""
    return Tiling.of(seq_len - CHUNK, seq_len, block_size, TILE, device="meta")


def meta_inputs(block_size: int, seq_len: int = MILLION, softcap: float = 0.0) -> Inputs:
    """Inputs of the same chunk, 32 query heads over 8 KV heads. Keys and values of a page lie side by side."""
    query = torch.empty(CHUNK, 32, 128, dtype=torch.bfloat16, device="meta")
    stored = torch.empty(seq_len // block_size, 8, block_size, 256, dtype=torch.bfloat16, device="meta")
    pages = torch.empty(seq_len // block_size, dtype=torch.int64, device="meta")
    cache = PagedCache(stored[..., :128], stored[..., 128:], "rows")
    return Inputs(query, cache, pages, Chunk(0, 0, seq_len - CHUNK, seq_len), 0.1, softcap)


@functools.cache
def meta_index(pattern: HeadPattern, block_size: int) -> SparseIndex:
    """The index of 32 heads at a million tokens."""
    tiling, patterns = meta_tiling(block_size), [pattern] * 32
    with LiveBytes():
        return build_index(tiling, patterns, EmptyScores(MILLION), planned(tiling, patterns))


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("name", MIXTURES)
def test_memory_at_a_million_tokens(name: str, block_size: int) -> None:
    """32 heads, an 8K chunk at the end of 1M tokens.

    All tensors count, including the scores, but not the scratch memory of a single sort.
    """
    tiling = meta_tiling(block_size)
    capacity = planned(tiling, MIXTURES[name])
    with LiveBytes() as memory:
        index = build_index(tiling, MIXTURES[name], EmptyScores(MILLION), capacity)
    # Column and diagonal scores, per head and token: four groups' sums in two arrays and merged, and two more.
    lists = 4 * index.blocks.numel() + 4 * index.columns.numel()
    assert lists + capacity.heads_at_once * MILLION * 4 * (2 * 4 + 3) <= MEMORY_LIMIT
    assert index.blocks.shape[:2] == (32, 64)
    assert memory.peak <= MEMORY_LIMIT, f"{memory.peak / 2**20:.0f} MiB"


def triton_scores(inputs: Inputs) -> TorchScores:
    """``TritonScores``; its module needs triton."""
    return pytest.importorskip("minference_vllm.triton_kernels.scores").TritonScores(inputs)


class NotLaunched:
    """Stands in for a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("stride", [2, 8, 16])
@pytest.mark.parametrize("block_size", [64, 128])
def test_memory_of_antidiagonal_scores_at_a_million_tokens(
    block_size: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, with everything that the GPU scores allocate; their kernels are not launched."""
    kernels = pytest.importorskip("minference_vllm.triton_kernels.antidiagonal")
    for kernel in ("square_lse_kernel", "square_mass_kernel"):
        monkeypatch.setattr(kernels, kernel, NotLaunched())
    tiling, patterns = meta_tiling(block_size), [Antidiagonal(stride=stride)] * 32
    scores, capacity = triton_scores(meta_inputs(block_size)), planned(tiling, patterns)
    with LiveBytes() as memory:
        build_index(tiling, patterns, scores, capacity)
    assert memory.peak <= MEMORY_LIMIT, f"{memory.peak / 2**20:.0f} MiB"


LOW_RANK_KERNELS = {
    "calibration": ("value_norms", "share_levels"),
    "chunk_queries": ("unlike_rows", "query_codes"),
    "fit": ("moments", "fit"),
    "key_codes": ("key_codes",),
    "key_lists": ("key_lists",),
    "approx_lse": ("approx_lse",),
    "tile_bins": ("tile_bins",),
    "representative_bins": ("representative_bins",),
    "thresholds": ("threshold",),
}


@pytest.mark.parametrize(("seq_len", "rank"), [(1 << 17, 16), (1 << 17, 128), (1 << 20, 16)])
def test_memory_of_low_rank_scores(seq_len: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above: the scores from pages, and their index."""
    for module, names in LOW_RANK_KERNELS.items():
        kernels = pytest.importorskip(f"minference_vllm.triton_kernels.{module}")
        for name in names:
            monkeypatch.setattr(kernels, f"{name}_kernel", NotLaunched())
    patterns = [LowRank(rank=rank)] * 32
    tiling, inputs = meta_tiling(128, seq_len), meta_inputs(128, seq_len)
    capacity = planned(tiling, patterns)
    # Heads are alike, and counting a thousand steps for each is slow: lists for all heads, scores for some.
    some = [*patterns[: capacity.heads_at_once], *[Dense()] * (32 - capacity.heads_at_once)]
    with LiveBytes(inputs.query, inputs.cache.key, inputs.pages) as memory:
        build_index(tiling, some, triton_scores(inputs), capacity)
    assert memory.peak <= MEMORY_LIMIT, f"{memory.peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("block_size", [64, 128])
def test_an_audit_at_a_million_tokens_waits_for_nothing_and_stays_small(block_size: int, rows: int) -> None:
    """On the meta device too, and without ever reading the keys of the whole prefix at once."""
    patterns = MIXTURES["coverage"]
    index, scores = meta_index(patterns[0], block_size), triton_scores(meta_inputs(block_size))
    check = RecallCheck(torch.empty(rows, dtype=torch.int64, device="meta"))
    with LiveBytes() as live:
        check.run(patterns, lambda _: index, functools.partial(chunk_recall, scores))
    assert check.recall is not None and check.recall.value.shape == (32,) and check.steps == (0,) * 32
    assert live.peak <= 2 * PIECE_BYTES, f"{live.peak / 2**20:.0f} MiB"


def test_an_audit_reads_the_pages_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall is the same whether the keys are read at once or a page at a time, also for FP8 caches with a scale."""
    torch.manual_seed(0)
    seq_len, rows = 700, torch.tensor([0, 17, 130, 199])
    tiling = Tiling.of(500, seq_len, 32, 64)
    query = torch.randn(200, 4, 64)
    memory = torch.randn(25, 2, 32, 128).to(torch.float8_e4m3fn)
    cache = PagedCache(memory[..., :64], memory[..., 64:], "rows", key_scale=0.5)
    pages = torch.randperm(25)[: tiling.num_key_blocks]
    patterns = [AShape(sink=40, local=100), BlockSparse(top_k=3), VerticalSlash(vertical=60, slash=150), Dense()]
    index = build_index(tiling, patterns, RandomScores(seq_len), planned(tiling, patterns))
    inputs = Inputs(query, cache, pages, Chunk(0, 0, 500, seq_len), 0.1)
    whole = chunk_recall(TorchScores(inputs), index, rows)
    monkeypatch.setattr(torch_scores, "PIECE_BYTES", 1)
    found = chunk_recall(triton_scores(inputs), index, rows)
    for part, right in zip(found, whole, strict=True):
        assert torch.allclose(part, right, atol=1e-6) and 0.0 < float(part[:3].min()) < 0.9
