"""Time to first token of short requests beside long prompts, in vLLM's dense server and with minference.

One client sends long prompts (``examples/demo/tasks.py``) one after the other; others send short ones at random times,
so that nearly all of them arrive during the prefill of a long prompt. By default vLLM gives the whole token budget of a
step to the prompt that it is reading, and a short request waits until that is done. With ``--threshold`` a step has
tokens left for short requests, which then wait for one chunk. Every answer is checked.

    python benchmarks/bench_beside.py --csv benchmarks/results/beside_cpu.csv
    python benchmarks/bench_beside.py --threshold 2048 --chunk 2560 --csv benchmarks/results/beside_cpu.csv
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import tasks
from bench_answers import DEMO
from record import emit
from soak_clients import ANSWER_TOKENS, Request, ask
from soak_report import percentile
from vllm_server import serve

MODEL = str(DEMO / "model")


class Asked(NamedTuple):
    begin: float
    """Seconds, ``time.monotonic``."""
    first_token: float
    """Seconds after ``begin``."""
    right: bool


def asked(url: str, prompt: tasks.Prompt) -> Asked:
    begin = time.monotonic()
    answer = ask(url, MODEL, Request(prompt, ANSWER_TOKENS, stream=True))
    return Asked(begin, answer.first_token, tasks.grade(answer.text, prompt.answer))


def long_prompts(url: str, tokens: int, seconds: float, done: list[Asked]) -> None:
    end = time.monotonic() + seconds
    seed = 0
    while time.monotonic() < end:
        seed += 1
        done.append(asked(url, tasks.needle(tokens, (seed % 9 + 1) / 10, seed)))


def short_prompts(url: str, tokens: int, seconds: float, every: float, seed: int, done: list[Asked]) -> None:
    rng, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(rng.expovariate(1 / every))
        done.append(asked(url, tasks.needle(tokens, rng.random(), rng.randrange(1 << 30))))


def measure(args: argparse.Namespace, name: str, folder: Path) -> dict[str, object]:
    flags = [
        *("--dtype", args.dtype, "--max-model-len", str(args.long + 64), "--max-num-batched-tokens", str(args.chunk)),
        *("--no-enable-prefix-caching", "--served-model-name", MODEL),
    ]
    if args.threshold:
        flags += ["--long-prefill-token-threshold", str(args.threshold)]
    if name != "dense":
        flags += ["--attention-backend", "minference"]
    long: list[Asked] = []
    short: list[Asked] = []
    with serve(name, MODEL, flags, folder / f"{name}.log", sys.stderr, {"VLLM_CPU_KVCACHE_SPACE": "2"}) as server:
        for tokens in (args.short, args.long):
            asked(server.url, tasks.needle(tokens, 0.5, 0))  # warm-up
        threads = [threading.Thread(target=long_prompts, args=(server.url, args.long, args.seconds, long))]
        threads += [
            threading.Thread(target=short_prompts, args=(server.url, args.short, args.seconds, args.every, seed, short))
            for seed in range(args.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Requests that were sent during the prefill of a long prompt.
    reading = [(one.begin, one.begin + one.first_token) for one in long]
    beside = [one.first_token for one in short if any(begin <= one.begin < end for begin, end in reading)]
    return {
        "engine": name,
        "long_tokens": args.long,
        "short_tokens": args.short,
        "chunk": args.chunk,
        "threshold": args.threshold,
        "seconds": args.seconds,
        "long_prompts": len(long),
        "long_first_token_s": statistics.median(one.first_token for one in long),
        "short_prompts": len(short),
        "short_beside_long": len(beside),
        "p50_s": percentile(beside, 0.5),
        "p90_s": percentile(beside, 0.9),
        "p99_s": percentile(beside, 0.99),
        "right": sum(one.right for one in long + short),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=["dense", "minference"], default=["dense", "minference"])
    parser.add_argument("--long", type=int, default=32000, help="tokens of the long prompts")
    parser.add_argument("--short", type=int, default=200, help="tokens of the short ones")
    parser.add_argument("--chunk", type=int, default=2048, help="max_num_batched_tokens")
    parser.add_argument("--threshold", type=int, default=0, help="vLLM's long_prefill_token_threshold; 0: none")
    parser.add_argument("--clients", type=int, default=2, help="that ask short prompts")
    parser.add_argument("--every", type=float, default=1.0, help="mean seconds between two of one client's")
    parser.add_argument("--seconds", type=float, default=150.0, help="of load on each engine")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.engines:
            emit(measure(args, name, Path(folder)), args.json, args.csv)


if __name__ == "__main__":
    main()
