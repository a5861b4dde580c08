"""Unsupported configurations are refused before weights are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MODELS: dict[str, dict[str, Any]] = {
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        "first_k_dense_replace": 2,
    },
    "mamba": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "state_size": 16,
        "num_hidden_layers": 2,
        "torch_dtype": "bfloat16",
    },
    "encoder": {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
    },
    "encoder_decoder": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": 512,
        "d_model": 256,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_target_positions": 448,
        "max_source_positions": 1500,
        "torch_dtype": "bfloat16",
        "is_encoder_decoder": True,
        **{f"{kind}_token_id": 1 for kind in ("pad", "bos", "eos", "decoder_start")},
    },
}
DUAL_CHUNK: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "dual_chunk_attention_config": {"chunk_size": 512, "local_size": 128},
}
DUAL_CHUNK_ERRORS: dict[str, tuple[dict[str, Any], str | None]] = {
    "dual_chunk": ({}, None),
    "dual_chunk_sizes": ({"hf_overrides": {"dual_chunk_attention_config": {"chunk_size": 512}}}, "not 512, None, 0"),
    "dual_chunk_fp8": ({"kv_cache_dtype": "fp8"}, "dual chunk attention with a KV cache of fp8"),
    "dual_chunk_speculative": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "dual chunk attention with speculative decoding",
    ),
    "dual_chunk_kernel": (
        {"additional_config": {"minference": {"kernel": "block_table"}}},
        "dual chunk attention with the kernel 'block_table'",
    ),
    "dual_chunk_floor": (
        {"additional_config": {"minference": {"recall_floor": 0.9}}},
        "dual chunk attention with a recall_floor",
    ),
}
"""Arguments, and what the error says."""
# What is wrong -> (settings, what the error says)
SETTINGS: dict[str, tuple[Any, str]] = {
    "unknown_setting": (
        {"min_contxt": 1},
        'additional_config["minference"]["min_contxt"]: unknown setting; known',
    ),
    "renamed": ({"engine": "native"}, "this setting is now named 'kernel'"),
    "negative": ({"min_context": -1}, 'additional_config["minference"]["min_context"] = -1'),
    "no_object": ("dense", 'additional_config["minference"] must be an object'),
    "missing_file": ({"patterns": "nowhere.json"}, "no pattern file at 'nowhere.json'"),
    "broken_json": ({"patterns": "broken.json"}, "broken.json: not valid JSON"),
    "kernel_for_gpus": ({"kernel": "triton"}, "kernel 'triton' cannot run here: it needs an NVIDIA GPU"),
    "misspelt": ({"mincontext": 5}, "did you mean 'min_context'?"),
    "unknown_kind": ({"patterns": "kind.json"}, "unknown pattern kind; allowed are dense, a_shape"),
    "absurd_budget": ({"patterns": "budget.json"}, "sink = 1000000000000"),
    "other_layers": ({"patterns": "layers.json"}, "describes 5 layers, the model has 3"),
    "other_heads": ({"patterns": "heads.json"}, "describes head 15, the model has heads 0 to 7"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_patterns: Callable[..., str]) -> Path:
    """Bad pattern files, and models that consist of a configuration only."""
    place = tmp_path_factory.mktemp("bad")
    dense = [{"kind": "dense"}]
    (place / "broken.json").write_text('{"schema_version": 1,')
    write_patterns(place / "kind.json", [{"kind": "zigzag"}])
    write_patterns(place / "budget.json", [{"kind": "a_shape", "sink": 10**12}])
    write_patterns(place / "layers.json", dense, layers=5)
    write_patterns(place / "heads.json", dense, heads=16)
    for name, config in {**MODELS, "qwen_1m": DUAL_CHUNK}.items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(config))
    return place


NO_CPU = """
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum

class NPUPlatform(CpuPlatform):
    _enum = PlatformEnum.OOT

def plugin():
    return "npu.NPUPlatform"
"""


def configure(folder: Path, cases: dict[str, dict[str, Any]], **environment: str) -> dict[str, str | None]:
    """Errors from creating vLLM's configuration, for all cases in one process."""
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, str(HERE / "configure_process.py"), "cases.json", "errors.json"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "errors.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def errors(folder: Path, llama: Path) -> dict[str, str | None]:
    cases: dict[str, dict[str, Any]] = {
        name: {"model": str(llama), "additional_config": {"minference": settings}}
        for name, (settings, _) in SETTINGS.items()
    }
    cases |= {name: {"model": name} for name in MODELS}
    cases |= {"good": {"model": str(llama)}, "float64": {"model": str(llama), "dtype": "float64"}}
    cases |= {name: {"model": "qwen_1m", **arguments} for name, (arguments, _) in DUAL_CHUNK_ERRORS.items()}
    cases["not_selected"] = {**cases["unknown_setting"], "attention_backend": None}
    return configure(folder, cases)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_and_pattern_files(name: str, errors: dict[str, str | None]) -> None:
    assert SETTINGS[name][1] in str(errors[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mla", "multi-head latent attention"),
        ("encoder", "pooling models run no causal prefill"),
        ("encoder_decoder", "encoder-decoder models are not supported"),
        ("mamba", "it has no attention heads"),
    ],
)
def test_models(name: str, message: str, errors: dict[str, str | None]) -> None:
    assert f"minference cannot serve {name}: " in str(errors[name]) and message in str(errors[name])


@pytest.mark.parametrize("name", DUAL_CHUNK_ERRORS)
def test_dual_chunk_attention(name: str, errors: dict[str, str | None]) -> None:
    message = DUAL_CHUNK_ERRORS[name][1]
    assert errors[name] is None if message is None else message in str(errors[name])


def test_an_unsupported_type_is_refused(errors: dict[str, str | None]) -> None:
    assert "float64" in str(errors["float64"])


def test_a_good_configuration_passes(errors: dict[str, str | None]) -> None:
    assert errors["good"] is None


def test_settings_of_a_backend_that_nobody_selected_do_no_harm(errors: dict[str, str | None]) -> None:
    assert errors["not_selected"] is None


@pytest.mark.parametrize(
    "environment",
    [{}, {"VLLM_TARGET_DEVICE": "cpu"}, {"VLLM_PLUGINS": "minference"}],
    ids=["another_plugins_platform", "target_device", "no_platform_plugin"],
)
def test_every_cpu_platform_validates_our_settings(
    environment: dict[str, str], folder: Path, llama: Path, install: Callable[..., str]
) -> None:
    """In the first case vLLM uses another plugin's platform, which it skips in the others."""
    path = install("foreign", "foreign:plugin", NO_CPU.replace("OOT", "CPU").replace("npu.", "foreign."))
    bad = {"model": str(llama), "additional_config": {"minference": SETTINGS["unknown_setting"][0]}}
    cases = {"bad": bad, "good": {"model": str(llama)}, "not_selected": {**bad, "attention_backend": None}}
    found = configure(folder, cases, PYTHONPATH=path, **environment)
    assert SETTINGS["unknown_setting"][1] in str(found.pop("bad"))
    assert found == {"good": None, "not_selected": None}


def test_a_device_without_our_kernels_ends_the_start(folder: Path, llama: Path, install: Callable[..., str]) -> None:
    path = install("npu", "npu:plugin", NO_CPU)
    cases = {"selected": {"model": str(llama)}, "not_selected": {"model": str(llama), "attention_backend": None}}
    found = configure(folder, cases, PYTHONPATH=path)
    assert "vLLM's platform here is npu.NPUPlatform: select another attention backend" in str(found["selected"])
    assert found["not_selected"] is None


def test_the_server_ends_with_our_message_and_loads_nothing(folder: Path, llama: Path, vllm_command: list[str]) -> None:
    def serve(settings: Any) -> subprocess.CompletedProcess[str]:
        command = [*vllm_command, "serve", str(llama), "--attention-backend", "minference"]
        command += ["--additional-config", json.dumps({"minference": settings})]
        return subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )

    names = ("unknown_setting", "other_layers")
    with ThreadPoolExecutor(len(names)) as pool:
        ended = list(pool.map(serve, [SETTINGS[name][0] for name in names]))
    for name, done in zip(names, ended, strict=True):
        assert done.returncode != 0, name
        # The last line, below vLLM's traceback.
        assert SETTINGS[name][1] in done.stdout.splitlines()[-1], done.stdout[-4000:]
        assert "load model" not in done.stdout, "weights were loaded first"
