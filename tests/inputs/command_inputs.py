"""Inputs for tests of the command line tool, and its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
LAYERS, HEADS = 3, 4


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def model(folder: Path, **fields: Any) -> Path:
    """A checkpoint that consists of its configuration only."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "dtype": "bfloat16",
}


def pattern_file(path: Path, layers: int = LAYERS, heads: int = HEADS) -> Path:
    entry: dict[str, Any] = {str(head): {"kind": "a_shape", "sink": 64, "local": 256} for head in range(heads)}
    entry[str(heads - 1)] = {"kind": "dense"}
    content = {"schema_version": 1, "provenance": "a test", "layers": {str(layer): entry for layer in range(layers)}}
    path.write_text(json.dumps(content))
    return path
