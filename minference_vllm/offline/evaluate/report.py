"""An evaluation's rows as a table, Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

NAMES = {
    "perplexity": "text",
    "inside": "questions inside",
    "end": "questions at chunks' ends",
    "few_shot": "repeated lines",
    "single": "single rows",
}
"""Labels of the tasks whose own name says little."""


class Row(NamedTuple):
    """One pattern, length and task."""

    tokens: int
    """Length of a prompt with its answer."""
    pattern: str
    task: str
    unit: str
    """The unit of ``dense``, ``sparse``, ``difference`` and ``standard_error``: nats (per token, less is better), s
    (median), score (share of the expected strings, more is better), share."""
    dense: float
    sparse: float
    difference: float
    """Sparse minus dense."""
    standard_error: float | None
    """Of the difference; None for a single sample, and for a median."""
    measured: int
    """Tokens, runs or samples."""
    right_dense: int | None = None
    """Number of answers with every token the most likely one."""
    right_sparse: int | None = None
    density: float = 1.0
    """Query-key pairs computed, as a share of those of dense attention, in the chunks that ran sparsely."""


class Header(NamedTuple):
    """The header of the report."""

    model: str
    sources: dict[str, str]
    """Where each pattern came from."""
    text: str
    chunk: int
    settings: dict[str, Any]
    seed: int
    sampled: str
    """Description of RULER's samples."""

    def lines(self) -> list[str]:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("minference-vllm", "torch"))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
        return [
            f"- text: {self.text}; chunks of {self.chunk} tokens; seed {self.seed}",
            f"- settings of minference: {json.dumps(self.settings)}",
            f"- {self.sampled}",
            *(f"- `{name}`: {source}" for name, source in self.sources.items() if name != source),
            f"- {versions}, vLLM {vllm_version()}, {device}",
        ]


def vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def write(folder: Path, header: Header, rows: Sequence[Row]) -> None:
    """Write ``report.md``, ``report.csv``, and ``report.png`` if matplotlib is installed."""
    with (folder / "report.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
    picture = draw(folder / "report.png", header.model, rows)
    lines = [
        f"# Sparse prefill of {header.model}, beside dense attention",
        "",
        *header.lines(),
        "",
        *table(SUMMARY, summary_rows(rows)),
        "",
        "Density: query-key pairs computed, as a share of dense attention's, where chunks ran sparsely. Loss: negative "
        "log-likelihood, nats per scored token; more is worse. RULER: mean score of its tasks. Same answers: share of "
        "the greedy tokens before they differ from dense attention's.",
        "",
        *(["![time and loss](report.png)", ""] if picture else []),
        "## Every task",
        "",
        *table(DETAILS, (detail(row) for row in rows)),
        "",
        "±: standard error of the difference. Right: answers of which every token was the likeliest.",
    ]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


SUMMARY = (
    "tokens", "pattern", "time to first token", "density", "loss of the text", "questions inside", "single rows",
    "RULER", "same answers",
)  # fmt: skip
DETAILS = ("tokens", "pattern", "task", "unit", "dense", "sparse", "difference", "measured", "right")


def summary(rows: Sequence[Row]) -> str:
    """The summary as a text table for a terminal."""
    cells = [SUMMARY, *summary_rows(rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(SUMMARY))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def summary_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for every length and pattern."""
    lines: list[tuple[str, ...]] = []
    for tokens, pattern in dict.fromkeys((row.tokens, row.pattern) for row in rows):
        of = {row.task: row for row in rows if (row.tokens, row.pattern) == (tokens, pattern)}
        timed, scores = of["time to first token"], [row for row in of.values() if row.unit == "score"]
        dense, sparse = (
            sum(getattr(row, name) for row in scores) / max(1, len(scores)) for name in ("dense", "sparse")
        )
        lines.append(
            (
                str(tokens),
                pattern,
                f"{timed.dense:.2f} -> {timed.sparse:.2f} s ({timed.dense / timed.sparse:.1f}x)",
                f"{timed.density:.3f}",
                difference(of["perplexity"]),
                difference(of["inside"]),
                difference(of["single"]),
                f"{dense:.2f} -> {sparse:.2f}" if scores else "",
                f"{of['agreement'].sparse:.2f}" if scores else "",
            )
        )
    return lines


def difference(row: Row) -> str:
    error = "" if row.standard_error is None else f" ± {row.standard_error:.4f}"
    return f"{row.difference:+.4f}{error}"


def detail(row: Row) -> tuple[str, ...]:
    right = "" if row.right_dense is None else f"{row.right_dense} -> {row.right_sparse}"
    name = NAMES.get(row.task, row.task)
    figures = (f"{row.dense:.4f}", f"{row.sparse:.4f}", difference(row), str(row.measured), right)
    return (str(row.tokens), row.pattern, name, row.unit, *figures)


def table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *lines)]


def draw(path: Path, model: str, rows: Sequence[Row]) -> bool:
    """Plot time to first token against length, and the loss of every task; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    patterns = list(dict.fromkeys(row.pattern for row in rows))
    timed = [row for row in rows if row.unit == "s"]
    first = [row for row in timed if row.pattern == patterns[0]]
    left.plot([row.tokens for row in first], [row.dense for row in first], "o-", color="0.4", label="dense")
    for pattern in patterns:
        own = [row for row in timed if row.pattern == pattern]
        left.plot([row.tokens for row in own], [row.sparse for row in own], "o-", label=pattern)
    left.set(xlabel="prompt (tokens)", ylabel="time to first token (s)", ylim=(0, None))
    left.legend()
    scored = [row for row in rows if row.unit == "nats"]
    tasks = list(dict.fromkeys(row.task for row in scored))
    groups = list(dict.fromkeys((row.pattern, row.tokens) for row in scored))
    width = 0.8 / len(groups)
    for number, (pattern, tokens) in enumerate(groups):
        own = [row for row in scored if (row.pattern, row.tokens) == (pattern, tokens)]
        places = [tasks.index(row.task) + (number + 0.5) * width - 0.4 for row in own]
        right.bar(
            places, [row.difference for row in own], width, yerr=[row.standard_error or 0.0 for row in own],
            label=f"{pattern}, {tokens} tokens",
        )  # fmt: skip
    right.set_xticks(range(len(tasks)), [NAMES.get(task, task) for task in tasks], rotation=15, fontsize=8)
    right.axhline(0.0, color="0.4", linewidth=1)
    right.set(ylabel="loss, sparse minus dense (nats per token)")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Sparse prefill of {model}")
    figure.savefig(path, dpi=130)
    return True
