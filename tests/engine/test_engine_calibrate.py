"""``minference-vllm calibrate`` as a user runs it, on a model whose language model is built with a copy of the
configuration: measurements of the engine's layers must reach the writer of the file."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_image_readers
from tiny_models import VOCABULARY

TOKENS = 8000


def test_calibrate_measures_every_layer_of_an_image_reader(tmp_path: Path, run_tool: Callable[..., Any]) -> None:
    draw, prompts = random.Random(0), tmp_path / "prompts.jsonl"
    texts = (" ".join(f"w{draw.randrange(VOCABULARY)}" for _ in range(TOKENS)) for _ in range(2))
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    model, out = tiny_image_readers.llava(tmp_path / "llava"), tmp_path / "out.json"
    done = run_tool(
        "calibrate", str(model), "-o", str(out), "--tokens", str(TOKENS), "--prompts", str(prompts),
        "--dtype", "float32", "--engine-args", json.dumps(tiny_image_readers.TEXT_ALONE),
        **tiny_image_readers.torchvision_environment(tmp_path / "stand_in"),
    )  # fmt: skip
    rows = re.findall(r"^ +(\d+|all) +([01]\.\d+) \(([01]\.\d+)\)", done.stdout, re.MULTILINE)
    assert [layer for layer, _, _ in rows] == ["0", "1", "2", "3", "all"], done.stdout[-4000:]
    assert all(0 < float(share) <= 1 for _, *shares in rows for share in shares) and float(rows[-1][1]) < 1
    # Whether calibration beats the default on random weights does not matter here.
    assert done.returncode == int(not out.exists())
    assert ("No file is better than the default" in done.stdout) == (not out.exists())
