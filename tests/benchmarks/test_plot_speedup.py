"""The picture of the attention benchmark's rows: which lines it draws, and files that can be read."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

import plot_speedup
from record import append

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "attention_cpu.csv"
ROW = {"pattern": "coverage", "context": 32768, "chunk": 8192, "dense_s": 6.0, "attend_s": 1.0, "machine": "this one"}
OURS = ROW | {"kernel": "triton", "speedup": 4.0}
PEER = ROW | {"peer": "flex", "speedup": 3.0, "computes": "the index"}


def write(path: Path, *rows: dict[str, object]) -> Path:
    for row in rows:
        append(path, row)
    return path


def test_lines_have_kernels_whole_and_alone_and_peers_alone(tmp_path: Path) -> None:
    longer = {"context": 65536, "speedup": 8.0}
    rows = plot_speedup.read(write(tmp_path / "rows.csv", OURS, PEER, OURS | longer, OURS | {"speedup": 5.0}))
    assert plot_speedup.lines(rows) == {
        ("triton", "whole"): {32768: 5.0, 65536: 8.0},
        ("triton", "alone"): {32768: 6.0, 65536: 6.0},
        ("flex", "alone"): {32768: 3.0},
    }
    assert plot_speedup.computed(rows) == {"flex": "the index"}


def test_only_the_last_rows_machine_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", OURS | {"machine": "another"}, OURS, PEER)
    assert [row["kernel"] for row in plot_speedup.read(path)] == ["triton", ""]


def test_a_picture_says_what_it_shows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", OURS, PEER, OURS | {"context": 8192, "dense_kernel": "FlashAttention 3"})
    target = tmp_path / "pictures" / "speedup.svg"
    plot_speedup.draw(plot_speedup.read(path), target)
    # Text is drawn as outlines, each preceded by a comment with its characters.
    text = target.read_text()
    for words in ("this one", "coverage: whole prompts", "coverage: the last 8K tokens", "context (tokens)", "32K"):
        assert words in text
    for words in ("FlashAttention 3 (times)", "flex: attention alone, the index", "triton: estimate, index"):
        assert words in text
    ElementTree.fromstring(text)


def test_the_committed_rows_can_be_drawn(tmp_path: Path) -> None:
    target = tmp_path / "speedup.png"
    plot_speedup.draw(plot_speedup.read(COMMITTED), target)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "rows.csv"
    empty.write_text("kernel,machine\n")
    with pytest.raises(ValueError, match="has no rows"):
        plot_speedup.read(empty)
