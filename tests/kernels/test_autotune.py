"""Kernels timed in turns: what counts, what is left out, and what happens when the time is used up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from minference_vllm.kernels.autotune import ROUNDS, Budget, Run, Trial, gpu_clock

NAMES = ("triton", "block_table")


class Machine:
    """Kernels that take the given seconds, and a clock for them."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.time, self.calls = seconds, 0.0, list[str]()

    def runs(self) -> dict[str, Run]:
        return {name: self._run(name) for name in self.seconds}

    def _run(self, name: str) -> Run:
        def run() -> None:
            self.calls.append(name)
            self.time += self.seconds[name]

        return run

    def clock(self, run: Run) -> float:
        begin = self.time
        run()
        return self.time - begin

    def trial(self, seconds: float = 20.0) -> Trial:
        return Trial(NAMES, self.clock, Budget(seconds), lambda: self.time)


def broken(error: Exception) -> Run:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize("fastest", NAMES)
def test_the_faster_one_wins_over_all_cases(fastest: str) -> None:
    trial = Machine().trial()
    slower = next(name for name in NAMES if name != fastest)
    for seconds in ({fastest: 0.02, slower: 0.01}, {fastest: 0.01, slower: 0.03}):
        machine = Machine(**seconds)
        trial.clock, trial.now = machine.clock, lambda machine=machine: machine.time  # type: ignore[misc]
        trial.measure(machine.runs())
        assert len(machine.calls) == ROUNDS * len(NAMES)
        assert machine.calls[:2] == machine.calls[2:4], "in turns"
    assert trial.fastest() == fastest and not trial.is_over
    assert trial.totals() == pytest.approx({fastest: 0.03, slower: 0.04})


def test_the_median_counts() -> None:
    machine, times = Machine(triton=0.0, block_table=0.0), iter([9, 2, 1, 2, 1, 2, 1, 2, 1, 2])
    trial = machine.trial()
    trial.clock = lambda run: float(next(times))
    trial.measure(machine.runs())
    assert trial.totals() == {"triton": 1.0, "block_table": 2.0}


def test_a_kernel_that_fails_is_left_out_with_its_reason() -> None:
    machine = Machine(triton=0.01, block_table=0.001)
    trial = machine.trial()
    trial.measure(machine.runs())
    trial.measure(machine.runs() | {"block_table": broken(ValueError("no such page"))})
    assert trial.failed == {"block_table": "ValueError: no such page"}
    assert trial.fastest() == "triton" and trial.totals() == pytest.approx({"triton": 0.02})
    trial.measure(machine.runs() | {"triton": broken(RuntimeError("too much shared memory"))})
    with pytest.raises(
        RuntimeError, match=r"'block_table': ValueError: no such page; kernel 'triton': .* shared memory"
    ):
        trial.fastest()


def test_missing_memory_says_nothing_about_a_kernel() -> None:
    machine = Machine(triton=0.01, block_table=0.001)
    trial = machine.trial()
    with pytest.raises(torch.OutOfMemoryError):
        trial.measure(machine.runs() | {"block_table": broken(torch.OutOfMemoryError("all is taken"))})
    assert trial.left == list(NAMES) and trial.fastest() == "triton"


@pytest.mark.parametrize(
    ("seconds", "calls", "fastest"),
    [(0.0, 0, "triton"), (0.5, 1, "triton"), (1.1, 2, "block_table"), (1.6, 3, "block_table")],
    ids=["no time", "one was timed", "both", "one twice"],
)
def test_what_was_timed_when_the_time_is_used_up(seconds: float, calls: int, fastest: str) -> None:
    machine = Machine(triton=1.0, block_table=0.5)
    trial = machine.trial(seconds)
    trial.measure(machine.runs())
    assert len(machine.calls) == calls and trial.is_over
    assert trial.fastest() == fastest
    trial.measure(machine.runs())
    assert len(machine.calls) == calls, "the next case is not begun"


def test_the_budget_is_that_of_several_trials_and_counts_what_comes_before_the_timing() -> None:
    machine, budget = Machine(triton=1.0, block_table=1.0), Budget(3.5)
    first, second = (Trial(NAMES, machine.clock, budget, lambda: machine.time) for _ in range(2))
    assert first.attempt("triton", lambda: machine.clock(machine.runs()["triton"])) == 1.0
    second.measure(machine.runs())
    assert len(machine.calls) == 4 and first.is_over


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls to stand-ins for CUDA events."""
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("wait"))
    return asked


def test_the_clock_of_a_gpu_runs_once_before_what_it_times(events: list[str]) -> None:
    clock: Callable[[Run], float] = gpu_clock(torch.device("cuda"))
    assert clock(lambda: events.append("run")) == 0.25
    assert events == ["run", "record", "run", "record", "wait"]


def test_kernels_that_are_not_named_are_never_run() -> None:
    machine = Machine(triton=1.0, block_table=0.5, other=0.1)
    runs: Mapping[str, Run] = machine.runs()
    machine.trial(100).measure(runs)
    assert set(machine.calls) == set(NAMES)
