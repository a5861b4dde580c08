"""The remainder against its float64 definition: the keys that a tile leaves out, as one key with one value.

Budget: see ``test_sparse_prefill``; the remainder and its merging are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_inputs import needs_native

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import SAMPLED_KEYS, sample_step, sampled_positions
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose
from minference_vllm.patterns.discovery import default_pattern
from minference_vllm.patterns.kinds import (
    AShape,
    Dense,
    HeadPattern,
    LowRank,
    PatternError,
    VerticalSlash,
    parse_head_pattern,
)
from minference_vllm.prefill import remainder
from minference_vllm.prefill.api import sparse_prefill
from minference_vllm.selection.build import build_index
from minference_vllm.selection.torch_scores import TorchScores

WINDOW = AShape(sink=16, local=64)
"""The selection does not matter in this file."""
SCALE = 0.2


def index_of(tiling: Tiling, query: torch.Tensor, keys: torch.Tensor) -> SparseIndex:
    scores = TorchScores(Inputs.of_rows(query, keys, keys, SCALE, tiling.block_size))
    return build_index(tiling, [WINDOW] * query.shape[1], scores)


def under(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, index: SparseIndex, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel's results: float32 output ``[chunk, H, D]`` and log-sum-exp ``[H, chunk]``."""
    heads = query.shape[1]
    scores = query.transpose(0, 1) @ reference.repeat_heads(keys, heads).transpose(1, 2) * SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~index.to_mask(), -torch.inf)
    return (scores.softmax(-1) @ reference.repeat_heads(values, heads)).transpose(0, 1), scores.logsumexp(-1)


def drawn(context: int, length: int, heads: int = 4, kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(length)
    values = torch.randn(kv_heads, length, 32) + torch.randn(32)
    return torch.randn(length - context, heads, 32), torch.randn(kv_heads, length, 32), values


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 3], [2]], ids=str)
@pytest.mark.parametrize(
    ("context", "length", "tile"),
    [(0, 517, 64), (333, 700, 64), (640, 650, 64), (0, 700, 128), (211, 911, 128), (5000, 5100, 64)],
)
def test_agrees_with_its_definition(context: int, length: int, tile: int, heads: list[int], softcap: float) -> None:
    query, keys, values = drawn(context, length)
    tiling = Tiling.of(context, length, 32, tile)
    index = index_of(tiling, query, keys)
    inputs = Inputs.of_rows(query, keys, values, SCALE, 32)
    inputs = Inputs(query, inputs.cache, inputs.pages, inputs.chunk, SCALE, softcap)
    out, lse = under(query, keys, values, index, softcap)
    plain = out.clone()
    remainder.add(inputs, index, remainder.of_heads(inputs, index, heads), out, lse)
    sampled = sampled_positions(length), sample_step(length)
    exact = reference.with_remainder(query, keys, values, index.to_mask(), tiling, SCALE, heads, *sampled, softcap)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    others = [head for head in range(4) if head not in heads]
    assert torch.equal(out[:, others], plain[:, others])
    assert not torch.equal(out[:, heads], plain[:, heads])


@pytest.mark.parametrize(("context", "length"), [(0, 517), (333, 700), (900, 1500)])
def test_of_a_window_only_what_all_rows_see(context: int, length: int) -> None:
    """Keys before it may be another request's, including NaN."""
    window = 300
    query, keys, values = drawn(context, length)
    tiling = Tiling.of(context, length, 32, 64, window=window)
    inputs = Inputs.of_rows(query, keys, values, SCALE, 32)
    index = build_index(tiling, [WINDOW] * 4, TorchScores(inputs))
    exact = reference.with_remainder(
        query, keys, values, index.to_mask(), tiling, SCALE, range(4), sampled_positions(length),
        sample_step(length),
    )  # fmt: skip
    out, lse = under(query, keys, values, index)
    gone = torch.arange(max(0, context - window + 1))
    for stored in (inputs.cache.key, inputs.cache.value):
        stored[gone // 32, :, gone % 32] = torch.nan
    remainder.add(inputs, index, remainder.of_heads(inputs, index, range(4)), out, lse)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_never_more_than_the_weight_that_was_left_out() -> None:
    """With every key sampled (Jensen's inequality)."""
    query, keys, values = drawn(300, 800)
    index = index_of(Tiling.of(300, 800, 32, 64), query, keys)
    found = remainder.of_tiles(Inputs.of_rows(query, keys, values, SCALE, 32), index, slice(0, 4))
    tile = (torch.arange(300, 800) // 64) - 300 // 64
    ours = ((query.transpose(0, 1) * found.key[:, tile]).sum(2) * SCALE + found.bias[:, tile]).T
    causal = reference.causal_mask(300, 800)
    scores = query.transpose(0, 1) @ reference.repeat_heads(keys, 4).transpose(1, 2) * SCALE
    left_out = scores.masked_fill(index.to_mask() | ~causal, -torch.inf).logsumexp(2).T
    assert (ours <= left_out + 1e-4).all()
    assert float((left_out - ours).mean()) < 0.7


def test_what_the_left_out_values_have_in_common_comes_back() -> None:
    """The selected keys have values near zero, as an attention sink has; the others share a direction."""
    query, keys, values = drawn(2000, 2400)
    values = values + 3.0
    values[:, :16] = 0.0
    tiling = Tiling.of(2000, 2400, 32, 64)
    index = index_of(tiling, query, keys)
    inputs = Inputs.of_rows(query, keys, values, SCALE, 32)
    dense = reference.masked_attention(query, keys, values, reference.causal_mask(2000, 2400), SCALE)
    out, lse = under(query, keys, values, index)
    before = float((out - dense).norm() / dense.norm())
    remainder.add(inputs, index, remainder.of_heads(inputs, index, range(4)), out, lse)
    assert float((out - dense).norm() / dense.norm()) < before / 3


def test_tiles_that_leave_nothing_out_stay_what_they_are() -> None:
    query, keys, values = drawn(400, 600)
    tiling = Tiling.of(400, 600, 32, 64)
    index = index_of(tiling, query, keys)
    unlisted = torch.rand(index.num_blocks.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    index = replace(index, blocks=index.blocks.masked_fill(unlisted[..., None], -1))
    out, lse = under(query, keys, values, index)
    plain = out.clone()
    inputs = Inputs.of_rows(query, keys, values, SCALE, 32)
    remainder.add(inputs, index, remainder.of_heads(inputs, index, range(4)), out, lse)
    tile = torch.arange(400, 600) // 64 - 400 // 64
    untouched = unlisted[:, tile].T
    assert torch.equal(out[untouched], plain[untouched])
    assert not torch.equal(out[~untouched], plain[~untouched])


@pytest.mark.parametrize("length", [1, 100, 2047, 2048, 4095, 4096, 5000, 131_072, 1_000_003])
def test_one_key_of_each_group_of_neighbours_is_sampled(length: int) -> None:
    step, positions = sample_step(length), sampled_positions(length)
    assert len(positions) == length // step
    assert min(length, SAMPLED_KEYS) <= len(positions) < 2 * SAMPLED_KEYS
    assert torch.equal(positions // step, torch.arange(len(positions)))
    if step > 8:
        spread = torch.bincount(positions % step * 8 // step, minlength=8)
        assert spread.min() > len(positions) // 16


@pytest.mark.parametrize("tile", [32, 64])
def test_an_index_names_what_its_mask_allows(tile: int) -> None:
    query, keys, _ = drawn(333, 700)
    tiling = Tiling.of(333, 700, 32, tile)
    scores = TorchScores(Inputs.of_rows(query, keys, keys, SCALE, 32))
    index = build_index(tiling, [VerticalSlash(vertical=60, slash=64), WINDOW, WINDOW, Dense()], scores)
    assert index.num_columns.any()
    positions = torch.arange(700)[torch.rand(700, generator=torch.Generator().manual_seed(0)) < 0.4]
    found, mask = index.names(positions), index.tile_mask(torch.arange(index.num_tiles))
    assert torch.equal(found, mask[..., positions])
    assert torch.equal(index.names(positions, slice(1, 3)), mask[1:3][..., positions])


# Served


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("behind", [torch.nan, torch.inf], ids=str)
def test_from_pages_in_any_order_and_with_anything_behind_the_last_token(
    dtype: torch.dtype, behind: float, paged_batch: Callable[..., Any]
) -> None:
    shape: dict[str, Any] = {"query_lens": [300, 129], "context_lens": [333, 900], "dtype": dtype}
    patterns: list[HeadPattern] = [WINDOW.model_copy(update={"remainder": True})] * 8
    batch = paged_batch(**shape, behind=behind)
    out, indices = sparse_prefill(*batch.arguments, patterns, kernel="native", return_index=True)
    clean = sparse_prefill(*paged_batch(**shape, behind=0.0).arguments, patterns, kernel="native")
    assert torch.equal(out, clean)
    for request, index in enumerate(indices):
        rows, length = batch.rows(request), index.tiling.seq_len
        assert float(index.density().min()) < 0.9
        exact = reference.with_remainder(
            batch.query[rows], batch.keys(request), batch.values(request), index.to_mask(), index.tiling, batch.scale,
            range(8), sampled_positions(length), sample_step(length),
        )  # fmt: skip
        error = float((out[rows].double() - exact).abs().max())
        # Rounded by the kernel, and when the remainder was added; bf16 kernels round weights, too.
        assert error <= 3 * torch.finfo(dtype).eps * float(exact.abs().max()) + 1e-5, error


@needs_native
@pytest.mark.parametrize("heads", [range(8), [0, 1, 5]], ids=str)
@pytest.mark.parametrize(
    "features",
    [{}, {"softcap": 1.5}, {"sinks": torch.linspace(-2, 30, 8)}, {"softcap": 1.5, "sinks": torch.linspace(-2, 9, 8)}],
    ids=lambda features: "+".join(features) or "plain",
)
def test_the_native_kernel_takes_it_as_one_more_key(
    features: dict[str, Any], heads: list[int], paged_batch: Callable[..., Any]
) -> None:
    batch = paged_batch(query_lens=[300], context_lens=[933], dtype=torch.float32)
    inputs = replace(batch.inputs(), **features)
    kernel = choose("native", torch.float32, batch.cache, with_lse=True)
    index = build_index(Tiling.of(933, 1233, batch.cache.block_size, 128), [WINDOW] * 8, kernel.scores(inputs))
    left_out = remainder.of_heads(inputs, index, heads)
    found, merged = (torch.full_like(batch.query, torch.nan) for _ in range(2))
    lse, own_lse = torch.empty(2, 8, 300)
    assert kernel.run_with_remainder is not None
    kernel.run_with_remainder(inputs, index, found, lse, left_out)
    kernel.run(inputs, index, merged, own_lse)
    plain = merged.clone()
    remainder.add(inputs, index, left_out, merged, own_lse)
    torch.testing.assert_close(found, merged, rtol=2e-5, atol=2e-5)
    changed = [head for head in range(8) if not torch.equal(found[:, head], plain[:, head])]
    assert changed == list(heads)
    assert (lse >= own_lse - 1e-5).all()


@needs_native
def test_a_kernel_without_a_log_sum_exp_is_refused(paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(query_lens=[200], context_lens=[300])
    with pytest.raises(ValueError, match=r"'block_table' cannot run: the remainder needs every row's log-sum-exp"):
        sparse_prefill(*batch.arguments, LowRank(remainder=True), kernel="block_table")
    assert choose("auto", torch.bfloat16, batch.cache, with_lse=True).name == "native"


@needs_native
def test_without_patterns_every_head_runs_the_default(
    paged_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = paged_batch(query_lens=[200], context_lens=[300])
    assert default_pattern() == LowRank(rank=64, gamma=0.94, remainder=True, queries=32, noise=0.022)
    assert default_pattern("cuda") == LowRank(gamma=0.94, remainder=True, queries=32, noise=0.022)
    with pytest.raises(ValueError, match="platform must be one of 'cpu', 'cuda', not 'gpu'"):
        default_pattern("gpu")
    found, named = (sparse_prefill(*batch.arguments, *patterns) for patterns in ((), (default_pattern(),)))
    assert torch.equal(found, named)
    # A kernel that cannot add the remainder serves more keys without it.
    found, named = (
        sparse_prefill(*batch.arguments, patterns, kernel="block_table") for patterns in (None, LowRank(gamma=0.96))
    )
    assert torch.equal(found, named)


def test_in_files_it_is_off_unless_it_is_named() -> None:
    old, named = (parse_head_pattern({"kind": "low_rank", **fields}) for fields in ({}, {"remainder": True}))
    assert [pattern.has_remainder for pattern in (old, named, WINDOW, Dense())] == [False, True, False, False]
    assert WINDOW.model_copy(update={"remainder": True}).without_remainder() == WINDOW
    assert isinstance(named, LowRank)
    assert named.without_remainder() == LowRank(gamma=0.975)
    assert [pattern.without_remainder() for pattern in (LowRank(gamma=0.5), Dense())] == [LowRank(gamma=0.5), Dense()]
    with pytest.raises(PatternError, match=r"remainder = 1: must be true or false"):
        parse_head_pattern({"kind": "low_rank", "remainder": 1})
