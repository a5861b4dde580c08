"""Which pattern every head of a model runs, one cell per head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from minference_vllm.patterns import KINDS, HeadPattern

# Okabe and Ito's colours, which people tell apart whatever their eyes.
COLOURS = dict(
    zip(
        KINDS,
        ("#7F7F7F", "#E69F00", "#F0E442", "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#D55E00"),
        strict=True,
    )
)
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
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    fixed = fixed or {}
    heads = len(layers[0])
    shown = [pattern for layer, patterns in enumerate(layers) if layer not in fixed for pattern in patterns]
    labelled = len(layers) * heads <= MOST_LABELLED
    cell = (1.1, 0.55) if labelled else (0.26, 0.22)
    figure = Figure(
        figsize=(max(6.0, cell[0] * heads + 5), max(3.2, cell[1] * len(layers) + 1.5)), layout="constrained"
    )
    axes = figure.subplots()
    image = [
        [to_rgb(FIXED_COLOUR if layer in fixed else COLOURS[pattern.kind]) for pattern in patterns]
        for layer, patterns in enumerate(layers)
    ]
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(-0.5, heads - 0.5, len(layers) - 0.5, -0.5))
    for border in range(1, heads):
        axes.axvline(border - 0.5, color="white", linewidth=1)
    for border in range(1, len(layers)):
        axes.axhline(border - 0.5, color="white", linewidth=1)
    for layer, reason in fixed.items():
        axes.text((heads - 1) / 2, layer, reason, ha="center", va="center", fontsize=7)
    if labelled:
        for layer, patterns in enumerate(layers):
            for head, pattern in enumerate(patterns) if layer not in fixed else ():
                axes.text(head, layer, budgets(pattern), ha="center", va="center", fontsize=7)
    for axis, name in ((axes.xaxis, "query head"), (axes.yaxis, "layer")):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_label_text(name)
    counts = Counter(pattern.kind for pattern in shown)
    legend = [
        Patch(facecolor=COLOURS[kind], label=f"{kind} ({counts[kind]} heads)") for kind in KINDS if kind in counts
    ]
    if fixed:
        label = f"patterns without effect ({len(fixed)} layers)"
        legend.append(Patch(facecolor=FIXED_COLOUR, edgecolor="black", label=label))
    names = ", ".join(dict(shown[0])) if shown and len(set(counts)) == 1 else ""
    note = f"in the cells: {names.removeprefix('kind, ')}" if labelled and names not in ("", "kind") else None
    axes.legend(handles=legend, title=note, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    axes.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def budgets(pattern: HeadPattern) -> str:
    """The pattern's numbers, in the order of its fields."""
    return "\n".join(str(value) for name, value in pattern if name != "kind")
