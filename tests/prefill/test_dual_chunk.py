"""Dual chunk attention of one request's chunk, against its float64 definition."""

from __future__ import annotations

import pytest
import torch
from dual_chunk_inputs import DualChunkBatch, make_dual_chunk_batch
from native_inputs import needs_native

from minference_vllm import reference
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.choose import choose
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
from minference_vllm.prefill.dual_chunk import MERGED_ROWS, DualChunk, Part, attend_dual_chunk, decode_dual_chunk, merge
from minference_vllm.prefill.dual_chunk_recall import audited_recall, piece_recall

SMALL = DualChunk(chunk_size=256, local_size=64)  # 192 tokens a chunk
SHARPENED = DualChunk(chunk_size=256, local_size=64, original_len=150)
WIDE_LOCAL = DualChunk(chunk_size=256, local_size=160)  # 96 tokens a chunk: no position is bounded
PLACES = {
    "first_chunk": (0, 150),
    "one_border": (100, 200),
    "many_borders": (0, 800),
    "whole_chunk": (192, 192),
    "late": (500, 333),
    "pieces_of_one_row": (191, 194),
    "one_row": (700, 1),
    "first_row_of_a_chunk": (384, 1),
    "last_row_of_a_chunk": (383, 1),
}
"""Context and new tokens."""
SELECTIVE: tuple[HeadPattern, ...] = (
    VerticalSlash(vertical=40, slash=64),
    BlockSparse(top_k=2),
    AShape(sink=16, local=64),
    TriShape(sink=16, local=64, last=20),
    Coverage(gamma=0.4, min_budget=0),
    Antidiagonal(stride=16, tau=0.4),
    PeakThreshold(alpha=0.9, sink=16, window=40),
    LowRank(gamma=0.3),
)


def attended(
    batch: DualChunkBatch, patterns: list[HeadPattern], kernel: str = "native"
) -> tuple[torch.Tensor, list[Part]]:
    inputs = batch.inputs
    out = torch.full_like(inputs.query, torch.nan)
    chosen = choose(kernel, inputs.query.dtype, inputs.cache, with_lse=True)
    return out, attend_dual_chunk(batch.rotated, inputs, batch.geometry, patterns, chosen, out, tile=64)


def assert_close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    # Keys and queries are rounded after rotation; the definition rotates unrounded ones.
    budget = (2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps) * float(exact.abs().max())
    assert torch.isfinite(found).all()
    assert float((found.double() - exact).abs().max()) <= budget


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", [SMALL, SHARPENED, WIDE_LOCAL], ids=["small", "sharpened", "wide_local"])
@pytest.mark.parametrize("place", PLACES)
def test_all_keys_are_the_definition(place: str, geometry: DualChunk, dtype: torch.dtype) -> None:
    batch = make_dual_chunk_batch(geometry, *PLACES[place], dtype=dtype)
    out, parts = attended(batch, [Dense()] * 4)
    assert_close(out, batch.exact(), dtype)
    assert torch.equal(batch.mask(parts), causal(batch))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", [100, 160, 191, 192, 193, 383, 384, 400, 700, 767, 768])
def test_decoding_is_the_definition(context: int, dtype: torch.dtype) -> None:
    for kv_heads in (1, 2, 4):
        batch = make_dual_chunk_batch(SHARPENED, context, 1, dtype=dtype, kv_heads=kv_heads)
        inputs = batch.inputs
        out = torch.full_like(inputs.query, torch.nan)
        decode_dual_chunk(batch.rotated, inputs, SHARPENED, choose("native", dtype, inputs.cache, with_lse=True), out)
        assert_close(out, batch.exact(), dtype)


@needs_native
@pytest.mark.parametrize("place", ["one_border", "many_borders", "whole_chunk", "late", "pieces_of_one_row"])
def test_selected_keys_are_attended_as_defined(place: str) -> None:
    for first in (0, 4):
        batch = make_dual_chunk_batch(SHARPENED, *PLACES[place])
        out, parts = attended(batch, list(SELECTIVE[first : first + 4]))
        mask = batch.mask(parts)
        assert_close(out, batch.exact(mask), torch.float32)
        assert not (mask & ~causal(batch)).any()
        assert float(mask.sum()) < 0.9 * float(causal(batch).sum())
        for index in (part.index for part in parts):
            pairs = index.computed_pairs()
            assert (pairs <= index.dense_pairs()).all()


@needs_native
def test_budgets_that_cover_everything_are_dense() -> None:
    batch = make_dual_chunk_batch(SMALL, 300, 500)
    patterns: list[HeadPattern] = [
        VerticalSlash(vertical=100_000, slash=100_000),
        BlockSparse(top_k=100_000),
        AShape(sink=0, local=100_000),
        TriShape(sink=0, local=0, last=100_000),
    ]
    out, parts = attended(batch, patterns)
    assert torch.equal(batch.mask(parts), causal(batch))
    assert_close(out, batch.exact(), torch.float32)


@needs_native
@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize("place", ["many_borders", "late"])
def test_each_part_keeps_its_share_of_the_attention(place: str, gamma: float) -> None:
    """The keys that stand in for a part's own rows count twice in its estimate, so slightly less may be kept."""
    batch = make_dual_chunk_batch(SMALL, *PLACES[place])
    batch.rotated *= 3  # sharper than random attention
    batch.query *= 3
    out, parts = attended(batch, [Coverage(gamma=gamma, min_budget=0)] * 4)
    assert_close(out, batch.exact(batch.mask(parts)), torch.float32)
    weights = batch.scores().masked_fill(~causal(batch), -torch.inf).softmax(-1)
    kept = (weights * batch.mask(parts)).sum(-1).mean()
    assert float(kept) > 2 * gamma - 1


@needs_native
@pytest.mark.parametrize("place", ["first_chunk", "whole_chunk", "late"])
def test_recall_is_that_of_the_definition(place: str) -> None:
    """For single rows, over all parts of their piece; the audit's recall is only checked for plausibility."""
    context_len, new = PLACES[place]
    batch = make_dual_chunk_batch(SHARPENED, context_len, new)
    _, parts = attended(batch, list(SELECTIVE[:4]))
    kernel = choose("native", torch.float32, batch.inputs.cache, with_lse=True)
    weights = batch.scores().masked_fill(~causal(batch), -torch.inf).softmax(-1)
    by_norm = weights * reference.repeat_heads(batch.paged.values(0), 4).norm(dim=2)[:, None]
    mask = batch.mask(parts)
    for begin, end in SHARPENED.pieces(Chunk(0, 0, context_len, context_len + new)):
        rows = torch.tensor([0, (end - begin) // 2, end - begin - 1])
        found = piece_recall([part for part in parts if part.rows == (begin, end)], kernel, rows)
        of_chunk = rows + begin - context_len
        for shares, kind in zip(found, (weights, by_norm), strict=True):
            expected = (kind * mask).sum(-1) / kind.sum(-1)
            torch.testing.assert_close(shares.double(), expected[:, of_chunk], rtol=1e-4, atol=1e-5)
    audited = audited_recall(parts, kernel, samples=20, seed=0)
    pieces = len({part.rows for part in parts})
    assert audited.mass.shape == (4, 20 * pieces) and 0 < float(audited.mass.mean()) < 1


@needs_native
def test_the_checkpoints_own_sizes() -> None:
    """Four rows across the end of the second chunk, at 507,904 tokens."""
    geometry = DualChunk(chunk_size=262_144, local_size=8192, original_len=262_144)
    batch = make_dual_chunk_batch(geometry, 507_902, 4, heads=1, kv_heads=1, block_size=128)
    out, parts = attended(batch, [Dense()])
    assert [part.keys[1] - part.keys[0] for part in parts] == [253_952, 253_952, 2, 253_952, 253_952]
    assert_close(out, batch.exact(), torch.float32)


@needs_native
def test_chunks_of_any_cut_are_the_same_attention() -> None:
    whole = make_dual_chunk_batch(SHARPENED, 0, 700)
    out, _ = attended(whole, [Dense()] * 4)
    last = make_dual_chunk_batch(SHARPENED, 0, 700)
    last.paged.context_lens = [430]
    last.rotated = last.rotated[430:]
    last.paged.query_start_loc = torch.tensor([0, 270], dtype=torch.int32)
    found, _ = attended(last, [Dense()] * 4)
    torch.testing.assert_close(found, out[430:], rtol=1e-5, atol=1e-5)


def causal(batch: DualChunkBatch) -> torch.Tensor:
    """bool ``[H, rows, S]``."""
    mask = reference.causal_mask(batch.context_len, batch.seq_len)
    return mask.expand(batch.query.shape[1], -1, -1)


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [((0, 192), [(0, 192)]), ((191, 193), [(191, 192), (192, 193)]), ((10, 400), [(10, 192), (192, 384), (384, 400)])],
)
def test_pieces(chunk: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    assert list(SMALL.pieces(Chunk(0, 0, *chunk))) == expected


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ((0, 10), ((0, 10),)),
        ((192, 200), ((192, 200), (0, 192))),
        ((600, 700), ((576, 700), (384, 576), (0, 384))),
    ],
)
def test_key_ranges(piece: tuple[int, int], expected: tuple[tuple[int, int], ...]) -> None:
    assert SMALL.key_ranges(*piece) == expected


def test_geometry_of_the_checkpoints() -> None:
    config = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    geometry = DualChunk.of({**config, "sparse_attention_config": {"0": {}}})
    assert geometry.chunk_len == geometry.plain_len == 253_952
    assert DualChunk.of({"chunk_size": 262144, "local_size": 8192}).original_len == 0
    assert DualChunk.of({**config, "original_max_position_embeddings": 32768}).plain_len == 32768


def test_scores_are_sharpened_beyond_the_original_length() -> None:
    geometry = DualChunk(256, 64, original_len=100)
    query = torch.ones(300, 1)
    found = geometry.sharpened(query, 0)[:, 0]
    assert torch.equal(found[:100], query[:100, 0])
    assert float(found[299]) == pytest.approx((0.1 * torch.tensor(3.0).log().item() + 1) ** 2)
    assert geometry.sharpened(query[:50], 50).data_ptr() == query.data_ptr()
    assert torch.equal(DualChunk(256, 64).sharpened(query, 10**6), query)


@pytest.mark.parametrize(
    "config",
    [
        {"chunk_size": 262144},
        {"chunk_size": 100, "local_size": 100},
        {"chunk_size": "262144", "local_size": 8192},
        {"chunk_size": 256, "local_size": -1},
        {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 1.5},
    ],
)
def test_impossible_geometry_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="dual_chunk_attention_config needs integers chunk_size > local_size >= 0"):
        DualChunk.of(config)


def test_merging() -> None:
    rows = MERGED_ROWS + 76
    (out, more), (lse, more_lse) = torch.randn(2, rows, 2, 8), torch.randn(2, 2, rows)
    more[2], more_lse[:, 2] = torch.nan, -torch.inf
    weight = torch.sigmoid(lse - more_lse).T[..., None]
    expected = torch.where(weight < 1, out * weight + more * (1 - weight), out)
    expected[2], total = out[2], torch.logaddexp(lse, more_lse)
    merge(out, lse, more, more_lse)
    torch.testing.assert_close(out, expected)
    assert torch.equal(lse, total) and torch.isfinite(lse).all()
