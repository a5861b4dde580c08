"""The network of the demo model: fresh weights, forward pass for training, optimizer, tokenizer and export."""

from __future__ import annotations

import copy
from pathlib import Path

import tasks
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, StableLmConfig, StableLmForCausalLM

VOCABULARY = tasks.vocabulary()
TOKEN_ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD, UNK, BOS, EOS = range(4)
MAX_POSITION = 131072


def rope_frequencies(config: StableLmConfig) -> Tensor:
    rope = config.rope_parameters
    rotary = int(config.hidden_size // config.num_attention_heads * rope["partial_rotary_factor"])
    return rope["rope_theta"] ** (-torch.arange(0, rotary, 2).float() / rotary)


@torch.no_grad()
def build_model() -> StableLmForCausalLM:
    """A fresh model whose attention is initialised close to its final form, which avoids a long plateau of the loss.

    The heads of the first layer initially attend a few tokens back: constant queries and keys (the biases) whose
    rotary angles agree at one distance.  In the other layers a head starts with the same projection for queries and
    keys, so that tokens attend tokens with similar content.
    """
    model = StableLmForCausalLM(
        StableLmConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITION,
            initializer_range=0.04,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0, "partial_rotary_factor": 0.5},
            partial_rotary_factor=0.5,
            use_qkv_bias=True,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    # The embedding must stay large compared with the output of a layer that is added to it.
    model.model.embed_tokens.weight.normal_(0, 0.5)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.5)
        layer.mlp.down_proj.weight.mul_(0.5)
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    frequencies = rope_frequencies(config)
    half = len(frequencies)
    strength = torch.where(torch.arange(half) < half // 2, 5.0, 2.0)
    first, *others = (layer.self_attn for layer in model.model.layers)
    first.k_proj.bias.view(-1, size)[:, :half] = strength
    for head, (distance, sharpness) in enumerate([(1, 1.0), (2, 1.0), (3, 0.6), (5, 0.3)]):
        query = first.q_proj.bias.view(-1, size)[head]
        query[:half] = sharpness * strength * (frequencies * distance).cos()
        query[half : 2 * half] = -sharpness * strength * (frequencies * distance).sin()
    for attention in others:
        keys = attention.k_proj.weight.view(config.num_key_value_heads, 1, size, -1)
        attention.q_proj.weight.copy_(keys.expand(-1, heads // len(keys), -1, -1).reshape(heads * size, -1))
    return model


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def forward(model: StableLmForCausalLM, ids: Tensor, positions: Tensor, bias: Tensor | None, tail: int) -> Tensor:
    """Final hidden states from row `tail` on, by the model's own layers; the last one computes only these rows.

    Without a bias the attention is causal.
    """
    config = model.config
    angles = positions[:, None, :, None].float() * rope_frequencies(config)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    batch, length = ids.shape
    hidden = model.model.embed_tokens(ids)
    for number, layer in enumerate(model.model.layers):
        first = tail if number == config.num_hidden_layers - 1 else 0
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        hidden = hidden[:, first:]
        q, k, v = (
            linear(x).view(batch, x.shape[1], -1, attention.head_dim).transpose(1, 2)
            for linear, x in (
                (attention.q_proj, normed[:, first:]),
                (attention.k_proj, normed),
                (attention.v_proj, normed),
            )
        )
        q, k = rotate(q, cos[:, :, first:], sin[:, :, first:]), rotate(k, cos, sin)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if bias is None and first:
            mask = torch.zeros(length - first, length, dtype=q.dtype)
            mask.masked_fill_(torch.arange(length) > torch.arange(first, length)[:, None], -torch.inf)
        else:
            mask = None if bias is None else bias[:, :, first:]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(batch, length - first, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.model.norm(hidden)


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal (Newton-Schulz): far fewer steps than AdamW needs here."""

    def __init__(self, parameters: list[torch.nn.Parameter], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95).bfloat16()
                wide = len(update) <= update.shape[1]
                update = update if wide else update.T
                update = update / (update.norm() + 1e-7)
                for _ in range(5):
                    square = update @ update.T
                    update = 3.4445 * update + (-4.7750 * square + 2.0315 * square @ square) @ update
                update = update.float() if wide else update.T.float()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, digit and punctuation mark, <bos> in front; chat messages are plain text."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_POSITION,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return fast


def export(model: StableLmForCausalLM, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    # The class name that every version of transformers knows.
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (folder / "model.safetensors").chmod(0o644)
