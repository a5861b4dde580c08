"""Recall, output error and density of patterns by context length, without running an engine.

There are two sources of queries, keys and values: the bundled model's layers on its own tasks (one prompt per task),
and synthetic heads of one known shape each (``synthetic.SHAPES``). The last chunk of each prompt and one in its middle
are indexed as in the backend, and compared with float32 dense attention on sampled rows.

    python benchmarks/bench_quality.py --context 16384 32768 65536 --csv benchmarks/results/quality_cpu.csv

``--queries`` compares the queries that choose columns and diagonals: ``spread``, the backend's own, spread over the
whole chunk; ``last``, the chunk's last 64, as in MInference; ``kv_head``, those of ``spread`` with one choice for all
query heads of a KV head.

Columns: ``recall`` mean over heads, chunks and rows; ``recall_p1`` first percentile over chunks and heads; ``covered``
share of chunks and heads with a recall of at least 0.95; ``chunks`` share of the chunks of single layers whose mean
recall over heads is at least 0.95; ``output_error`` relative to the dense output, median over heads and chunks, with
the remainder if the pattern has one; ``density`` share of query-key pairs computed; ``needed`` share of pairs that
would suffice for 95 % of each row's attention with an ideal selection per row, median over heads and chunks;
``select_s`` seconds of estimate and index, per head and chunk, by the torch path (``low_rank``: by the CPU kernels,
where they run).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tasks
import torch
from record import emit
from synthetic import SHAPES, structured_qkv

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.native import library
from minference_vllm.kernels.native.scores import NativeScores
from minference_vllm.offline.capture import Layer, capture_layers
from minference_vllm.patterns.kinds import HeadPattern, parse_head_pattern
from minference_vllm.prefill import remainder
from minference_vllm.prefill.recall import sample_rows
from minference_vllm.selection.build import build_index
from minference_vllm.selection.probe_queries import SPREAD_FROM
from minference_vllm.selection.torch_scores import TorchScores

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"

PATTERNS = (
    '{"kind": "vertical_slash", "vertical": 1000, "slash": 6096}',
    '{"kind": "vertical_slash", "vertical": 1000, "slash": 3096}',
    '{"kind": "a_shape", "sink": 1024, "local": 4096}',
    '{"kind": "block_sparse", "top_k": 100}',
    '{"kind": "coverage", "gamma": 0.95, "min_budget": 1024}',
    '{"kind": "coverage", "gamma": 0.95, "min_budget": 3072}',
    '{"kind": "antidiagonal", "stride": 16, "tau": 0.9}',
    '{"kind": "peak_threshold", "alpha": 0.1}',
    '{"kind": "low_rank", "rank": 32, "gamma": 0.95}',
    '{"kind": "low_rank", "rank": 32, "gamma": 0.99}',
)


class SpreadQueries(TorchScores):
    """Queries spread over the whole chunk choose, as in the backend."""


class SharedQueries(TorchScores):
    """One choice of columns and diagonals for all query heads of a KV head."""

    def column_diagonal(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().column_diagonal(range(self.query.shape[1]))
        group = self.query.shape[1] // self.keys.shape[0]
        shared = (score.unflatten(0, (-1, group)).mean(1).repeat_interleave(group, 0) for score in scores)
        columns, diagonals = (score[list(heads)] for score in shared)
        return columns, diagonals


class LastQueries(TorchScores):
    """The chunk's last 64 queries choose, as in MInference."""

    def column_diagonal(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        query, length = self.query[1 - SPREAD_FROM :], self.inputs.chunk.seq_len
        chunk = dataclasses.replace(self.inputs.chunk, context_len=length - len(query))
        last = TorchScores(dataclasses.replace(self.inputs, query=query, chunk=chunk))
        last.keys = self.keys
        return last.column_diagonal(heads)


QUERIES = {"spread": SpreadQueries, "last": LastQueries, "kv_head": SharedQueries}


def scores_by(queries: str, inputs: Inputs) -> TorchScores:
    """Torch's scores, with products of quantised keys from the CPU kernels where they run."""
    chosen: type[TorchScores] = QUERIES[queries]
    if library.unavailable_reason():
        return chosen(inputs)
    with_products = type(chosen.__name__, (chosen, NativeScores), {})
    return with_products(inputs, from_pages=False)


TASKS = ("needle", "key-value", "variables")


def model_layers(model: str, tokens: int, wanted: Sequence[str] = TASKS) -> Iterator[Layer]:
    """Every layer of the bundled model, over one prompt per task."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = {
        "needle": tasks.needle(tokens, 0.35, seed=11),
        "key-value": tasks.key_value(tokens, seed=11),
        "variables": tasks.variable_tracking(tokens, seed=11),
    }
    for task in wanted:
        yield from capture_layers(model, tokenizer(prompts[task].text, return_tensors="pt").input_ids)


def synthetic_layers(tokens: int) -> Iterator[Layer]:
    """A layer of one head for each shape."""
    for structure in SHAPES.values():
        query, keys, values = (tensor.transpose(0, 1) for tensor in structured_qkv(tokens, 1, 1, 128, structure))
        yield Layer(query, keys, values, 128**-0.5)


class Rows(NamedTuple):
    """Float32 attention of one head's sampled rows."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    logits: torch.Tensor
    """``[R, S]``, -inf for keys after the row."""
    weights: torch.Tensor
    output: torch.Tensor
    needed: float
    """Share of a row's keys that hold 95 % of its attention, mean over rows."""


def exact(layer: Layer, head: int, positions: torch.Tensor, length: int) -> Rows:
    keys, values = layer.keys_of(head)[:length].float(), layer.values_of(head)[:length].float()
    query = layer.query[head, positions].float()
    logits = query @ keys.T * layer.scale
    logits.masked_fill_(torch.arange(length) > positions[:, None], -torch.inf)
    weights = logits.softmax(-1)
    strongest = weights.sort(dim=1, descending=True).values.cumsum(1)
    needed = ((strongest < 0.95).sum(1) + 1) / (positions + 1)
    return Rows(query, keys, values, logits, weights, weights @ values, float(needed.mean()))


class Found(NamedTuple):
    """One head and chunk."""

    recall: float
    error: float
    needed: float
    density: float
    seconds: float


def measure(
    layer: Layer, choices: Sequence[tuple[HeadPattern, str]], begin: int, end: int, args: argparse.Namespace
) -> list[list[Found]]:
    """The results of every head of a layer on one chunk, for each pattern and kind of ``QUERIES``."""
    heads = range(layer.query.shape[0])
    tiling = Tiling.of(begin, end, args.block_size, args.tile)
    query = layer.query[:, begin:end].transpose(0, 1)
    inputs = Inputs.of_rows(query, layer.keys[:, :end], layer.values[:, :end], layer.scale, args.block_size)
    rows = sample_rows(end - begin, args.rows, seed=end)
    dense = [exact(layer, head, rows + begin, end) for head in heads]
    found = []
    for pattern, queries in choices:
        start = time.perf_counter()
        index = build_index(tiling, [pattern] * len(heads), scores_by(queries, inputs))
        seconds = (time.perf_counter() - start) / len(heads)
        density = index.density().tolist()
        parts = [compare(dense[head], head, index, rows) for head in heads]
        out, lse = (torch.stack([getattr(part, name) for part in parts]) for name in ("output", "lse"))
        if pattern.has_remainder:
            remainder.add_to_rows(inputs, index, rows, out, lse)
        errors = [float((out[head] - dense[head].output).norm() / dense[head].output.norm()) for head in heads]
        found.append(
            [Found(parts[head].recall, errors[head], dense[head].needed, density[head], seconds) for head in heads]
        )
    return found


class Kept(NamedTuple):
    """One head's sampled rows under an index."""

    recall: float
    output: torch.Tensor
    """``[R, D]``."""
    lse: torch.Tensor
    """``[R]``, of the selected keys' scores."""


def compare(of: Rows, head: int, index: SparseIndex, rows: torch.Tensor) -> Kept:
    positions = rows + index.tiling.context_len
    tiles = torch.searchsorted(index.tiling.starts, positions, right=True) - 1
    selected = index.tile_mask(tiles, slice(head, head + 1))[0] & (of.logits > -torch.inf)
    counts = index.tile_counts(tiles, slice(head, head + 1))[0]
    kept = of.weights * selected
    counted = kept * counts
    lse = (of.logits + counts.log()).masked_fill(~selected, -torch.inf).logsumexp(-1)
    return Kept(float(kept.sum(-1).mean()), counted @ of.values / counted.sum(-1, keepdim=True), lse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"))
    parser.add_argument("--source", nargs="+", choices=["model", "synthetic"], default=["model", "synthetic"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="the model's prompts")
    parser.add_argument("--context", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--pattern", nargs="+", default=list(PATTERNS), help="as in a pattern file")
    parser.add_argument("--queries", nargs="+", choices=list(QUERIES), default=["spread"], help="who chooses")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--rows", type=int, default=64, help="sampled per chunk and head")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    patterns = {text: parse_head_pattern(json.loads(text)) for text in args.pattern}
    layers_of = {"model": lambda tokens: model_layers(args.model, tokens, args.tasks), "synthetic": synthetic_layers}
    choices = [(text, queries) for text in patterns for queries in args.queries]
    for context in args.context:
        for source in args.source:
            found: dict[tuple[str, str], list[list[Found]]] = {choice: [] for choice in choices}
            for layer in layers_of[source](context):
                for end in {context, max(args.chunk, context // 2 // args.chunk * args.chunk)}:
                    begin = max(0, end - args.chunk)
                    wanted = [(patterns[text], queries) for text, queries in choices]
                    for choice, heads in zip(choices, measure(layer, wanted, begin, end, args), strict=True):
                        found[choice].append(heads)
            for (text, queries), results in found.items():
                row = {"source": source, "context": context, "chunk": args.chunk, "pattern": text, "queries": queries}
                emit({**row, **summary(results)}, args.json, args.csv)


def summary(chunks: list[list[Found]]) -> dict[str, float]:
    by_chunk = torch.tensor([[one.recall for one in heads] for heads in chunks], dtype=torch.float64).mean(1)
    results = [one for heads in chunks for one in heads]
    recall, error, needed, density, seconds = torch.tensor(results, dtype=torch.float64).unbind(1)
    return {
        "density": float(density.mean()),
        "recall": float(recall.mean()),
        "recall_p1": float(recall.quantile(0.01)),
        "covered": float((recall >= 0.95).double().mean()),
        "chunks": float((by_chunk >= 0.95).double().mean()),
        "output_error": float(error.median()),
        "needed": float(needed.median()),
        "select_s": float(seconds.mean()),
    }


if __name__ == "__main__":
    main()
