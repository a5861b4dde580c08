"""The command line tool on the bundled model: what it prints, writes and returns."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from minference_vllm import __version__
from minference_vllm.backend import compat, registration
from minference_vllm.commands import doctor
from minference_vllm.commands.cli import COMMANDS, main
from minference_vllm.commands.inspect import spans, table
from minference_vllm.kernels.native import library
from minference_vllm.offline.checkpoint import Checkpoint
from minference_vllm.settings import Settings

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
LAYERS, HEADS = 3, 4


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run the tool in this process."""

    def run(*arguments: object) -> Ended:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return run


def model(folder: Path, **fields: Any) -> Path:
    """A checkpoint of which only the configuration is there."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "dtype": "bfloat16",
}


def pattern_file(path: Path, layers: int = LAYERS, heads: int = HEADS) -> Path:
    entry: dict[str, Any] = {str(head): {"kind": "a_shape", "sink": 64, "local": 256} for head in range(heads)}
    entry[str(heads - 1)] = {"kind": "dense"}
    content = {"schema_version": 1, "provenance": "a test", "layers": {str(layer): entry for layer in range(layers)}}
    path.write_text(json.dumps(content))
    return path


# The frame


def test_the_tool_is_installed_and_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minference_vllm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"minference-vllm {__version__}"
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'minference-vllm = "minference_vllm.commands.cli:main"' in declared


def test_help_names_every_command(tool: Callable[..., Ended]) -> None:
    ended = tool("--help")
    assert ended.code == 0 and all(
        name in ended.out and command.help in ended.out for name, command in COMMANDS.items()
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(tool: Callable[..., Ended], name: str) -> None:
    ended = tool(name, "--help")
    assert ended.code == 0 and len(ended.out.splitlines()) > 5


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["calibrat"],
        ["convert"],
        ["convert", "coverage"],
        ["convert", "coverage", "-o", "-", "--to", "yaml"],
        ["convert", "coverage", "-o", "-", "--layers", "0"],
        ["inspect"],
        ["plot", "x", "--head", "3"],
        ["plot", "x", "-o", "picture.bmp"],
        ["plot", "x", "--tokens", "0"],
        ["plot", "x", "--prompt", "a", "--tokens", "5"],
        ["doctor", "now"],
    ],
)
def test_wrong_usage(tool: Callable[..., Ended], arguments: list[str]) -> None:
    ended = tool(*arguments)
    assert ended.code == 2 and ended.out == "" and "usage: minference-vllm" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "no.json", "-o", "-"], "no pattern file at 'no.json'"),
        (["convert", "coverage", "-o", "/no/folder/out.json"], "No such file or directory: '/no/folder/out.json'"),
        (["inspect", "no/model"], "no/model"),
        (["inspect", str(DEMO), "--patterns", "no.json"], "no pattern file at 'no.json'"),
        (["plot", str(DEMO), "--head", "3:0"], "no head 3:0; the model has layers 0 to 2, heads 0 to 3"),
    ],
)
def test_expected_errors_are_one_line(tool: Callable[..., Ended], arguments: list[str], message: str) -> None:
    ended = tool(*arguments)
    (line,) = ended.err.splitlines()
    assert ended.code == 1 and line.startswith(f"minference-vllm {arguments[0]}: ") and message in line


def test_commands_without_torch_say_so_in_one_line(tmp_path: Path) -> None:
    """Those that need it; the others do their work."""
    script = f"""
import contextlib, importlib.metadata, io, json, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "vllm", "transformers"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Without())
real = importlib.metadata.version

def version(name):
    if name in ("torch", "vllm", "transformers"):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

importlib.metadata.version = version
from minference_vllm.commands import doctor
from minference_vllm.commands.cli import main
doctor.importlib.util.find_spec = lambda name: None
found = {{}}
for command in json.loads({json.dumps(json.dumps(WITHOUT_TORCH))}):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    found[command[0]] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(found))
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["convert"][0] == 0 and '"kind": "dense"' in found["convert"][1]
    assert found["doctor"][0] == 1 and found["doctor"][2] == ""
    assert "Serving with minference does not work here: torch, vllm, transformers." in found["doctor"][1]
    for name in ("inspect", "plot", "calibrate", "evaluate"):
        line = f"minference-vllm {name}: No module named 'torch'; minference-vllm doctor says what is missing\n"
        assert found[name] == [1, "", line]


WITHOUT_TORCH = [
    ["doctor"],
    ["convert", "dense", "-o", "-"],
    ["inspect", str(DEMO)],
    ["plot", str(DEMO)],
    ["calibrate", str(DEMO), "-o", "file.json"],
    ["evaluate", str(DEMO)],
]


# convert


def test_convert_there_and_back(tool: Callable[..., Ended], tmp_path: Path) -> None:
    published = tmp_path / "published.json"
    published.write_text(json.dumps([{"0": ["stream_llm", 1024, 4096, 0.5], "1": ["block_sparse", 9, 0, 0.75]}]))
    ours, qwen = tmp_path / "ours.json", tmp_path / "qwen.json"
    ended = tool("convert", published, "-o", ours)
    assert ended == (0, "", "left out: the scores of 2 heads; nothing is computed from them\n")
    ended = tool("convert", ours, "-o", qwen, "--to", "qwen")
    assert ended.code == 0 and [line.split(":")[1] for line in ended.err.splitlines()] == [" provenance"]
    ended = tool("convert", qwen, "-o", "-", "--to", "minference")
    assert ended.code == 0 and ended.err == ""
    assert json.loads(ended.out) == [{"0": ["stream_llm", 1024, 4096, 1.0], "1": ["block_sparse", 9, 0, 1.0]}]


def test_convert_writes_nothing_when_it_refuses(tool: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ended = tool("convert", "dense", "-o", out, "--to", "qwen", "--layers", 1, "--heads", 1)
    assert ended.code == 1 and "layer 0, head 0: dense" in ended.err and not out.exists()


# inspect


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
    """The configuration of a heterogeneous model does not say what its layers do not share."""
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


# plot


def test_plot_without_a_prompt_draws_the_pattern_map(tool: Callable[..., Ended], tmp_path: Path) -> None:
    ended = tool("plot", DEMO, "-o", tmp_path / "demo.svg", "--patterns", "vertical_slash_30_2048")
    assert ended == (0, f"{tmp_path / 'demo_patterns.svg'}\n", "")
    assert "vertical_slash: 12" in (tmp_path / "demo_patterns.svg").read_text()


def test_plot_a_prompt(tool: Callable[..., Ended], tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the teacher carried the red book to the old market . " * 90)
    patterns = pattern_file(tmp_path / "patterns.json")
    common = ["plot", DEMO, "--prompt", prompt, "--patterns", patterns, "--chunk", 512, "-o", tmp_path / "demo.svg"]
    ended = tool(*common, "--min-context", 0, "--head", "0:1", "--head", "2:3")
    assert ended.code == 0, ended.err
    names = ("demo_patterns.svg", "demo_layers.svg", "demo_layer0_head1.svg", "demo_layer2_head3.svg")
    assert ended.out.splitlines() == [str(tmp_path / name) for name in names]
    sparse, dense = ((tmp_path / name).read_text() for name in names[2:])
    assert "991 tokens in chunks of 512, layer 0, head 1: a_shape(sink=64, local=256)" in sparse
    assert "keys computed: 100.0%" in dense and "keys computed: 100.0%" not in sparse
    # Without a named head the one with the lowest recall is drawn; below min_context everything is dense.
    ended = tool(*common)
    assert ended.code == 0 and "all of it is dense" in ended.err and len(ended.out.splitlines()) == 3


def test_plot_a_generated_prompt(tool: Callable[..., Ended], tmp_path: Path) -> None:
    ended = tool("plot", DEMO, "--tokens", 600, "--min-context", 0, "-o", tmp_path / "demo.png")
    assert ended.code == 0 and len(ended.out.splitlines()) == 3
    for line in ended.out.splitlines():
        assert Path(line).read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_what_it_cannot_draw(tool: Callable[..., Ended], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert f"{empty} is empty" in tool("plot", DEMO, "--prompt", empty, "-o", tmp_path / "x.png").err
    assert "No such file" in tool("plot", DEMO, "--prompt", tmp_path / "no.txt", "-o", tmp_path / "x.png").err
    for device in ("foo", "meta", "cuda:9999"):
        ended = tool("plot", DEMO, "--device", device, "-o", tmp_path / "x.png")
        (line,) = ended.err.splitlines()
        assert ended.code == 1 and line.startswith(f"minference-vllm plot: --device {device!r}: ")
    mamba = model(tmp_path / "mamba", model_type="mamba", architectures=["MambaForCausalLM"], dtype="bfloat16")
    ended = tool("plot", mamba, "-o", tmp_path / "x.png")
    assert ended.code == 1 and ended.err.startswith(f"minference-vllm plot: minference cannot serve {mamba}: it has no")
    windowed = model(tmp_path / "mistral", **{**LLAMA, "model_type": "mistral", "sliding_window": 64})
    ended = tool("plot", windowed, "--head", "0:0", "-o", tmp_path / "x.png")
    assert ended.code == 1 and "head 0:0 runs no pattern; dense: sliding window" in ended.err


# doctor


def test_doctor_finds_this_machine_ready(tool: Callable[..., Ended]) -> None:
    ended = tool("doctor")
    assert ended.code == 0, ended.out
    assert "!!" not in ended.out and "minference is minference_vllm.backend." in ended.out
    assert ended.out.splitlines()[-1] == "Ready: vllm serve MODEL --attention-backend minference"
    assert all(f"kernel {name}" in ended.out for name in ("block_table", "fa4", "native", "triton"))


def test_doctor_names_a_plugin_that_is_left_out(tool: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "minference_cpu")
    ended = tool("doctor")
    assert ended.code == 1 and "VLLM_PLUGINS=minference_cpu leaves minference out" in ended.out
    assert "does not work here: attention backend" in ended.out


@pytest.mark.parametrize("amx", [False, True])
def test_doctor_says_that_sparse_pays_later_with_amx(
    tool: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert ("sparse pays later: try 16384" in tool("doctor").out) == amx


def test_doctor_prints_its_own_lines_alone() -> None:
    """Also from the checkout's root, where ``python -m`` finds our folder ``triton_kernels``. In a fresh process:
    packages log while they are first imported. Ready, too, where vLLM loads no platform plugins."""
    done = subprocess.run(
        [sys.executable, "-m", "minference_vllm", "doctor"],
        cwd=DEMO.parents[2],
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_PLUGINS": "minference"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert all(line[:2] in ("ok", "--", "  ", "", "Re") for line in done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize(
    ("module", "unspecified", "remedy"),
    [
        ("vllm.platforms.interface", True, "install the vLLM built for this machine"),
        ("vllm.platforms.rocm", False, "minference has kernels for no other device"),
        ("somebody.elses", False, "leave the plugin that brings it out: VLLM_PLUGINS=minference"),
    ],
)
def test_doctor_names_a_platform_that_is_not_ours(
    tool: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, module: str, unspecified: bool, remedy: str
) -> None:
    kinds = {"is_cpu": False, "is_cuda": False, "is_unspecified": unspecified}
    methods = {name: staticmethod(lambda answer=answer: answer) for name, answer in kinds.items()}
    platform = type("Other", (), {"__module__": module, **methods})()
    monkeypatch.setattr(compat, "vllm_platform", lambda: platform)
    ended = tool("doctor")
    assert ended.code == 1 and f"{module}.Other: neither CPU nor CUDA" in ended.out and remedy in ended.out
    assert "does not work here: platform." in ended.out


def test_doctor_names_platform_plugins_of_which_vllm_takes_one(
    tool: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("Only one platform plugin can be activated, but got: ['a', 'b']")

    monkeypatch.setattr(compat, "vllm_platform", refuse)
    ended = tool("doctor")
    assert ended.code == 1 and "got: ['a', 'b']" in ended.out
    assert "name minference and the one to keep in VLLM_PLUGINS" in ended.out


def test_doctor_names_a_slot_that_is_taken(tool: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "resolved_class", lambda: None)
    ended = tool("doctor")
    assert ended.code == 1 and "another plugin has taken vLLM's slot" in ended.out

    def refuse() -> None:
        raise RuntimeError("other.Backend has taken it")

    monkeypatch.setattr(registration, "register_name", refuse)
    ended = tool("doctor")
    assert ended.code == 1 and "other.Backend has taken it" in ended.out


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("0.25.1", "supports vLLM 0.26 to 0.33, found 0.25.1"),
        ("0.34.0", "found 0.34.0"),
        (None, "not installed as a distribution"),
    ],
)
def test_doctor_names_a_vllm_that_does_not_fit(
    tool: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, version: str | None, text: str
) -> None:
    real = importlib.metadata.version

    def found(name: str) -> str:
        if name != "vllm":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    ended = tool("doctor")
    assert ended.code == 1 and text in ended.out and "pip install 'vllm>=0.26,<0.34'" in ended.out


def test_doctor_survives_a_vllm_that_cannot_be_used(
    tool: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(doctor, "device", broken)
    ended = tool("doctor")
    assert ended.code == 1 and "cannot be used: RuntimeError: undefined symbol" in ended.out
