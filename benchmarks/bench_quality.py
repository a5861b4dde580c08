"""What a pattern costs and what it keeps: recall, output error and density over context, without running an engine.

Two sources of queries, keys and values: the bundled model's layers over its own tasks (one prompt per task), and
synthetic heads of one known shape each (``synthetic.SHAPES``). For each, the last chunk of the prompt and one in its
middle are indexed as the backend would, and compared with float32 dense attention on sampled rows.

    python benchmarks/bench_quality.py --context 16384 32768 65536 --csv benchmarks/results/quality_cpu.csv

Columns: ``recall`` mean over heads, chunks and rows; ``recall_p1`` the chunk and head that 99 % of them are above;
``covered`` share of chunks and heads whose recall is at least 0.95; ``output_error`` relative to the dense output,
median over heads and chunks; ``density`` share of query-key pairs computed; ``select_s`` seconds of estimate and index,
per head and chunk, by the torch path.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from record import emit
from synthetic import SHAPES, structured_qkv

from minference_vllm.capture import capture_layers
from minference_vllm.estimate import Estimates
from minference_vllm.index import SparseIndex, build_index
from minference_vllm.patterns import HeadPattern, parse_head_pattern
from minference_vllm.recall import sample_rows
from minference_vllm.tiling import Tiling

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
sys.path.insert(0, str(DEMO))

PATTERNS = (
    '{"kind": "vertical_slash", "vertical": 1000, "slash": 6096}',
    '{"kind": "vertical_slash", "vertical": 1000, "slash": 3096}',
    '{"kind": "a_shape", "sink": 1024, "local": 4096}',
    '{"kind": "block_sparse", "top_k": 100}',
    '{"kind": "coverage", "gamma": 0.95, "min_budget": 1024}',
    '{"kind": "coverage", "gamma": 0.95, "min_budget": 3072}',
    '{"kind": "coverage", "gamma": 0.98, "min_budget": 3072}',
    '{"kind": "coverage", "gamma": 0.98, "min_budget": 6144}',
    '{"kind": "antidiagonal", "stride": 16, "tau": 0.9}',
    '{"kind": "peak_threshold", "alpha": 0.1}',
)


class Head(NamedTuple):
    """Queries, keys and values of one query head, ``[S, D]`` each, and the softmax scale."""

    name: str
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float


def model_heads(model: str, tokens: int) -> Iterator[Head]:
    """Every head of the bundled model, over one prompt per task."""
    import tasks
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = {
        "needle": tasks.needle(tokens, 0.35, seed=11),
        "key-value": tasks.key_value(tokens, seed=11),
        "variables": tasks.variable_tracking(tokens, seed=11),
    }
    for task, prompt in prompts.items():
        ids = tokenizer(prompt.text, return_tensors="pt").input_ids
        for number, layer in enumerate(capture_layers(model, ids)):
            group = layer.query.shape[0] // layer.keys.shape[0]
            for head in range(layer.query.shape[0]):
                kv = head // group
                yield Head(
                    f"{task}, layer {number}, head {head}",
                    layer.query[head],
                    layer.keys[kv],
                    layer.values[kv],
                    layer.scale,
                )


def synthetic_heads(tokens: int) -> Iterator[Head]:
    for name, structure in SHAPES.items():
        query, keys, values = structured_qkv(tokens, 1, 1, 128, structure)
        yield Head(name, query[:, 0], keys[:, 0], values[:, 0], 128**-0.5)


class Found(NamedTuple):
    recall: float
    error: float
    density: float
    seconds: float


def measure(head: Head, pattern: HeadPattern, begin: int, end: int, args: argparse.Namespace) -> Found:
    """One head and chunk."""
    query, keys = head.query[begin:end, None], head.keys[None, :end]
    tiling = Tiling.of(begin, end, args.block_size, args.tile)
    start = time.perf_counter()
    index = build_index(tiling, [pattern], Estimates(query, keys, head.scale))
    seconds = time.perf_counter() - start
    recall, error = compare(head, index, sample_rows(end - begin, args.rows, seed=end))
    return Found(recall, error, float(index.density().mean()), seconds)


def compare(head: Head, index: SparseIndex, rows: torch.Tensor) -> tuple[float, float]:
    """Recall and relative output error of sampled rows against dense attention in float32."""
    positions = rows + index.context_len
    tiles = torch.searchsorted(index.tile_starts, positions, right=True) - 1
    keys, values = head.keys[: index.seq_len].float(), head.values[: index.seq_len].float()
    logits = head.query[positions].float() @ keys.T * head.scale
    weights = logits.masked_fill_(torch.arange(index.seq_len) > positions[:, None], -torch.inf).softmax(-1)
    kept = weights * index.tile_mask(tiles)[0]
    recall = kept.sum(-1, keepdim=True)
    dense, sparse = weights @ values, kept @ values / recall
    return float(recall.mean()), float((sparse - dense).norm() / dense.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"))
    parser.add_argument("--source", nargs="+", choices=["model", "synthetic"], default=["model", "synthetic"])
    parser.add_argument("--context", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--pattern", nargs="+", default=list(PATTERNS), help="as in a pattern file")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--rows", type=int, default=64, help="sampled per chunk and head")
    parser.add_argument("--verbose", action="store_true", help="a line per head on stderr")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    patterns = {text: parse_head_pattern(json.loads(text)) for text in args.pattern}
    for context in args.context:
        for source in args.source:
            found: dict[str, list[Found]] = {text: [] for text in patterns}
            for head in model_heads(args.model, context) if source == "model" else synthetic_heads(context):
                length = len(head.query)
                for end in {length, max(args.chunk, length // 2 // args.chunk * args.chunk)}:
                    for text, pattern in patterns.items():
                        result = measure(head, pattern, max(0, end - args.chunk), end, args)
                        found[text].append(result)
                        if args.verbose:
                            print(f"{head.name}, to {end}, {text}: {result}", file=sys.stderr)
            for text, results in found.items():
                emit(summary(source, context, args.chunk, text, results), args.json, args.csv)


def summary(source: str, context: int, chunk: int, pattern: str, results: list[Found]) -> dict[str, object]:
    recall = torch.tensor([result.recall for result in results])
    return {
        "source": source,
        "context": context,
        "chunk": chunk,
        "pattern": pattern,
        "density": float(torch.tensor([result.density for result in results]).mean()),
        "recall": float(recall.mean()),
        "recall_p1": float(recall.quantile(0.01)),
        "covered": float((recall >= 0.95).float().mean()),
        "output_error": float(torch.tensor([result.error for result in results]).median()),
        "select_s": sum(result.seconds for result in results) / len(results),
    }


if __name__ == "__main__":
    main()
