"""Parts of messages about invalid input: the shortened value, what is allowed, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

MAX_SHOWN = 60
"""Maximum characters of a value or a name in a message."""
ALIKE = 0.75
"""Minimum similarity (``difflib``) at which a name is taken for a misspelling of another."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = MAX_SHOWN
_short.maxlevel = 2


def shortened(value: Any) -> str:
    """``repr`` of a value, with the middle of long ones left out."""
    return cut(_short.repr(value))


def cut(text: str, length: int = MAX_SHOWN) -> str:
    """The text with its middle left out if it is longer, and unprintable characters escaped as in ``repr``: a name may
    contain line breaks, and in JSON half of a surrogate pair."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-(length // 4) :]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'min_context'?"``, or an empty string if no known name is similar."""
    alike = nearest(name, known)
    return f"; did you mean {alike!r}?" if alike else ""


def nearest(name: str, known: Iterable[str], alike: float = ALIKE) -> str | None:
    """The most similar known name, or None. Case, and characters between words, are ignored."""
    plain = {_plain(other): other for other in known}
    found = difflib.get_close_matches(_plain(name[:MAX_SHOWN]), plain, n=1, cutoff=alike)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def value_problem(problem: Mapping[str, Any], field: FieldInfo | None) -> str:
    """Message for one entry of pydantic's ``ValidationError.errors()`` about a value: what it is, and what it must be.

    Args:
        field: the value's field; None: use pydantic's own message.
    """
    if problem["type"] == "value_error":
        must = str(problem["ctx"]["error"])
    else:
        must = f"must be {allowed(field)}" if field is not None else str(problem["msg"])
    return f"{shortened(problem['input'])}: {must}"


def allowed(field: FieldInfo) -> str:
    """The values of a field, in words: ``a whole number from 0 to 4096``."""
    limits = {
        name: f"{getattr(limit, name):.12g}"
        for limit in field.metadata
        for name in ("ge", "gt", "le", "lt", "multiple_of")
        if getattr(limit, name, None) is not None
    }
    kinds = {kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType}
    if get_origin(field.annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(field.annotation)))}"
    if kinds == {bool}:
        return "true or false"
    if kinds == {str}:
        return "text"
    words = ["a whole number" if kinds == {int} else "a number"]
    if "gt" in limits and "lt" in limits:
        words.append(f"between {limits['gt']} and {limits['lt']}, both excluded")
    elif "ge" in limits and "le" in limits:
        words.append(f"from {limits['ge']} to {limits['le']}")
    elif "ge" in limits:
        words.append(f"of at least {limits['ge']}")
    if "multiple_of" in limits:
        words.append(f"that {limits['multiple_of']} divides")
    return " ".join(words)
