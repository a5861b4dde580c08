"""The search inside the engine's processes: chunks are measured layer by layer while the prompt is read, and saved.

Each process appends what it measured to a file of its own, one JSON object per line and layer, so that an interrupted
run loses at most the layer it was working on. Run again, it reads the file and measures only what is missing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minference_vllm.core.inputs import Inputs
from minference_vllm.offline.calibrate.search import CANDIDATES, Measured, measure


class CalibrationError(ValueError):
    """A calibration that cannot start or continue; the message says why and what is allowed."""


@dataclass(frozen=True)
class Plan:
    """What to measure; the same in every process."""

    identity: str
    """Names model, prompts, candidates and kernel: partial results of another identity are refused."""
    chunk_ends: tuple[int, ...]
    """Positions at which the measured chunks end."""
    kernel: str
    partial: str
    """Path of the partial results, without the process's suffix."""

    def path(self, process: int) -> Path:
        return Path(f"{self.partial}.{process}")


@dataclass
class Recorder:
    """One process's part of a calibration."""

    plan: Plan
    process: int
    layers: int
    """Layers that this process runs, for the progress bar."""
    prompt: int = 0
    """Number of the prompt that is being read."""
    _known: set[tuple[int, int, int]] = field(default_factory=set)
    _progress: Any = None

    def __post_init__(self) -> None:
        path = self.plan.path(self.process)
        if path.exists():
            self._known = {(row["prompt"], row["chunk_end"], row["layer"]) for row in read_rows(path, self.plan)}
        else:
            path.write_text(json.dumps({"identity": self.plan.identity}) + "\n")

    def record(self, layer: int, first_head: int, inputs: Inputs) -> None:
        """Measure all candidates on this chunk of this layer, unless already done."""
        chunk_end = inputs.first_key + inputs.chunk.seq_len
        if chunk_end not in self.plan.chunk_ends:
            return
        if self._progress is None and not self.process:
            self._progress = tqdm(total=self.layers * len(self.plan.chunk_ends), desc="layers measured", unit="layer")
        if (self.prompt, chunk_end, layer) not in self._known:
            seed = zlib.crc32(f"{self.prompt} {chunk_end} {layer}".encode())
            found = measure(inputs, CANDIDATES, self.plan.kernel, seed=seed)
            row = {
                "prompt": self.prompt,
                "chunk_end": chunk_end,
                "layer": layer,
                "first_head": first_head,
                "measured": found.to_json(),
            }
            with self.plan.path(self.process).open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self._progress is not None:
            self._progress.update()

    def next_prompt(self, number: int) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        self.prompt = number


def read_rows(path: Path, plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows of a partial file. A truncated last line is skipped, and removed from the file.

    Raises:
        CalibrationError: the file belongs to another calibration.
    """
    lines = path.read_text().splitlines()
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not rows or rows[0].get("identity") != plan.identity:
        raise CalibrationError(
            f"{path} holds partial results of another calibration (other model, prompts, options or versions); remove "
            "it, or choose another output file"
        )
    if len(rows) < len(lines):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield from rows[1:]


def collect(plan: Plan, processes: Sequence[int], heads: int) -> dict[int, dict[tuple[int, int], Measured]]:
    """Layer -> (prompt, end of the chunk) -> the measurements, with the heads of all processes merged."""
    layers: dict[int, dict[tuple[int, int], Measured]] = {}
    for process in processes:
        for row in read_rows(plan.path(process), plan):
            chunks = layers.setdefault(row["layer"], {})
            key = row["prompt"], row["chunk_end"]
            whole = chunks.setdefault(key, Measured.nothing(len(CANDIDATES), heads))
            part, first = Measured.from_json(row["measured"]), row["first_head"]
            for values, found in zip(vars(whole).values(), vars(part).values(), strict=True):
                values[:, first : first + found.shape[1]] = found
    return layers
