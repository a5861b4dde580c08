"""The summary of ``soak.py``, and the problems that make a run fail."""

from __future__ import annotations

import itertools
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from record import environment
from soak_clients import CLASSES, Tally
from soak_server import Watched
from soak_watch import MIB, growth

WRONG_SHARE = 0.01
"""Maximum share of answers that may be wrong where vLLM's own backend is right."""
WARM_UP = 0.25
"""Share of the last server's life after which memory should stay constant."""
GROWTH_LIMIT = 60.0
"""MiB per hour."""
LEAST_MINUTES = 8
"""Minimum minutes of samples to distinguish growth from noise."""
SHOWN = 20
"""Maximum number of problems in the summary; the others are counted."""


class Report:
    def __init__(
        self,
        tally: Tally,
        servers: Sequence[Watched],
        dense_wrong: int,
        limit: float,
        longest: int,
        facts: Mapping[str, str],
    ) -> None:
        """
        Args:
            servers: at least one, in order; memory is judged by the last one.
            dense_wrong: number of wrong answers that are also wrong with vLLM's own backend.
            limit: MiB per hour by which memory may grow.
            longest: tokens of a prompt.
            facts: further rows of the summary.
        """
        self.tally, self.servers, self.dense_wrong = tally, servers, dense_wrong
        self.limit, self.longest, self.facts = limit, longest, facts
        self.memory = [(seconds, sum(sizes.values())) for seconds, sizes in servers[-1].memory]
        self.growth = growth(self.memory[int(WARM_UP * len(self.memory)) :])
        self.ours_wrong = len(tally.wrong) - dense_wrong
        self.problems = [*self._happened(), *self._wrong(), *self._lost(), *self._untested(), *self._grown()]

    def text(self) -> str:
        rows = self._rows()
        width = max(map(len, rows))
        lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
        lines += [f"problem: {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"and {len(self.problems) - SHOWN} more problems")
        return "\n".join(lines) + "\n"

    # Problems

    def _happened(self) -> Iterator[str]:
        for text, count in self.tally.problems.items():
            yield f"{count} times: {text}" if count > 1 else text

    def _wrong(self) -> Iterator[str]:
        answers = self.tally.right + len(self.tally.wrong)
        if self.ours_wrong > WRONG_SHARE * answers:
            yield f"{self.ours_wrong} of {answers} answers are wrong where vLLM's own backend is right"

    def _lost(self) -> Iterator[str]:
        if lost := self.tally.sent - self.tally.done:
            yield f"{lost} requests have no end: a client failed"

    def _untested(self) -> Iterator[str]:
        """Events that never happened, which the run did not test."""
        happened = {
            "answers": self.tally.right,
            "streamed answers": self.tally.streamed,
            "cancelled requests": self.tally.cancelled,
            "preemptions": self._total("vllm:num_preemptions_total"),
            "hits of the prefix cache": self._total("vllm:prefix_cache_hits_total"),
            "sparse chunks": self._stats("sparse_chunks"),
        }
        yield from (f"not tested: there were no {what}" for what, count in happened.items() if not count)

    def _grown(self) -> Iterator[str]:
        found = self.growth
        if found is not None and found.minutes >= LEAST_MINUTES and found.slope > self.limit:
            yield f"memory grows by {found.slope:.1f} MiB per hour, more than {self.limit:g}"

    # Rows

    def _rows(self) -> dict[str, Any]:
        tally, measured = self.tally, environment()
        memory = [size / MIB for _, size in self.memory]
        computed, dense = self._stats("computed_pairs"), self._stats("dense_pairs")
        return {
            "machine": measured["machine"],
            "vllm, torch": f"{measured['vllm']}, {measured['torch']}",
            "commit": commit(),
            "command": measured["command"],
            **self.facts,
            "requests": tally.sent,
            "answers": f"{tally.right + len(tally.wrong)}, {tally.streamed} of them streamed",
            "right": f"{tally.right}; wrong by vLLM's own backend, too: {self.dense_wrong}; "
            f"by ours alone: {self.ours_wrong}",
            "cancelled": tally.cancelled,
            "cut off by a kill": tally.cut_off,
            "restarts": len(self.servers) - 1,
            "preemptions": self._total("vllm:num_preemptions_total"),
            "tokens of prompts": self._total("vllm:prompt_tokens_total"),
            "from the prefix cache": self._total("vllm:prefix_cache_hits_total"),
            "sparse chunks": f"{self._stats('sparse_chunks'):.0f}, density {computed / dense if dense else 1:.3f}",
            "memory": f"{memory[-1]:.0f} MiB at the end, {max(memory):.0f} MiB at most (last server)",
            "memory growth": self._growth(),
            **self._first_tokens(),
            "result": "failed" if self.problems else "passed",
        }

    def _total(self, metric: str) -> int:
        """Sum of a vLLM counter over all servers; for killed ones, its value when last read."""
        return round(sum(server.metrics.get(metric, 0) for server in self.servers))

    def _stats(self, name: str) -> float:
        """The same for our own counters."""
        return float(sum(server.stats[name] for server in self.servers))

    def _growth(self) -> str:
        found = self.growth
        if found is None:
            return "too short to fit"
        judged = f"limit {self.limit:g}" if found.minutes >= LEAST_MINUTES else "too short to judge"
        return f"{found.slope:+.1f} ± {found.error:.1f} MiB per hour over {found.minutes} minutes ({judged})"

    def _first_tokens(self) -> dict[str, str]:
        """Percentiles over streamed answers, overall and by prompt length."""
        taken = self.tally.first_tokens
        borders = [0, *(round(greatest * self.longest) for _, _, greatest in CLASSES)]
        rows = {"first token": [seconds for _, seconds in taken]}
        for low, high in itertools.pairwise(borders):
            rows[f"  to {high} tokens"] = [seconds for tokens, seconds in taken if low < tokens <= high]
        return {name: percentiles(seconds) for name, seconds in rows.items() if seconds}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (less than 1) of the values lie."""
    return sorted(values)[int(share * len(values))]


def percentiles(seconds: Sequence[float]) -> str:
    p99 = percentile(seconds, 0.99)
    return f"p50 {statistics.median(seconds):.2f} s, p99 {p99:.2f} s ({len(seconds)} answers)"


def commit() -> str:
    """The commit of this checkout; empty if it is not a git checkout."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
