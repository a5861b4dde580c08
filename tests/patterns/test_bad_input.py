"""Models and settings that cannot be served give one clear error, from the configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm.backend.limits import unsupported_layer_reasons
from minference_vllm.backend.runtime import Runtime, runtime_for
from minference_vllm.patterns import discovery
from minference_vllm.patterns import file as formats
from minference_vllm.patterns.kinds import AShape, Dense, LowRank

LAYERS, HEADS = 2, 4
DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"


def configuration(settings: Any = None, **model: Any) -> SimpleNamespace:
    """The parts of vLLM's configuration that are read."""
    fields: dict[str, Any] = {
        "model": "some/model",
        "use_mla": False,
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "dtype": torch.bfloat16,
        "hf_config": SimpleNamespace(),
        "hf_text_config": SimpleNamespace(num_attention_heads=HEADS),
        "get_total_num_hidden_layers": lambda: LAYERS,
    }
    additional = {} if settings is None else {"minference": settings}
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**fields, **model}),
        additional_config=additional,
        compilation_config=SimpleNamespace(),
    )


def pattern_file(folder: Path, layers: int = LAYERS, heads: int = HEADS) -> str:
    path = folder / "patterns.json"
    entry = {str(head): {"kind": "a_shape", "sink": 1, "local": 2} for head in range(heads)}
    path.write_text(json.dumps({"schema_version": 1, "layers": {str(layer): entry for layer in range(layers)}}))
    return str(path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"use_mla": True}, "multi-head latent attention"),
        ({"runner_type": "pooling"}, "pooling models run no causal prefill"),
        ({"is_encoder_decoder": True}, "encoder-decoder models are not supported"),
        ({"hf_text_config": SimpleNamespace(num_heads=80)}, "it has no attention heads"),
        ({"dtype": torch.float64}, "dtype float64 is not supported; allowed are bfloat16, float16, float32"),
        ({"dtype": torch.float8_e4m3fn}, "dtype float8_e4m3fn is not supported"),
    ],
)
def test_models_that_cannot_be_served(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"minference cannot serve some/model: .*{message}"):
        runtime_for(configuration(**model))


def test_several_reasons_come_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"latent attention.*; .*float64"):
        runtime_for(configuration(use_mla=True, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_contxt": 5}, "unknown setting; known ones are patterns, min_context"),
        ({"min_context": -5}, r'additional_config\["minference"\]\["min_context"\] = -5'),
        ({"patterns": "no_such_preset"}, r"no pattern file at 'no_such_preset'.*shipped names are a_shape"),
        ("dense", "must be an object of settings"),
        (
            {"patterns": {"schema_version": 1}},
            r"\['patterns'\]".replace("'", '"') + " = .*: must be the path of a pattern",
        ),
        ({"patterns": '{"schema_version": 1}'}, "no pattern file at .*; give the path of a pattern file"),
        (
            {"patterns": '{"schema_version": 1, "provenance": "' + 5000 * "long " + '"}'},
            r"^no pattern file at .{,300}; give",
        ),
    ],
)
def test_settings_that_cannot_be_used(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runtime_for(configuration(settings))


def test_another_models_pattern_file(tmp_path: Path) -> None:
    for layers, heads, message in [(3, 4, "3 layers, the model has 2"), (2, 8, "head 7, the model has heads 0 to 3")]:
        path = pattern_file(tmp_path, layers, heads)
        with pytest.raises(ValueError, match=message) as error:
            runtime_for(configuration({"patterns": path}))
        assert path in str(error.value)


def test_a_draft_model_runs_the_users_patterns_where_they_are_its_own(tmp_path: Path) -> None:
    path = pattern_file(tmp_path)
    own = runtime_for(configuration({"patterns": path}, runner_type="draft"))
    assert own.patterns.for_layer(0, 1) == (AShape(sink=1, local=2),)
    written = runtime_for(
        configuration({"patterns": "dense"}, runner_type="draft", get_total_num_hidden_layers=lambda: 1)
    )
    assert written.patterns.for_layer(0, 1) == (Dense(),)
    others = runtime_for(configuration({"patterns": path}, runner_type="draft", get_total_num_hidden_layers=lambda: 1))
    assert others.patterns.for_layer(0, 1) == (LowRank(rank=64, gamma=0.94, remainder=True, queries=32, noise=0.022),)
    assert others.source.endswith(f"since {path} describes another model than the draft")
    assert others.counters.line().startswith("minference (draft model): 0 prefill chunks")
    others.use(own.patterns, "a test")
    assert others.counters.line().startswith("minference (draft model): ")


def test_a_draft_models_broken_file_is_refused(tmp_path: Path) -> None:
    """The file is part of the checkpoint."""
    (tmp_path / "sparse_attention_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        runtime_for(configuration(model=str(tmp_path), runner_type="draft"))


def test_a_broken_pattern_file(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"patterns\.json: not valid JSON"):
        runtime_for(configuration({"patterns": str(path)}))


# Where patterns come from


def test_the_users_file_comes_first(tmp_path: Path) -> None:
    write_checkpoint_file(tmp_path)
    path = pattern_file(tmp_path)
    runtime = runtime_for(configuration({"patterns": path}, model=str(tmp_path)))
    assert runtime.source == f"{path} (the setting 'patterns')"
    assert runtime.patterns.for_layer(1, HEADS) == (AShape(sink=1, local=2),) * HEADS


def write_checkpoint_file(folder: Path) -> dict[str, Any]:
    content = {str(layer): {str(head): ["stream_llm", 7, 8, 1.0] for head in range(HEADS)} for layer in range(LAYERS)}
    (folder / "sparse_attention_config.json").write_text(json.dumps(content))
    return content


def test_then_the_checkpoints_own(tmp_path: Path) -> None:
    content = write_checkpoint_file(tmp_path)
    beside = runtime_for(configuration(model=str(tmp_path)))
    assert beside.patterns.for_layer(0, 1) == (AShape(sink=7, local=8),)
    assert "sparse_attention_config.json" in beside.source
    loaded = SimpleNamespace(dual_chunk_attention_config={"sparse_attention_config": content})
    assert runtime_for(configuration(hf_config=loaded)).patterns.layers == beside.patterns.layers


def test_the_checkpoints_own_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint_file(tmp_path)
    asked = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((*arguments, options["revision"]))
        return str(tmp_path / "sparse_attention_config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    runtime = runtime_for(configuration(model="some/model", revision="v2"))
    assert asked == [("some/model", "sparse_attention_config.json", "v2")]
    assert runtime.patterns.for_layer(0, 1) == (AShape(sink=7, local=8),)


def test_a_checkpoints_file_of_another_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint_file(tmp_path)
    with pytest.raises(ValueError, match="describes 2 layers, the model has 3"):
        runtime_for(configuration(model=str(tmp_path), get_total_num_hidden_layers=lambda: 3))


def test_then_the_shipped_default() -> None:
    runtime = runtime_for(configuration())
    assert runtime.patterns.for_layer(0, 1) == (LowRank(rank=64, gamma=0.94, remainder=True, queries=32, noise=0.022),)
    assert "the default (no file was set" in runtime.source


def ship(folder: Path, monkeypatch: pytest.MonkeyPatch, **models: str) -> None:
    """Pretend to ship files with these names, each for a model, next to the default."""
    shipped = {"default_cpu": discovery.shipped_pattern_files()["default_cpu"]}
    entry = {str(head): {"kind": "a_shape", "sink": 3, "local": 4} for head in range(HEADS)}
    for name, model in models.items():
        shipped[name] = folder / f"{name}.json"
        content = {"schema_version": 1, "model": model, "layers": {str(layer): entry for layer in range(LAYERS)}}
        shipped[name].write_text(json.dumps(content))
    for module in (discovery, formats):
        monkeypatch.setattr(module, "shipped_pattern_files", lambda: shipped)


@pytest.mark.parametrize(
    ("model", "found_on"),
    [
        ("Org/Model-7B", "Org/Model-7B"),
        ("org/MODEL-7b", "Org/Model-7B"),
        ("/checkpoints/model-7b", "Org/Model-7B"),
        ("/cache/models--Org--Model-7B/snapshots/0123abcd", "Org/Model-7B"),
        ("Someone/model-7b", "Org/Model-7B"),
        ("some/other", "NewForCausalLM"),
    ],
)
def test_a_shipped_file_by_name_or_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, found_on: str
) -> None:
    ship(tmp_path, monkeypatch, by_architecture="NewForCausalLM", by_name="Org/Model-7B")
    architecture = SimpleNamespace(architectures=["NewForCausalLM"])
    runtime = runtime_for(configuration(model=model, hf_config=architecture))
    assert runtime.patterns.model == found_on and found_on in runtime.source
    assert runtime.patterns.for_layer(0, 1) == (AShape(sink=3, local=4),)


def test_a_shipped_file_of_another_size_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(tmp_path, monkeypatch, by_name="some/model")
    assert runtime_for(configuration()).patterns.model == "some/model"
    assert "the default (" in runtime_for(configuration(get_total_num_hidden_layers=lambda: LAYERS + 1)).source


def test_a_preset_by_name() -> None:
    assert runtime_for(configuration({"patterns": "dense"})).patterns.for_layer(0, 1) == (Dense(),)


def test_a_configuration_has_one_runtime() -> None:
    first, second = configuration(), configuration()
    assert runtime_for(first) is runtime_for(first)
    assert runtime_for(first) is not runtime_for(second)
    assert isinstance(runtime_for(first), Runtime)


def test_the_language_model_of_a_multimodal_one_has_its_runtime() -> None:
    """vLLM builds it with a copy of the configuration; counters, patterns and recorder must be shared."""
    from vllm.engine.arg_utils import EngineArgs

    whole = EngineArgs(
        str(DEMO), attention_backend="minference", additional_config={"minference": {"patterns": "default_cpu"}}
    ).create_engine_config()
    part = whole.with_hf_config(whole.model_config.hf_config, architectures=["Qwen2ForCausalLM"])
    assert part is not whole and runtime_for(part) is runtime_for(whole)
    other = SimpleNamespace(
        model_config=configuration().model_config,
        compilation_config=whole.compilation_config,
        additional_config=whole.additional_config,
    )
    assert runtime_for(other) is not runtime_for(whole), "a draft model"


# Layers that run densely

PLAIN: dict[str, Any] = {
    "sliding_window": None,
    "logits_soft_cap": None,
    "alibi_slopes": None,
    "sinks": None,
    "is_decoder": True,
    "kv_cache_dtype": "auto",
    "dtype": torch.bfloat16,
}


def test_plain_layers_run_sparsely() -> None:
    assert unsupported_layer_reasons(**PLAIN) == []
    # Values that mean "none" in vLLM.
    plain = {**PLAIN, "sliding_window": -1, "logits_soft_cap": 0, "kv_cache_dtype": "bfloat16"}
    assert unsupported_layer_reasons(**plain) == []


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("sliding_window", 4096, "sliding window"),
        ("sliding_window", 0, "sliding window"),
        ("logits_soft_cap", 30.0, "soft cap"),
        ("alibi_slopes", torch.ones(4), "ALiBi"),
        ("sinks", torch.zeros(4), "attention sinks"),
        ("is_decoder", False, "not causal"),
        ("kv_cache_dtype", "fp8", "KV cache of fp8"),
        ("kv_cache_dtype", "float16", "KV cache of float16"),
    ],
)
def test_other_layers_have_a_reason(field: str, value: Any, reason: str) -> None:
    (found,) = unsupported_layer_reasons(**{**PLAIN, field: value})
    assert reason in found
