"""Tiny language models and a tokenizer, made on the spot, for the tests of the language benchmark."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 256
NEEDLES, ANSWERS, QUESTION, FILLERS = range(8), range(8, 16), 16, range(32, 256)


def config(layers: int, **fields: object) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        head_dim=32,
        max_position_embeddings=8192,
        **{**sizes, "initializer_range": 0.3, **fields},
    )


def random_model(folder: Path, layers: int = 2, **fields: object) -> Path:
    """A Llama with random weights, whose attention is far from flat."""
    torch.manual_seed(0)
    LlamaForCausalLM(config(layers, **fields)).save_pretrained(folder)
    return folder


def lookup_model(folder: Path) -> Path:
    """A Llama of one layer that answers: after the question, needle ``i`` at any position gives answer ``i``.

    Tokens are one-hot in the first half of the hidden state, answers are written to its second half. The question's
    query and the needles' keys meet in the pair of dimensions that RoPE turns slowest, too slow to matter here.
    """
    wide = config(1, hidden_size=2 * VOCABULARY, num_key_value_heads=1, rope_theta=1e12)
    model = LlamaForCausalLM(wide)
    attention, slowest = model.model.layers[0].self_attn, wide.head_dim // 2 - 1
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "norm" not in name:
                weights.zero_()
        model.model.embed_tokens.weight[:, :VOCABULARY] = torch.eye(VOCABULARY)
        model.lm_head.weight[:, VOCABULARY:] = torch.eye(VOCABULARY)
        attention.q_proj.weight[slowest :: wide.head_dim, QUESTION] = 1.0
        attention.k_proj.weight[slowest, NEEDLES] = 1.0
        attention.v_proj.weight[NEEDLES, NEEDLES] = 1.0
        for head in range(wide.num_attention_heads):
            attention.o_proj.weight[[VOCABULARY + answer for answer in ANSWERS], [head * 32 + i for i in NEEDLES]] = 1.0
    model.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte."""
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
