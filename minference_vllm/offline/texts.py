"""Long texts that need no network, and prompts read from files: what ``calibrate`` and ``evaluate`` read."""

from __future__ import annotations

import json
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


def help_topics(characters: int) -> str:
    """Python's own help texts, the longest English text that every Python brings; repeated where they do not reach."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return (text * (characters // len(text) + 1))[:characters]


def read_prompts(path: Path) -> list[str]:
    """One prompt of a text file, or those of the lines of a ``.jsonl``.

    Raises:
        ValueError: a line that is no ``{"prompt": "..."}``.
    """
    text = path.read_text()
    if path.suffix != ".jsonl":
        return [text]
    try:
        prompts = [json.loads(line)["prompt"] for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f'{path}: every line must be a JSON object {{"prompt": "..."}}') from None
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def without_middle(ids: list[int], tokens: int) -> list[int]:
    """At most ``tokens`` of them, three quarters from the beginning and the end, where the question stands."""
    if len(ids) <= tokens:
        return ids
    end = tokens // 4
    return ids[: tokens - end] + ids[len(ids) - end :]
