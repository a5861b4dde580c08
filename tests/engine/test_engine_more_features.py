"""Common serving options of vLLM: adapters, KV connectors, guided answers, beams, priorities. Whole engines on
CPUs; drafted tokens: ``test_engine_needles``. docs/features.md lists the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from engine_answers import assert_same_tokens

MODEL = Path(__file__).parent.parent.parent / "examples" / "demo" / "model"
OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 1024,
}
# The engine runs in this process, so that all requests are queued before the first step and steps are repeatable.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

pytestmark = pytest.mark.features


# Adapters


def write_adapter(model: Path, folder: Path, seed: int) -> str:
    """A LoRA adapter of random weights for the attention of every layer, large enough to change the answers."""
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, size, rank = config["hidden_size"], config["head_dim"], 8
    outputs = {"q_proj": config["num_attention_heads"] * size, "v_proj": config["num_key_value_heads"] * size}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, output in outputs.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) * 0.1
            weights[f"{place}.lora_B.weight"] = torch.randn(output, rank, generator=generator) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(outputs), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    return str(folder)


def test_adapters_give_the_tokens_of_vllms_own_backend(
    llama: Path,
    run_engine: Callable[..., Any],
    prompt: Callable[..., list[int]],
    with_minference: Callable[..., Any],
    full_patterns: str,
    sparse_patterns: str,
    tmp_path: Path,
) -> None:
    """Two of them and the model itself in one batch. In float32, so that few answers diverge at nearly tied tokens.
    With a spare slot: beside others, vLLM's CPU engine gives requests without an adapter the one in the last slot."""
    first, second = (write_adapter(llama, tmp_path / name, seed) for seed, name in enumerate(("first", "second")))
    batches = [{"prompts": [prompt(1501, 1)] * 3 + [prompt(2000, 2)], "lora": [first, second, None, first]}]
    options = {**OPTIONS, "dtype": "float32", "enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    stock = run_engine(llama, batches, options, max_tokens=12, **IN_PROCESS)
    assert len(set(map(tuple, stock.tokens[0][:3]))) == 3, "the adapters change nothing"
    full = run_engine(llama, batches, {**options, **with_minference(full_patterns)}, max_tokens=12, **IN_PROCESS)
    assert full.density == 1.0 and full.stats[0]["sparse_chunks"] >= 5
    assert_same_tokens(full, stock, tie=0.005, at_least=40)
    sparse = run_engine(llama, batches, {**options, **with_minference(sparse_patterns)}, **IN_PROCESS)
    assert sparse.density < 0.9 and len(set(map(tuple, sparse.tokens[0][:3]))) == 3


# KV connectors


def test_a_connector_stores_and_loads_what_sparse_prefill_wrote(
    llama: Path,
    run_engine: Callable[..., Any],
    prompt: Callable[..., list[int]],
    with_minference: Callable[..., Any],
    sparse_patterns: str,
    tmp_path: Path,
) -> None:
    """Like vLLM's own prefix cache. The rest of a loaded prompt, 80 and 92 tokens, runs sparsely on the loaded pages;
    this connector stores prompts that are one chunk."""
    batches = [{"prompts": [prompt(2000, 0)]}, {"prompts": [prompt(1500, 1)]}]
    extra = {"shared_storage_path": str(tmp_path)}
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    options = {**OPTIONS, "max_num_batched_tokens": 4096, **with_minference(sparse_patterns, min_chunk=16)}
    connected = {**options, "kv_transfer_config": connector}
    stored = run_engine(llama, batches * 2, connected, **IN_PROCESS)
    loaded = run_engine(llama, batches, connected, **IN_PROCESS)
    cached = run_engine(llama, batches * 2, {**options, "enable_prefix_caching": True}, **IN_PROCESS)
    assert cached.cached == [[0], [0], [1920], [1408]]
    assert stored.log.count("External Cache Hit!") == loaded.log.count("External Cache Hit!") == 2
    assert stored.tokens == cached.tokens
    assert loaded.tokens == cached.tokens[2:]
    sparse = [answer.stats[0]["sparse_tokens"] for answer in (stored, loaded, cached)]
    assert sparse == [2000 + 1500 + 80 + 92, 80 + 92, 2000 + 1500 + 80 + 92]
    assert cached.density < 0.9


# The bundled model's answers


@pytest.fixture(scope="module")
def needle() -> tasks.Prompt:
    return tasks.needle(8192, 0.3, seed=0)


@pytest.fixture(scope="module")
def ask(
    run_engine: Callable[..., Any], with_minference: Callable[..., Any], needle: tasks.Prompt
) -> Callable[..., Any]:
    """Every batch's answer to the needle's question, as text, and the engine's whole answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    question = tokenizer(needle.text).input_ids

    def run(batches: list[dict[str, Any]], max_tokens: int = 8, **llm: Any) -> tuple[list[str], Any]:
        options = {**OPTIONS, "max_model_len": 8192 + 64, "max_num_batched_tokens": 4096, "skip_tokenizer_init": False}
        options |= with_minference("coverage(0.95, 512)")
        asked = [{"prompts": [question], **batch} for batch in batches]
        answer = run_engine(MODEL, asked, {**options, **llm}, max_tokens=max_tokens, **IN_PROCESS)
        return [tokenizer.decode(tokens, skip_special_tokens=True) for (tokens,) in answer.tokens], answer

    return run


def test_guided_answers_are_right_and_keep_to_their_grammar(ask: Callable[..., Any], needle: tasks.Prompt) -> None:
    """The words of the model's vocabulary have no spaces, so the grammar sees the answer 6 0 4 8 as 6048."""
    right = needle.answer.replace(" ", "")
    wrong = "".join(str(9 - int(digit)) for digit in right)
    schema = {"type": "integer", "minimum": 1000, "maximum": 9999}
    guides = [{"regex": "[0-9]{4}"}, {"choice": [wrong, right]}, {"choice": [wrong]}, {"json": schema}]
    texts, answer = ask([{"structured_outputs": guide} for guide in guides], max_tokens=8)
    assert [text.replace(" ", "") for text in texts] == [right, right, wrong, right]
    assert answer.stats[0]["sparse_chunks"] == 2 * len(guides) and answer.density < 0.9


def test_beams_find_the_needle_and_share_its_prompt(ask: Callable[..., Any], needle: tasks.Prompt) -> None:
    """In vLLM every beam of every step is a separate request, which reads the prompt from the prefix cache."""
    texts, answer = ask([{"beams": 3}], max_tokens=5, enable_prefix_caching=True)
    assert tasks.grade(texts[0], needle.answer)
    assert answer.stats[0]["sparse_chunks"] == 2 and answer.density < 0.9


# Priorities


def test_priorities_change_the_order_and_no_answer(
    llama: Path,
    run_engine: Callable[..., Any],
    prompt: Callable[..., list[int]],
    with_minference: Callable[..., Any],
    full_patterns: str,
) -> None:
    """With pages for one and a half prompts, the more important prompt, which comes last, preempts the other."""
    batches = [{"prompts": [prompt(1020, 1), prompt(1020, 2)], "priority": [1, 0]}]
    options = {**OPTIONS, "max_num_batched_tokens": 2048, "max_model_len": 2048, "num_gpu_blocks_override": 18}
    options["scheduling_policy"] = "priority"
    stock = run_engine(llama, batches, options, **IN_PROCESS)
    answer = run_engine(llama, batches, {**options, **with_minference(full_patterns)}, **IN_PROCESS)
    assert answer.density == 1.0
    assert_same_tokens(answer, stock, tie=0.1, at_least=12)
    sparse = answer.stats[0]
    assert sparse["sparse_chunks"] == 2 + 1, "the less important one was computed anew"
