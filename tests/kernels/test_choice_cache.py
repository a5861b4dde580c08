"""The fastest kernel on disk: found again by the same key, written atomically; files with other content are ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.kernels import choice_cache
from minference_vllm.kernels.choice_cache import Choice, default_folder, load, path_of, store, stored

KEY = {"gpu": "NVIDIA H100", "torch": "2.14", "layer": "bfloat16, 32 heads", "tile": 128}
CHOICE = Choice("triton", {"triton": 0.002, "block_table": 0.003})
NAMES = ["triton", "block_table"]


@pytest.fixture(autouse=True)
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of the log."""
    lines: list[str] = []
    choice_cache._warn_once.cache_clear()
    monkeypatch.setattr(choice_cache.logger, "warning", lambda message, *values: lines.append(message % values))
    return lines


def test_what_was_stored_is_found_by_the_same_key_alone(tmp_path: Path, warnings: list[str]) -> None:
    folder = tmp_path / "made" / "on the way"
    assert load(folder, KEY, NAMES) is None
    store(folder, KEY, CHOICE)
    assert load(folder, KEY, NAMES) == CHOICE
    for name in KEY:
        assert load(folder, KEY | {name: "other"}, NAMES) is None
    assert list(stored(folder)) == [(KEY, CHOICE)]
    assert not warnings
    assert [path.suffix for path in folder.iterdir()] == [".json"], "nothing is left beside it"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\xff",
        "[" * 100_000,
        {},
        {"key": KEY | {"tile": 64}, "kernel": "triton", "seconds": {"triton": 1.0}},
        {"key": KEY, "kernel": "native", "seconds": {"native": 1.0}},
        {"key": KEY, "kernel": ["triton"], "seconds": {"triton": 1.0}},
        {"key": KEY, "kernel": "triton", "seconds": {"block_table": 1.0}},
        {"key": KEY, "kernel": "triton", "seconds": {"triton": -1.0}},
        {"key": KEY, "kernel": "triton", "seconds": {"triton": 10**400}},
        {"key": KEY, "kernel": "triton", "seconds": {"triton": None}},
        {"key": KEY, "kernel": "triton", "seconds": 3},
    ],
    ids=str,
)
def test_a_file_that_is_none_of_ours_is_ignored_with_a_line(content: Any, tmp_path: Path, warnings: list[str]) -> None:
    path = path_of(tmp_path, KEY)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
    for _ in range(2):
        assert load(tmp_path, KEY, NAMES) is None
    (line,) = warnings
    assert f"{path} is ignored" in line
    list(stored(tmp_path))
    store(tmp_path, KEY, CHOICE)
    assert load(tmp_path, KEY, NAMES) == CHOICE, "it is replaced"


def test_a_folder_in_the_place_of_the_file(tmp_path: Path, warnings: list[str]) -> None:
    path_of(tmp_path, KEY).mkdir()
    assert load(tmp_path, KEY, NAMES) is None
    store(tmp_path, KEY, CHOICE)
    assert len(warnings) == 2
    assert len(list(tmp_path.iterdir())) == 1, "what was begun is removed"


def test_a_folder_that_cannot_be_made(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "file").write_text("")
    store(tmp_path / "file" / "folder", KEY, CHOICE)
    (line,) = warnings
    assert "timed again at the next start" in line


def test_the_folder_is_below_vllms_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert default_folder() == tmp_path / "minference" / "kernels"
    monkeypatch.delenv("VLLM_CACHE_ROOT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "vllm" / "minference" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "vllm" / "minference" / "kernels"


def test_vllm_has_its_cache_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    envs = pytest.importorskip("vllm.envs")
    for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert default_folder().parents[1] == Path(envs.VLLM_CACHE_ROOT)
