"""One head's attention as a picture, with the keys that a sparse index computes drawn over it.

Sizes: ``S`` tokens, ``D`` head size, ``W`` cells along an edge of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.selection.probe_queries import cap_, unseen

BLOCK_COLOUR, COLUMN_COLOUR, NOTHING_COLOUR = (0.12, 0.42, 0.75), (0.85, 0.30, 0.0), (0.92, 0.92, 0.92)


@dataclass(frozen=True)
class HeadMap:
    """Attention of one head, down-sampled to ``[W, W]`` cells, and what an index computes of it."""

    cell: int
    """Tokens along an edge of a cell."""
    reduce: Literal["max", "sum"]
    attention: torch.Tensor
    """float32 ``[W, W]``: the largest weight in each cell, or the weights' sum."""
    left_out: torch.Tensor
    """Like ``attention``, of the keys that the index leaves out."""
    blocks: torch.Tensor
    """float32 ``[W, W]``: share of each cell's pairs that lie in whole blocks of the index."""
    columns: torch.Tensor
    """float32 ``[W, W]``: share that lies in the index's single columns."""
    density: float
    """Computed pairs as a share of the dense ones over the whole prompt, including chunks that are served densely."""
    recall: float
    """Mean over the rows of the share of a row's attention that lies on computed keys."""
    seq_len: int


def head_map(
    query: torch.Tensor,
    keys: torch.Tensor,
    indices: Sequence[SparseIndex],
    head: int,
    scale: float,
    cells: int = 512,
    reduce: Literal["max", "sum"] = "max",
    softcap: float = 0.0,
) -> HeadMap:
    """Down-sample the attention of one head exactly: every weight is computed, none is kept.

    Memory is bounded by the rows of one query tile times ``S``.

    Args:
        query: ``[S, D]``, rotated queries of the head.
        keys: ``[S, D]``, rotated keys of its KV head.
        indices: one per prefill chunk, in order; together they cover all rows.
        head: the head's number in the indices.
        cells: maximum cells along an edge.
        softcap: see ``Inputs``.
    """
    length = keys.shape[0]
    borders = [index.tiling.context_len for index in indices] + [length]
    if borders[0] != 0 or any(a.tiling.seq_len != b for a, b in zip(indices, borders[1:], strict=True)):
        raise ValueError(f"the indices must cover rows 0 to {length} in order; they begin at {borders[:-1]}")
    cell = -(-length // cells)
    width = -(-length // cell)
    attention, left_out, blocks, columns = (torch.zeros(width, width) for _ in range(4))
    # Keys that pad the last cell are in every row's future.
    keys = torch.nn.functional.pad(keys.float(), (0, 0, 0, width * cell - length))
    recall = computed = 0.0
    for index in indices:
        computed += float(index.computed_pairs()[head])
        for tile, (begin, end) in enumerate(pairwise(index.tiling.starts.tolist())):
            reach = -(-end // cell)
            scores = cap_(query[begin:end].float() @ keys[: reach * cell].T * scale, softcap)
            hidden = unseen(torch.arange(begin, end), reach * cell, index.tiling.window)
            scores.masked_fill_(hidden, -torch.inf)
            weights = scores.softmax(-1)
            in_block, in_column = _computed_keys(index, head, tile, width * cell)
            kept = (in_block | in_column)[: reach * cell]
            missed = weights * ~kept
            recall += float(weights.sum() - missed.sum())
            shares = [marked.view(width, cell).float().mean(-1) / cell for marked in (in_block, in_column)]
            for row in range(begin // cell, (end - 1) // cell + 1):
                rows = slice(max(row * cell - begin, 0), (row + 1) * cell - begin)
                for image, part in ((attention, weights[rows]), (left_out, missed[rows])):
                    by_cell = part.view(-1, reach, cell)
                    if reduce == "max":
                        torch.maximum(image[row, :reach], by_cell.amax((0, 2)), out=image[row, :reach])
                    else:
                        image[row, :reach] += by_cell.sum((0, 2))
                blocks[row] += shares[0] * len(part)
                columns[row] += shares[1] * len(part)
    density = computed / sum(index.dense_pairs() for index in indices)
    return HeadMap(cell, reduce, attention, left_out, blocks, columns, density, recall / length, length)


def _computed_keys(index: SparseIndex, head: int, tile: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool ``[length]`` twice: keys in the tile's blocks, and keys that are single columns."""
    size, part = index.tiling.block_size, (head // index.heads_per_list, tile)
    in_block = torch.zeros(-(-length // size), size, dtype=torch.bool)
    in_block[index.blocks[part][: int(index.num_blocks[part])].long()] = True
    in_column = torch.zeros(length, dtype=torch.bool)
    in_column[index.columns[part][: int(index.num_columns[part])].long()] = True
    return in_block.view(-1)[:length], in_column


def draw_head(
    head: HeadMap, title: str, path: Path, block_size: int, marks: Mapping[str, tuple[int, int]] | None = None
) -> Path:
    """Write the picture of one head; the suffix of ``path`` (.png, .svg, .pdf) chooses the format.

    Args:
        title: which model, layer and head this is, and its pattern.
        block_size: tokens per block of the index, for the legend.
        marks: label -> (first, last) position of keys to point at.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(19.0, 6.6), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    edge = len(head.attention)
    future = torch.ones(edge, edge, dtype=torch.bool).triu(1)
    top = 1.0 if head.reduce == "max" else float(head.attention.max())
    norm = LogNorm(0.1 / head.seq_len, top, clip=True)
    extent = (0, edge * head.cell, edge * head.cell, 0)
    images = (
        ("attention", head.attention),
        (f"keys computed: {head.density:.1%} of the prompt's dense pairs", None),
        (f"attention left out: {1 - head.recall:.2%} of all (recall {head.recall:.2%})", head.left_out),
    )
    for axes, (name, weights) in zip(panels, images, strict=True):
        axes.set_title(name, fontsize=12)
        if weights is None:
            image = axes.imshow(_tint(head, future).numpy(), extent=extent, interpolation="nearest")
        else:
            shown = weights.masked_fill(future, torch.nan).numpy()
            image = axes.imshow(shown, cmap="inferno", norm=norm, extent=extent, interpolation="nearest")
        axes.set_xlim(0, head.seq_len)
        axes.set_ylim(head.seq_len, 0)
        axes.set_xlabel("key position (token)")
        axes.spines[["top", "right"]].set_visible(False)
        for label, (first, last) in (marks or {}).items():
            at, shift = (first + last) / 2, 0.08 * head.seq_len
            arrow = {"arrowstyle": "->"}
            axes.annotate(label, (at, at), (at + shift, at - shift), arrowprops=arrow, va="bottom", fontsize=10)
    panels[0].set_ylabel("query position (token)")
    bar = figure.colorbar(image, ax=panels[2], shrink=0.8, extend="min")
    what = "largest weight" if head.reduce == "max" else "sum of the weights"
    bar.set_label(f"{what} in a cell of {head.cell} x {head.cell} tokens")
    legend = [
        Patch(facecolor=BLOCK_COLOUR, label=f"whole blocks of {block_size} keys"),
        Patch(facecolor=COLUMN_COLOUR, label="single keys (columns),\ndeeper where there are more"),
        Patch(facecolor=NOTHING_COLOUR, label="not computed"),
    ]
    panels[1].legend(handles=legend, loc="upper right")
    figure.suptitle(title, fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def _tint(head: HeadMap, future: torch.Tensor) -> torch.Tensor:
    """RGB ``[W, W, 3]``: the share that each cell computes, in deeper colours for more; white above the diagonal."""
    tint = torch.tensor(NOTHING_COLOUR).expand(*future.shape, 3)
    most = head.columns.max().clamp(min=1e-9)
    for colour, share in ((COLUMN_COLOUR, head.columns / most), (BLOCK_COLOUR, head.blocks)):
        tint = torch.lerp(tint, torch.tensor(colour), share.clamp(0, 1)[..., None])
    return tint.masked_fill(future[..., None], 1.0)
