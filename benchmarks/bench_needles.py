"""Answers of the bundled model, dense against minference, on the same questions.

Every haystack holds several secrets, spread evenly over its depth, and every question is a prompt of its own.
minference reads each prompt from its first token (prefix caching off). vLLM's dense engine keeps the haystack's prefix
in its cache from one question to the next, which changes nothing but the time: the cached keys are the ones it would
compute again. Its time to first token is therefore taken from the first question of each haystack alone.

    python benchmarks/bench_needles.py --tokens 32768 65536 --csv benchmarks/results/needles_cpu.csv
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine_process import ENVIRONMENT, Engine, Timed
from record import emit

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
sys.path.insert(0, str(DEMO))
import tasks  # noqa: E402 - the demo's own tasks

ANSWER_TOKENS = tasks.CODE_DIGITS + 2


def needle_questions(tokens: int, count: int, seed: int) -> list[tasks.Prompt]:
    """Questions for each of ``count`` secrets in one text."""
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
    """Questions for ``count`` of the records of one text, a quarter of which is records."""
    return [tasks.key_value(tokens, seed, depth=number / max(1, count - 1)) for number in range(count)]


QUESTIONS = {"needle": needle_questions, "key-value": key_value_questions}


def start(name: str, args: argparse.Namespace, folder: Path) -> Engine:
    options: dict[str, Any] = {
        "model": args.model,
        "dtype": "bfloat16",
        "max_model_len": max(args.tokens) + ANSWER_TOKENS,
        "max_num_batched_tokens": args.chunk,
        "max_num_seqs": 1,
        "enforce_eager": True,
        "enable_prefix_caching": name == "dense",
        "disable_log_stats": False,
    }
    if name == "minference":
        settings = {"patterns": args.patterns} if args.patterns else {}
        options |= {"attention_backend": "minference", "additional_config": {"minference": settings}}
    gib = math.ceil(max(args.tokens) * 3 * 2 * 2 * 64 * 2 * 2 / (1 << 30))
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": str(gib)}
    engine = Engine(name, options, environment, folder / f"{name}.log")
    engine.start()
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"))
    parser.add_argument("--patterns", default=None, help="the setting of that name")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536], help="prompt lengths")
    parser.add_argument("--tasks", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--haystacks", type=int, default=10)
    parser.add_argument("--questions", type=int, default=10, help="per haystack")
    parser.add_argument("--chunk", type=int, default=2048, help="max_num_batched_tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: start(name, args, Path(folder)) for name in ("dense", "minference")}
        try:
            for engine in engines.values():
                engine.ask(tokenizer(tasks.needle(256, 0.5, 0).text).input_ids, ANSWER_TOKENS - 1)  # warm-up
            for tokens in args.tokens:
                for task in args.tasks:
                    emit(measure(args, tokenizer, engines, task, tokens), args.json, args.csv)
        finally:
            for engine in engines.values():
                engine.stop()


def measure(
    args: argparse.Namespace, tokenizer: Any, engines: dict[str, Engine], task: str, tokens: int
) -> dict[str, object]:
    """One row: the same questions to both engines."""
    right: dict[str, int] = dict.fromkeys(engines, 0)
    ttft: dict[str, list[float]] = {name: [] for name in engines}
    same = asked = 0
    pairs = [0.0, 0.0]
    for haystack in range(args.haystacks):
        for number, prompt in enumerate(QUESTIONS[task](tokens, args.questions, seed=1000 + haystack)):
            ids = tokenizer(prompt.text).input_ids
            answers = []
            for name, engine in engines.items():
                timed: Timed = engine.ask(ids, ANSWER_TOKENS - 1)
                answers.append(tokenizer.decode(timed.tokens))
                right[name] += tasks.grade(answers[-1], prompt.answer)
                if name == "minference" or number == 0:
                    ttft[name].append(timed.ttft)
                pairs[0] += timed.computed_pairs
                pairs[1] += timed.dense_pairs
            same += answers[0].split(".")[0] == answers[1].split(".")[0]
            asked += 1
        print(f"{task} {tokens}: {right} of {asked}", file=sys.stderr, flush=True)
    return {
        "task": task,
        "tokens": tokens,
        "chunk": args.chunk,
        "patterns": args.patterns or "default",
        "questions": asked,
        "correct_dense": right["dense"],
        "correct_sparse": right["minference"],
        "same_answer": same,
        "density": pairs[0] / pairs[1] if pairs[1] else 1.0,
        "ttft_dense_s": statistics.median(ttft["dense"]),
        "ttft_sparse_s": statistics.median(ttft["minference"]),
    }


if __name__ == "__main__":
    main()
