"""Models of a few small layers with random weights, and a tokenizer whose words are ``w0`` ... ``w511``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
"""Weights large enough that attention is peaked and that the best token leads clearly."""


def save(model: Any, folder: Path) -> Path:
    """A model of transformers in bfloat16, and the tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.bfloat16().save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def gemma2(folder: Path, window: int) -> Path:
    """Soft caps on all logits, and a sliding window in every second layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **caps, sliding_window=window, query_pre_attn_scalar=64))
    common = _alike(model)
    for layer in model.model.layers:
        # What a layer adds must outweigh the token itself, whose embedding is also what it is recognised by.
        layer.post_attention_layernorm.weight.data.fill_(3.0)
        layer.post_feedforward_layernorm.weight.data.fill_(3.0)
        _without(layer.self_attn.v_proj.weight.data, common)
    return save(model, folder)


def gpt_oss(folder: Path, window: int) -> Path:
    """Attention sinks, two experts of four per token, and a sliding window in every second layer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, sliding_window=window, num_local_experts=4, num_experts_per_tok=2))
    common = _alike(model)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=4.0)
        layer.self_attn.o_proj.weight.data.mul_(0.3)
        layer.mlp.experts.down_proj.data.mul_(0.3)
    _without(model.lm_head.weight.data, common)
    return save(model, folder)


def _alike(model: Any) -> torch.Tensor:
    """Give all tokens something in common, so that rows look at the same keys: random ones share nothing, and a tile of
    them needs most of a short prompt.

    Returns:
        What they have in common; what the answers are made of must not know it, or they would be alike.
    """
    common = torch.randn(SIZES["hidden_size"])
    model.model.embed_tokens.weight.data += 0.3 * common
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(4)
    return common


def _without(rows: torch.Tensor, common: torch.Tensor) -> None:
    """Make rows of weights orthogonal to it, in place."""
    rows -= torch.outer(rows @ common, common) / common.square().sum()
