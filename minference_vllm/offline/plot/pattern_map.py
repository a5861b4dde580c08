"""Which pattern every head of a model runs, one cell per head."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection.families import FAMILIES

if TYPE_CHECKING:
    from matplotlib.patches import Patch

FIXED_COLOUR = "#FFFFFF"
MOST_LABELLED = 128
"""Heads up to which every cell also holds its budgets."""


def draw_pattern_map(
    layers: Sequence[Sequence[HeadPattern]], title: str, path: Path, fixed: Mapping[int, str] | None = None
) -> Path:
    """Write the picture of all heads' patterns; the suffix of ``path`` (.png, .svg, .pdf) chooses the format.

    Args:
        layers: per layer one pattern per query head.
        title: which model this is.
        fixed: layer -> what runs there whatever the patterns say.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    fixed = fixed or {}
    heads = len(layers[0])
    runs = {layer: patterns for layer, patterns in enumerate(layers) if layer not in fixed}
    labelled = len(layers) * heads <= MOST_LABELLED
    cell = (1.1, 0.55) if labelled else (0.26, 0.22)
    width, height = max(6.0, cell[0] * heads + 5), max(3.2, cell[1] * len(layers) + 1.5)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = [
        [to_rgb(FAMILIES[pattern.kind].colour if layer in runs else FIXED_COLOUR) for pattern in patterns]
        for layer, patterns in enumerate(layers)
    ]
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(-0.5, heads - 0.5, len(layers) - 0.5, -0.5))
    axes.vlines([head - 0.5 for head in range(1, heads)], -0.5, len(layers) - 0.5, color="white", linewidth=1)
    axes.hlines([layer - 0.5 for layer in range(1, len(layers))], -0.5, heads - 0.5, color="white", linewidth=1)
    for layer, reason in fixed.items():
        axes.text((heads - 1) / 2, layer, reason, ha="center", va="center", fontsize=7)
    for layer, patterns in runs.items() if labelled else ():
        for head, pattern in enumerate(patterns):
            budgets = "\n".join(str(value) for name, value in pattern if name != "kind")
            axes.text(head, layer, budgets, ha="center", va="center", fontsize=7)
    for axis, name in ((axes.xaxis, "query head"), (axes.yaxis, "layer")):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_label_text(name)
    handles = _legend(runs, fixed, labelled)
    axes.legend(handles=handles, title="pattern: heads", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    lines = (textwrap.fill(line, int(11 * width)) for line in title.splitlines())
    figure.suptitle("\n".join(lines), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _legend(runs: Mapping[int, Sequence[HeadPattern]], fixed: Mapping[int, str], labelled: bool) -> list[Patch]:
    """A patch per kind with its number of heads and, where cells hold budgets, what these are."""
    from matplotlib.patches import Patch

    counts = Counter(str(pattern.kind) for patterns in runs.values() for pattern in patterns)
    fields = {str(pattern.kind): ", ".join(dict(pattern)) for patterns in runs.values() for pattern in patterns}
    legend = []
    for kind in (kind for kind in FAMILIES if kind in counts):
        named = fields[kind].removeprefix("kind").removeprefix(", ")
        label = f"{kind}: {counts[kind]}" + (f"\n({named})" if labelled and named else "")
        legend.append(Patch(facecolor=FAMILIES[kind].colour, label=label))
    if fixed:
        legend.append(Patch(facecolor=FIXED_COLOUR, edgecolor="black", label="no pattern runs"))
    return legend
