"""The single command for GPU owners, without a GPU: what it would run, what it skips, and how it stops."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import pytest
from gpu_check import MINUTES, QUICK_MINUTES, Command, Done, Skipped
from peers import PEERS, Kind, Size

from minference_vllm.kernels import choice_cache

CONTEXTS = gpu_check.CONTEXTS


def option(command: Command, name: str) -> list[str]:
    """The values of an option in a command."""
    rest = command.words[command.words.index(name) + 1 :]
    return rest[: next((place for place, word in enumerate(rest) if word.startswith("--")), len(rest))]


@pytest.fixture
def peers_that_run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def only(**reasons: Callable[[Size], str | None]) -> None:
        for name in PEERS:
            reason = reasons.get(name, lambda size: "it is not installed")
            monkeypatch.setitem(PEERS, name, Kind(PEERS[name].prepare, reason))

    return only


def test_attention_runs_the_peers_that_can_and_names_the_others_once(peers_that_run: Callable[..., None]) -> None:
    peers_that_run(
        flex=lambda size: None, minference=lambda size: None if size.chunk == size.context else "whole prompts alone"
    )
    items = list(gpu_check.attention(CONTEXTS, quick=False))
    commands = [item for item in items if isinstance(item, Command)]
    assert items[len(commands) :] == [
        Skipped("peer xformers", "it is not installed"),
        Skipped("peer vllm_sparse", "it is not installed"),
        Skipped("peer minference", "whole prompts alone"),
    ]
    for command in commands:
        whole = option(command, "--context") == option(command, "--chunk")
        assert option(command, "--peer") == (["flex", "minference"] if whole else ["flex"])
    assert {int(option(command, "--context")[0]) for command in commands} == set(CONTEXTS)
    assert all(int(option(command, "--chunk")[0]) <= gpu_check.LONGEST_WHOLE for command in commands)


def test_without_peers_attention_names_none(peers_that_run: Callable[..., None]) -> None:
    peers_that_run()
    first, *_ = gpu_check.attention(CONTEXTS, quick=False)
    assert isinstance(first, Command) and "--peer" not in first.words


def test_a_quick_run_has_two_contexts_and_ten_minutes(peers_that_run: Callable[..., None]) -> None:
    peers_that_run(flex=lambda size: None)
    commands = [item for item in gpu_check.items_of("attention", True, CONTEXTS[-1]) if isinstance(item, Command)]
    assert {option(command, "--context")[0] for command in commands} == {"32768", "131072"}
    assert sum(QUICK_MINUTES.values()) <= 10
    assert set(QUICK_MINUTES) <= set(MINUTES)


def test_the_benchmarks_take_the_arguments(
    monkeypatch: pytest.MonkeyPatch, peers_that_run: Callable[..., None]
) -> None:
    """The benchmark scripts parse every command themselves and stop before measuring."""
    pytest.importorskip("vllm")
    import bench_attention
    import bench_ttft

    peers_that_run(**{name: lambda size: None for name in PEERS})
    monkeypatch.setattr(gpu_check, "installed", lambda module: True)
    monkeypatch.setattr(bench_attention, "measure", lambda *arguments: [])
    monkeypatch.setattr(bench_attention.torch, "set_default_device", lambda device: None)
    read: list[SimpleNamespace] = []
    monkeypatch.setattr(bench_ttft, "write_model", lambda folder, args: read.append(args))
    monkeypatch.setattr(bench_ttft, "Engine", SimpleNamespace)
    for step in ("attention", "ttft"):
        for item in gpu_check.items_of(step, False, CONTEXTS[-1]):
            assert isinstance(item, Command)
            monkeypatch.setattr(sys, "argv", item.words[1:])
            if step == "attention":
                assert bench_attention.main() == 0
            else:
                with pytest.raises(TypeError):  # where the engine would start
                    bench_ttft.main()
    assert [args.context[-1] for args in read] == [262144, 1048576]
    assert {(args.intermediate, args.heads, args.kv_heads) for args in read} == {(14336, 32, 8)}


def test_the_sanitizer_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda program: None)
    (skipped,) = gpu_check.items_of("sanitizer", False, 0)
    assert isinstance(skipped, Skipped) and "compute-sanitizer is not installed" in skipped.reason
    monkeypatch.setattr(gpu_check.shutil, "which", lambda program: f"/cuda/bin/{program}")
    for item, tool in zip(gpu_check.items_of("sanitizer", False, 0), ("memcheck", "racecheck"), strict=True):
        assert isinstance(item, Command) and item.words[:3] == ["/cuda/bin/compute-sanitizer", "--tool", tool]
        assert option(item, "--error-exitcode")[0] != "0"
        files = [gpu_check.ROOT / word for word in item.words if word.startswith("tests/")]
        assert files and all(file.is_file() for file in files)


def test_what_needs_vllm_or_matplotlib_or_rows_is_skipped_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "installed", lambda module: False)
    for step, missing in (("choice", "vLLM"), ("engine", "vLLM"), ("ttft", "vLLM"), ("plot", "matplotlib")):
        (item,) = gpu_check.items_of(step, False, CONTEXTS[-1])
        assert isinstance(item, Skipped) and f"{missing} is not installed" in item.reason
    monkeypatch.setattr(gpu_check, "installed", lambda module: True)
    (item,) = gpu_check.items_of("plot", False, CONTEXTS[-1], tmp_path)
    assert item == Skipped("picture of the attention rows", "there are no rows")


def test_the_kernels_that_engines_took_on_this_gpu_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_name", lambda: "a GPU")
    choice = choice_cache.Choice("triton", {"triton": 0.002, "block_table": 0.003})
    for gpu, layer in (("a GPU", "32 heads"), ("another", "8 heads")):
        key = {"gpu": gpu, "layer": layer, "vllm": "0.33.0", "torch": "2.14.0", "chunk_len": 8192, "seq_len": 65536}
        choice_cache.store(choice_cache.default_folder(), key, choice)
    (line,) = gpu_check.kept_choices()
    assert line.startswith("auto chose 'triton' 2.00 ms, 'block_table' 3.00 ms (1.50 times as long), for the last 8192")
    assert line.endswith("layers of 32 heads; vllm 0.33.0, torch 2.14.0")


def python(code: str, *environment: tuple[str, str]) -> Command:
    return Command("a script", [sys.executable, "-c", code], environment)


def test_commands_end_with_a_verdict() -> None:
    assert gpu_check.run(python("")) == "ok"
    assert gpu_check.run(python("raise SystemExit(3)")) == "failed (3)"
    assert gpu_check.run(python("import os; raise SystemExit(os.environ['STATUS'] != 'x')", ("STATUS", "x"))) == "ok"


def test_what_runs_out_of_time_is_stopped_with_its_children(tmp_path: Path) -> None:
    written = tmp_path / "child"
    script = f"sleep 60 & echo $! > {shlex.quote(str(written))}; wait"
    began = time.monotonic()
    assert gpu_check.run(Command("a script", ["sh", "-c", script]), 1.0) == "stopped"
    assert time.monotonic() - began < 30
    # Nobody but init waits for the child, so it may stay as a zombie.
    status = Path(f"/proc/{written.read_text().strip()}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_only_a_quick_run_stops_a_step_whose_minutes_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float | None] = []

    def items(*arguments: object) -> Iterator[gpu_check.Item]:
        yield Skipped("one", "not here")
        yield Command("two", [])

    def run(command: Command, seconds: float | None) -> str:
        limits.append(seconds)
        return "ok"

    monkeypatch.setattr(gpu_check, "items_of", items)
    monkeypatch.setattr(gpu_check, "run", run)
    verdicts = [(title, verdict) for title, verdict, _ in gpu_check.check({"tests": 0}, False, 0)]
    assert verdicts == [("one: not here", "skipped"), ("two", "ok")] and limits == [None]
    assert list(gpu_check.check({"tests": 0}, True, 0))[1] == Done("two: out of time", "stopped", 0.0)
    assert list(gpu_check.check({"tests": 1}, True, 0))[1].verdict == "ok"
    assert limits[1] is not None and 0 < limits[1] <= 60


def test_without_a_gpu_nothing_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "check", lambda *arguments: pytest.fail("something ran"))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_every_command_of_a_rehearsal_runs_without_a_gpu(tmp_path: Path) -> None:
    """GPU commands run through ``rehearsal.py`` or on the CPU; sizes are small, and no row is kept."""
    for step in MINUTES:
        for item in gpu_check.items_of(step, False, CONTEXTS[-1], tmp_path, rehearse=True):
            if isinstance(item, Skipped):
                continue
            assert item.words[0] == sys.executable and "--peer" not in item.words, item
            assert "cuda" not in item.words or item.words[1] == "tools/rehearsal.py"
            assert str(gpu_check.RESULTS) not in " ".join(item.words)
            for name in set(gpu_check.TOKENS) & set(item.words):
                assert all(0 < int(number) <= 4096 for number in option(item, name))
            for name in set(gpu_check.SMALL) & set(item.words):
                assert option(item, name) == [gpu_check.SMALL[name]]


@pytest.mark.timeout(600)
def test_a_rehearsal(tmp_path: Path) -> None:
    """The kernel of ``auto``, attention on 128 tokens, each of our kernels checked against float64, and the picture of
    its rows."""
    pytest.importorskip("triton")
    pytest.importorskip("vllm")
    words = [sys.executable, "tools/gpu_check.py", "--rehearse", "--quick", "--only", "choice", "attention", "plot"]
    done = subprocess.run(words, cwd=gpu_check.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("kernel=")]
    assert {line.split()[0] for line in rows} == {"kernel=triton", "kernel=block_table"}
    kinds = [line for line in done.stdout.splitlines() if line.startswith("pages of ")]
    assert len(kinds) == 6 and all("'triton' " in line and "'block_table' " in line for line in kinds)
    *before, header, first = done.stdout.split("\n\n")[-1].splitlines()[:2]
    assert not before and header.split()[:4] == ["context", "goal", "layer", "met"]
    # A row that stands for 32K tokens.
    assert first.split()[:2] == ["32,768", "5x"] and first.split()[3] in ("yes", "no")
    assert [line.split()[0] for line in done.stdout.split("\n\n")[-2].splitlines()[1:]][-1] == "ok"


def test_an_interrupted_run_still_says_what_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> Iterator[Done]:
        yield Done("tests of one layer", "ok", 5.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_check, "check", interrupted)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--quick", "--only", "tests", "ttft"])
    assert gpu_check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"a GPU: tests {QUICK_MINUTES['tests']} min, ttft {MINUTES['ttft']} min;"
    end = lines.index("")
    assert [line.split()[0] for line in lines[3:] if line.startswith(("ok", "stopped"))] == ["ok", "stopped"], lines
    assert end >= 2
