"""Long texts that need no network, and prompts read from files: what ``calibrate`` and ``evaluate`` read."""

from __future__ import annotations

import importlib.util
import json
import platform
import random
import string
from pathlib import Path


def key_value_prompt(characters: int) -> str:
    """A JSON object of random keys and values and a question for one of them, as in arXiv 2407.02490, section 4."""
    rng = random.Random(0)

    def word() -> str:
        return "".join(rng.choices(string.hexdigits[:16], k=32))

    pairs = {word(): word() for _ in range(max(1, characters // 76))}
    wanted = rng.choice(list(pairs))
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'{json.dumps(pairs, indent=0)}\n\nKey: "{wanted}"\nThe value associated with the specified key is: '
    )


def load_text(name: str) -> tuple[str, str]:
    """A text's label in the report, and the text.

    Args:
        name: ``pydoc`` (the topics of Python's help), ``opticks`` (Newton's, in the package apache-tvm-ffi that vLLM
            installs), or a file.

    Raises:
        ValueError: no such text here.
    """
    if name == "pydoc":
        from pydoc_data.topics import topics  # the longest English text that comes with every Python

        version = ".".join(platform.python_version_tuple()[:2])
        return f"pydoc topics {version}", "\n\n".join(topics[topic] for topic in sorted(topics))
    path = Path(name)
    if name == "opticks":
        package = importlib.util.find_spec("tvm_ffi")
        if package is None or package.origin is None:
            raise ValueError("text 'opticks' is in the package apache-tvm-ffi, which is not installed")
        path = Path(package.origin).parent / "3rdparty" / "libbacktrace" / "Isaac.Newton-Opticks.txt"
    try:
        return (name if name == "opticks" else path.name), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text {name!r}: not pydoc, opticks or a readable file: {error}") from None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one for a text file, one per line for a ``.jsonl``.

    Raises:
        ValueError: a line is not ``{"prompt": "..."}``, or there is none.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [text]
    try:
        prompts = [json.loads(line)["prompt"] for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, KeyError, TypeError):
        prompts = [None]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f'{path}: every line must be a JSON object {{"prompt": "..."}}')
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def without_middle(ids: list[int], tokens: int) -> list[int]:
    """At most ``tokens`` of the ids: three quarters from the beginning, one from the end, where the question is."""
    if len(ids) <= tokens:
        return ids
    end = tokens // 4
    return ids[: tokens - end] + ids[len(ids) - end :]
