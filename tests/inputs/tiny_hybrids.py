"""Models whose attention layers stand between layers without keys: linear attention, Mamba2, short convolutions.

vLLM makes the pages of their attention layers as large as the state that the other layers keep per request.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_decoders import WITHOUT_HEAD_DIM
from tiny_models import SIZES, random_model, save

TURNS = ["linear_attention", "full_attention"] * 2
GATED_DELTA_NETS: dict[str, Any] = {
    **SIZES,
    "layer_types": TURNS,
    "head_dim": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
"""Heads of 256, as Qwen's have; the other sizes lead to pages of 640 tokens."""


def qwen3_next(folder: Path) -> Path:
    """Gated delta nets and attention in turns, two experts of four per token."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    experts |= {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    return save(random_model(Qwen3NextForCausalLM, Qwen3NextConfig(**GATED_DELTA_NETS, **experts)), folder)


def qwen3_5(folder: Path) -> Path:
    """The same without experts."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return save(random_model(Qwen3_5ForCausalLM, Qwen3_5TextConfig(**GATED_DELTA_NETS)), folder)


def granite_hybrid(folder: Path) -> Path:
    """Granite 4.0 H: Mamba2 and attention in turns, two experts of four per token."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 128}
    mamba = {"mamba_n_heads": 8, "mamba_d_state": 64}
    sizes = {**WITHOUT_HEAD_DIM, "num_attention_heads": 8, "layer_types": TURNS, "attention_multiplier": 0.125}
    config = GraniteMoeHybridConfig(**sizes, **experts, **mamba)
    return save(random_model(GraniteMoeHybridForCausalLM, config), folder)


def lfm2(folder: Path) -> Path:
    """Short convolutions and attention in turns."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    # Fields of real checkpoints that vLLM reads and transformers does not know.
    shapes = {"conv_dim": 256, "block_dim": 256, "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
    config = Lfm2Config(**WITHOUT_HEAD_DIM, layer_types=["conv", "full_attention"] * 2, **shapes)
    return save(random_model(Lfm2ForCausalLM, config), folder)
