"""The table of goals: which rows it uses, and what it prints for them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import gpu_goals


def write(path: Path, *rows: dict[str, Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def layer(context: int, speedup: float, **changed: Any) -> dict[str, Any]:
    row = {"kernel": "triton", "pattern": "default_cuda", "context": context, "chunk": 8192, "density": 0.05}
    row |= {
        "estimate_s": 0.001,
        "index_s": 0.001,
        "sparse_s": 0.01,
        "speedup": speedup,
        "attend_tflops": 350,
        "peer": "",
    }
    return row | changed


def test_the_best_row_of_the_default_stands_beside_its_goal(tmp_path: Path) -> None:
    rows = write(
        tmp_path / "attention.csv",
        layer(32768, 4.0),
        layer(32768, 5.5, kernel="block_table"),
        layer(32768, 9.0, pattern="a_shape"),
        layer(32768, 9.0, chunk=32768),
        layer(32768, 9.0, peer="flex"),
        layer(131072, 12.0),
    )
    engines = write(
        tmp_path / "ttft.csv",
        {"context": 131072, "pattern": "default_cuda", "ttft_ratio": 0.2},
        {"context": 131072, "pattern": "a_shape", "ttft_ratio": 0.25},
    )
    header, *lines = gpu_goals.table(rows, engines)
    assert header.split()[:4] == ["context", "goal", "layer", "met"] and len(lines) == len(gpu_goals.GOALS)
    assert lines[0].split() == ["32,768", "5x", "5.5x", "yes", "block_table", "0.050", "20%", "350", "-"]
    assert lines[1].split() == ["65,536", "8x", *"------", "-"]
    assert lines[2].split() == [
        "131,072",
        "18x",
        "12.0x",
        "no",
        "triton",
        "0.050",
        "20%",
        "350",
        "5.0x,",
        "default_cuda",
    ]


def test_without_rows_nothing_is_claimed(tmp_path: Path) -> None:
    for line in list(gpu_goals.table(tmp_path / "none.csv", tmp_path / "none.csv"))[1:]:
        assert set(line.split()[2:]) == {"-"}


def test_a_rehearsals_tokens_stand_for_more(tmp_path: Path) -> None:
    rows = write(tmp_path / "attention.csv", layer(128, 2.0, chunk=32))
    assert list(gpu_goals.table(rows, tmp_path / "none.csv", 256))[1].split()[2:4] == ["2.0x", "no"]
