"""One server of ``soak.py``, monitored under load, and checked before and after."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import tasks
from soak_clients import ANSWER_TOKENS, Request, Tally, send
from soak_watch import (
    account,
    account_problems,
    prometheus_problems,
    read_metrics,
    read_stats,
    resident,
    stats_problems,
)
from vllm_server import Server, log_tail

MODEL = str(Path(__file__).resolve().parents[1] / "examples" / "demo" / "model")
MIN_CONTEXT, MIN_CHUNK, CHUNK = 1024, 256, 2048
SAMPLE_EVERY, STATS_EVERY = 2.0, 10.0
"""Seconds."""
STALLED = 200.0
"""Maximum seconds without the end of any request; longer than a request may take."""
QUIET_TIMEOUT = END_TIMEOUT = 60.0
LEFT = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
"""Metrics that must be 0 after all clients have ended."""


class Watched:
    """A server started with the settings above."""

    def __init__(self, server: Server, tally: Tally, longest: int) -> None:
        """``longest``: tokens of a prompt."""
        self.server, self.tally, self.longest = server, tally, longest
        self.memory: list[tuple[float, dict[str, int]]] = []
        """Seconds of load, and bytes by process name."""
        self.stats = read_stats(server.url)
        """Our counters, as last read."""
        self.metrics: dict[str, float] = {}
        """vLLM's metrics, as last read."""

    def check_alone(self, seed: int) -> None:
        """Check the answer of a prompt that is served alone, and its effect on the counters."""
        prompt = tasks.needle(self.longest // 3, 0.5, seed)
        before = read_stats(self.server.url)
        send(self.server.url, MODEL, Request(prompt, ANSWER_TOKENS, stream=True), self.tally)
        self.read_counters()
        expected = account(prompt.tokens, CHUNK, MIN_CONTEXT, MIN_CHUNK)
        self.tally.add_problems(account_problems(before, self.stats, expected))

    def read_counters(self) -> None:
        found = read_stats(self.server.url)
        self.tally.add_problems(stats_problems(found, self.stats, MIN_CHUNK))
        self.stats, self.metrics = found, read_metrics(self.server.url)

    def watch_for(self, seconds: float) -> bool:
        """Sample memory and counters for ``seconds``; False if the run must end now."""
        begin = changed = time.monotonic()
        done, read = self.tally.done, 0.0
        while (now := time.monotonic()) < begin + seconds:
            if self.server.process.poll() is not None:
                self.tally.problem(f"the server ended by itself; {log_tail(self.server.log)}")
                return False
            if self.tally.done != done:
                done, changed = self.tally.done, now
            if now - changed > STALLED:
                self.tally.problem(f"no request has ended in {STALLED:.0f} s")
                return False
            self.memory.append((now - begin, resident(self.server.process.pid)))
            if now - read > STATS_EVERY:
                read = now
                try:
                    self.read_counters()
                except OSError as error:
                    self.tally.problem(f"the server does not tell its counters: {error}")
                    return False
            time.sleep(max(0.0, min(now + SAMPLE_EVERY, begin + seconds) - time.monotonic()))
        return True

    def check_quiet(self) -> None:
        """Check that no requests or cache pages remain after all clients have ended."""
        end = time.monotonic() + QUIET_TIMEOUT
        while left := {name: value for name, value in read_metrics(self.server.url).items() if name in LEFT and value}:
            if time.monotonic() > end:
                self.tally.problem(f"left when all clients were gone: {left}")
                break
            time.sleep(1)
        self.tally.add_problems(prometheus_problems(self.server.url))

    def check_end(self) -> None:
        """Check that the server ends on a SIGTERM to the process of ``vllm serve`` only, as sent by a container."""
        self.server.process.send_signal(signal.SIGTERM)
        try:
            self.server.process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.tally.problem(f"the server has not ended {END_TIMEOUT:.0f} s after SIGTERM")
