"""Time to first token and per decoded token of a whole engine, vLLM's own backend against minference.

A Llama-shaped model with random weights (``load_format="dummy"``, nothing on disk) is loaded once per pattern. Every
prompt (random token ids, prefix caching off) is run twice per turn, in alternating order: with minference, and with the
methods that minference overrides reset to vLLM's own, in the same process. Two processes of the same code differ by
several per cent on a small machine; within one process, turn by turn, much smaller differences are visible. Before
anything is timed, both must answer a short prompt with the same tokens.

Random weights give flat attention: all columns and diagonals score about the same, ``vertical_slash`` selects them at
random, and its density says nothing about a trained model. ``a_shape`` has the same cost on any data and is the row to
read for speed; ``vertical_slash`` beside it shows the cost of the estimate.

Contexts below ``--min-context``, and the seconds per decoded token of every row, show the overhead where sparse prefill
gains nothing: both must stay within 1 % of dense. ``ttft_ratio`` and ``decode_ratio`` are medians over the turns of
minference's time divided by the dense time of the same turn; their spread is half the interquartile range.

    python benchmarks/bench_ttft.py --context 4096 32768 65536 --csv benchmarks/results/ttft_cpu.csv
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_attention import PATTERNS
from engine_process import ENVIRONMENT, Engine, Timed, end_with_us, one_at_a_time
from record import emit

from minference_vllm.kernels.choose import KERNELS
from minference_vllm.patterns.file import PatternFile

VOCABULARY = 512
CHECK_TOKENS = 300


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """Write the configuration of a Llama of the given shape; its weights are random when it is loaded."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate or 2 * args.hidden,
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
    """Arguments of ``LLM`` and environment variables for one engine; ``pattern`` is a name in PATTERNS."""
    pages = math.ceil(longest(args) / 128) + 2
    cache_bytes = pages * 128 * 2 * args.layers * args.kv_heads * args.head_size * 4
    others = {"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": not args.compile}
    environment = dict(ENVIRONMENT)
    if args.device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(cache_bytes / (1 << 30)))
    else:
        others["kv_cache_memory_bytes"] = cache_bytes
    patterns = PatternFile(provenance="benchmarks/bench_attention.py", default=PATTERNS[pattern])
    file = model / f"{pattern}.json"
    file.write_text(patterns.model_dump_json())
    settings = {"patterns": str(file), "min_context": args.min_context, "kernel": args.kernel, "log_interval": 0}
    return one_at_a_time(str(model), args.dtype, longest(args), args.chunk, settings, **others), environment


def random_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_same_answers(engine: Engine) -> None:
    """A prompt too short for the sparse path must decode to the same tokens either way."""
    dense, sparse = (engine.ask(random_prompt(CHECK_TOKENS, 0), 8, dense).tokens for dense in (True, False))
    if dense != sparse:
        sys.exit(f"{engine.name}: answers differ on a short prompt: {dense}, {sparse}")


def measure(args: argparse.Namespace, engine: Engine, context: int) -> dict[str, object]:
    """One row."""
    prompt = random_prompt(context, context)
    dense: list[Timed] = []
    sparse: list[Timed] = []
    for turn in range(args.repeat + 1):
        both = [(dense, True), (sparse, False)]
        for timings, densely in both if turn % 2 else reversed(both):
            timed = engine.ask(prompt, args.decode, densely)
            if turn:  # the first turn is a warm-up
                timings.append(timed)
    return {
        "kernel": args.kernel,
        "pattern": engine.name,
        "context": context,
        "chunk": args.chunk,
        "density": density(context, args.layers * args.heads, sparse[-1]),
        **compare("ttft", [timed.ttft for timed in dense], [timed.ttft for timed in sparse]),
        **compare("decode", [timed.decode for timed in dense], [timed.decode for timed in sparse]),
    }


def compare(what: str, dense: list[float], sparse: list[float]) -> dict[str, float]:
    """Medians of seconds, and median and spread of the ratio turn by turn."""
    ratios = [b / a for a, b in zip(dense, sparse, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        f"{what}_dense_s": statistics.median(dense),
        f"{what}_sparse_s": statistics.median(sparse),
        f"{what}_ratio": middle,
        f"{what}_spread": (high - low) / 2,
    }


def density(context: int, heads: int, timed: Timed) -> float:
    """Computed pairs of the whole prompt as a share of the dense ones, including first chunks below the threshold."""
    everything = heads * context * (context + 1) / 2
    return (everything - timed.dense_pairs + timed.computed_pairs) / everything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 32768, 65536], help="prompt lengths")
    parser.add_argument("--chunk", type=int, default=4096, help="max_num_batched_tokens")
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=["a_shape", "vertical_slash"])
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="the setting of that name")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--min-context", type=int, default=8192, help="the setting of that name")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded after each prompt")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=None, help="default: twice --hidden")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (slower start)")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    end_with_us()
    if args.decode < 1 or args.repeat < 1:
        parser.error("--decode and --repeat must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args)
        for pattern in args.patterns:
            options, environment = engine_options(args, Path(folder), pattern)
            engine = Engine(pattern, options, environment, Path(folder) / f"{pattern}.log")
            try:
                engine.start()
                check_same_answers(engine)
                for context in args.context:
                    emit(measure(args, engine, context), args.json, args.csv)
            finally:
                engine.stop()


if __name__ == "__main__":
    main()
