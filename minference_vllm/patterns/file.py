"""The pattern file of a model, in our format and two published ones.

* ours (``minference-vllm``): named fields, a schema version and provenance (``PatternFile``);
* MInference's (``minference``): a list with one object per layer, ``{"head": [kind, a, b, score]}``;
* Qwen's ``sparse_attention_config.json`` (``qwen``): ``{"layer": {"head": [kind, a, b, score]}}``.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from minference_vllm.core.validation import cut, shortened
from minference_vllm.patterns.kinds import (
    NUMBERS,
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
MAX_SIZE = 8 << 20
"""Maximum bytes of a pattern file. With 128 layers of 128 heads, measurements included, it has three million."""
MAX_PATH = 240
"""Maximum characters of a path in a message."""


def _number(key: Any) -> int:
    if not is_number(key):
        raise ValueError(NUMBERS)
    return int(key)


def _version(version: Any) -> Any:
    if type(version) is not int or version != 1:
        raise ValueError("must be 1, the only version so far")
    return version


Number = Annotated[int, BeforeValidator(_number)]


class Measurement(BaseModel):
    """Measurements of a head's pattern, made when it was found."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    recall: float = Field(ge=0, le=1, allow_inf_nan=False)
    """Mean share of the dense attention that lies on the selected keys."""
    value_recall: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """The same with every weight times the norm of its key's value."""
    density: float = Field(ge=0, allow_inf_nan=False)
    """Computed query-key pairs as a share of the dense ones, as a server logs it."""
    cost: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """The density including what ``low_rank`` spends on scores. Patterns are chosen by it."""
    output_error: float = Field(ge=0, allow_inf_nan=False)
    """Error of the attention output, relative to the dense output."""


class PatternFile(BaseModel):
    """The patterns of a model's heads. ``layers`` may be empty: every head then runs ``default``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Annotated[Literal[1], BeforeValidator(_version)] = 1
    model: str | None = None
    """The model these patterns were found on; None: any model."""
    provenance: str = ""
    """Where the patterns come from: the paper, a calibration command, a converted file."""
    default: HeadPattern = VerticalSlash()
    """Pattern of the heads without an entry."""
    layers: dict[Number, dict[Number, HeadPattern]] = {}
    """Layer number -> query head number (global, before tensor parallelism) -> pattern."""
    measured: dict[Number, dict[Number, Measurement]] = {}
    """Layer number -> query head number -> what ``calibrate`` measured; informational only."""

    def check_model(self, num_layers: int, num_heads: int, source: str = "pattern file") -> None:
        """Raise PatternError if the file has layers or heads that the model does not have.

        A file with fewer layers or heads than the model is also refused, unless it has none: it is nearly always the
        file of another model.
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

    @property
    def used(self) -> frozenset[HeadPattern]:
        """All patterns that heads may run."""
        return frozenset([self.default, *(pattern for heads in self.layers.values() for pattern in heads.values())])

    @property
    def is_dense(self) -> bool:
        """Whether every head attends everything."""
        return all(pattern.kind == "dense" for pattern in self.used)

    def for_layer(self, layer: int, num_heads: int, first_head: int = 0) -> tuple[HeadPattern, ...]:
        """Patterns of heads ``first_head .. first_head + num_heads`` (a tensor-parallel rank's slice) of one layer."""
        heads = self.layers.get(layer, {})
        return tuple(heads.get(first_head + head, self.default) for head in range(num_heads))


def format_of(content: Any, source: str) -> Format:
    """The format that parsed JSON is in.

    Raises:
        PatternError: none of them.
    """
    if isinstance(content, Mapping) and "schema_version" in content:
        return "minference-vllm"
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "minference"
    if isinstance(content, Mapping) and any(map(is_number, content)):
        return "qwen"
    raise PatternError(
        f"{source}: neither a minference pattern file (an object with schema_version), nor MInference's list of "
        f"layers, nor an object of layers as in sparse_attention_config.json; found {shortened(content)}"
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
        others = {"": PatternFile.model_fields, "measured": Measurement.model_fields}
        raise PatternError(f"{source}: {first_problem(error, others)}") from None


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
    named = None if _is_file(name_or_path) else named_patterns(name_or_path)
    if named is not None:
        return named
    content, path = read_pattern_json(name_or_path)
    return parse_patterns(content, str(path))


def named_patterns(name: str) -> PatternFile | None:
    """A shipped file by its name, or one pattern for all heads, written out; None: neither. Reads no other files.

    Raises:
        PatternError: a written pattern with an unknown kind or field, or a budget out of range.
    """
    written = parse_written_pattern(name)
    if written is not None:
        return PatternFile(default=written, provenance="written out")
    if name not in shipped_pattern_files():
        return None
    content, path = read_pattern_json(name)
    return parse_patterns(content, str(path))


def read_pattern_json(name_or_path: str) -> tuple[Any, Path]:
    """Parsed JSON of a pattern file, by path or by the name of a shipped one, and its path.

    Raises:
        PatternError: no such file, one that is too large, broken JSON, a duplicate name in an object, or a number that
            is not finite.
    """
    shipped = shipped_pattern_files()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not _is_file(path):
        raise PatternError(
            f"no pattern file at {cut(name_or_path, MAX_PATH)!r}; give {PATTERNS_ARE}; shipped names are "
            f"{', '.join(shipped)}"
        )
    try:
        size = path.stat().st_size
        if size > MAX_SIZE:
            raise PatternError(f"{path}: {size / 2**20:.1f} MiB; a pattern file has at most {MAX_SIZE >> 20} MiB")
        text = path.read_bytes()
    except OSError as error:
        raise PatternError(f"pattern file {cut(str(path), MAX_PATH)!r}: {error.strerror}") from None
    try:
        content = json.loads(text.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # broken, not UTF-8, a number of thousands of digits, too deep
        raise PatternError(f"{path}: not valid JSON: {error}") from None
    problem = _json_problem(content)
    if problem:
        raise PatternError(f"{path}: {problem}")
    return content, path


class _Twice(dict[str, Any]):
    """A JSON object with a duplicate name."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Twice(pairs)


def _json_problem(content: Any) -> str | None:
    """A duplicate name or a number that is not finite, both of which Python's ``json`` accepts; None: neither."""
    waiting = [("", content)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, _Twice):
            return f"{shortened(value.name)} stands twice in {place or 'the outermost object'}"
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{place}.{cut(str(name))}".lstrip("."), inner) for name, inner in items]
        elif isinstance(value, float) and not math.isfinite(value):
            return f"{place} = {value}: numbers must be finite"
    return None


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # the content of a file, most likely
            return False
        raise PatternError(f"pattern file {cut(str(path), MAX_PATH)!r}: {error.strerror}") from None


def to_text(content: Any, indent: str = "") -> str:
    """JSON with one line per head, so that two files can be compared line by line."""
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
