"""Compare the answers of two engines."""

from __future__ import annotations

from typing import Any


def assert_same_tokens(found: Any, expected: Any, tie: float, at_least: int) -> None:
    """The same greedy tokens. They may differ only from a position on at which the best two are nearly tied, since
    rounding picks either."""
    agreed = 0
    for prompts in zip(found.tokens, expected.tokens, expected.leads, strict=True):
        for ours, theirs, leads in zip(*prompts, strict=True):
            for position, (token, other, lead) in enumerate(zip(ours, theirs, leads, strict=True)):
                if token != other:
                    assert lead < tie, f"position {position}: {ours} instead of {theirs}, which led by {lead} nats"
                    break
                agreed += 1
    assert agreed >= at_least, f"only {agreed} tokens agree before ties part the answers"
