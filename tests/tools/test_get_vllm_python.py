"""Getting the Python files of a CUDA release: existing files are kept; failures leave nothing behind. No download."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import get_vllm_python
import pytest
from get_smollm2 import MakeError

FILES = ("vllm/__init__.py", "vllm/configs/tuned.json", "vllm/_C.abi3.so", "vllm-1.0.dist-info/METADATA")


def answer(monkeypatch: pytest.MonkeyPatch, *files: str) -> list[str]:
    """Stand in for pip, which downloads a wheel with these files; returns the requests to it."""
    asked: list[str] = []

    def download(requirement: str, folder: Path, *options: str) -> Path:
        asked.extend([requirement, *options])
        wheel = folder / "vllm-1.0-cp38-abi3-manylinux_2_28_x86_64.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in files:
                archive.writestr(name, name)
        return wheel

    monkeypatch.setattr(get_vllm_python, "download_wheel", download)
    return asked


def test_python_and_json_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, folder = answer(monkeypatch, *FILES), tmp_path / "1.0"
    monkeypatch.setattr(sys, "argv", ["get_vllm_python.py", "1.0", "--output", str(folder)])
    for _ in range(2):
        get_vllm_python.main()
        assert capsys.readouterr().out == f"{folder}\n"
    assert asked == ["vllm==1.0", *get_vllm_python.PLATFORM], "downloaded once"
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["vllm/__init__.py", "vllm/configs/tuned.json"]
    assert list(tmp_path.iterdir()) == [folder], "the wheel is gone"


def test_the_cache_is_where_the_user_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert get_vllm_python.default_folder("0.33.0") == tmp_path / "minference-vllm" / "vllm-python" / "0.33.0"


@pytest.mark.parametrize(
    ("files", "free", "problem"),
    [
        (("other/__init__.py",), 1 << 40, "has no Python files of vLLM"),
        (FILES, 1 << 20, "has 1 MB of free space, 1024 MB are needed"),
    ],
)
def test_what_fails_leaves_nothing_behind(
    files: tuple[str, ...], free: int, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, *files)
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(MakeError, match=problem):
        get_vllm_python.make("1.0", tmp_path / "1.0")
    assert list(tmp_path.iterdir()) == []


def test_other_content_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MakeError, match="exists and holds no vLLM"):
        get_vllm_python.make("1.0", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
