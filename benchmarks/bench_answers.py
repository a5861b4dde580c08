"""Answers of the bundled model to the same questions, dense and with minference, for each given pattern file.

Every text contains several facts, spread evenly over its depth, and every question is a separate prompt. minference
reads each prompt from its first token (prefix caching off). vLLM's dense engine keeps the text's prefix in its cache
between questions, which only changes the time, since the cached keys are those that it would compute again. Its time to
first token is therefore taken only from the first question of each text.

With ``--keep-texts`` minference also keeps the prefix, like a server that answers many questions about one document:
the text's keys come from one pass of sparse attention, and of every question only the last tokens are read, also
sparsely (``min_chunk`` 16). Many questions on long texts then take minutes.

    python benchmarks/bench_answers.py --tokens 32768 --patterns low_rank --csv benchmarks/results/answers_cpu.csv
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tasks
from engine_process import ENVIRONMENT, Engine, Timed, end_with_us, one_at_a_time
from record import emit

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"

ANSWER_TOKENS = tasks.CODE_DIGITS + 5
"""The answer for a copied variable first names the variable that it copies."""


def needle_questions(tokens: int, count: int, seed: int) -> list[tasks.Prompt]:
    """One question for each of ``count`` secrets in one text."""
    rng = random.Random(seed)
    keys = tasks.random_keys(rng, count)
    codes = [tasks.random_code(rng) for _ in keys]
    room = tokens - 1 - len(tasks.question("needle", keys[0]))
    statements = [tasks.statement("needle", key, code) for key, code in zip(keys, codes, strict=True)]
    words, _ = tasks.document(rng, room, statements, [number / max(1, count - 1) for number in range(count)])
    ends = [tasks.question("needle", key) for key in keys]
    return [
        tasks.Prompt(" ".join(words + end), " ".join(code), len(words) + len(end) + 1)
        for end, code in zip(ends, codes, strict=True)
    ]


def key_value_questions(tokens: int, count: int, seed: int) -> list[tasks.Prompt]:
    """Questions for ``count`` records of one text. A quarter of the text is records."""
    return [tasks.key_value(tokens, seed, depth=number / max(1, count - 1)) for number in range(count)]


def variable_questions(tokens: int, count: int, seed: int) -> list[tasks.Prompt]:
    """Questions for the copied variable of each of ``count`` chains in one text."""
    return [tasks.variable_tracking(tokens, seed, chains=count, chain=number) for number in range(count)]


class Task(NamedTuple):
    questions: Callable[[int, int, int], list[tasks.Prompt]]
    """Tokens, questions in one text, and a seed -> prompts."""
    per_text: int


TASKS = {
    "needle": Task(needle_questions, 20),
    "key-value": Task(key_value_questions, 20),
    # As many chains as the model was trained on.
    "variables": Task(variable_questions, 4),
}


def start(name: str, args: argparse.Namespace, folder: Path) -> Engine:
    """Start an engine: ``dense``, or the name of a pattern file."""
    settings = {"patterns": name} | ({"min_chunk": 16} if args.keep_texts else {}) if name != "dense" else None
    keep = {"enforce_eager": True, "enable_prefix_caching": name == "dense" or args.keep_texts}
    tokens = max(args.tokens) + ANSWER_TOKENS
    options = one_at_a_time(args.model, args.dtype, tokens, args.chunk, settings, **keep)
    gib = math.ceil(max(args.tokens) * 3 * 2 * 2 * 64 * 2 * 2 / (1 << 30))
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": str(gib)}
    engine = Engine(name, options, environment, folder / f"{Path(name).name}.log")
    engine.start()
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"))
    parser.add_argument("--patterns", nargs="+", default=["default_cpu"], help="shipped pattern files, or paths")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536], help="prompt lengths")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--questions", type=int, default=100, help="per task and length")
    parser.add_argument("--chunk", type=int, default=2048, help="max_num_batched_tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--keep-texts", action="store_true", help="with a prefix cache for minference, too")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    end_with_us()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: start(name, args, Path(folder)) for name in ("dense", *args.patterns)}
        try:
            for engine in engines.values():
                engine.ask(tokenizer(tasks.needle(256, 0.5, 0).text).input_ids, ANSWER_TOKENS - 1)  # warm-up
            for tokens in args.tokens:
                for task in args.tasks:
                    for row in measure(args, tokenizer, engines, task, tokens):
                        emit(row, args.json, args.csv)
        finally:
            for engine in engines.values():
                engine.stop()


class Answers:
    """The answers of one engine."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.right = 0
        self.ttft: list[float] = []
        self.pairs = [0.0, 0.0]

    def add(self, text: str, right: bool, timed: Timed, whole: bool) -> None:
        """``whole``: the prompt was read from its first token."""
        self.texts.append(text.split(".")[0])
        self.right += right
        if whole:
            self.ttft.append(timed.ttft)
        self.pairs[0] += timed.computed_pairs
        self.pairs[1] += timed.dense_pairs

    @property
    def density(self) -> float:
        return self.pairs[0] / self.pairs[1] if self.pairs[1] else 1.0


def measure(
    args: argparse.Namespace, tokenizer: Any, engines: dict[str, Engine], task: str, tokens: int
) -> list[dict[str, object]]:
    """One row per pattern file; all engines get the same questions."""
    found = {name: Answers() for name in engines}
    for first in range(0, args.questions, TASKS[task].per_text):
        count = min(TASKS[task].per_text, args.questions - first)
        for number, prompt in enumerate(TASKS[task].questions(tokens, count, 1000 + first)):
            ids = tokenizer(prompt.text).input_ids
            for name, engine in engines.items():
                timed = engine.ask(ids, ANSWER_TOKENS - 1)
                text = tokenizer.decode(timed.tokens)
                whole = number == 0 or not (name == "dense" or args.keep_texts)
                found[name].add(text, tasks.grade(text, prompt.answer), timed, whole)
        right = ", ".join(f"{name} {answers.right}" for name, answers in found.items())
        print(f"{task} {tokens}, right of {first + count}: {right}", file=sys.stderr, flush=True)
    dense = found.pop("dense")
    return [
        {
            "task": task,
            "tokens": tokens,
            "chunk": args.chunk,
            "patterns": name,
            "questions": args.questions,
            "correct_dense": dense.right,
            "correct_sparse": answers.right,
            "same_answer": sum(a == b for a, b in zip(dense.texts, answers.texts, strict=True)),
            "density": answers.density,
            "ttft_dense_s": statistics.median(dense.ttft),
            "ttft_sparse_s": statistics.median(answers.ttft),
        }
        for name, answers in found.items()
    ]


if __name__ == "__main__":
    main()
