"""The pattern file of a model, in our format and the two that others have published.

* ours (``minference-vllm``): named fields, a schema version and provenance (``PatternFile``);
* MInference's (``minference``): a list with one object per layer, ``{"head": [kind, a, b, score]}``;
* Qwen's ``sparse_attention_config.json`` (``qwen``): ``{"layer": {"head": [kind, a, b, score]}}``.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from minference_vllm.core.validation import cut
from minference_vllm.patterns.kinds import (
    MAX_NUMBER,
    HeadPattern,
    PatternError,
    VerticalSlash,
    first_problem,
    parse_written_pattern,
)
from minference_vllm.patterns.published import head_pattern, is_number, published_layers
from minference_vllm.settings import PATTERNS_ARE

Format = Literal["minference-vllm", "minference", "qwen"]
FORMATS: tuple[Format, ...] = get_args(Format)
MAX_PATH = 240
"""Characters of a path that a message repeats."""


class Measurement(BaseModel):
    """What a head's pattern was measured to do when it was found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recall: float
    """Mean share of the dense attention that lies on the selected keys."""
    value_recall: float | None = None
    """The same with every weight times the norm of its key's value."""
    density: float
    """Computed query-key pairs as a share of the dense ones, with what ``low_rank`` spends where it scores keys."""
    output_error: float
    """Of the attention output, relative to the dense output."""


class PatternFile(BaseModel):
    """The patterns of a model's heads. ``layers`` may be empty: every head then runs ``default``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str | None = None
    """The model these patterns were found on; None: any model."""
    provenance: str = ""
    """Where the patterns come from: the paper, a calibration command, a converted file."""
    default: HeadPattern = VerticalSlash()
    """What a head without an entry runs."""
    layers: dict[int, dict[int, HeadPattern]] = {}
    """Layer number -> query head number (global, before tensor parallelism) -> pattern."""
    measured: dict[int, dict[int, Measurement]] = {}
    """Layer number -> query head number -> what ``calibrate`` measured; for people, nothing runs by it."""

    @model_validator(mode="after")
    def _numbers_are_in_range(self) -> PatternFile:
        for layer, heads in self.layers.items():
            if any(not 0 <= number <= MAX_NUMBER for number in (layer, *heads)):
                raise ValueError(f"layer and head numbers start at 0 and end at {MAX_NUMBER} (layer {layer})")
        return self

    def check_model(self, num_layers: int, num_heads: int, source: str = "pattern file") -> None:
        """Raise PatternError when the file speaks of layers or heads that the model does not have.

        A file that covers fewer layers or heads than the model is also refused unless it covers none: half a file is
        nearly always the file of another model.
        """
        if not self.layers:
            return
        found_layers = max(self.layers) + 1
        if found_layers != num_layers:
            raise PatternError(f"{source} describes {found_layers} layers, the model has {num_layers}")
        for layer, heads in self.layers.items():
            if heads and max(heads) + 1 > num_heads:
                raise PatternError(
                    f"{source}, layer {layer}: describes head {max(heads)}, the model has heads 0 to {num_heads - 1}"
                )
        found_heads = max((max(heads) + 1 for heads in self.layers.values() if heads), default=num_heads)
        if found_heads != num_heads:
            raise PatternError(f"{source} describes {found_heads} heads per layer, the model has {num_heads}")

    def for_layer(self, layer: int, num_heads: int, first_head: int = 0) -> tuple[HeadPattern, ...]:
        """Patterns of heads ``first_head .. first_head + num_heads`` (a tensor-parallel rank's slice) of one layer."""
        heads = self.layers.get(layer, {})
        return tuple(heads.get(first_head + head, self.default) for head in range(num_heads))


def format_of(content: Any, source: str) -> Format:
    """Which of the formats parsed JSON is in.

    Raises:
        PatternError: none of them.
    """
    if isinstance(content, Mapping) and "schema_version" in content:
        return "minference-vllm"
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "minference"
    if isinstance(content, Mapping) and content and all(map(is_number, content)):
        return "qwen"
    raise PatternError(
        f"{source}: neither a minference pattern file (an object with schema_version), nor MInference's list of "
        "layers, nor an object of layers as in sparse_attention_config.json"
    )


def parse_patterns(content: Any, source: str) -> PatternFile:
    """A pattern file from parsed JSON in any of the three formats.

    Raises:
        PatternError: not one of the formats, an unknown kind, or a budget out of range.
    """
    fields = content
    if format_of(content, source) != "minference-vllm":
        origin = "MInference's list format" if isinstance(content, Sequence) else "sparse_attention_config.json format"
        layers = {
            layer: {head: head_pattern(entry, f"{source}, layer {layer}, head {head}") for head, entry in heads.items()}
            for layer, heads in published_layers(content, source).items()
        }
        fields = {"provenance": f"read from {source} ({origin})", "layers": layers}
    try:
        return PatternFile.model_validate(fields)
    except ValidationError as error:
        raise PatternError(f"{source}: {first_problem(error)}") from None


def shipped_pattern_files() -> dict[str, Path]:
    """Name -> path of the pattern files that ship with the package."""
    folder = Path(str(resources.files("minference_vllm.pattern_configs")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_pattern_file(name_or_path: str) -> PatternFile:
    """Load a pattern file by path, or by the name of a shipped one; or one pattern for all heads, written out as
    ``low_rank(32, 0.95)`` or ``coverage(gamma=0.95, min_budget=3072)``.

    Raises:
        PatternError: no such file, broken JSON, or content that ``parse_patterns`` refuses.
    """
    written = None if _is_file(name_or_path) else parse_written_pattern(name_or_path)
    if written is not None:
        return PatternFile(default=written, provenance="written out")
    content, path = read_pattern_json(name_or_path)
    return parse_patterns(content, str(path))


def read_pattern_json(name_or_path: str) -> tuple[Any, Path]:
    """Parsed JSON of a pattern file, by path or by the name of a shipped one, and its path.

    Raises:
        PatternError: no such file, broken JSON, or a name that stands twice in one object.
    """
    shipped = shipped_pattern_files()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not _is_file(path):
        raise PatternError(
            f"no pattern file at {cut(name_or_path, MAX_PATH)!r}; give {PATTERNS_ARE}; shipped names are "
            f"{', '.join(shipped)}"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise PatternError(f"{path}: {twice!r} stands twice in one object")
        return found

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique), path
    except OSError as error:
        raise PatternError(f"pattern file {cut(str(path), MAX_PATH)!r}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PatternError(f"{path}: not valid JSON: {error}") from None


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # the content of a file, most likely
            return False
        raise PatternError(f"pattern file {cut(str(path), MAX_PATH)!r}: {error.strerror}") from None


def to_text(content: Any, indent: str = "") -> str:
    """JSON for people: one line per head, so that two files can be compared line by line."""
    if isinstance(content, dict | list) and any(isinstance(item, dict | list) for item in _items(content)):
        inner = indent + "  "
        if isinstance(content, dict):
            lines = [f"{inner}{json.dumps(str(name))}: {to_text(item, inner)}" for name, item in content.items()]
        else:
            lines = [f"{inner}{to_text(item, inner)}" for item in content]
        opening, closing = ("{", "}") if isinstance(content, dict) else ("[", "]")
        return "\n".join([opening, ",\n".join(lines), indent + closing])
    return json.dumps(content)


def _items(content: dict[Any, Any] | list[Any]) -> Sequence[Any]:
    return list(content.values()) if isinstance(content, dict) else content
