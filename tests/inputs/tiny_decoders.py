"""Models of attention and feed-forward layers only, with the variations of current families."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import SIZES, VOCABULARY, WINDOWED, random_model, save

WITHOUT_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"num_attention_heads": 4}
"""For families whose head size follows from the number of heads."""
PER_LAYER_INPUTS = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32}
SHARING = {"num_hidden_layers": 6, "layer_types": [*WINDOWED, *WINDOWED[:2]], "num_kv_shared_layers": 2}
"""The last two layers read the caches of the two before."""
NOT_SCALED = 1.0
"""Sharpening factor for families that do not divide scores by the square root of the head size."""


def gemma2(folder: Path, window: int) -> Path:
    """Soft caps on all logits, and a sliding window in every second layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config = Gemma2Config(**SIZES, **caps, layer_types=WINDOWED, sliding_window=window, query_pre_attn_scalar=64)
    return save(random_model(Gemma2ForCausalLM, config), folder)


def gemma3(folder: Path, window: int) -> Path:
    """Queries and keys with norms of their own, and a sliding window in every second layer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(**SIZES, layer_types=WINDOWED, sliding_window=window, query_pre_attn_scalar=64)
    return save(random_model(Gemma3ForCausalLM, config), folder)


def gemma3n(folder: Path, window: int) -> Path:
    """Two streams of hidden states, and layers that share caches."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    streams = {"altup_num_inputs": 2, "laurel_rank": 16, "activation_sparsity_pattern": [0.0] * 6}
    config = Gemma3nTextConfig(**SIZES | SHARING, **PER_LAYER_INPUTS, **streams, sliding_window=window)
    model = random_model(Gemma3nForCausalLM, config, NOT_SCALED)
    for layer in model.model.layers:
        layer.altup.correct_output_scale.data.fill_(1.0)
    return save(model, folder)


def gemma4(folder: Path, window: int) -> Path:
    """Heads of 256 in layers with a window and of 512 in the others, and layers that share caches."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512}
    config = Gemma4TextConfig(**SIZES | SHARING | heads, **PER_LAYER_INPUTS, sliding_window=window)
    return save(random_model(Gemma4ForCausalLM, config, NOT_SCALED), folder)


def glm4(folder: Path) -> Path:
    """Half of every head rotated, norms after attention and after feed-forward layers."""
    from transformers import Glm4Config, Glm4ForCausalLM

    return save(random_model(Glm4ForCausalLM, Glm4Config(**SIZES)), folder)


def gpt_oss(folder: Path, window: int) -> Path:
    """Attention sinks, two experts of four per token, and a sliding window in every second layer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(**SIZES, **experts, layer_types=WINDOWED, sliding_window=window)
    model = random_model(GptOssForCausalLM, config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=4.0)
        layer.self_attn.o_proj.weight.data.mul_(0.3)
        layer.mlp.experts.down_proj.data.mul_(0.3)
    return save(model, folder)


def llama4(folder: Path, chunk: int) -> Path:
    """Attention within chunks of the sequence in all layers but the last, and one expert of four in every second."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    experts = {"num_local_experts": 4, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2}
    config = Llama4TextConfig(**SIZES, **experts, attention_chunk_size=chunk)
    return save(random_model(Llama4ForCausalLM, config), folder)


def mistral(folder: Path, window: int) -> Path:
    """A sliding window in all layers, without a list that says so."""
    from transformers import MistralConfig, MistralForCausalLM

    return save(random_model(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=window)), folder)


def phi3(folder: Path, window: int) -> Path:
    """Phi-3 mini: heads of 96, and a sliding window in all layers."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**WITHOUT_HEAD_DIM | {"hidden_size": 384}, sliding_window=window)
    return save(random_model(Phi3ForCausalLM, config), folder)


def phi4(folder: Path) -> Path:
    """Phi-4 mini: Phi-3 without a window, with three quarters of every head rotated."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return save(random_model(Phi3ForCausalLM, Phi3Config(**WITHOUT_HEAD_DIM, partial_rotary_factor=0.75)), folder)


def qwen3(folder: Path) -> Path:
    """Queries and keys with norms of their own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return save(random_model(Qwen3ForCausalLM, Qwen3Config(**SIZES)), folder)
