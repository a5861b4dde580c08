"""Picture of each layer's density and recall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from minference_vllm.offline.plot.head import BLOCK_COLOUR, COLUMN_COLOUR


def draw_layers(layers: Sequence[int], density: torch.Tensor, recall: torch.Tensor, title: str, path: Path) -> Path:
    """Write the picture of density and recall per layer; the suffix of ``path`` (.png, .svg, .pdf) chooses the format.

    Args:
        layers: numbers of the layers measured.
        density: ``[layers, heads]``, computed pairs as a share of the dense ones, as a server logs it.
        recall: ``[layers, heads]``, mean share of a row's attention that lies on computed keys.
        title: which model, prompt and patterns this is.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(max(9.0, 0.22 * len(layers) + 4), 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.set_title(f"recall: mean {float(recall.mean()):.2%}, worst head {float(recall.min()):.2%}", fontsize=11)
    upper.plot(layers, recall.mean(1).tolist(), color=COLUMN_COLOUR, label="mean of the layer's heads")
    lower.set_title(f"density: mean {float(density.mean()):.2%} of the dense pairs in sparse chunks", fontsize=11)
    lower.bar(layers, density.mean(1).tolist(), color=BLOCK_COLOUR, alpha=0.45, label="mean of the layer's heads")
    for axes, values, colour in ((upper, recall, COLUMN_COLOUR), (lower, density, BLOCK_COLOUR)):
        places = [number for number in layers for _ in range(values.shape[1])]
        axes.scatter(places, values.flatten().tolist(), s=10, color=colour, label="one head", zorder=3)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=9)
    # Recall is usually close to 1: its axis begins just below the worst head.
    lost = max(0.01, 1 - float(recall.min()))
    upper.set_ylim(max(0.0, 1 - 1.15 * lost), 1 + 0.05 * lost)
    lower.set_ylim(0.0, None)
    upper.set_ylabel("share of the attention\non computed keys")
    lower.set_ylabel("share of query-key pairs\nthat are computed")
    lower.set_xlabel("layer")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
