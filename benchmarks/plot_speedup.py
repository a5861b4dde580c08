"""Plot the rows of ``bench_attention.py``: speed-up over the dense kernel against context, per kernel and peer.

One panel per chunk (across) and pattern (down). Our kernels are drawn with their estimate and index. Peers are
attention only, so with peers there is also a thin line for each kernel's attention only. If several rows have the same
point, the last one is used. Only rows of the last row's machine are drawn, since times of different machines are not
comparable.

    python benchmarks/plot_speedup.py benchmarks/results/attention_cpu.csv -o attention.png
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Row = dict[str, str]
Line = dict[int, float]
"""Speed-up at each context."""
COLOURS = ("#1f5fbf", "#d1600a", "#2a8a3c", "#a03070", "#7a6a20", "#3a9aa8")


def read(path: Path) -> list[Row]:
    """The rows from the same machine as the file's last row."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return [row for row in rows if row["machine"] == rows[-1]["machine"]]


def lines(rows: Iterable[Row]) -> dict[tuple[str, str], Line]:
    """Speed-ups by name and by what was timed: ``whole``, or attention ``alone``."""
    found: dict[tuple[str, str], Line] = {}
    for row in rows:
        context = int(row["context"])
        if row.get("peer"):
            found.setdefault((row["peer"], "alone"), {})[context] = float(row["speedup"])
        else:
            found.setdefault((row["kernel"], "whole"), {})[context] = float(row["speedup"])
            alone = float(row["dense_s"]) / float(row["attend_s"])
            found.setdefault((row["kernel"], "alone"), {})[context] = alone
    return found


def chunk_of(row: Row) -> int:
    """Tokens of the chunk, which is the same for all rows of a panel; 0 for whole prompts of any length."""
    return 0 if row["chunk"] == row["context"] else int(row["chunk"])


def computed(rows: Iterable[Row]) -> dict[str, str]:
    """What each peer attended, from the column ``computes``."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("peer") and row["computes"] not in found.setdefault(row["peer"], []):
            found[row["peer"]].append(row["computes"])
    return {peer: " / ".join(words) for peer, words in found.items()}


def size(tokens: float) -> str:
    """``131072`` -> ``128K``."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:g}{name}"
    return f"{tokens:g}"


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture; the suffix of ``path`` (.png, .svg, .pdf) chooses the format."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    chunks = sorted({chunk_of(row) for row in rows})
    names = list(dict.fromkeys(name for name, _ in lines(rows)))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    peers = computed(rows)
    figure = Figure(figsize=(max(7.5, 4.2 * len(chunks)), 3.2 * len(patterns) + 1.6), layout="constrained")
    grid = figure.subplots(len(patterns), len(chunks), sharex=True, sharey=True, squeeze=False)
    panels: list[list[Axes]] = grid.tolist()
    for down, pattern in enumerate(patterns):
        for across, chunk in enumerate(chunks):
            own = [row for row in rows if row["pattern"] == pattern and chunk_of(row) == chunk]
            draw_panel(panels[down][across], lines(own), colours, peers)
            what = f"the last {size(chunk)} tokens" if chunk else "whole prompts"
            panels[down][across].set_title(f"{pattern}: {what}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("context (tokens)")
    kernels = sorted({row["dense_kernel"] for row in rows if row.get("dense_kernel")}) or ["the dense kernel"]
    figure.supylabel(f"speed-up over {', '.join(kernels)} (times)", fontsize=10)
    set_ticks(panels[0][0], rows)
    figure.legend(handles=legend(names, colours, peers), loc="outside lower center", ncols=2, fontsize=9)
    last = rows[-1]
    versions = ", ".join(f"{name} {last[name]}" for name in ("torch", "vllm") if last.get(name))
    figure.suptitle(f"One attention layer\n{last['machine']}, {versions}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_panel(axes: Axes, found: dict[tuple[str, str], Line], colours: dict[str, str], peers: dict[str, str]) -> None:
    axes.axhline(1.0, color="0.4", linewidth=1)
    if not found:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4")
    for (name, timed), line in found.items():
        if timed == "whole" or peers:
            contexts = sorted(line)
            style = style_of(name, timed, peers)
            axes.plot(contexts, [line[context] for context in contexts], color=colours[name], **style)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


class Style(TypedDict, total=False):
    """Line options of matplotlib."""

    marker: str
    linestyle: str
    linewidth: float


def style_of(name: str, timed: str, peers: dict[str, str]) -> Style:
    if timed == "whole":
        return {"marker": "o", "linewidth": 2}
    return {"marker": "s", "linestyle": "--", "linewidth": 1.5} if name in peers else {"linestyle": ":", "linewidth": 1}


def set_ticks(axes: Axes, rows: list[Row]) -> None:
    """Both axes in powers of two. The panels share their ticks."""
    contexts = sorted({int(row["context"]) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: size(tokens)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}x"))


def legend(names: list[str], colours: dict[str, str], peers: dict[str, str]) -> list[Line2D]:
    def handle(name: str, timed: str, words: str) -> Line2D:
        return Line2D([], [], color=colours[name], label=f"{name}: {words}", **style_of(name, timed, peers))

    handles = []
    for name in names:
        if name in peers:
            handles.append(handle(name, "alone", f"attention alone, {peers[name]}"))
        else:
            handles.append(handle(name, "whole", "estimate, index and attention"))
            handles += [handle(name, "alone", "attention alone")] if peers else []
    return [*handles, Line2D([], [], color="0.4", linewidth=1, label="dense")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="written by bench_attention.py --csv")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .png, .svg or .pdf file")
    args = parser.parse_args()
    try:
        rows = read(args.csv)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    draw(rows, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
