"""Which of several kernels is the fastest on this machine: each is run in turns, and timed.

The clock is given, so that nothing here needs a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")
Run = Callable[[], object]
Clock = Callable[[Run], float]
"""Runs what it is given, and returns the seconds that it took."""
ROUNDS = 5
"""Times that each kernel is timed per case; the median counts."""
SECONDS = 20.0
"""What all trials of a process may take together."""


def gpu_clock(device: torch.device) -> Clock:
    """Seconds on the GPU, by events. What is timed runs once before, without being waited for: launches then lie ahead
    of the GPU, as when a model is served."""

    def seconds(run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1000

    return seconds


@dataclass
class Budget:
    """Seconds that are left for trials."""

    left: float = SECONDS


@dataclass
class Trial:
    """Some kernels, timed on one case after the other until the budget is used up.

    What runs cannot be interrupted: a kernel that takes long to compile may exceed the budget, and is the last to run.
    """

    names: Sequence[str]
    """Of the kernels; the first is chosen where nothing could be timed."""
    clock: Clock
    budget: Budget = field(default_factory=Budget)
    now: Callable[[], float] = time.perf_counter
    """The time in seconds, which the budget is spent by."""
    medians: list[dict[str, float]] = field(default_factory=list)
    """Of each case: seconds by kernel, of those that could run it."""
    failed: dict[str, str] = field(default_factory=dict)
    """Kernels that are left out, and why."""

    @property
    def is_over(self) -> bool:
        """Whether the budget is used up; then not every case was timed as often as planned."""
        return self.budget.left <= 0

    @property
    def left(self) -> list[str]:
        """The kernels that have not failed."""
        return [name for name in self.names if name not in self.failed]

    def attempt(self, name: str, step: Callable[[], T]) -> T | None:
        """What the step returns; None where it raises, by which the kernel is left out.

        Raises:
            torch.OutOfMemoryError: the memory of the trial is not there, which says nothing about a kernel.
        """
        before = self.now()
        try:
            return step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"
            return None
        finally:
            self.budget.left -= self.now() - before

    def measure(self, runs: Mapping[str, Run]) -> None:
        """One case: what each kernel runs. Kernels take turns, so that a change of the GPU's clock meets them all."""
        seconds: dict[str, list[float]] = {name: [] for name in self.left}
        for _ in range(ROUNDS):
            for name in list(seconds):
                if self.is_over:
                    break
                took = self.attempt(name, partial(self.clock, runs[name]))
                if took is None:
                    del seconds[name]
                else:
                    seconds[name].append(took)
        if all(seconds.values()):
            self.medians.append({name: statistics.median(taken) for name, taken in seconds.items()})

    def totals(self) -> dict[str, float]:
        """Seconds of each kernel that is left, over all cases; empty where no case was timed."""
        if not self.medians:
            return {}
        return {name: sum(median[name] for median in self.medians) for name in self.left}

    def fastest(self) -> str:
        """The kernel with the least time in total; the first that is left where nothing was timed.

        Raises:
            RuntimeError: none is left; says why of each.
        """
        if not self.left:
            raise RuntimeError("; ".join(f"kernel {name!r}: {reason}" for name, reason in self.failed.items()))
        totals = self.totals()
        return min(totals, key=totals.__getitem__) if totals else self.left[0]
