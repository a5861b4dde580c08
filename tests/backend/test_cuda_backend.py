"""The backends on top of vLLM's FlashAttention and Triton backends, run on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_layer import DTYPE, LAYOUTS, Layer, Parent, only
from layer_inputs import DIM, HEADS, KV_HEADS, MIXED, PAGE, SPARSE, assert_right, record_once

from minference_vllm.core.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT, Chunk


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_batch(layout: Callable[..., torch.Tensor], make_gpu_layer: Callable[..., Layer]) -> None:
    layer = make_gpu_layer(MIXED, layout=layout)
    metadata = layer.builder.build(0, layer.common())
    assert [chunk.request for chunk, _ in metadata.sparse] == list(SPARSE)
    output = layer.run(metadata)
    assert len(layer.indices) == len(SPARSE)
    assert_right(layer, output, SPARSE)
    assert [call.seq_lens.tolist() for call in layer.dense_calls] == [[501], [701, 50], [120, 640]]
    assert all(float(index.density().mean()) < 0.95 for index in layer.indices)
    counters = layer.impl.runtime.counters
    assert counters.dense_chunks == {BELOW_MIN_CHUNK: 2, BELOW_MIN_CONTEXT: 1}
    assert counters.computed_pairs == sum(float(index.to_mask().sum()) for index in layer.indices)


def test_a_layer_that_shares_another_ones_cache(make_gpu_layer: Callable[..., Layer]) -> None:
    """It is called without keys and values, and so is the parent for requests between sparse chunks."""
    layer = make_gpu_layer(MIXED)
    metadata = layer.builder.build(0, layer.common())
    assert metadata.sparse and metadata.dense_runs
    output = layer.run(metadata, shares_cache=True)
    assert_right(layer, output, SPARSE)
    assert layer.new_rows == [(None, None)] * len(metadata.dense_runs)
    layer.run(metadata)
    lengths = [rows.stop - rows.start for _, rows, _ in metadata.dense_runs]
    assert [(len(key), len(value)) for key, value in layer.new_rows[-len(lengths) :]] == [(n, n) for n in lengths]


@pytest.mark.parametrize("requests", [[(500, 1), (9, 1), (700, 1)], [(0, 50)], [(0, 299)], [(700, 99), (3, 1)]])
def test_batches_without_a_sparse_chunk_take_the_parents_path(
    requests: list[tuple[int, int]], parent: Parent, make_gpu_layer: Callable[..., Layer]
) -> None:
    layer = make_gpu_layer(requests)
    metadata = layer.builder.build(0, layer.common())
    assert type(metadata) is parent.metadata
    layer.run(metadata)
    assert layer.dense_calls == [metadata] and not layer.indices


def test_decodes_are_never_sparse_whatever_the_setting(make_gpu_layer: Callable[..., Layer]) -> None:
    """Their batches replay a CUDA graph that captured the parent's path."""
    layer = make_gpu_layer([(700, 21), (900, 21)], settings={"min_chunk": 1}, speculative=20)
    assert not getattr(layer.builder.build(0, layer.common()), "sparse", ())
    layer = make_gpu_layer([(700, 22), (900, 21)], settings={"min_chunk": 1}, speculative=20)
    assert [chunk.request for chunk, _ in layer.builder.build(0, layer.common()).sparse] == [0]


def test_whole_cuda_graphs_for_uniform_batches_alone(
    monkeypatch: pytest.MonkeyPatch, parent: Parent, make_gpu_layer: Callable[..., Layer]
) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    layer = make_gpu_layer([(0, 400)])
    for theirs, ours in (("ALWAYS", "UNIFORM_BATCH"), ("UNIFORM_BATCH", "UNIFORM_BATCH"), ("NEVER", "NEVER")):
        monkeypatch.setattr(parent.builder, "_cudagraph_support", AttentionCGSupport[theirs])
        assert layer.builder.get_cudagraph_support(layer.config, layer.spec) is AttentionCGSupport[ours]


def test_kernels_are_compiled_with_the_builder_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Layer]
) -> None:
    from minference_vllm.backend import gpu

    calls: list[tuple[Any, ...]] = []
    chosen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu, "warm_up", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(gpu, "choose_kernels", lambda *arguments: chosen.append((*arguments, len(calls))))
    layer = make_gpu_layer([(0, 400)])
    assert not calls and not chosen
    dense = SimpleNamespace(layer_name="somebody else's", impl=SimpleNamespace(dense_only=True))
    layer.make_builder(layer.layer, dense, device="cuda")
    assert layer.impl.sparse_layer.kernel.name == "triton"
    assert calls == [([layer.layer], layer.spec, DTYPE, layer.impl.runtime.settings, torch.device("cuda"))]
    assert chosen == [([layer.layer], layer.spec, layer.config, torch.device("cuda"), 0)], "before they are compiled"


@only("FlashAttention")
@pytest.mark.parametrize(
    ("kernel", "kernels"),
    [
        ("auto", "our Triton kernels (kernel 'triton')"),
        ("triton", "our Triton kernels (kernel 'triton')"),
        ("block_table", "vLLM's FlashAttention kernel (kernel 'block_table')"),
    ],
)
def test_the_kernels_that_run_are_logged(
    kernel: str, kernels: str, monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Layer]
) -> None:
    from minference_vllm.backend import gpu

    for step in ("warm_up", "choose_kernels"):
        monkeypatch.setattr(gpu, step, lambda *arguments: None)
    lines = record_once(monkeypatch)
    make_gpu_layer([(0, 400)], settings={"kernel": kernel}, device="cuda")
    (line,) = [line for line in lines if "patterns from" in line]
    assert f"; attention by {kernels}; sparse from " in line


def test_the_page_size_of_the_builder_decides(make_gpu_layer: Callable[..., Layer]) -> None:
    """Not the one in vLLM's configuration when layers are created, since vLLM may change it later."""
    kinds = [{"kind": "antidiagonal", "stride": PAGE, "tau": 0.4}] * HEADS
    layer = make_gpu_layer(MIXED, patterns=kinds, page_before=16)
    assert_right(layer, layer.run(layer.builder.build(0, layer.common())), SPARSE)
    with pytest.raises(ValueError, match=f"stride 48 must divide the page size.* {PAGE}"):
        make_gpu_layer(MIXED, patterns=[{"kind": "antidiagonal", "stride": 48}] * HEADS, page_before=96)


@only("FlashAttention")
def test_runs_do_not_share_the_parents_schedule(
    monkeypatch: pytest.MonkeyPatch, parent: Parent, make_gpu_layer: Callable[..., Layer]
) -> None:
    """FlashAttention-3's ahead-of-time schedule is in one buffer per builder: runs must not overwrite the batch's."""
    layer = make_gpu_layer(MIXED)
    layer.builder.aot_schedule, layer.builder.scheduler_metadata = True, torch.zeros(64, dtype=torch.int32)
    layer.builder.aot_sliding_window = (-1, -1)
    schedules = iter(range(1, 9))
    monkeypatch.setattr(
        parent.theirs,
        "get_scheduler_metadata",
        lambda **arguments: torch.full((4,), next(schedules), dtype=torch.int32),
        raising=False,
    )
    metadata = layer.builder.build(0, layer.common())
    assert metadata.scheduler_metadata.tolist() == [1] * 4
    assert all(run.scheduler_metadata is None for _, _, run in metadata.dense_runs)


@only("FlashAttention")
def test_the_block_table_of_another_group_of_layers(make_gpu_layer: Callable[..., Layer]) -> None:
    layer = make_gpu_layer(MIXED)
    metadata = layer.builder.build(0, layer.common())
    table, slots = layer.batch.block_table + 7, torch.arange(int(layer.batch.query_start_loc[-1]))
    other = layer.builder.update_block_table(metadata, table, slots)
    assert torch.equal(other.block_table, table) and torch.equal(other.slot_mapping, slots)
    for chunk, pages in other.sparse:
        assert torch.equal(pages, table[chunk.request].long())
    for (first, last), rows, run in other.dense_runs:
        assert torch.equal(run.block_table, table[first:last]) and torch.equal(run.slot_mapping, slots[rows])
    assert torch.equal(metadata.block_table, layer.batch.block_table), "the first group's stays"
    plain = make_gpu_layer([(0, 50)])
    short = plain.builder.build(0, plain.common())
    assert torch.equal(plain.builder.update_block_table(short, table, slots).block_table, table)


def test_fp8_caches_come_with_their_scales(
    monkeypatch: pytest.MonkeyPatch, make_gpu_layer: Callable[..., Layer]
) -> None:
    layer = make_gpu_layer([(0, 400)])
    monkeypatch.setattr(layer.impl, "kv_cache_dtype", "fp8")
    scales = {"_q_scale_float": 0.5, "_k_scale_float": 0.25, "_v_scale_float": 2.0}
    attention = SimpleNamespace(layer_name="model.layers.1.self_attn.attn", _k_scale=torch.tensor(1.0), **scales)
    memory = torch.zeros(5, KV_HEADS, PAGE, 2 * DIM, dtype=torch.uint8)
    cache = layer.impl.paged_cache(attention, memory, DTYPE)
    assert cache.key.dtype == cache.value.dtype == torch.float8_e4m3fn
    assert (cache.key_scale, cache.value_scale) == (0.25, 2.0)
    query, pages, chunk = torch.zeros(1, HEADS, DIM, dtype=DTYPE), torch.arange(5), Chunk(0, 0, 4, 5)
    assert layer.impl.inputs(attention, query, cache, pages, chunk).scale == layer.impl.scale
    quantised = query.to(torch.float8_e4m3fn)
    assert layer.impl.inputs(attention, quantised, cache, pages, chunk).scale == layer.impl.scale / 2
    layer.impl.prepare(attention, layer.spec, DTYPE, torch.device("cpu"))
    assert layer.impl.sparse_layer is not None
    attention._k_scale = torch.ones(KV_HEADS)
    layer.impl.prepare(attention, layer.spec, DTYPE, torch.device("cpu"))
    assert layer.impl.sparse_layer is None, "one scale per head is not ours"
