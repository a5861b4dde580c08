"""A small Qwen2 with dual chunk attention on vLLM's CPU engine, against the whole model in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Runner = Callable[..., Any]
LAYERS, HEADS, KV_HEADS, DIM, BASE = 3, 4, 2, 64, 1e4
DUAL_CHUNK = {"chunk_size": 512, "local_size": 128, "original_max_position_embeddings": 600}
CHUNK = 384
LENGTHS = (1525, 378, 760, 100)
"""Prompt lengths; the first three end just before a border, which their answers cross."""
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and a configuration like those of Qwen2.5-1M, but smaller."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "qwen"
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=HEADS * DIM,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        rope_theta=BASE,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "dual_chunk_attention_config": DUAL_CHUNK}))
    return folder


def with_sparse_attention_config(qwen: Path, name: str, budget: tuple[int, int], as_list: bool) -> Path:
    """The same model with a ``sparse_attention_config.json``, whose last head has ten columns more than the others.

    Args:
        as_list: write layers as a list, not as an object of layer numbers.
    """
    folder = qwen.parent / name
    folder.mkdir()
    for file in qwen.iterdir():
        (folder / file.name).symlink_to(file)
    columns, diagonals = budget
    heads = {str(head): ["vertical_and_slash", columns, diagonals, 1.0] for head in range(HEADS)}
    heads[str(HEADS - 1)][1] = columns + 10
    layers = [heads] * LAYERS if as_list else {str(layer): heads for layer in range(LAYERS)}
    (folder / "sparse_attention_config.json").write_text(json.dumps(layers))
    return folder


# The whole model


def turned(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[heads, S, D]`` rotated to positions ``[S]``."""
    angles = positions.double()[:, None] * BASE ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    first, second = rows.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``[heads, S, D]`` each, not rotated. The distance in chunks decides the rotation for each score."""
    place = torch.arange(query.shape[1])
    own, chunk = place % CHUNK, place // CHUNK
    keys = turned(keys, own).transpose(1, 2)
    intra = turned(query, own) @ keys
    successive = turned(query, (own + CHUNK).clamp(max=DUAL_CHUNK["chunk_size"])) @ keys
    inter = turned(query, torch.full_like(own, DUAL_CHUNK["chunk_size"])) @ keys
    apart = chunk[:, None] - chunk
    scores = torch.where(apart == 0, intra, torch.where(apart == 1, successive, inter))
    longer = (place + 1.0) / DUAL_CHUNK["original_max_position_embeddings"]
    scores = scores * (0.1 * longer.double().log() + 1).clamp(min=1)[:, None] ** 2 * DIM**-0.5
    return scores.masked_fill(place > place[:, None], -torch.inf).softmax(-1) @ values


def norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """float64 ``[S, vocabulary]``."""
    from safetensors.torch import load_file

    weights = {name: weight.double() for name, weight in load_file(folder / "model.safetensors").items()}

    def linear(name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        rows = norm(hidden, weights[f"{name}.input_layernorm.weight"])
        query, keys, values = (
            linear(f"{name}.self_attn.{part}_proj", rows).unflatten(1, (-1, DIM)).transpose(0, 1) for part in "qkv"
        )
        keys, values = (part.repeat_interleave(HEADS // KV_HEADS, 0) for part in (keys, values))
        attended = attention(query, keys, values).transpose(0, 1).flatten(1)
        hidden = hidden + linear(f"{name}.self_attn.o_proj", attended)
        rows = norm(hidden, weights[f"{name}.post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(linear(f"{name}.mlp.gate_proj", rows))
        hidden = hidden + linear(f"{name}.mlp.down_proj", gate * linear(f"{name}.mlp.up_proj", rows))
    return linear("lm_head", norm(hidden, weights["model.norm.weight"]))


def assert_right(folder: Path, prompt: list[int], tokens: list[int], leads: list[float]) -> None:
    """Every token of an answer is the exact model's best one, with the same lead over the second best."""
    found = logits(folder, prompt + tokens[:-1])[len(prompt) - 1 :].log_softmax(-1)
    best, second = found.topk(2).values.unbind(-1)
    assert len(tokens) == MAX_TOKENS and found.argmax(-1).tolist() == tokens
    torch.testing.assert_close(torch.tensor(leads, dtype=torch.float64), best - second, rtol=1e-3, atol=1e-3)


# The engine


def batches(prompt: Callable[..., list[int]]) -> list[dict[str, Any]]:
    """All prompts together; the first one again, from the cache; and the first one with more tokens appended."""
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    longer = prompts[0] + prompt(300, 9)
    return [{"prompts": prompts}, {"prompts": prompts[:1]}, {"prompts": [longer, prompts[3]]}]


OPTIONS = {"dtype": "float32", "enable_prefix_caching": True, "max_num_batched_tokens": 500}
SETTINGS = {"min_context": 200, "min_chunk": 64, "log_interval": 0.001}


def options(**settings: Any) -> dict[str, Any]:
    return {
        **OPTIONS,
        "attention_backend": "minference",
        "additional_config": {"minference": {**SETTINGS, **settings}},
    }


@pytest.fixture(scope="module")
def dense(qwen: Path, run_engine: Runner, prompt: Callable[..., list[int]]) -> Any:
    return run_engine(qwen, batches(prompt), {**options(patterns="dense"), "enforce_eager": True}, MAX_TOKENS)


@pytest.fixture(scope="module")
def full(qwen: Path, run_engine: Runner, prompt: Callable[..., list[int]]) -> Any:
    """With torch.compile and the checkpoint's own budgets, which cover everything."""
    folder = with_sparse_attention_config(qwen, "full", (100_000, 100_000), as_list=False)
    return run_engine(folder, batches(prompt), options(), MAX_TOKENS)


@pytest.fixture(scope="module")
def sparse(qwen: Path, run_engine: Runner, prompt: Callable[..., list[int]]) -> Any:
    folder = with_sparse_attention_config(qwen, "sparse", (40, 128), as_list=True)
    return run_engine(folder, batches(prompt)[:1], {**options(), "enforce_eager": True}, MAX_TOKENS)


def assert_all_right(folder: Path, asked: list[dict[str, Any]], answer: Any) -> None:
    for batch, tokens, leads in zip(asked, answer.tokens, answer.leads, strict=True):
        for ids, of_prompt, led in zip(batch["prompts"], tokens, leads, strict=True):
            assert_right(folder, ids, of_prompt, led)


def test_dense_answers_are_the_whole_models(qwen: Path, dense: Any, prompt: Callable[..., list[int]]) -> None:
    """In chunks, mixed batches and decodes, across the borders of the model's own chunks."""
    assert_all_right(qwen, batches(prompt), dense)


def test_prefixes_came_from_the_cache(dense: Any) -> None:
    assert dense.cached[0] == [0] * len(LENGTHS)
    assert dense.cached[1][0] >= 3 * CHUNK and dense.cached[2][0] >= 3 * CHUNK
    assert dense.tokens[1][0] == dense.tokens[0][0]


def test_budgets_that_cover_everything_answer_the_same(qwen: Path, full: Any, prompt: Callable[..., list[int]]) -> None:
    assert "enforce_eager=False" in full.log and "patterns from the checkpoint's configuration" in full.log
    assert full.density == 1.0
    assert_all_right(qwen, batches(prompt), full)


def test_the_checkpoints_own_patterns_run_per_head(sparse: Any) -> None:
    assert "patterns from the checkpoint's configuration" in sparse.log
    assert 0.1 < sparse.density < 0.9
    assert all(len(tokens) == MAX_TOKENS for tokens in sparse.tokens[0])
