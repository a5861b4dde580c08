"""vLLM's rotary embedding for dual chunk attention, built in a process with our plugin."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from dual_chunk_inputs import rotate, rotations

from minference_vllm.prefill.dual_chunk import ROTATIONS, DualChunk

HEADS, KV_HEADS, DIM, BASE = 4, 2, 32, 10_000.0
GEOMETRY = DualChunk(chunk_size=256, local_size=64)


@pytest.fixture(scope="module")
def rotary() -> torch.nn.Module:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from minference_vllm.plugin import register

    register()
    with set_current_vllm_config(VllmConfig()):
        found = get_rope(
            DIM,
            max_position=1000,
            rope_parameters={"rope_theta": BASE, "rope_type": "default"},
            dtype=torch.float32,
            dual_chunk_attention_config={"chunk_size": 256, "local_size": 64, "sparse_attention_config": {"0": {}}},
        )
    assert isinstance(found, torch.nn.Module)
    return found


@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_five_rotations_of_a_query_and_one_of_a_key(tokens: int, rotary: torch.nn.Module) -> None:
    """A single token keeps its dimension, which the attention layer takes as the number of tokens."""
    positions = torch.arange(tokens) * 3 + 70
    query, key = torch.randn(tokens, HEADS * DIM), torch.randn(tokens, KV_HEADS * DIM)
    turned, turned_key = rotary(positions, query.clone(), key.clone())
    assert turned.shape == (tokens, ROTATIONS * HEADS * DIM) and turned_key.shape == key.shape
    expected = rotations(query.view(tokens, HEADS, DIM), positions, GEOMETRY, BASE)
    torch.testing.assert_close(turned.view(tokens, ROTATIONS, HEADS, DIM).double(), expected, rtol=1e-4, atol=1e-4)
    expected = rotate(key.view(tokens, KV_HEADS, DIM), positions % GEOMETRY.chunk_len, BASE)
    torch.testing.assert_close(turned_key.view(tokens, KV_HEADS, DIM).double(), expected, rtol=1e-4, atol=1e-4)
    assert turned.device.type == "cpu"


def test_registering_twice_changes_nothing(rotary: torch.nn.Module) -> None:
    from vllm.model_executor.custom_op import op_registry_oot

    from minference_vllm.plugin import register

    register()
    assert op_registry_oot["DualChunkRotaryEmbedding"] is type(rotary)


def test_a_process_without_a_model_does_not_import_it() -> None:
    """The import takes seconds, and vLLM loads its plugins in every process."""
    code = """
import sys
from minference_vllm.backend.dual_chunk_rope import MODULE
from minference_vllm.plugin import register
register(), register()
assert MODULE not in sys.modules
import vllm.model_executor.layers.rotary_embedding
from vllm.model_executor.custom_op import op_registry_oot
assert op_registry_oot["DualChunkRotaryEmbedding"].__name__ == "OnAnyDevice"
register()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
