"""Strategies for user input: texts, names and JSON, nearly right and far from it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import strategies as st

FACTOR = int(os.environ.get("FUZZ") or 0)
"""Factor for the examples of a longer run; 0: no longer run."""
MAX_LENGTH = 1200
"""Maximum characters of a message, per problem."""
PIECES = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"-", b"1e999", b"NaN", b"true", b"null", b"\\ud800", b"\n"]


def examples(count: int) -> Callable[[Any], Any]:
    """``count`` examples in the fast tests, and ``FUZZ`` times as many in a longer run."""
    return hypothesis.settings(max_examples=count * max(1, FACTOR))


def assert_readable(message: str, problems: int = 1) -> None:
    """A message that fits on a screen and can be printed anywhere."""
    assert message.strip(), "no message"
    assert message.isprintable(), f"cannot be printed as it is: {message!r}"
    assert len(message) <= MAX_LENGTH * problems, f"{len(message)} characters: {message[:2000]}"


# Includes lone surrogates, which JSON can contain.
texts = st.text(st.characters(), max_size=12)
numbers = st.one_of(
    st.integers(-2, 300),
    st.integers(),
    st.floats(0, 1),
    st.floats(),
    st.sampled_from([0, 1, 1 << 24, (1 << 24) + 1, 10**400, -(10**400)]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)


@st.composite
def misspelt(draw: st.DrawFn, names: list[str]) -> str:
    """A name with up to two characters of it changed, added or left out."""
    name = list(draw(st.sampled_from(names)))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(name)))
        name[place : place + draw(st.integers(0, 1))] = draw(st.text(st.characters(), max_size=1))
    return "".join(name)


@st.composite
def mutated(draw: st.DrawFn, contents: list[Any], words: list[Any]) -> Any:
    """Parsed JSON with one to three places of it replaced, left out or renamed.

    Args:
        contents: correct contents.
        words: names and values that occur in such contents.
    """
    content = {"": copy.deepcopy(draw(st.sampled_from(contents)))}
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        inside, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if what == "replace" or inside is content:
            inside[key] = draw(st.one_of(values, st.sampled_from(words)))
        elif what == "remove":
            del inside[key]
        elif isinstance(inside, dict):
            inside[draw(st.one_of(texts, st.sampled_from([word for word in words if isinstance(word, str)])))] = (
                inside.pop(key)
            )
        else:
            inside.insert(key, draw(values))
    return content[""]


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in content with every key or place in it."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from _places(content[key])


@st.composite
def mutated_text(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """Bytes of a text, some of them changed, left out, added or repeated."""
    text = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(text)))
        end = begin + draw(st.integers(0, 8))
        piece = draw(st.one_of(st.binary(max_size=4), st.sampled_from(PIECES), st.just(bytes(text[begin:end]) * 2)))
        text[begin:end] = piece
    return bytes(text)
