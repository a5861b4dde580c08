"""Common parts of models of a few small layers with random weights, and a tokenizer whose words are ``w0`` ...
``w511``; the models are in ``tiny_decoders``, ``tiny_hybrids`` and ``tiny_image_readers``."""

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
}
"""Weights large enough that attention is peaked and that the best token leads clearly."""
WINDOWED = ["sliding_attention", "full_attention"] * 2
"""Layer types if every second layer has a sliding window."""


def random_model(kind: Any, config: Any, sharper: float = 4.0) -> Any:
    """A model of transformers with a fixed seed, whose attention is peaked and whose answers depend on it.

    All embeddings share a common direction, so that rows attend the same keys: with fully random ones a tile needs most
    of a short prompt. The values are orthogonal to it, or all answers would be alike.

    Args:
        sharper: factor for the queries, and for the keys too if both have norms of their own.
    """
    torch.manual_seed(0)
    model = kind(config)
    embeddings, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    tied = head.data_ptr() == embeddings.data_ptr()
    common = torch.randn(embeddings.shape[1])
    embeddings += 0.3 * common
    if not tied:
        _without(head, common)
    for name, weight in model.get_decoder().named_parameters():
        rows = weight.data
        match name.split(".")[-2:]:
            case ["q_norm" | "k_norm" | "q_layernorm" | "k_layernorm", _]:
                # These norms alone set the size of queries and keys. Their weights may be offsets from 0 or 1.
                rows += sharper - 1
            case ["q_proj", "weight"]:
                rows *= sharper
            case ["v_proj", "weight"]:
                _without(rows, common)
            case ["qkv_proj", "weight"]:
                size = len(rows) // (config.num_attention_heads + 2 * config.num_key_value_heads)
                rows[: config.num_attention_heads * size] *= sharper
                _without(rows[-config.num_key_value_heads * size :], common)
            case ["post_attention_layernorm" | "post_feedforward_layernorm", _] if tied:
                # A layer's output must outweigh the token's own embedding, which is also its row of the output head.
                rows += 3
    return model


def _without(rows: torch.Tensor, common: torch.Tensor) -> None:
    """Make rows of weights orthogonal to ``common``, in place."""
    rows -= torch.outer(rows @ common, common) / common.square().sum()


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
