"""Batches of any shape through the CPU backend and ``sparse_prefill``, compared with float64 attention.

Pages are shuffled. Unused pages and the output are filled with NaN, and slots after a request's last token with large
values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_layer import Layer
from fuzz_inputs import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from layer_inputs import HEADS, assert_right
from paged_inputs import make_batch
from prefill_checks import check

from minference_vllm import reference
from minference_vllm.kernels.block_table.cpu_ops import layout_for
from minference_vllm.kernels.native import library
from minference_vllm.patterns.kinds import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    LowRank,
    PeakThreshold,
    TriShape,
    VerticalSlash,
)
from minference_vllm.prefill.api import sparse_prefill

KERNELS = ["block_table"] if library.unavailable_reason() else ["native", "block_table"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PAGES = [32, 64, 96, 128]
"""Page sizes in tokens that every kernel serves."""
EVERYTHING = 100_000
BORDERS = [*range(3), *(border + beside for border in (16, 32, 64, 128, 256, 512) for beside in (-1, 0, 1))]

budgets = st.one_of(st.integers(0, 300), st.just(EVERYTHING))
shares = st.floats(0.01, 0.99)
full_patterns = st.one_of(
    st.builds(AShape, sink=budgets, local=st.just(EVERYTHING)),
    st.builds(AShape, sink=st.just(EVERYTHING), local=budgets),
    st.builds(TriShape, sink=budgets, local=budgets, last=st.just(EVERYTHING)),
    st.builds(VerticalSlash, vertical=st.just(EVERYTHING), slash=budgets),
    st.builds(VerticalSlash, vertical=budgets, slash=st.just(EVERYTHING)),
    st.builds(BlockSparse, top_k=st.just(EVERYTHING)),
    st.builds(Coverage, gamma=shares, min_budget=st.just(EVERYTHING)),
)
sparse_patterns = st.one_of(
    st.builds(Dense),
    st.builds(AShape, sink=budgets, local=budgets),
    st.builds(TriShape, sink=budgets, local=budgets, last=budgets),
    st.builds(VerticalSlash, vertical=budgets, slash=budgets),
    st.builds(BlockSparse, top_k=st.integers(1, 20)),
    st.builds(Coverage, gamma=shares, min_budget=budgets),
    st.builds(Antidiagonal, stride=st.sampled_from([2, 4, 8, 16]), tau=shares),
    st.builds(PeakThreshold, alpha=shares, sink=budgets, window=budgets),
    st.builds(LowRank, rank=st.sampled_from([16, 32, 64]), gamma=shares, queries=st.sampled_from([0, 16])),
)
lengths = st.one_of(st.integers(1, 400), st.sampled_from(BORDERS[1:]))
requests = st.lists(
    st.tuples(st.one_of(st.just(0), st.integers(0, 600), st.sampled_from(BORDERS)), lengths), min_size=1, max_size=5
)
settings = st.fixed_dictionaries(
    {
        "min_context": st.integers(0, 500),
        "min_chunk": st.integers(1, 150),
        "kernel": st.sampled_from(KERNELS),
        "audit_rows": st.integers(0, 8),
        "audit_share": st.sampled_from([0.0, 1.0]),
    },
    optional={"tile": st.integers(32, 300)},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layer")


def served(folder: Path, patterns: list[Any], **shape: Any) -> Layer:
    """Serve a batch with the backend, and check the output against its index."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        content = [pattern.model_dump() for pattern in patterns]
        layer = Layer(folder, monkeypatch, patterns=content, **shape)
        nobodys = torch.ones(len(layer.cache), dtype=torch.bool)
        for pages, tokens in zip(layer.batch.block_table.long(), layer.batch.seq_lens.tolist(), strict=True):
            nobodys[pages[: -(-tokens // layer.page)]] = False
        layer.cache[nobodys] = torch.nan
        metadata = layer.metadata()
        output = layer.run(layer.impl, metadata)
    planned = [chunk.request for chunk, _ in getattr(metadata, "sparse", ())]
    assert_right(layer, output, planned if layer.impl.sparse_layer is not None else [])
    assert layer.counters.sparse_chunks == len(planned)
    return layer


@examples(25)
@given(
    requests=requests,
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from(PAGES),
    patterns=st.lists(full_patterns, min_size=HEADS, max_size=HEADS),
    settings=settings,
    floor=st.sampled_from([None, 0.99]),
)
def test_all_keys_selected_is_dense_attention(
    folder: Path, requests: Any, dtype: Any, page: int, patterns: Any, settings: Any, floor: float | None
) -> None:
    if floor is not None and settings["audit_rows"]:
        settings = {**settings, "recall_floor": floor}
    layer = served(folder, patterns, requests=requests, dtype=dtype, page=page, settings=settings)
    for index in layer.indices:
        causal = reference.causal_mask(index.tiling.context_len, index.tiling.seq_len)
        assert torch.equal(index.to_mask(), causal.expand(HEADS, -1, -1))
    assert layer.counters.density == 1.0 and not layer.counters.raised


@examples(40)
@given(
    requests=requests,
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from(PAGES),
    patterns=st.lists(sparse_patterns, min_size=HEADS, max_size=HEADS),
    settings=settings,
)
def test_what_is_selected_is_attended(
    folder: Path, requests: Any, dtype: Any, page: int, patterns: Any, settings: Any
) -> None:
    layer = served(folder, patterns, requests=requests, dtype=dtype, page=page, settings=settings)
    for index in layer.indices:
        mask, tiling = index.to_mask(), index.tiling
        assert not (mask & ~reference.causal_mask(tiling.context_len, tiling.seq_len)).any(), "a later key"
        assert mask.diagonal(tiling.context_len, dim1=1, dim2=2).all(), "a row without itself"
        assert int(mask.sum()) == int(index.computed_pairs().sum()), "pairs are counted wrong"
        for head, pattern in enumerate(patterns):
            if pattern.kind == "a_shape":
                assert mask[head][_a_shape(pattern, tiling.context_len, tiling.seq_len)].all()


def _a_shape(pattern: AShape, context_len: int, seq_len: int) -> torch.Tensor:
    """bool ``[rows, S]``: the minimum that each row must attend."""
    causal, keys = reference.causal_mask(context_len, seq_len), torch.arange(seq_len)
    row = torch.arange(context_len, seq_len)[:, None]
    return causal & ((keys < pattern.sink) | (keys > row - pattern.local))


@examples(40)
@given(
    requests=requests,
    dtype=st.sampled_from(DTYPES),
    head_size=st.sampled_from(range(16, 257, 16)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    page=st.sampled_from([16, 48, *PAGES]),
    tile=st.one_of(st.none(), st.integers(1, 300)),
    kernel=st.sampled_from(KERNELS),
    patterns=st.lists(st.one_of(full_patterns, sparse_patterns), min_size=1, max_size=24),
    seed=st.integers(0, 100),
)
def test_sparse_prefill_of_any_shape(
    requests: Any, dtype: Any, head_size: int, kv_heads: int, group: int, page: int, tile: int | None, kernel: str,
    patterns: Any, seed: int,
) -> None:  # fmt: skip
    heads = kv_heads * group
    contexts, news = zip(*requests, strict=True)
    batch = make_batch(news, contexts, heads, kv_heads, head_size, page, dtype, seed)
    layout = layout_for(dtype, page, head_size) if kernel == "block_table" else "rows"
    assume(layout is not None and library.unsupported_cache_reason(dtype, batch.cache) is None)
    per_head = [patterns[head % len(patterns)] for head in range(heads)]
    out = torch.full_like(batch.query, torch.nan)
    found, indices = sparse_prefill(*batch.arguments, per_head, kernel=kernel, tile=tile, out=out, return_index=True)
    assert found is out
    check(batch, out, indices, roundings=2)
