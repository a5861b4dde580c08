"""``minference-vllm doctor``: what it finds on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from command_inputs import DEMO, Ended

from minference_vllm.backend import compat, registration
from minference_vllm.commands import doctor


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
    assert f"sparse pays {'later: try 16384' if amx else 'sooner: try 4096'}" in tool("doctor").out


def test_doctor_prints_its_own_lines_alone() -> None:
    """Also from the checkout's root, where ``python -m`` finds our folder ``triton_kernels``. In a fresh process, since
    packages log when first imported. It is also ready if vLLM loads no platform plugins."""
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
