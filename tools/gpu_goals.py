"""The table at the end of ``gpu_check.py``: measurements against the goals of this project.

One line per context: the best row of one layer with ``default_cuda`` for the last 8,192 tokens, index building included
(its kernel, density, the index's share of the time, and the kernel's TFLOP/s), and the speed-up of the first token of a
whole engine with the best pattern. "-" means that there is no row.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

GOALS = {1 << 15: 5.0, 1 << 16: 8.0, 1 << 17: 18.0, 1 << 18: 25.0, 1 << 20: 50.0}
"""Tokens -> speed-up over dense attention that one layer must reach."""
CHUNK, PATTERN = 8192, "default_cuda"


def table(attention: Path, first_tokens: Path, share: int = 1) -> Iterator[str]:
    """Lines of text.

    Args:
        attention, first_tokens: rows of ``bench_attention.py`` and ``bench_ttft.py``; either may be absent.
        share: factor by which a rehearsal has divided the lengths of the rows.
    """
    layers, engines = rows_of(attention), rows_of(first_tokens)
    yield "context     goal   layer  met  kernel        density  index  TFLOP/s  first token"
    for context, goal in GOALS.items():
        wanted = {"context": str(context // share)}
        of_layer = wanted | {"chunk": str(CHUNK // share), "pattern": PATTERN, "peer": ""}
        layer, engine = best(layers, of_layer, "speedup"), best(engines, wanted, "ttft_ratio")
        line = f"{context:9,d} {goal:5.0f}x"
        if layer is None:
            line += "       -    -  -                   -      -        -"
        else:
            speedup, whole = float(layer["speedup"]), float(layer["sparse_s"])
            index = (float(layer["estimate_s"]) + float(layer["index_s"])) / whole
            line += f" {speedup:6.1f}x  {'yes' if speedup >= goal else ' no'}  {layer['kernel']:12s}"
            line += f" {float(layer['density']):8.3f} {index:5.0%} {float(layer.get('attend_tflops') or 0):8.0f}"
        ratio = "-" if engine is None else f"{1 / float(engine['ttft_ratio']):.1f}x, {engine['pattern']}"
        yield f"{line}  {ratio}"


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def best(rows: list[dict[str, str]], wanted: dict[str, str], by: str) -> dict[str, str] | None:
    """The row with the largest speed-up (or the smallest ratio of times) among those with these values."""
    found = [row for row in rows if all((row.get(name) or "") == value for name, value in wanted.items())]
    sign = -1 if by.endswith("ratio") else 1
    return max(found, key=lambda row: sign * float(row[by]), default=None)
