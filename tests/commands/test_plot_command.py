"""``minference-vllm plot``: what it draws, and what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from command_inputs import DEMO, LLAMA, Ended, model, pattern_file


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
    # By default the head with the lowest recall is drawn; below min_context everything is dense.
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
