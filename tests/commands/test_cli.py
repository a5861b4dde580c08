"""The command line tool: its common parts, and its errors for wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_inputs import DEMO, Ended

from minference_vllm import __version__
from minference_vllm.commands.cli import COMMANDS


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
    """Only commands that need torch; the others still work."""
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
