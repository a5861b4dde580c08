"""``tools/compile_fa4.py``: its reason if it cannot compile, and what it reads from machine code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import compile_fa4
import pytest


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compile_fa4, "NEEDED", {"torch": "torch", "no_such_module": "no-such-package"})
    monkeypatch.setattr("sys.argv", ["compile_fa4"])
    assert compile_fa4.main() == 0
    assert capsys.readouterr().out == ("skipped: FlashAttention 4 is compiled by no-such-package, not installed here\n")


def test_every_variant_is_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(call: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(call)
        return subprocess.CompletedProcess(call, int(call[-1] == "128"))

    monkeypatch.setattr(compile_fa4, "missing_packages", list)
    monkeypatch.setattr(compile_fa4.get_vllm_python, "make", lambda *arguments: None)
    monkeypatch.setattr(compile_fa4.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["compile_fa4", "--arch", "90", "--head-size", "64", "128"])
    assert compile_fa4.main() == 1, "one of them does not compile"
    assert [call[-4:] for call in calls] == [["--arch", "90", "--head-size", size] for size in ("64", "128")]


def test_what_is_read_from_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    answers = {
        "-res-usage": "  REG:128 STACK:160 SHARED:1024 LOCAL:0",
        "-sass": " STL [R1+0x8], R3 ;\n LDL.64 R4, [R1] ;\n HGMMA.64x64x16 ;\n",
    }

    def run(call: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(call, 0, answers[call[1]])

    monkeypatch.setattr(compile_fa4.subprocess, "run", run)
    assert compile_fa4.Code.of(Path("x.cubin")) == compile_fa4.Code(registers=128, stack=160, spills=2)


def test_the_call_compiles() -> None:
    """If FlashAttention 4's packages are installed."""
    missing = compile_fa4.missing_packages()
    if missing:
        pytest.skip(f"FlashAttention 4 is compiled by {' and '.join(missing)}")
    done = subprocess.run(
        [sys.executable, compile_fa4.__file__, "--arch", "90", "--head-size", "128"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout)
    assert done.returncode == 0 and "0 instructions on local memory" in done.stdout, done.stdout + done.stderr[-4000:]
