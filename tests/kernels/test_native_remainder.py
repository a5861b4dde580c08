"""The remainder by our CPU kernels against torch's, and the resulting attention against its float64 definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_inputs import LAYOUTS, in_layout, small_batch
from paged_inputs import PagedBatch

from minference_vllm import reference
from minference_vllm.core import remainder as core
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import Layout
from minference_vllm.core.remainder import Remainder, sample_step, sampled_positions
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose
from minference_vllm.kernels.native import remainder as native
from minference_vllm.patterns.kinds import AShape, BlockSparse, HeadPattern, VerticalSlash
from minference_vllm.prefill import remainder
from minference_vllm.selection.build import build_index

PATTERNS: list[HeadPattern] = [
    VerticalSlash(vertical=60, slash=50), BlockSparse(top_k=1), AShape(sink=16, local=64),
    VerticalSlash(vertical=150, slash=0),
]  # fmt: skip
SHAPES = [(8, 2, 64), (7, 1, 80), (4, 4, 128)]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have steps too."""
    monkeypatch.setattr(core, "SAMPLED_KEYS", 150)


def index_of(inputs: Inputs, tile: int = 64, unlisted: float = 0.0) -> SparseIndex:
    """An index with each pattern; the share ``unlisted`` of the tiles attends everything, without a list."""
    chunk, size = inputs.chunk, inputs.cache.block_size
    tiling = Tiling.of(chunk.context_len, chunk.seq_len, size, tile, window=inputs.window)
    scores = choose("native", inputs.query.dtype, inputs.cache).scores(inputs)
    index = build_index(tiling, (PATTERNS * 2)[: inputs.num_heads], scores)
    without = torch.rand(index.num_blocks.shape, generator=torch.Generator().manual_seed(0)) < unlisted
    return replace(
        index,
        blocks=index.blocks.masked_fill(without[..., None], -1),
        columns=index.columns.masked_fill(without[..., None], -1),
        num_columns=index.num_columns.masked_fill(without, 0),
    )


def check(found: Remainder, right: Remainder) -> None:
    """Equal up to float32 sums; no remainder at all where no key is left out."""
    there = right.bias > -torch.inf
    assert torch.equal(found.bias > -torch.inf, there)
    for ours, theirs in zip(found, right, strict=True):
        assert ours.dtype == torch.float32 and ours.is_contiguous() and ours.shape == theirs.shape
        if there.any():
            assert float((ours - theirs)[there].abs().max()) <= 5e-6 * float(theirs[there].abs().max())
    assert not torch.cat([found.key, found.value], 2)[~there].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("chunk", "context"), [(301, 210), (128, 640), (37, 1000), (300, 0), (1, 417)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), SHAPES)
def test_it_is_torchs(
    layout: Layout, chunk: int, context: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> None:
    batch = small_batch(chunk, context, heads, kv_heads, head_size, dtype)
    inputs = batch.inputs(cache=in_layout(batch, layout))
    index = index_of(inputs, unlisted=0.3)
    for wanted in (range(heads), [1, heads - 1]):
        check(native.of_heads(inputs, index, wanted), remainder.of_heads(inputs, index, wanted))


def exact(inputs: Inputs, batch: PagedBatch, index: SparseIndex, heads: Sequence[int]) -> torch.Tensor:
    length = inputs.chunk.seq_len
    return reference.with_remainder(
        batch.query, batch.keys(0), batch.values(0), index.to_mask(), index.tiling, inputs.scale, heads,
        sampled_positions(length), sample_step(length), inputs.softcap,
    )  # fmt: skip


def with_found(inputs: Inputs, batch: PagedBatch, index: SparseIndex, found: Remainder) -> torch.Tensor:
    """Attention in float64 under the index, with a remainder, which is added in float32."""
    heads = inputs.num_heads
    keys, values = (reference.repeat_heads(part, heads) for part in (batch.keys(0), batch.values(0)))
    scores = batch.query.double().transpose(0, 1) @ keys.transpose(1, 2) * inputs.scale
    scores = reference.capped(scores, inputs.softcap).masked_fill(~index.to_mask(), -torch.inf)
    out = (scores.softmax(-1) @ values).transpose(0, 1).float().contiguous()
    as_floats = replace(inputs, query=inputs.query.float())
    remainder.add(as_floats, index, found, out, scores.logsumexp(-1).float())
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", [{}, {"softcap": 1.5}, {"window": 200}, {"window": 333, "softcap": 20.0}], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), SHAPES)
def test_it_is_what_its_definition_says(
    layout: Layout, features: dict[str, Any], heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> None:
    """With a window, keys that no row sees may lie in another request's pages, including NaN."""
    batch, wanted = small_batch(301, 710, heads, kv_heads, head_size, dtype), [0, heads - 2, heads - 1]
    inputs = replace(batch.inputs(cache=in_layout(batch, layout)), **features)
    index = index_of(inputs)
    if inputs.window:
        gone = torch.arange(710 - inputs.window + 1)
        table, parts = batch.block_table[0].long(), [batch.key_cache.clone(), batch.value_cache.clone()]
        for part in parts:
            part[table[gone // 32], gone % 32] = torch.nan
        inputs = replace(inputs, cache=in_layout(replace(batch, key_cache=parts[0], value_cache=parts[1]), layout))
    found = native.of_heads(inputs, index, wanted)
    assert (found.bias[wanted] > -torch.inf).any(1).all()
    check(found, remainder.of_heads(inputs, index, wanted))
    torch.testing.assert_close(
        with_found(inputs, batch, index, found).double(), exact(inputs, batch, index, wanted), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("tile", [32, 64, 128])
def test_every_key_sampled_and_tiles_of_any_size(
    tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "SAMPLED_KEYS", 2048)
    batch = small_batch(301, 710, 8, 2, 64, dtype)
    inputs = batch.inputs(cache=in_layout(batch, "transposed"))
    index = index_of(inputs, tile, unlisted=0.2)
    assert sample_step(1011) == 1
    check(native.of_heads(inputs, index, range(8)), remainder.of_heads(inputs, index, range(8)))


def test_lists_may_be_those_of_several_heads_and_in_any_order(dtype: torch.dtype) -> None:
    batch = small_batch(301, 710, 8, 2, 64, dtype)
    inputs = batch.inputs()
    index = index_of(inputs, unlisted=0.2)
    turned = torch.arange(index.columns.shape[2]).expand_as(index.columns)
    turned = torch.where(turned < index.num_columns[..., None], index.num_columns[..., None] - 1 - turned, turned)
    index = SparseIndex(
        index.tiling, index.blocks[::4].contiguous(), index.num_blocks[::4].contiguous(),
        index.columns.gather(2, turned)[::4].contiguous(), index.num_columns[::4].contiguous(), heads_per_list=4,
    )  # fmt: skip
    assert index.num_heads == 8 and index.num_columns.any()
    check(native.of_heads(inputs, index, range(8)), remainder.of_heads(inputs, index, range(8)))


@pytest.mark.parametrize("wanted", [[], range(8)], ids=str)
def test_where_nothing_is_left_out(wanted: Sequence[int], dtype: torch.dtype) -> None:
    """No head uses the remainder, or every tile attends everything."""
    batch = small_batch(301, 710, 8, 2, 64, dtype)
    inputs = batch.inputs()
    found = native.of_heads(inputs, index_of(inputs, unlisted=1.0 if wanted else 0.0), wanted)
    assert (found.bias == -torch.inf).all()
    assert not found.key.any() and not found.value.any()


def test_threads_do_not_change_a_bit(
    dtype: torch.dtype, paged_batch: Callable[..., PagedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "SAMPLED_KEYS", 2048)  # several tasks of each KV head
    batch = paged_batch([301], [3700], dtype=dtype)
    inputs = batch.inputs()
    index = index_of(inputs, 128)

    def of(threads: int) -> Remainder:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return native.of_heads(inputs, index, range(8))

    alone = of(1)
    check(alone, remainder.of_heads(inputs, index, range(8)))
    for threads in (2, 3, 5):
        assert all(torch.equal(*parts) for parts in zip(of(threads), alone, strict=True))


def test_large_scores(dtype: torch.dtype) -> None:
    """Few keys have any weight, and float32 computes it as accurately as the score."""
    batch = small_batch(301, 710, 8, 2, 64, dtype)
    inputs = replace(batch.inputs(), scale=40.0)
    index = index_of(inputs)
    means = remainder.by_tile(inputs.query.double(), index.tiling).sum(1) / index.tiling.rows[:, None, None]
    products = means.transpose(0, 1) @ reference.repeat_heads(batch.keys(0), 8).transpose(1, 2) * inputs.scale
    budget = 2 * torch.finfo(torch.float32).eps * float(products.abs().max())
    assert 1e-5 < budget < 1e-4
    found, right = (of(inputs, index, range(8)) for of in (native.of_heads, remainder.of_heads))
    for ours, theirs in zip(found[:2], right[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=budget * float(theirs.abs().max()))
    # The bias and the key's score may have errors much larger than the key's; their sum is the left-out weight.
    left_out = [bias + (means.transpose(0, 1) * key).sum(2) * inputs.scale for key, _, bias in (found, right)]
    torch.testing.assert_close(*left_out, rtol=0, atol=2 * budget)  # both round two scores each


def test_the_kernel_brings_it(dtype: torch.dtype) -> None:
    assert choose("native", dtype, small_batch(301, 710, 8, 2, 64, dtype).cache).remainder is native.of_heads
