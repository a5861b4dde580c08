"""Writing of result rows, with the machine, versions and command line."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """The CPU's name, family and best vector extension."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in facts.items()}
    flags = found.get("flags", "").split()
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags]
    return f"{found.get('model name', '?')} family {found.get('cpu family', '?')} ({units[0] if units else '?'})"


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment() -> dict[str, Any]:
    """Columns with the environment of a measurement."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "machine": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vllm": version("vllm"),
        "minference_vllm": version("minference-vllm"),
        "command": shlex.join(["python", *sys.argv]),
    }


def emit(row: dict[str, Any], as_json: bool, csv_path: str | None) -> None:
    """Print a row, as JSON or as aligned text, and append it to a CSV file with its environment."""
    # Significant digits, since a stage takes seconds on a CPU and microseconds on a GPU.
    shown = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps(shown) if as_json else "  ".join(f"{key}={value}" for key, value in shown.items()), flush=True)
    if csv_path is not None:
        append(Path(csv_path), shown | environment())


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file. Missing columns are added and left empty in earlier rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    columns: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or [])
    new = [name for name in row if name not in columns]
    if not new:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)
        return
    # Written beside the file and then renamed, so that an interruption does not lose existing rows.
    written = path.with_name(f"{path.name}.new")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *new])
        writer.writeheader()
        writer.writerows([*rows, row])
    written.replace(path)
