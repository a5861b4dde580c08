"""Plot the rows of ``bench_language.py``: the loss of each pattern against its density, one panel per task.

Loss is the difference to dense, nats per scored token; one colour per pattern, one marker per text, length and chunk.
Bars are standard errors. The axis is linear below 0.001 and logarithmic above. If several rows have the same point, the
last one is used.

    python benchmarks/plot_language.py rows.csv -o loss.png
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Row = Mapping[str, Any]
COLOURS = (
    "#1f5fbf", "#d1600a", "#2a8a3c", "#a03070", "#7a6a20", "#3a9aa8", "#c23b3b", "#6a4fb0", "#555555", "#b0943a",
)  # fmt: skip
MARKERS = "osD^vP*X"
LINEAR_BELOW = 1e-3


class Point(NamedTuple):
    pattern: str
    prompts: str
    """Text, length and chunk."""
    density: float
    difference: float
    error: float
    """Standard error of the difference."""


def points(rows: Iterable[Row]) -> dict[str, list[Point]]:
    """Points by task. Rows without a loss (those of ``heads``) are left out."""
    found: dict[tuple[str, str, str], Point] = {}
    for row in rows:
        if row["difference"] != "":
            prompts = f"{row['text']}, {row['tokens']} tokens, chunks of {row['chunk']}"
            figures = (float(row[name]) for name in ("density", "difference", "standard_error"))
            found[row["task"], row["pattern"], prompts] = Point(row["pattern"], prompts, *figures)
    by_task: dict[str, list[Point]] = {}
    for (task, _, _), point in found.items():
        by_task.setdefault(task, []).append(point)
    return by_task


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture; the suffix of ``path`` (.png, .svg, .pdf) chooses the format.

    Raises:
        ValueError: no row has a loss.
    """
    tasks = points(rows)
    if not tasks:
        raise ValueError("no row has a loss to draw")
    every = [point for found in tasks.values() for point in found]
    patterns = list(dict.fromkeys(point.pattern for point in every))
    prompts = list(dict.fromkeys(point.prompts for point in every))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(patterns)}
    markers = {name: MARKERS[place % len(MARKERS)] for place, name in enumerate(prompts)}
    columns = min(3, len(tasks))
    down = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * down + 1.8), layout="constrained")
    panels = figure.subplots(down, columns, sharey=True, squeeze=False).flatten()
    for axes, (task, found) in zip(panels, tasks.items(), strict=False):
        draw_panel(axes, task, found, colours, markers)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], color=colours[name], marker="o", linestyle="", label=name) for name in patterns]
    handles += [Line2D([], [], color="0.3", marker=markers[name], linestyle="", label=name) for name in prompts]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    models = ", ".join(dict.fromkeys(str(row["model"]) for row in rows))
    figure.suptitle(f"Loss of sparse prefill against dense, {models}", fontsize=11)
    for axes in panels[max(0, len(tasks) - columns) : len(tasks)]:
        axes.set_xlabel("query-key pairs computed, share of dense", fontsize=9)
    figure.supylabel("sparse minus dense (nats per scored token)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_panel(
    axes: Axes, task: str, found: Sequence[Point], colours: Mapping[str, str], markers: Mapping[str, str]
) -> None:
    axes.axhline(0.0, color="0.4", linewidth=1)
    for point in found:
        axes.errorbar(
            point.density, point.difference, point.error,
            color=colours[point.pattern], marker=markers[point.prompts], linestyle="", elinewidth=1,
        )  # fmt: skip
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.set_xlim(0, 1.03)
    axes.set_title(task, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="written by bench_language.py --output")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .png, .svg or .pdf file")
    args = parser.parse_args()
    try:
        with args.csv.open(newline="") as file:
            draw(list(csv.DictReader(file)), args.output)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_language: {error}")
    print(args.output)


if __name__ == "__main__":
    main()
