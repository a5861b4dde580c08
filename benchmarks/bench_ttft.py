"""Whole engine: time to first token and per decoded token, vLLM's own backend against minference.

A Llama-shaped model with random weights (``load_format="dummy"``, nothing on disk) is loaded once per backend, each in
a process of its own, all at the same time; while one works, the others are stopped. Every prompt (random token ids, prefix
caching off) goes to each engine in turn, and medians over the turns are reported, so that a busy neighbour or a warm
processor meets all engines alike. Before anything is timed, all engines must answer a short prompt with the same
tokens.

Random weights give flat attention: all columns and diagonals score about the same, chance decides which of them
``vertical_slash`` takes, and its density says nothing about a trained model. ``a_shape`` has the same cost on any data
and is the row to read for speed; ``vertical_slash`` beside it shows what the estimate costs.

Contexts below ``--min-context``, and the seconds per decoded token of every row, show what users pay who gain nothing:
both must stay within 1 % of dense.

    python benchmarks/bench_ttft.py --context 4096 32768 65536 --csv benchmarks/results/ttft_cpu.csv
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_attention import PATTERNS
from engine_process import ENVIRONMENT, Engine, Timed
from record import emit

from minference_vllm.patterns import PatternFile

DENSE = "dense"
VOCABULARY = 512
CHECK_TOKENS = 300


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """The configuration of a Llama of the wanted shape; its weights are made up when it is loaded."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_size,
        max_position_embeddings=longest(args),
        rope_theta=1e6,
        dtype="bfloat16",
    ).save_pretrained(folder)


def longest(args: argparse.Namespace) -> int:
    return max(args.context) + args.decode + 1


def engine_options(args: argparse.Namespace, model: Path, pattern: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments of ``LLM`` and environment variables for one engine; ``pattern`` is ``dense`` or a name in PATTERNS."""
    pages = math.ceil(longest(args) / 128) + 2
    cache_bytes = pages * 128 * 2 * args.layers * args.kv_heads * args.head_size * 2
    options: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": longest(args),
        "max_num_batched_tokens": args.chunk,
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        "enforce_eager": not args.compile,
        "disable_log_stats": False,
    }
    environment = dict(ENVIRONMENT)
    if args.device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(cache_bytes / (1 << 30)))
    else:
        options["kv_cache_memory_bytes"] = cache_bytes
    if pattern != DENSE:
        patterns = PatternFile(provenance="benchmarks/bench_attention.py", default=PATTERNS[pattern])
        file = model / f"{pattern}.json"
        file.write_text(patterns.model_dump_json())
        settings = {
            "patterns": str(file), "min_context": args.min_context, "engine": args.engine, "log_interval": 0
        }  # fmt: skip
        options |= {"attention_backend": "minference", "additional_config": {"minference": settings}}
    return options, environment


@contextlib.contextmanager
def engines(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Engine]]:
    """A dense engine and one per pattern, loaded one after the other."""
    running: dict[str, Engine] = {}
    try:
        for name in [DENSE, *args.patterns]:
            options, environment = engine_options(args, folder, name)
            running[name] = Engine(name, options, environment, folder / f"{name}.log")
            running[name].start()
        yield running
    finally:
        for engine in running.values():
            engine.stop()


def random_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_same_answers(running: dict[str, Engine]) -> None:
    """All engines must decode the same tokens after a prompt too short for the sparse path."""
    answers = {name: engine.ask(random_prompt(CHECK_TOKENS, 0), 8).tokens for name, engine in running.items()}
    if any(tokens != answers[DENSE] for tokens in answers.values()):
        sys.exit(f"the engines disagree on a short prompt: {answers}")


def measure(args: argparse.Namespace, running: dict[str, Engine], context: int) -> Iterator[dict[str, object]]:
    """Rows of one context, one per pattern."""
    prompt = random_prompt(context, context)
    turns: dict[str, list[Timed]] = {name: [] for name in running}
    for turn in range(args.repeat + 1):
        for name, engine in running.items():
            timed = engine.ask(prompt, args.decode)
            if turn:  # the first one warms up
                turns[name].append(timed)
    ttft = {name: statistics.median(timed.ttft for timed in timings) for name, timings in turns.items()}
    decode = {name: statistics.median(timed.decode for timed in timings) for name, timings in turns.items()}
    for name in args.patterns:
        last = turns[name][-1]
        yield {
            "engine": args.engine,
            "pattern": name,
            "context": context,
            "chunk": args.chunk,
            "density": density(context, args.layers * args.heads, last),
            "ttft_dense_s": ttft[DENSE],
            "ttft_sparse_s": ttft[name],
            "speedup": ttft[DENSE] / ttft[name],
            "decode_dense_s": decode[DENSE],
            "decode_sparse_s": decode[name],
        }


def density(context: int, heads: int, timed: Timed) -> float:
    """Computed pairs of the whole prompt, first chunks below the threshold included, as a share of the dense ones."""
    everything = heads * context * (context + 1) / 2
    return (everything - timed.dense_pairs + timed.computed_pairs) / everything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 32768, 65536], help="prompt lengths")
    parser.add_argument("--chunk", type=int, default=4096, help="max_num_batched_tokens")
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=["a_shape", "vertical_slash"])
    parser.add_argument("--engine", default="auto", help="the setting of that name")
    parser.add_argument("--min-context", type=int, default=8192, help="the setting of that name")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded after each prompt")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (slower start)")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    if args.decode < 1 or args.repeat < 1:
        parser.error("--decode and --repeat must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args)
        with engines(args, Path(folder)) as running:
            check_same_answers(running)
            for context in args.context:
                for row in measure(args, running, context):
                    emit(row, args.json, args.csv)


if __name__ == "__main__":
    main()
