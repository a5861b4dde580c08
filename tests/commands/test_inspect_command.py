"""``minference-vllm inspect``: what it prints about a checkpoint, its layers and heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_inputs import DEMO, HEADS, LAYERS, LLAMA, Ended, model, pattern_file

from minference_vllm.commands.inspect import spans, table
from minference_vllm.kernels.native import library
from minference_vllm.offline.checkpoint import Checkpoint
from minference_vllm.settings import Settings


def test_inspect_the_bundled_model(tool: Callable[..., Ended]) -> None:
    ended = tool("inspect", DEMO)
    lines = ended.out.splitlines()
    assert ended.code == 0
    assert lines[0] == f"model     {DEMO} (StableLmForCausalLM, 3 layers, 4 query heads over 2, bfloat16)"
    assert lines[1].startswith("patterns  shipped 'default_cpu', the default (no file was set")
    assert "from 8192 tokens" in ended.out
    assert lines[-2].split() == ["layers", "heads", "pattern"] and lines[-1].startswith("0-2     all    ")


def test_inspect_groups_layers_and_heads(tool: Callable[..., Ended], tmp_path: Path) -> None:
    path = pattern_file(tmp_path / "patterns.json")
    ended = tool("inspect", DEMO, "--patterns", path)
    assert ended.code == 0 and f"{path} (the setting 'patterns')" in ended.out and "a test" in ended.out
    assert ended.out.splitlines()[-2:] == [
        "0-2     0-2    a_shape(sink=64, local=256)",
        "        3      dense",
    ]


def test_inspect_sums_up_what_was_measured(tool: Callable[..., Ended], tmp_path: Path) -> None:
    path = pattern_file(tmp_path / "patterns.json")
    content = json.loads(path.read_text())
    found = {
        "0": {"recall": 1.0, "density": 0.1, "output_error": 0.0},
        "2": {"recall": 0.9, "density": 0.3, "output_error": 0.1},
    }
    path.write_text(json.dumps({**content, "measured": {"1": found}}))
    ended = tool("inspect", DEMO, "--patterns", path)
    assert "measured  density 0.200; recall 0.950, lowest 0.900 (layer 1, head 2)" in ended.out


def test_inspect_takes_a_file_that_measured_nothing(tool: Callable[..., Ended], tmp_path: Path) -> None:
    path = pattern_file(tmp_path / "patterns.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "measured": {"0": {}}}))
    ended = tool("inspect", DEMO, "--patterns", path)
    assert ended.code == 0 and "measured" not in ended.out


def test_inspect_takes_the_checkpoints_own_file(tool: Callable[..., Ended], tmp_path: Path) -> None:
    folder = model(tmp_path / "llama", **LLAMA)
    entry = {str(head): ["stream_llm", 7, 8, 1.0] for head in range(4)}
    (folder / "sparse_attention_config.json").write_text(json.dumps({"0": entry, "1": entry}))
    ended = tool("inspect", folder)
    assert ended.code == 0 and "(the checkpoint's own)" in ended.out and "a_shape(sink=7, local=8)" in ended.out


def test_inspect_refuses_another_models_file(tool: Callable[..., Ended], tmp_path: Path) -> None:
    path = pattern_file(tmp_path / "patterns.json", layers=LAYERS + 1)
    ended = tool("inspect", DEMO, "--patterns", path)
    assert ended.code == 1 and "describes 4 layers, the model has 3" in ended.err
    path = pattern_file(tmp_path / "patterns.json", heads=2 * HEADS)
    ended = tool("inspect", DEMO, "--patterns", path)
    assert ended.code == 1 and "describes head 7, the model has heads 0 to 3" in ended.err


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}, "multi-head latent attention"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "pooling models run no causal prefill"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "encoder-decoder models"),
        ({**LLAMA, "dtype": "float64"}, "dtype float64 is not supported"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "it has no attention heads"),
    ],
)
def test_inspect_says_why_a_model_is_refused(
    tool: Callable[..., Ended], tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    ended = tool("inspect", model(tmp_path / "model", **fields))
    assert ended.code == 1 and f"refused   {reason}" in ended.out


SHORT_WINDOW = "sliding window of 4096 tokens, below min_context"


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, {"0-1": f"dense: {SHORT_WINDOW}"}),
        ({"model_type": "mistral", "sliding_window": 8192}, {}),
        ({"model_type": "gpt_oss"}, {"0": "dense: sliding window of 128 tokens, below min_context"}),
        (
            {"model_type": "gpt_oss", "head_dim": 512},
            {"0": "dense: sliding window, attention sinks", "1": "dense: attention sinks"},
        ),
        (
            {"model_type": "gemma2"},
            {"0": f"dense: {SHORT_WINDOW}"},
        ),
        (
            {"model_type": "gemma2", "head_dim": 512},
            {"0": "dense: sliding window, soft cap on logits", "1": "dense: soft cap on logits"},
        ),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, {}),
        (
            {"model_type": "cohere2", "sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"]},
            {"0": "dense: sliding window of 4097 tokens, below min_context"},
        ),
        ({"model_type": "llama4_text"}, {}),
        (
            {"model_type": "llama4_text", "attention_chunk_size": 4096},
            {"0-1": "dense: attention within chunks of 4096 tokens, below min_context"},
        ),
        ({"model_type": "gemma4_text"}, {"0": "dense: sliding window of 512 tokens, below min_context"}),
        (
            {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
            {"0": "no patterns: linear attention"},
        ),
    ],
)
def test_inspect_names_layers_that_run_no_pattern(
    tool: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    rows: dict[str, str],
) -> None:
    monkeypatch.setattr(library, "unavailable_reason", lambda dtype=None: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ended = tool("inspect", model(tmp_path / "model", **{**LLAMA, "architectures": ["SomeForCausalLM"], **fields}))
    assert ended.code == 0, ended.err
    table = {line.split()[0]: line.split(maxsplit=2)[2] for line in ended.out.split("\n\n")[1].splitlines()[1:]}
    found = {layers: text for layers, text in table.items() if text.startswith(("dense", "no patterns"))}
    assert found == rows


def test_inspect_names_the_heads_of_all_kinds_of_layers(tool: Callable[..., Ended], tmp_path: Path) -> None:
    """The configuration of a heterogeneous model only has what its layers share."""
    folder = tmp_path / "model"
    gemma = {**LLAMA, "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "attention_k_eq_v": True}
    ended = tool("inspect", model(folder, **gemma, num_global_key_value_heads=1))
    assert ended.code == 0, ended.err
    assert "2 layers, 4 query heads over 2 and 4 query heads over 1, bfloat16)" in ended.out
    ended = tool("inspect", model(folder, **gemma, per_layer_config={"0": {"num_attention_heads": 8}}))
    assert ended.code == 0 and "2 layers, 8 query heads over 2 and 4 query heads over 2," in ended.out


def test_our_own_kernels_run_patterns_where_vllms_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt_oss = Checkpoint(str(model(tmp_path / "model", **{**LLAMA, "model_type": "gpt_oss"})))
    monkeypatch.setattr(library, "unavailable_reason", lambda dtype=None: None)
    for on_gpu in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda on_gpu=on_gpu: on_gpu)
        window = "sliding window" if on_gpu else "sliding window of 128 tokens, below min_context"
        assert gpt_oss.fixed_layers(Settings()) == {0: f"dense: {window}"}
        assert gpt_oss.fixed_layers(Settings(kernel="block_table"))[1] == "dense: attention sinks"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_heads_that_no_kernel_on_a_gpu_takes(on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's full attention has heads of 512; on CPUs vLLM's own kernel takes them."""
    gemma = Checkpoint(str(model(tmp_path / "model", **{**LLAMA, "model_type": "gemma4_text", "head_dim": 256})))
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    assert gemma.fixed_layers(Settings()).get(1) == ("dense: head size 512 is above 256" if on_gpu else None)


def test_table_groups_what_is_alike() -> None:
    a, b = (("all", "a"),), (("0-2, 5", "b"), ("3-4", "dense"))
    assert table([a, b, a, b, a]) == [
        "layers    heads   pattern",
        "0-4 by 2  all     a",
        "1, 3      0-2, 5  b",
        "          3-4     dense",
    ]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1, 2], "0-2"), ([0, 1, 3], "0-1, 3"), ([1, 3], "1, 3"), ([3, 7, 11], "3-11 by 4")],
)
def test_spans(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text
