"""The two published formats of pattern files: MInference's list with one object per layer, and Qwen's
``sparse_attention_config.json``. Both give a head as ``[kind, a, b, score]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minference_vllm.core.validation import shortened
from minference_vllm.patterns.kinds import (
    MAX_NUMBER,
    NUMBERS,
    AShape,
    BlockSparse,
    HeadPattern,
    PatternError,
    VerticalSlash,
    parse_head_pattern,
)

PUBLISHED_KINDS = "vertical_and_slash, stream_llm, block_sparse and flex_vertical_and_slash"


def published_layers(content: Any, source: str) -> dict[int, dict[int, Any]]:
    """The unchanged entries of a published file: layer -> head -> ``[kind, a, b, score]``.

    Raises:
        PatternError: a layer is not an object of head numbers, a number is not in plain decimal, or there are no heads.
    """
    layers = dict(enumerate(content)) if isinstance(content, Sequence) else content
    for layer, heads in layers.items():
        if not is_number(layer):
            raise PatternError(f"{source}, layer {shortened(layer)}: {NUMBERS}")
        if not isinstance(heads, Mapping):
            raise PatternError(f"{source}, layer {layer}: expected an object of head numbers, found {shortened(heads)}")
        for head in heads:
            if not is_number(head):
                raise PatternError(
                    f"{source}, layer {layer}: expected an object of head numbers, found {shortened(head)}; {NUMBERS}"
                )
    if not any(layers.values()):
        raise PatternError(f"{source}: no head of any layer is named")
    return {int(layer): {int(head): entry for head, entry in heads.items()} for layer, heads in layers.items()}


def is_number(key: Any) -> bool:
    """Whether this is a layer or head number: an int, or the name of a JSON object in plain decimal ("07" would be the
    same as "7")."""
    text = str(key) if type(key) is int else key
    return isinstance(text, str) and re.fullmatch("0|[1-9][0-9]{0,3}", text) is not None and int(text) <= MAX_NUMBER


def head_pattern(entry: Any, place: str) -> HeadPattern:
    """One head of a published file: ``[kind, a, b, score]``."""
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) < 3:
        raise PatternError(f"{place}: expected [kind, a, b, score], found {shortened(entry)}")
    kind, first, second = entry[0], entry[1], entry[2]
    fields: dict[str, Any]
    if kind == "vertical_and_slash":
        fields = {"kind": "vertical_slash", "vertical": first, "slash": second}
    elif kind == "stream_llm":
        fields = {"kind": "a_shape", "sink": first, "local": second}
    elif kind == "block_sparse":
        fields = {"kind": "block_sparse", "top_k": first}
    elif kind == "flex_vertical_and_slash":
        # [gamma, min_budget] for columns and for diagonals. Ours covers both together, with the larger of each.
        pairs = [part for part in (first, second) if isinstance(part, list) and len(part) == 2]
        if len(pairs) < 2 or not all(isinstance(value, int | float) for pair in pairs for value in pair):
            raise PatternError(f"{place}: expected {kind} with [gamma, min_budget] twice, found {shortened(entry)}")
        gammas, budgets = zip(*pairs, strict=True)
        fields = {"kind": "coverage", "gamma": max(gammas), "min_budget": max(budgets)}
    else:
        raise PatternError(f"{place}: unknown kind {shortened(kind)}; published files have {PUBLISHED_KINDS}")
    try:
        return parse_head_pattern(fields)
    except PatternError as error:
        raise PatternError(f"{place}: {error}") from None


def published_entry(pattern: HeadPattern, score: float) -> list[Any] | None:
    """``[kind, a, b, score]`` of a pattern; None if the published formats do not have its kind, or its remainder."""
    if pattern.has_remainder:
        return None
    if isinstance(pattern, VerticalSlash):
        return ["vertical_and_slash", pattern.vertical, pattern.slash, score]
    if isinstance(pattern, AShape):
        return ["stream_llm", pattern.sink, pattern.local, score]
    if isinstance(pattern, BlockSparse):
        return ["block_sparse", pattern.top_k, 0, score]
    return None
