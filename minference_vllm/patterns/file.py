"""Pattern files as JSON: ours, and the two that others have published.

* ours (``minference-vllm``): named fields, a schema version and provenance (``PatternFile``);
* MInference's (``minference``): a list with one object per layer, ``{"head": [kind, a, b, score]}``;
* Qwen's ``sparse_attention_config.json`` (``qwen``): ``{"layer": {"head": [kind, a, b, score]}}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from minference_vllm.patterns.kinds import (
    AShape,
    BlockSparse,
    HeadPattern,
    PatternError,
    PatternFile,
    VerticalSlash,
    first_problem,
    parse_head_pattern,
)

Format = Literal["minference-vllm", "minference", "qwen"]
FORMATS: tuple[Format, ...] = get_args(Format)
PUBLISHED_KINDS = "vertical_and_slash, stream_llm and block_sparse"


def format_of(content: Any, source: str) -> Format:
    """Which of the formats parsed JSON is in.

    Raises:
        PatternError: none of them.
    """
    if isinstance(content, Mapping) and "schema_version" in content:
        return "minference-vllm"
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "minference"
    if isinstance(content, Mapping) and content and all(map(_is_number, content)):
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
            layer: {head: _head(entry, f"{source}, layer {layer}, head {head}") for head, entry in heads.items()}
            for layer, heads in published_layers(content, source).items()
        }
        fields = {"provenance": f"read from {source} ({origin})", "layers": layers}
    try:
        return PatternFile.model_validate(fields)
    except ValidationError as error:
        raise PatternError(f"{source}: {first_problem(error)}") from None


def published_layers(content: Any, source: str) -> dict[int, dict[int, Any]]:
    """The entries of a published file as they stand there: layer -> head -> ``[kind, a, b, score]``.

    Raises:
        PatternError: a layer is no object of head numbers.
    """
    layers = dict(enumerate(content)) if isinstance(content, Sequence) else content
    for layer, heads in layers.items():
        if not isinstance(heads, Mapping) or not all(map(_is_number, heads)):
            raise PatternError(f"{source}, layer {layer}: expected an object of head numbers, found {heads!r:.80}")
    return {int(layer): {int(head): entry for head, entry in heads.items()} for layer, heads in layers.items()}


def _is_number(key: Any) -> bool:
    # "07" and "7" would be the same head.
    return str(key).isdecimal() and str(int(key)) == str(key)


def _head(entry: Any, place: str) -> HeadPattern:
    """One head of a published file: ``[kind, a, b, score]``."""
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) < 3:
        raise PatternError(f"{place}: expected [kind, a, b, score], found {entry!r}")
    kind, first, second = entry[0], entry[1], entry[2]
    fields: dict[str, Any]
    if kind == "vertical_and_slash":
        fields = {"kind": "vertical_slash", "vertical": first, "slash": second}
    elif kind == "stream_llm":
        fields = {"kind": "a_shape", "sink": first, "local": second}
    elif kind == "block_sparse":
        fields = {"kind": "block_sparse", "top_k": first}
    else:
        raise PatternError(f"{place}: unknown kind {kind!r}; published files have {PUBLISHED_KINDS}")
    try:
        return parse_head_pattern(fields)
    except PatternError as error:
        raise PatternError(f"{place}: {error}") from None


def published_entry(pattern: HeadPattern, score: float) -> list[Any] | None:
    """``[kind, a, b, score]`` of a pattern; None where the published formats have no such kind."""
    if isinstance(pattern, VerticalSlash):
        return ["vertical_and_slash", pattern.vertical, pattern.slash, score]
    if isinstance(pattern, AShape):
        return ["stream_llm", pattern.sink, pattern.local, score]
    if isinstance(pattern, BlockSparse):
        return ["block_sparse", pattern.top_k, 0, score]
    return None


def shipped_pattern_files() -> dict[str, Path]:
    """Name -> path of the pattern files that ship with the package."""
    folder = Path(str(resources.files("minference_vllm.pattern_configs")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_pattern_file(name_or_path: str) -> PatternFile:
    """Load a pattern file by path, or by the name of a shipped one.

    Raises:
        PatternError: no such file, broken JSON, or content that ``parse_patterns`` refuses.
    """
    content, path = read_pattern_json(name_or_path)
    return parse_patterns(content, str(path))


def read_pattern_json(name_or_path: str) -> tuple[Any, Path]:
    """Parsed JSON of a pattern file, by path or by the name of a shipped one, and its path.

    Raises:
        PatternError: no such file, broken JSON, or a name that stands twice in one object.
    """
    shipped = shipped_pattern_files()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise PatternError(
            f"no pattern file at {name_or_path!r}; give a path or one of the shipped names: {', '.join(shipped)}"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise PatternError(f"{path}: {twice!r} stands twice in one object")
        return found

    try:
        return json.loads(path.read_text(), object_pairs_hook=unique), path
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PatternError(f"{path}: not valid JSON: {error}") from None


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
