"""RULER (arXiv 2404.06654) for any tokenizer and length: lm-eval's generators and its score.

Of its thirteen tasks, the seven that need no download: needles are hidden in repeated sentences or among other needles,
since essays would have to be downloaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

PACKAGES = ("lm_eval", "wonderwords", "nltk", "scipy")
MIN_TOKENS = 4096
"""lm-eval's own minimum prompt length; some of its generators do not terminate below it."""

NIAH: dict[str, dict[str, Any]] = {
    "niah_single": {"type_haystack": "repeat"},
    "niah_multikey": {"type_haystack": "needle"},
    "niah_multivalue": {"type_haystack": "repeat", "num_needle_v": 4},
    "niah_multiquery": {"type_haystack": "repeat", "num_needle_q": 4},
}
"""Arguments of ``generate_samples`` in lm-eval's ``prepare_niah`` by task, beside those that all tasks share."""
GENERATED = {**dict.fromkeys(NIAH, 128), "variable_tracking": 30, "common_words": 120, "frequent_words": 50}
"""Maximum tokens of an answer by task, as in lm-eval's task files."""


class Sample(NamedTuple):
    task: str
    question: str
    prefix: str
    """The beginning of the answer."""
    expected: list[str]


def missing_packages() -> list[str]:
    """The packages among lm-eval and its requirements here that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def samples(tokenizer: Any, tokens: int, count: int, seed: int) -> list[Sample]:
    """``count`` samples of every task; question and answer together have at most ``tokens`` tokens.

    Args:
        tokenizer: of transformers.
        tokens: at least ``MIN_TOKENS``.
        seed: of everything that is drawn.
    """
    found = []
    with _quiet():
        for task, generate in _generators().items():
            # A task's samples do not depend on those before it.
            _seed(f"{task} {tokens} {seed}")
            for made in generate(tokenizer, tokens, count):
                found.append(Sample(task, made["input"], made["gen_prefix"], list(made["outputs"])))
    return found


def score(expected: Sequence[str], answer: str) -> float:
    """Share of the expected strings that the answer contains, as lm-eval's ``string_match_all``."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    return float(string_match_all(postprocess_pred([answer]), [list(expected)]))


def _generators() -> dict[str, Callable[[Any, int, int], list[dict[str, Any]]]]:
    # On import prepare_niah downloads a sentence splitter for essays, in the process of rank 0.
    with patch.dict(os.environ, LOCAL_RANK="1"):
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils

    def needles(task: str) -> Callable[[Any, int, int], list[dict[str, Any]]]:
        def generate(tokenizer: Any, tokens: int, count: int) -> list[dict[str, Any]]:
            options = NIAH[task]
            found: list[dict[str, Any]] = prepare_niah.generate_samples(
                prepare_niah.get_haystack(options["type_haystack"]), tokenizer, max_seq_length=tokens,
                template=niah_utils.TEMPLATE, num_samples=count, type_needle_k="words", type_needle_v="numbers",
                **options,
            )  # fmt: skip
            return found

        return generate

    def variables(tokenizer: Any, tokens: int, count: int) -> list[dict[str, Any]]:
        (example,) = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)
        found: list[dict[str, Any]] = vt_utils.sys_vartrack_w_noise_random(
            tokenizer, count, tokens, icl_example=example
        )
        return found

    def common(tokenizer: Any, tokens: int, count: int) -> list[dict[str, Any]]:
        # The module has its own random generator, created on import.
        cwe_utils.RNG.seed(random.random())
        found: list[dict[str, Any]] = cwe_utils.sys_word_pair_random(count, tokens, tokenizer)
        return found

    def frequent(tokenizer: Any, tokens: int, count: int) -> list[dict[str, Any]]:
        # Its length is that of the question alone.
        found: list[dict[str, Any]] = fwe_utils.sys_kwext(tokenizer, tokens - GENERATED["frequent_words"], count)
        return found

    others = {"variable_tracking": variables, "common_words": common, "frequent_words": frequent}
    return {**{task: needles(task) for task in NIAH}, **others}


def _seed(text: str) -> None:
    """Seed what the generators draw from."""
    import numpy as np

    random.seed(text)
    np.random.seed(random.getrandbits(32))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the generators' output and progress bars, and restore the state of ``random``."""
    state = random.getstate()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(state)
