"""Checks of ``soak.py`` from outside of the server: its memory, its log, and the consistency of its counters."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from vllm_server import OPENER

from minference_vllm.core.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT, PREFILL_FROM

TIMEOUT = 60.0
MIB = 1 << 20
HOUR, MINUTE = 3600.0, 60.0
IN_LOG = re.compile(
    r"\b(ERROR|CRITICAL)\b|Traceback|Segmentation fault|core dumped|terminate called"
    # Our own messages about events that no request of the soak test should cause.
    r"|minference: some (layers|batches)|below the floor|had no room"
)
"""Matches lines that must not occur in a server's log."""
ENDING = "[shutdown] API server: shutdown triggered"
"""vLLM logs this when it is told to end. It then kills its engine at once and may log that as an error."""
AT_THE_END = re.compile(r"\bERROR\b.*minference|Segmentation fault|core dumped|terminate called")
"""Matches lines that must not occur even then."""


def get(url: str) -> str:
    with OPENER.open(url, timeout=TIMEOUT) as answer:
        return str(answer.read().decode())


def read_metrics(url: str) -> dict[str, float]:
    """vLLM's ``/metrics``, each sample summed over its labels."""
    return _samples(get(f"{url}/metrics"))


def _samples(text: str) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


# Memory


def resident(group: int) -> dict[str, int]:
    """Resident bytes of the processes of a group, by their names.

    File-backed pages are left out, since the kernel can reclaim them at any time.
    """
    found: dict[str, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                name, status = (process / "comm").read_text().strip(), (process / "status").read_text()
                size = 1024 * sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", status)))
                found[name] = found.get(name, 0) + size
        except OSError:
            continue  # the process has ended
    return found


class Growth(NamedTuple):
    """A linear fit, in MiB per hour."""

    slope: float
    error: float
    """Standard error."""
    minutes: int


def growth(samples: Sequence[tuple[float, float]]) -> Growth | None:
    """Growth of memory: a linear fit to the means per minute, which are nearly independent of each other.

    Args:
        samples: seconds and bytes.

    Returns:
        None if there are fewer than three minutes.
    """
    by_minute: dict[int, list[float]] = defaultdict(list)
    for seconds, size in samples:
        by_minute[int((seconds - samples[0][0]) // MINUTE)].append(size / MIB)
    if len(by_minute) < 3:
        return None
    hours = [minute * MINUTE / HOUR for minute in by_minute]
    means = [statistics.fmean(sizes) for sizes in by_minute.values()]
    slope, start = statistics.linear_regression(hours, means)
    rest = sum((mean - start - slope * hour) ** 2 for hour, mean in zip(hours, means, strict=True))
    spread = statistics.variance(hours) * (len(hours) - 1)
    return Growth(slope, math.sqrt(rest / (len(hours) - 2) / spread), len(hours))


# Log


def log_problems(text: str) -> list[str]:
    """Lines that must not occur."""
    before, _, after = text.partition(ENDING)
    parts = (before, IN_LOG), (after, AT_THE_END)
    return [line[:300] for part, pattern in parts for line in part.splitlines() if pattern.search(line)]


# Counters


class Account(NamedTuple):
    """What a prompt must add to the counters if it is served alone and not cached."""

    sparse_chunks: int
    sparse_tokens: int
    dense_chunks: Counter[str]


def account(tokens: int, chunk: int, min_context: int, min_chunk: int) -> Account:
    """``chunk``: maximum tokens of a step."""
    ends = [*range(chunk, tokens, chunk), tokens]
    parts = [(end, end - begin) for begin, end in zip([0, *ends], ends, strict=False)]
    sparse = [length for end, length in parts if end >= min_context and length >= min_chunk]
    dense = Counter(
        BELOW_MIN_CHUNK if length < min_chunk else BELOW_MIN_CONTEXT
        for end, length in parts
        if length >= PREFILL_FROM and (end < min_context or length < min_chunk)
    )
    return Account(len(sparse), sum(sparse), dense)


def read_stats(url: str) -> dict[str, Any]:
    """``/minference/stats``."""
    found = json.loads(get(f"{url}/minference/stats"))
    assert isinstance(found, dict)
    return found


def stats_problems(found: dict[str, Any], before: dict[str, Any] | None, min_chunk: int) -> list[str]:
    """Contradictions between counters, or with earlier values."""
    chunks, tokens, computed, dense = (
        found[name] for name in ("sparse_chunks", "sparse_tokens", "computed_pairs", "dense_pairs")
    )
    heads, reasons = found["heads"], found["dense_chunks"]
    audited = [head for head in heads if head["audited_chunks"]]
    facts = {
        "sparse chunks are shorter than min_chunk": tokens >= chunks * min_chunk,
        "more pairs were computed than dense attention has": 0 <= computed <= dense,
        "the density is not that of the pairs": math.isclose(found["density"], computed / dense if dense else 1.0),
        "no pairs in sparse chunks": (chunks > 0) <= (computed > 0),
        "tiles without room": found["overflowed_tiles"] == 0,
        "unexpected reasons for dense chunks": set(reasons) <= {BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT},
        "more audits than chunks": all(head["audited_chunks"] <= chunks for head in heads),
        "a recall that is no share": all(
            0 <= head[f"least_{kind}"] <= head[kind] + 1e-6 <= 1 + 1e-5
            for head in audited
            for kind in ("recall", "value_recall")
        ),
        "heads raised without a floor": not any(h["chunks_with_more_keys"] + h["chunks_run_densely"] for h in heads),
    }
    if before is not None:
        growing = ("sparse_chunks", "sparse_tokens", "computed_pairs", "dense_pairs")
        facts["counters went back"] = all(found[name] >= before[name] for name in growing) and all(
            reasons.get(reason, 0) >= count for reason, count in before["dense_chunks"].items()
        )
    return [f"/minference/stats: {problem}: {_short(found)}" for problem, fine in facts.items() if not fine]


def account_problems(before: dict[str, Any], after: dict[str, Any], expected: Account) -> list[str]:
    """Whether one prompt between two readings changed the counters by other amounts than expected."""
    dense = Counter(after["dense_chunks"])
    dense.subtract(before["dense_chunks"])
    chunks, tokens = (after[name] - before[name] for name in ("sparse_chunks", "sparse_tokens"))
    added = Account(chunks, tokens, +dense)
    return [] if added == expected else [f"/minference/stats: one prompt added {added}, not {expected}"]


def prometheus_problems(url: str) -> list[str]:
    """Differences between ``/minference/metrics`` and ``/minference/stats`` of an idle server."""
    found, told = read_stats(url), _samples(get(f"{url}/minference/metrics"))
    names = ("sparse_chunks", "sparse_tokens", "computed_pairs", "dense_pairs", "overflowed_tiles")
    expected = {name: found[name] for name in names} | {"dense_chunks": sum(found["dense_chunks"].values())}
    differing = [name for name, value in expected.items() if told.get(f"minference_{name}_total", 0) != value]
    return [f"/minference/metrics differs from stats: {', '.join(differing)}"] if differing else []


def _short(found: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in found.items() if name != "heads"})
