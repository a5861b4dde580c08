"""Find the fastest of several kernels on this machine by timing them in turns.

The clock is a parameter, so that nothing here needs a GPU.
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
"""Runs a function and returns the seconds that it took."""
ROUNDS = 5
"""Measurements of each kernel per case; the median counts."""
SECONDS = 20.0
"""Time budget of all trials of a process together."""


def gpu_clock(device: torch.device) -> Clock:
    """A clock that measures GPU time by events. The function first runs once without a synchronisation, so that
    launches are queued ahead of the GPU, as in serving."""

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
    """Remaining seconds for trials."""

    left: float = SECONDS


@dataclass
class Trial:
    """Some kernels that are timed case by case until the budget is used up.

    A running step cannot be interrupted: a kernel that takes long to compile may exceed the budget, and is the last to
    run.
    """

    names: Sequence[str]
    """Names of the kernels; the first is chosen if nothing could be timed."""
    clock: Clock
    budget: Budget = field(default_factory=Budget)
    now: Callable[[], float] = time.perf_counter
    """Returns the time in seconds, to account for the budget."""
    medians: list[dict[str, float]] = field(default_factory=list)
    """For each case: the median seconds of each kernel that could run it."""
    failed: dict[str, str] = field(default_factory=dict)
    """Excluded kernels, and the reasons."""

    @property
    def is_over(self) -> bool:
        """Whether the budget is used up; then not every case was timed as often as planned."""
        return self.budget.left <= 0

    @property
    def left(self) -> list[str]:
        """The kernels that have not failed."""
        return [name for name in self.names if name not in self.failed]

    def attempt(self, name: str, step: Callable[[], T]) -> T | None:
        """The result of the step; None if it raises, which excludes the kernel.

        Raises:
            torch.OutOfMemoryError: there is not enough memory for the trial, which says nothing about the kernel.
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
        """Time one case, given the function to run for each kernel. Kernels take turns, so that a change of the GPU's
        clock rate affects all of them."""
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
        """Total seconds over all cases of each kernel that has not failed; empty if no case was timed."""
        if not self.medians:
            return {}
        return {name: sum(median[name] for median in self.medians) for name in self.left}

    def fastest(self) -> str:
        """The kernel with the smallest total time; if nothing was timed, the first that has not failed.

        Raises:
            RuntimeError: all kernels have failed; the message has the reason of each.
        """
        if not self.left:
            raise RuntimeError("; ".join(f"kernel {name!r}: {reason}" for name, reason in self.failed.items()))
        totals = self.totals()
        return min(totals, key=totals.__getitem__) if totals else self.left[0]
