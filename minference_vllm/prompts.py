"""Long prompts for looking at a model when the user brings none: key-value retrieval, as MInference's search uses."""

from __future__ import annotations

import random
import uuid
from typing import Any

INSTRUCTION = "Extract the value corresponding to the specified key in the JSON object below."


def key_value_text(pairs: int, seed: int) -> str:
    """A JSON object of random pairs and a question for the value of one of them."""
    rng = random.Random(seed)
    names = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2 * pairs)]
    lines = ",\n ".join(f'"{key}": "{value}"' for key, value in zip(names[::2], names[1::2], strict=True))
    return f'{INSTRUCTION}\n\n{{{lines}}}\n\nKey: "{rng.choice(names[::2])}"\nCorresponding value:'


def key_value_ids(tokenizer: Any, tokens: int, seed: int) -> list[int]:
    """Token ids of ``key_value_text`` with as many pairs as ``tokens`` hold.

    Args:
        tokenizer: of the model, from transformers.
        tokens: most tokens of the prompt.

    Raises:
        ValueError: not even one pair fits.
    """

    def ids(pairs: int) -> list[int]:
        return list(tokenizer(key_value_text(pairs, seed))["input_ids"])

    one = len(ids(1))
    per_pair = max(1.0, (len(ids(101)) - one) / 100)
    if one > tokens:
        raise ValueError(f"a prompt of {tokens} tokens holds no key-value pair; the smallest has {one}")
    pairs = 1 + int((tokens - one) / per_pair)
    found = ids(pairs)
    while len(found) > tokens:
        # Pairs differ by a few tokens from the mean.
        pairs = max(1, pairs - max(1, int((len(found) - tokens) / per_pair)))
        found = ids(pairs)
    return found
