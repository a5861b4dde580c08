"""Translate a pattern file between our format, MInference's list and Qwen's sparse_attention_config.json.

The format of FILE is recognised. What the other format cannot hold and no computation depends on (scores, provenance)
is left out, with one line about each kind of loss. What would change what is computed is refused, with the layers and
heads that are in the way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from minference_vllm.patterns.file import (
    FORMATS,
    Format,
    PatternFile,
    format_of,
    parse_patterns,
    published_layers,
    read_pattern_json,
    to_text,
)
from minference_vllm.patterns.kinds import MAX_NUMBER, PatternError
from minference_vllm.patterns.published import PUBLISHED_KINDS, published_entry

MAX_NAMED = 5
"""Heads named in one error; the others are counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="pattern file: a path, or the name of a shipped one")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="where to write; - for standard output")
    parser.add_argument("--to", choices=FORMATS, default=FORMATS[0], help="format to write (default: %(default)s)")
    shape = parser.add_argument_group(
        "size of the model", "Published formats list every head. A file of ours that does not name the last ones needs:"
    )
    shape.add_argument("--layers", type=_size, metavar="N", help="layers of the model")
    shape.add_argument("--heads", type=_size, metavar="N", help="query heads per layer")


def _size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_NUMBER + 1:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_NUMBER + 1}, not {text}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    content, path = read_pattern_json(args.file)
    converted, losses = convert(content, args.to, str(path), args.layers, args.heads)
    for loss in losses:
        print(f"left out: {loss}", file=sys.stderr)
    text = to_text(converted) + "\n"
    if args.output == "-":
        print(text, end="")
    else:
        Path(args.output).write_text(text)
    return 0


def convert(
    content: Any, target: Format, source: str, num_layers: int | None = None, num_heads: int | None = None
) -> tuple[Any, list[str]]:
    """A pattern file in another format.

    Args:
        content: parsed JSON in any of the formats.
        source: its name, for messages.
        num_layers, num_heads: the model's size; None: the last layer and head that the file names.

    Returns:
        parsed JSON in the target format; what was left out, a sentence per kind of loss.

    Raises:
        PatternError: the content is invalid, or the target format cannot express it.
    """
    patterns = parse_patterns(content, source)
    if target == "minference-vllm":
        losses = [] if format_of(content, source) == target else _unread(published_layers(content, source))
        return patterns.model_dump(mode="json"), losses
    if format_of(content, source) != "minference-vllm":
        # Between published formats entries are copied unchanged, scores included.
        entries, losses = published_layers(content, source), []
    else:
        entries, losses = _entries(patterns, target, source, num_layers, num_heads), _unwritten(patterns)
    by_layer = {layer: {str(head): entry for head, entry in heads.items()} for layer, heads in entries.items()}
    if target == "qwen":
        return {str(layer): heads for layer, heads in by_layer.items()}, losses
    return [by_layer.get(layer, {}) for layer in range(max(by_layer, default=-1) + 1)], losses


def _unread(layers: dict[int, dict[int, Any]]) -> list[str]:
    """What is lost when a published file is read into our format."""
    entries = [entry for heads in layers.values() for entry in heads.values()]
    losses = []
    if scores := sum(len(entry) > 3 for entry in entries):
        losses.append(f"the scores of {scores} heads; nothing is computed from them")
    if seconds := sum(entry[0] == "block_sparse" and entry[2] != 0 for entry in entries):
        losses.append(f"the second number of {seconds} block_sparse heads; nothing is computed from it")
    if others := sum(len(entry) > 4 for entry in entries):
        losses.append(f"what stands behind the score of {others} heads; its meaning is not known")
    return losses


def _unwritten(patterns: PatternFile) -> list[str]:
    """What is lost when our format is written as a published one."""
    losses = []
    if patterns.measured:
        losses.append("what was measured, but for the recall, which is written as the score")
    if patterns.model:
        losses.append(f"model: {patterns.model}")
    if patterns.provenance:
        losses.append(f"provenance: {patterns.provenance}")
    return losses


def _entries(
    patterns: PatternFile, target: Format, source: str, num_layers: int | None, num_heads: int | None
) -> dict[int, dict[int, Any]]:
    """Every head of the model in the published form."""
    if num_layers is None:
        num_layers = max(patterns.layers, default=-1) + 1
    if num_heads is None:
        num_heads = max((head + 1 for heads in patterns.layers.values() for head in heads), default=0)
    if num_layers < 1 or num_heads < 1:
        raise PatternError(
            f"{source} has a default for all heads and names none; {target} lists every head, so give the model's "
            "size with --layers and --heads"
        )
    patterns.check_model(num_layers, num_heads, source)
    entries: dict[int, dict[int, Any]] = {}
    refused = []
    for layer in range(num_layers):
        entries[layer] = {}
        for head, pattern in enumerate(patterns.for_layer(layer, num_heads)):
            measured = patterns.measured.get(layer, {}).get(head)
            # 1.0 is the score of heads without an entry in MInference's own code.
            entry = entries[layer][head] = published_entry(pattern, measured.recall if measured else 1.0)
            if entry is None:
                refused.append(f"layer {layer}, head {head}: {pattern}")
    if refused:
        others = f"; and {len(refused) - MAX_NAMED} more" if len(refused) > MAX_NAMED else ""
        raise PatternError(
            f"{source}: {target} has {PUBLISHED_KINDS} only, without a remainder, and cannot say "
            f"{'; '.join(refused[:MAX_NAMED])}{others}"
        )
    return entries
