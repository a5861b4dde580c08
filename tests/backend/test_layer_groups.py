"""Several KV-cache groups of one model: each has its own builder and sees every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_layer import Layer
from layer_inputs import MIN_CONTEXT, MIXED, PAGE, make_known, record_once

from minference_vllm.core.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT

CHUNK = 8 * PAGE
"""Chunk size, in tokens, of Llama 4's chunked local attention."""


def chunked(layer: Layer, number: int, size: int) -> Any:
    """A layer with chunked local attention, as vLLM creates it."""
    made = layer.make_layer(number, {})
    made.attention_chunk_size = size
    return made


def chunked_builder(layer: Layer, chunked_layer: Any, ours: bool = True) -> Any:
    """vLLM's builder for such a layer, on top of our backend or of vLLM's own."""
    from vllm.model_executor.layers.attention import chunked_local_attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from minference_vllm.backend.cpu import MInferenceCPUBackend

    names = make_known(layer.monkeypatch, [chunked_layer])
    backend = chunked_local_attention.create_chunked_local_attention_backend(
        MInferenceCPUBackend if ours else CPUAttentionBackend, chunked_layer.attention_chunk_size
    )
    builder = backend.get_builder_cls()(layer.spec, names, layer.config, torch.device("cpu"))
    chunked_layer.isa = builder.isa
    return builder


def test_a_batch_is_counted_once_however_many_groups_see_it(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED)
    layer.metadata()
    layer.builder = layer.make_builder(layer.make_layer(0, {}))
    assert layer.metadata().sparse
    counters = layer.counters
    assert (counters.sparse_chunks, counters.sparse_tokens) == (3, 400 + 150 + 300)
    assert counters.dense_chunks == {BELOW_MIN_CHUNK: 2, BELOW_MIN_CONTEXT: 1}


def test_a_group_made_anew_counts_still(make_cpu_layer: Callable[..., Layer]) -> None:
    """vLLM recreates builders, and has several per group where it splits batches into micro-batches."""
    layer = make_cpu_layer(MIXED)
    layer.builder = layer.make_builder(layer.layer)
    layer.metadata()
    assert layer.counters.sparse_chunks == 3


def test_a_group_that_sees_pieces_of_chunks_counts_only_where_no_other_does(
    make_cpu_layer: Callable[..., Layer],
) -> None:
    layer = make_cpu_layer([(0, 2 * CHUNK)])
    whole, pieces = layer.builder, chunked_builder(layer, chunked(layer, 0, CHUNK))
    for builder in (pieces, whole):
        layer.builder = builder
        assert len(layer.metadata().sparse) == (2 if builder is pieces else 1)
    assert (layer.counters.sparse_chunks, layer.counters.sparse_tokens) == (1, 2 * CHUNK)
    del layer.impl.runtime.sparse_groups[whole.group]
    layer.builder = pieces
    layer.metadata()
    assert layer.counters.sparse_chunks == 1 + 2


def test_layers_that_attend_within_chunks_run_sparsely(make_cpu_layer: Callable[..., Layer]) -> None:
    """A decode, a prompt of several chunks, and one that begins inside a chunk. The layer's patterns (the file's
    default) select all keys here, so the output equals that of vLLM's own backend."""
    layer = make_cpu_layer([(700, 1), (0, 2 * CHUNK + 130), (CHUNK // 2, CHUNK)], dtype=torch.float32)
    layer.builder = chunked_builder(layer, chunked(layer, 0, CHUNK), ours=False)
    expected = layer.run(layer.parent, layer.metadata())
    ours = chunked(layer, 0, CHUNK)
    layer.builder = chunked_builder(layer, ours)
    metadata = layer.metadata()
    assert [chunk.seq_len for chunk, _ in metadata.sparse] == [CHUNK] * 3
    torch.testing.assert_close(layer.run(ours.impl, metadata), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [MIN_CONTEXT - 1, MIN_CONTEXT])
def test_short_chunks_of_the_sequence_keep_a_layer_dense(
    size: int, monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]
) -> None:
    layer = make_cpu_layer([(0, CHUNK)])
    lines = record_once(monkeypatch)
    builder = layer.make_builder(chunked(layer, 0, size))
    line = f"minference: some layers run densely: attention within chunks of {size} tokens, below min_context"
    short = size < MIN_CONTEXT
    assert builder.dense_only == short
    assert [found for found in lines if "run densely:" in found] == [line] * short
