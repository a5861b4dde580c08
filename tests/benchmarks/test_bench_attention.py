"""The attention benchmark's rows and refusals, on a prompt too short for meaningful timings."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

import bench_attention
from peers import PEERS, Kind, Peer, Problem, everything
from record import append

from minference_vllm import reference


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: object) -> int:
        sizes = {"context": 400, "heads": 2, "kv-heads": 1, "head-size": 64, "block-size": 32, "tile": 64, "repeat": 1}
        fixed = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        argv = ["bench_attention.py", *fixed, "--kernel", "block_table", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        return bench_attention.main()

    return run


def dense(problem: Problem) -> Peer:
    keys, values = (rows.transpose(0, 1) for rows in (problem.keys, problem.values))
    index = everything(problem.index)
    out = reference.masked_attention(problem.query, keys, values, index.to_mask(), problem.scale)
    return Peer("all keys", index, lambda: out)


def wrong(problem: Problem) -> Peer:
    return Peer("the index", problem.index, lambda: torch.zeros_like(problem.query))


def unwritten(problem: Problem) -> Peer:
    return Peer("the index", problem.index, lambda: torch.full_like(problem.query, torch.nan))


def broken(problem: Problem) -> Peer:
    raise RuntimeError("no such kernel")


def test_peers_that_cannot_run_are_named_before_anything_is_measured(
    bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PEERS, "xformers", Kind(dense, lambda size: f"not at chunk {size.chunk} with {size.tile} rows"))
    monkeypatch.setattr(bench_attention, "measure", lambda *arguments: pytest.fail("something was measured"))
    with pytest.raises(SystemExit):
        bench("--peer", "xformers")
    said = capsys.readouterr().err
    assert "peer 'xformers' cannot run at context 400, chunk 400: not at chunk 400 with 64 rows" in said


def test_a_peers_failure_costs_its_own_row_only(
    bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = {"flex": broken, "xformers": dense, "vllm_sparse": wrong, "minference": unwritten}
    for name, prepare in peers.items():
        monkeypatch.setitem(PEERS, name, Kind(prepare, lambda size: None))
    file = tmp_path / "rows.csv"
    assert bench("--peer", *peers, "--pattern", "a_shape", "--csv", file) == 1
    ours, peer = csv.DictReader(file.open())
    assert (ours["kernel"], ours["peer"]) == ("block_table", "")
    assert (peer["kernel"], peer["peer"], peer["computes"]) == ("", "xformers", "all keys")
    assert float(peer["density"]) == float(peer["recall"]) == 1.0
    assert float(peer["speedup"]) == pytest.approx(float(peer["dense_s"]) / float(peer["attend_s"]), rel=1e-3)
    said = capsys.readouterr().err
    assert "peer 'flex', context 400, a_shape: RuntimeError: no such kernel" in said
    assert "peer 'vllm_sparse'" in said and "is off by 1 of the largest output" in said
    assert "peer 'minference'" in said and "is off by nan of the largest output" in said


def test_a_wrong_answer_of_ours_is_not_timed_either(
    bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_attention, "sampled_check", lambda *arguments: (math.nan, 1.0))
    assert bench("--pattern", "a_shape") == 1
    printed = capsys.readouterr()
    assert not printed.out and "kernel 'block_table', context 400, a_shape: its answer is off by nan" in printed.err


def test_rows_go_under_the_columns_that_a_file_has(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "rows.csv"
    append(file, {"a": 1, "b": "x, y"})
    append(file, {"b": 2})
    append(file, {"c": 3, "a": 4})
    assert file.read_text().split() == ["a,b,c", '1,"x,', 'y",', ",2,", "4,,3"]
    assert [path.name for path in file.parent.iterdir()] == ["rows.csv"]
