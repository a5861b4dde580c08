"""The density that ``plot`` draws for a model equals the engine's for the same prompt and patterns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minference_vllm.offline.capture import capture_layers, chunk_indices, measure, sparse_chunks
from minference_vllm.patterns.discovery import load_pattern_file
from minference_vllm.settings import Settings

CHUNK, MIN_CONTEXT = 1024, 512


@pytest.mark.parametrize("name", ["vertical_slash(100, 300)", "block_sparse(6)"])
def test_plot_draws_what_an_engine_counts(
    name: str, llama: Path, run_engine: Callable[..., Any], prompt: Callable[..., list[int]]
) -> None:
    ids, settings = prompt(3500, 1), Settings(min_context=MIN_CONTEXT)
    drawn = []
    for number, layer in enumerate(capture_layers(str(llama), torch.tensor([ids]))):
        patterns = load_pattern_file(name).for_layer(number, len(layer.query))
        density, _ = measure(layer, sparse_chunks(chunk_indices(layer, patterns, CHUNK, settings), settings))
        drawn.append(float(density.mean()))
    options = {
        "enforce_eager": True, "enable_prefix_caching": False, "max_num_batched_tokens": CHUNK, "dtype": "float32",
        "attention_backend": "minference", "additional_config": {"minference": {"min_context": MIN_CONTEXT}},
    }  # fmt: skip
    changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # patterns are switched in this process
    answer = run_engine(llama, [{"prompts": [ids], "patterns": name}], options, **changes)
    counted = answer.counted[0]["density"]
    assert 0 < counted < 0.95
    assert sum(drawn) / len(drawn) == pytest.approx(counted, rel=0.005)
