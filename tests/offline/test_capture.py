"""Captured layers: capturing does not change the model, and the measurements match its attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_decoders
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from minference_vllm.backend.counters import Counters
from minference_vllm.offline.capture import (
    Layer,
    capture_layers,
    chunk_indices,
    measure,
    sparse_chunks,
    visit_layers,
)
from minference_vllm.offline.plot import head_map
from minference_vllm.patterns.kinds import AShape, Dense, HeadPattern, VerticalSlash
from minference_vllm.settings import Settings

LENGTH, HEADS, KV_HEADS, DIM = 700, 4, 2, 16
PATTERNS: list[HeadPattern] = [AShape(sink=128, local=130), VerticalSlash(vertical=20, slash=128), Dense(), AShape()]


@pytest.fixture(scope="module", params=[None, 64], ids=["full", "windowed"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=100,
        hidden_size=HEADS * DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        sliding_window=request.param,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("model")
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(100, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def test_capturing_leaves_the_model_as_it_is(model: Path, ids: torch.Tensor) -> None:
    """The values of a layer depend on the attention of those before it, windows included."""
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    expected: list[torch.Tensor] = []
    for layer in plain.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: expected.append(output[0]))
    with torch.inference_mode():
        plain(ids, use_cache=False)
    numbers: list[int] = []
    layers: list[Layer] = []

    def visit(number: int, layer: Layer) -> None:
        numbers.append(number)
        layers.append(layer)

    visit_layers(str(model), ids, visit)
    assert numbers == [0, 1, 2]
    for layer, values in zip(layers, expected, strict=True):
        assert layer.query.shape == (HEADS, LENGTH, DIM) and layer.keys.shape == (KV_HEADS, LENGTH, DIM)
        assert layer.scale == DIM**-0.5
        torch.testing.assert_close(
            layer.values, values.view(LENGTH, KV_HEADS, DIM).transpose(0, 1), rtol=1e-3, atol=1e-3
        )
    for first, second in zip(capture_layers(str(model), ids), layers, strict=True):
        assert torch.equal(first.query, second.query)


def test_soft_caps_and_windows_are_captured(tmp_path: Path) -> None:
    layers = capture_layers(
        str(tiny_decoders.gemma2(tmp_path / "gemma2", window=300)), torch.arange(LENGTH)[None] % 512
    )
    assert [(layer.softcap, layer.window) for layer in layers] == [(50.0, 300), (50.0, 0)] * 2


def random_layer() -> Layer:
    generator = torch.Generator().manual_seed(2)
    query, keys, values = (
        torch.randn(heads, LENGTH, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return Layer(2 * query, keys, values, DIM**-0.5)


def test_keys_of_a_query_head() -> None:
    layer = random_layer()
    assert [torch.equal(layer.keys_of(head), layer.keys[head // 2]) for head in range(HEADS)] == [True] * HEADS


@pytest.mark.parametrize("changes", [{}, {"softcap": 1.0}, {"window": 330}], ids=["plain", "soft cap", "window"])
def test_figures_are_those_of_the_whole_attention(changes: dict[str, Any]) -> None:
    layer = random_layer()._replace(**changes)
    indices = chunk_indices(layer, PATTERNS, 300, Settings(min_context=0, min_chunk=1))
    assert [(index.tiling.context_len, index.tiling.seq_len) for index in indices] == [(0, 300), (300, 600), (600, 700)]
    density, recall = measure(layer, indices, rows=LENGTH)
    for head in range(HEADS):
        picture = head_map(layer.query[head], layer.keys_of(head), indices, head, layer.scale, softcap=layer.softcap)
        assert float(density[head]) == pytest.approx(picture.density)
        assert float(recall[head]) == pytest.approx(picture.recall, abs=1e-5)
    assert density[0] < 0.96 and recall[0] < 0.97 and density[2] == 1 and recall[2] == pytest.approx(1)


def test_chunks_that_the_backend_leaves_to_vllm_are_dense() -> None:
    layer = random_layer()
    indices = chunk_indices(layer, PATTERNS, 300, Settings(min_context=400, min_chunk=150))
    densities = [float(index.density()[0]) for index in indices]
    assert densities[0] == densities[2] == 1 and densities[1] < 1


def test_density_and_recall_of_the_sparse_chunks_are_those_of_a_server() -> None:
    layer, settings = random_layer(), Settings(min_context=400, min_chunk=150)
    indices = chunk_indices(layer, PATTERNS, 300, settings)
    (served,) = sparse_chunks(indices, settings)
    assert served is indices[1]
    counters = Counters()
    counters.count_layer(served.computed_pairs().sum(), served.num_heads * served.dense_pairs())
    density, recall = measure(layer, [served], rows=LENGTH)
    assert float(density.mean()) == pytest.approx(counters.density)
    _, of_all = measure(layer, indices, rows=LENGTH)
    torch.testing.assert_close(1 - of_all, (1 - recall) * 300 / LENGTH, rtol=1e-4, atol=1e-6)
