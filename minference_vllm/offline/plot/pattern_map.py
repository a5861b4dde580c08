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

RGB = tuple[float, float, float]
FIXED_COLOUR = "#FFFFFF"
MAX_LABELLED = 128
"""Maximum number of heads for which every cell also shows its budgets."""


def text_colour(background: RGB) -> str:
    """Black or white, whichever has the higher contrast by WCAG, which is then at least 4.58."""
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in background)
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "white"


def _rgb(colour: str) -> RGB:
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue


def draw_pattern_map(
    layers: Sequence[Sequence[HeadPattern]], title: str, path: Path, fixed: Mapping[int, str] | None = None
) -> Path:
    """Write the picture of all heads' patterns; the suffix of ``path`` (.png, .svg, .pdf) chooses the format.

    Args:
        layers: per layer one pattern per query head.
        title: which model this is.
        fixed: layer -> what runs there instead of its patterns.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    fixed = fixed or {}
    heads, colour_of = len(layers[0]), {kind: _rgb(family.colour) for kind, family in FAMILIES.items()}
    runs = {layer: patterns for layer, patterns in enumerate(layers) if layer not in fixed}
    labelled = len(layers) * heads <= MAX_LABELLED
    handles = _legend(runs, fixed, labelled)
    # Sizes in inches, for a cell's lines of 7 points and the legend's of 10.
    budgets = max((len(dict(pattern)) - 1 for patterns in runs.values() for pattern in patterns), default=0)
    cell = (1.1, max(0.55, 0.13 * budgets + 0.1)) if labelled else (0.26, 0.22)
    legend = 0.08 * len(handles) + 0.17 * sum(1 + str(handle.get_label()).count("\n") for handle in handles)
    width, height = max(6.0, cell[0] * heads + 5), max(3.2, cell[1] * len(layers) + 1.5, legend + 1.2)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = [
        [colour_of[pattern.kind] if layer in runs else _rgb(FIXED_COLOUR) for pattern in patterns]
        for layer, patterns in enumerate(layers)
    ]
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(-0.5, heads - 0.5, len(layers) - 0.5, -0.5))
    axes.vlines([head - 0.5 for head in range(1, heads)], -0.5, len(layers) - 0.5, color="white", linewidth=1)
    axes.hlines([layer - 0.5 for layer in range(1, len(layers))], -0.5, heads - 0.5, color="white", linewidth=1)
    for layer, reason in fixed.items():
        axes.text((heads - 1) / 2, layer, reason, ha="center", va="center", fontsize=7)
    for layer, patterns in runs.items() if labelled else ():
        for head, pattern in enumerate(patterns):
            text = "\n".join(map(str, pattern.named().values()))
            colour = text_colour(colour_of[pattern.kind])
            axes.text(head, layer, text, ha="center", va="center", fontsize=7, color=colour)
    for axis, name in ((axes.xaxis, "query head"), (axes.yaxis, "layer")):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_label_text(name)
    axes.legend(handles=handles, title="pattern: heads", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    lines = (textwrap.fill(line, int(11 * width)) for line in title.splitlines())
    figure.suptitle("\n".join(lines), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _legend(runs: Mapping[int, Sequence[HeadPattern]], fixed: Mapping[int, str], labelled: bool) -> list[Patch]:
    """A patch per kind with its number of heads and, if cells show budgets, the names of these."""
    from matplotlib.patches import Patch

    counts = Counter(str(pattern.kind) for patterns in runs.values() for pattern in patterns)
    fields: dict[str, dict[str, None]] = {kind: {} for kind in counts}
    for pattern in (pattern for patterns in runs.values() for pattern in patterns):
        fields[pattern.kind] |= dict.fromkeys(pattern.named())
    legend = []
    for kind in (kind for kind in FAMILIES if kind in counts):
        named = ", ".join(fields[kind])
        label = f"{kind}: {counts[kind]}" + (f"\n({named})" if labelled and named else "")
        legend.append(Patch(facecolor=FAMILIES[kind].colour, label=label))
    if fixed:
        legend.append(Patch(facecolor=FIXED_COLOUR, edgecolor="black", label="no pattern runs"))
    return legend
