"""Mean correction against its float64 definition: softmax over the selected keys and, in place of the keys of every
page that is left out, as many copies of its mean key and mean value.

Budget: see ``test_sparse_prefill``; means and merging are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import Layout, PagedCache
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose
from minference_vllm.kernels.native import library
from minference_vllm.patterns.kinds import (
    AShape,
    Dense,
    HeadPattern,
    LowRank,
    PatternError,
    PeakThreshold,
    VerticalSlash,
    parse_head_pattern,
)
from minference_vllm.prefill import mean_correction
from minference_vllm.prefill.api import sparse_prefill
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.recall import RecallCheck
from minference_vllm.prefill.timing import Timing
from minference_vllm.selection.build import build_index
from minference_vllm.selection.compaction import Capacity
from minference_vllm.selection.families import mean_corrected_heads
from minference_vllm.selection.torch_scores import TorchScores

needs_native = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason=str(library.unavailable_reason())
)  # fmt: skip
SPARSE = PeakThreshold(alpha=0.99, sink=16, window=40)
CORRECTED = SPARSE.model_copy(update={"mean_correction": True})
PATTERNS: list[HeadPattern] = [
    CORRECTED,
    SPARSE,
    VerticalSlash(vertical=60, slash=120),
    PeakThreshold(alpha=0.98, sink=0, window=0, mean_correction=True),
    Dense(),
    CORRECTED,
    AShape(sink=16, local=64),
    PeakThreshold(alpha=0.999_999, sink=0, window=0, mean_correction=True),
]
"""Over two KV heads, each of which has corrected and other heads."""
CASES: dict[str, dict[str, Any]] = {
    "whole_prompt": {"query_lens": [512], "context_lens": [0]},
    "odd_length": {"query_lens": [517], "context_lens": [0]},
    "second_chunk": {"query_lens": [256], "context_lens": [512]},
    "context_ends_inside_a_page": {"query_lens": [201], "context_lens": [333]},
    "long_context_short_chunk": {"query_lens": [70], "context_lens": [1500]},
    "within_the_first_tile": {"query_lens": [90], "context_lens": [0]},
    "several_requests": {"query_lens": [300, 1, 129, 45], "context_lens": [0, 377, 256, 13]},
    "gqa_4_to_1": {"kv_heads": 1, "query_lens": [200], "context_lens": [350]},
    "no_gqa": {"kv_heads": 8, "query_lens": [200], "context_lens": [350]},
    "head_size_128": {"head_size": 128, "query_lens": [200], "context_lens": [350]},
    "large_tile": {"tile": 256, "query_lens": [700], "context_lens": [211]},
    "pages_of_64": {"block_size": 64, "tile": 64, "query_lens": [300], "context_lens": [211]},
}


def definition(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: SparseIndex,
    patterns: Sequence[HeadPattern],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 ``[chunk, H, D]``, and bool ``[H]``: whether anything was left out."""
    mask, heads = index.to_mask(), mean_corrected_heads(patterns)
    extended = reference.with_mean_pages(keys, values, mask, index.tiling, heads)
    exact = reference.masked_attention(query, *extended, scale)
    return exact, extended[2][..., keys.shape[1] :].flatten(1).any(1)


def paged(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> TorchScores:
    """Scores over pages of 32 tokens."""
    return TorchScores(Inputs.of_rows(query, keys, values, scale, 32))


def assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Outputs that were rounded to bf16 twice: by the kernel, and when the correction was added; weights once."""
    assert torch.isfinite(found).all()
    error, largest = float((found.double() - exact).abs().max()), float(exact.abs().max())
    assert error <= 3 * torch.finfo(found.dtype).eps * largest, error


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_its_definition(name: str, paged_batch: Callable[..., Any]) -> None:
    arguments = dict(CASES[name])
    tile = arguments.pop("tile", None)
    batch = paged_batch(**arguments)
    out, indices = sparse_prefill(*batch.arguments, PATTERNS, kernel="native", tile=tile, return_index=True)
    anything = torch.zeros(8, dtype=torch.bool)
    for request, index in enumerate(indices):
        rows = batch.rows(request)
        exact, left_out = definition(
            batch.query[rows], batch.keys(request), batch.values(request), index, PATTERNS, batch.scale
        )
        assert_close(out[rows], exact)
        anything |= left_out
    assert anything.any() == (name != "within_the_first_tile")
    assert not anything[[1, 2, 4, 6]].any()


@needs_native
def test_other_heads_are_served_as_without_it(paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(query_lens=[300], context_lens=[333])
    without = [
        pattern.model_copy(update={"mean_correction": False}) if isinstance(pattern, PeakThreshold) else pattern
        for pattern in PATTERNS
    ]
    found, plain = (sparse_prefill(*batch.arguments, patterns, kernel="native") for patterns in (PATTERNS, without))
    same = [torch.equal(found[:, head], plain[:, head]) for head in range(8)]
    assert same == [False, True, True, False, True, False, True, False]


@needs_native
def test_with_every_page_kept_nothing_changes(paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(query_lens=[333, 129], context_lens=[0, 211])
    found, plain = (
        sparse_prefill(*batch.arguments, PeakThreshold(alpha=1e-9, mean_correction=corrected), kernel="native")
        for corrected in (True, False)
    )
    assert torch.equal(found, plain)


@needs_native
@pytest.mark.parametrize("behind", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_lies_behind_the_last_token_makes_no_difference(
    dtype: torch.dtype, behind: float, paged_batch: Callable[..., Any]
) -> None:
    shape: dict[str, Any] = {"query_lens": [300], "context_lens": [333], "dtype": dtype}
    clean, found = (
        sparse_prefill(*paged_batch(**shape, behind=filled).arguments, PATTERNS, kernel="native")
        for filled in (0.0, behind)
    )
    assert torch.isfinite(clean).all() and torch.equal(found, clean)


@needs_native
@pytest.mark.parametrize("layout", ["transposed", "amx"])
def test_caches_of_other_layouts(layout: Layout, paged_batch: Callable[..., Any]) -> None:
    """``auto`` takes the one CPU kernel that can, whatever the layout is faster for."""
    batch = paged_batch(query_lens=[300], context_lens=[333])
    keys, values = (stored.transpose(1, 2).contiguous() for stored in (batch.key_cache, batch.value_cache))
    blocks, heads, size, dim = keys.shape
    if layout == "transposed":
        packed = keys.transpose(2, 3).reshape(keys.shape), values
    else:
        packed = (
            keys.view(blocks, heads, size // 16, 16, dim // 2, 2).transpose(3, 4).reshape(keys.shape),
            values.view(blocks, heads, size // 2, 2, dim // 16, 16).permute(0, 1, 4, 2, 5, 3).reshape(keys.shape),
        )
    cache = PagedCache(*(part.contiguous() for part in packed), layout)
    out = torch.full_like(batch.query, torch.nan)
    kernel = choose("auto", batch.query.dtype, cache, with_lse=True)
    index = attend_chunk(batch.inputs(cache=cache), PATTERNS, kernel, out)
    exact, _ = definition(batch.query, batch.keys(0), batch.values(0), index, PATTERNS, batch.scale)
    assert_close(out, exact)


@needs_native
def test_kept_page_means_give_the_same(paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(query_lens=[300], context_lens=[333])
    kernel = choose("auto", batch.query.dtype, batch.cache, with_lse=True)
    kept, outputs = PageMeans(), [torch.empty_like(batch.query) for _ in range(3)]
    for out, means in zip(outputs, (None, kept, kept), strict=True):
        attend_chunk(batch.inputs(page_means=means), PATTERNS, kernel, out)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


@needs_native
def test_heads_that_a_floor_raised_are_not_corrected(paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(query_lens=[300], context_lens=[333])
    kernel = choose("auto", batch.query.dtype, batch.cache, with_lse=True)
    check, timing = RecallCheck(torch.tensor([7, 200]), floor=0.999), Timing()
    found, raised = torch.empty_like(batch.query), torch.empty_like(batch.query)
    attend_chunk(batch.inputs(), [CORRECTED] * 8, kernel, found, check=check, timing=timing)
    assert min(check.steps) >= 1
    patterns = [CORRECTED.at_step(step) for step in check.steps]
    assert all(isinstance(pattern, LowRank | Dense) for pattern in patterns)
    attend_chunk(batch.inputs(), patterns, kernel, raised)
    assert torch.equal(found, raised)


def eager_under(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, index: SparseIndex, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel gives: float32 output ``[chunk, H, D]`` and log-sum-exp ``[H, chunk]``."""
    heads = query.shape[1]
    scores = query.transpose(0, 1) @ reference.repeat_heads(keys, heads).transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~index.to_mask(), -torch.inf)
    return (scores.softmax(-1) @ reference.repeat_heads(values, heads)).transpose(0, 1), scores.logsumexp(-1)


@pytest.mark.parametrize("part_bytes", [1, 1 << 16, 1 << 30])
@pytest.mark.parametrize(("context", "length"), [(0, 517), (333, 700), (640, 650)])
def test_added_to_any_kernels_result_in_pieces(
    context: int, length: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mean_correction, "PART_BYTES", part_bytes)
    torch.manual_seed(0)
    query = torch.randn(length - context, 8, 32)
    keys, values = (torch.randn(2, length, 32) for _ in range(2))
    scores = paged(query, keys, values, 0.2)
    index = build_index(Tiling.of(context, length, 32, 64), PATTERNS, scores)
    out, lse = eager_under(query, keys, values, index, 0.2, softcap=0.0)
    mean_correction.add(scores, index, mean_corrected_heads(PATTERNS), out, lse)
    exact, _ = definition(query, keys, values, index, PATTERNS, 0.2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_tiles_that_overflowed_leave_nothing_out() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(200, 2, 32), torch.randn(1, 600, 32), torch.randn(1, 600, 32)
    tiling, patterns = Tiling.of(400, 600, 32, 64), [CORRECTED, PATTERNS[3]]
    scores = paged(query, keys, values, 0.2)
    index = build_index(tiling, patterns, scores, Capacity(blocks=6, columns=1, heads_at_once=2))
    unlisted = index.blocks[..., 0] < 0
    assert unlisted.any() and not unlisted.all()
    out, lse = eager_under(query, keys, values, index, 0.2, softcap=0.0)
    plain = out.clone()
    mean_correction.add(scores, index, [0, 1], out, lse)
    exact, _ = definition(query, keys, values, index, patterns, 0.2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    tile_of_row = torch.searchsorted(index.tiling.starts, torch.arange(400, 600), right=True) - 1
    untouched = unlisted[:, tile_of_row].T
    assert torch.equal(out[untouched], plain[untouched])


def test_rows_without_a_share_in_it_stay_what_they_are() -> None:
    """Scores so far below the selected ones that their weights vanish, or so far above that the others do."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(100, 1, 32), torch.randn(1, 400, 32), torch.randn(1, 400, 32)
    scores = paged(query, keys, values, 0.2)
    index = build_index(Tiling.of(300, 400, 32, 64), [CORRECTED], scores)
    out, lse = eager_under(query, keys, values, index, 0.2, softcap=0.0)
    for shift, expected in ((1e4, out.clone()), (-1e4, None)):
        found = out.clone()
        mean_correction.add(scores, index, [0], found, lse + shift)
        assert torch.isfinite(found).all()
        if expected is not None:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", ["sink and local", "topics", "far diagonal"])
def test_the_error_against_dense_attention_falls(shape: str) -> None:
    from synthetic import SHAPES, structured_qkv

    query, keys, values = structured_qkv(4096, 2, 1, 128, SHAPES[shape], dtype=torch.float32)
    query, keys, values = query[2048:], keys.transpose(0, 1), values.transpose(0, 1)
    scale, pattern = 128**-0.5, PeakThreshold(alpha=0.5, mean_correction=True)
    scores = TorchScores(Inputs.of_rows(query, keys, values, scale, 128))
    index = build_index(Tiling.of(2048, 4096, 128, 128), [pattern] * 2, scores)
    assert float(index.density().mean()) < 0.6
    out, lse = eager_under(query, keys, values, index, scale, softcap=0.0)
    dense = reference.masked_attention(query, keys, values, reference.causal_mask(2048, 4096), scale)
    before = float((out - dense).norm() / dense.norm())
    mean_correction.add(scores, index, [0, 1], out, lse)
    after = float((out - dense).norm() / dense.norm())
    assert after < before / 3, (before, after)


# Where it cannot be had


def test_a_kernel_without_a_log_sum_exp_is_refused(
    paged_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = paged_batch(query_lens=[200], context_lens=[300])
    with pytest.raises(
        ValueError, match="'block_table' cannot run: mean correction and the remainder need every row's log-sum-exp"
    ):
        sparse_prefill(*batch.arguments, CORRECTED, kernel="block_table")
    monkeypatch.setattr(library, "unavailable_reason", lambda dtype=None: "the processor has no AVX2")
    with pytest.raises(ValueError, match="kernel 'native' does, but the processor has no AVX2"):
        sparse_prefill(*batch.arguments, CORRECTED)


@needs_native
def test_auto_leaves_amx_pages_to_the_kernel_that_can() -> None:
    memory = torch.zeros(4, 2, 32, 64, dtype=torch.bfloat16)
    cache = PagedCache(memory, memory, "amx")
    assert choose("auto", torch.bfloat16, cache).name == "block_table"
    assert choose("auto", torch.bfloat16, cache, with_lse=True).name == "native"


# In pattern files


def test_in_files_it_is_off_unless_it_is_named() -> None:
    old = parse_head_pattern({"kind": "peak_threshold", "alpha": 0.1, "sink": 256, "window": 512})
    assert old == PeakThreshold() and mean_corrected_heads([old]) == []
    named = parse_head_pattern({"kind": "peak_threshold", "mean_correction": True})
    assert mean_corrected_heads([old, named]) == [1]
    assert parse_head_pattern(named.model_dump(mode="json")) == named
    for wrong in (1, "true", None):
        with pytest.raises(PatternError, match=r"mean_correction = .*: must be true or false"):
            parse_head_pattern({"kind": "peak_threshold", "mean_correction": wrong})
    with pytest.raises(PatternError, match="mean_correction"):
        parse_head_pattern({"kind": "antidiagonal", "mean_correction": True})
