"""Quality of sparse patterns with a real language model on real text, against dense attention in the same process.

    python tools/get_smollm2.py
    python benchmarks/bench_language.py --text pydoc opticks --output rows.csv --picture loss.png
    python benchmarks/bench_language.py --tokens 16000 --patterns default_cpu 'coverage(0.95, 1024)'

The model runs with transformers in float32. Every layer's attention is ours, chunk by chunk, so that errors of sparse
attention in one layer propagate to later layers and chunks, as in a server (``language_model.py``). No engine runs:
dense is torch's scaled dot-product attention. The questions and their places are in
``minference_vllm/offline/evaluate/tasks.py``. For prompts above the model's trained length, positions are stretched by
YaRN.

One row per text, length, chunk, pattern and task. ``dense``, ``sparse``: mean loss of the scored tokens (negative
log-likelihood, nats per token); ``difference``: sparse minus dense, with the ``standard_error`` of that mean over
tokens; ``answers``: number of scored answers; ``right_dense``, ``right_sparse``: number of answers whose every token
was the likeliest; ``density``: share of the prompt's query-key pairs computed, 1 for chunks below ``--min-context``;
``seconds``, ``seconds_dense``: of the sparse and the dense pass, comparable only within one run on an idle machine.

Task ``heads`` compares every head with exact attention over the same keys and values, on sampled rows of the text's
prompts: ``recall`` of the weights; ``value_recall``, in which each weight is multiplied by the distance of the key's
value from the row's output, the effect of leaving the key out; ``output_error`` relative to the output's norm. All are
means over heads; 99 % of the heads are above ``_p1`` and below ``_p99``. ``worst_heads``: layer.head, error, recall,
value recall.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from get_smollm2 import default_folder, is_made
from language_model import Attend, ChunkedPrefill, Heads, LanguageModel, Scores, dense
from record import append, emit, environment

from minference_vllm import PatternFile, Settings, load_pattern_file
from minference_vllm.offline.evaluate.tasks import TASKS, Passages, Prompt
from minference_vllm.offline.texts import load_text

SMOLLM2 = default_folder()
PATTERNS = (
    "dense", "default_cpu", "default_cuda", "coverage", "vertical_slash_1000_6096", "a_shape", "antidiagonal(16, 0.9)",
    "peak_threshold(0.1)", "block_sparse",
)  # fmt: skip
HEADS = "heads"
WORST = 5
"""Number of worst heads in a row."""


class Read(NamedTuple):
    """The result of reading some prompts in one way."""

    scores: list[Scores]
    prefills: list[ChunkedPrefill]
    """One per prompt; empty for dense attention."""
    seconds: float

    @property
    def density(self) -> float:
        return sum(one.computed_pairs for one in self.prefills) / sum(one.pairs for one in self.prefills)


def read(model: LanguageModel, prompts: Sequence[Prompt], prefills: Sequence[ChunkedPrefill] = ()) -> Read:
    """Read every prompt with its prefill, or densely if there are none."""
    start = time.perf_counter()
    ways: Sequence[Attend] = prefills or [dense] * len(prompts)
    scores = [
        model.score(prompt.ids, wanted(prompt), attend, prompt.questions)
        for prompt, attend in zip(prompts, ways, strict=True)
    ]
    seconds = time.perf_counter() - start - sum(one.compare_seconds for one in prefills)
    return Read(scores, list(prefills), seconds)


def wanted(prompt: Prompt) -> torch.Tensor:
    """int64 ``[n]``: positions of all scored tokens, answer by answer."""
    return torch.cat([torch.arange(one.first, one.first + one.tokens) for one in prompt.answers])


class Answers(NamedTuple):
    """The answers of one task in all prompts."""

    loss: torch.Tensor
    """float64 ``[n]``, per token."""
    right: list[bool]
    """Per answer, whether every token was the likeliest."""


def answers(task: str, prompts: Sequence[Prompt], scores: Sequence[Scores]) -> Answers:
    losses, right = [], []
    for prompt, found in zip(prompts, scores, strict=True):
        counts = [one.tokens for one in prompt.answers]
        for one, loss, hits in zip(prompt.answers, found.loss.split(counts), found.right.split(counts), strict=True):
            if one.task == task:
                losses.append(loss)
                right.append(bool(hits.all()))
    return Answers(torch.cat(losses), right)


def task_row(task: str, prompts: Sequence[Prompt], with_dense: Read, sparse: Read) -> dict[str, Any]:
    """A row's figures for one task."""
    expected, found = (answers(task, prompts, one.scores) for one in (with_dense, sparse))
    difference = found.loss - expected.loss
    return {
        "dense": float(expected.loss.mean()),
        "sparse": float(found.loss.mean()),
        "difference": float(difference.mean()),
        "standard_error": float(difference.std() / len(difference) ** 0.5),
        "count": len(difference),
        "answers": len(found.right),
        "right_dense": sum(expected.right),
        "right_sparse": sum(found.right),
    }


def heads_row(sparse: Read, num_heads: int) -> dict[str, Any]:
    """A row's figures for the heads."""
    heads = Heads.of([prefill.heads for prefill in sparse.prefills])
    worst = heads.error.argsort(descending=True)[:WORST].tolist()
    return {
        "recall": float(heads.recall.mean()),
        "recall_p1": float(heads.recall.quantile(0.01)),
        "value_recall": float(heads.value_recall.mean()),
        "value_recall_p1": float(heads.value_recall.quantile(0.01)),
        "output_error": float(heads.error.mean()),
        "output_error_p99": float(heads.error.quantile(0.99)),
        "worst_heads": "; ".join(
            f"{head // num_heads}.{head % num_heads} {heads.error[head]:.3f} {heads.recall[head]:.3f} "
            f"{heads.value_recall[head]:.3f}"
            for head in worst
        ),
    }


COLUMNS = (
    "model", "yarn", "text", "passages", "tokens", "chunk", "min_context", "pattern", "task", "dense", "sparse",
    "difference", "standard_error", "count", "answers", "right_dense", "right_sparse", "density", "recall", "recall_p1",
    "value_recall", "value_recall_p1", "output_error", "output_error_p99", "worst_heads", "seconds", "seconds_dense",
)  # fmt: skip
"""Of the CSV file; columns that do not apply to a row's task are empty."""


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Round to six digits, the precision of a loss in floating point."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def measure(
    args: argparse.Namespace, texts: Sequence[tuple[str, str]], patterns: dict[str, PatternFile]
) -> Iterator[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    passages = [Passages(tokenizer, text, label) for label, text in texts]
    for tokens in args.tokens:
        # Its positions are stretched for this length.
        model = LanguageModel(args.model, tokens)
        for name, file in patterns.items():
            file.check_model(model.num_layers, model.num_heads, f"pattern {name!r}")
        for text in passages:
            common = {"model": Path(args.model).name, "yarn": model.yarn, "text": text.label, "tokens": tokens}
            for row in measure_text(args, model, text, tokens, patterns):
                yield common | row


def measure_text(
    args: argparse.Namespace, model: LanguageModel, text: Passages, tokens: int, patterns: dict[str, PatternFile]
) -> Iterator[dict[str, Any]]:
    """The rows of one text and length."""
    settings, of = Settings(min_context=args.min_context), args.passages
    plain = [task for task in args.tasks if task in ("perplexity", HEADS)]
    planted = [task for task in TASKS if task in args.tasks and task != "perplexity"]
    prompts = [text.plain(number, of, tokens) for number in range(of)]
    known = read(model, prompts) if plain else None
    for chunk in args.chunk:
        sets = [(prompts, known, plain)] if known else []
        if planted:
            with_questions = [text.planted(number, of, tokens, chunk, planted) for number in range(of)]
            sets.append((with_questions, read(model, with_questions), planted))
        for name, file in patterns.items():
            for asked, with_dense, tasks in sets:
                rows = args.rows if HEADS in tasks else 0
                sparse = read(model, asked, [ChunkedPrefill(file, chunk, settings, rows) for _ in asked])
                for task in tasks:
                    figures = (
                        heads_row(sparse, model.num_heads)
                        if task == HEADS
                        else task_row(task, asked, with_dense, sparse)
                    )
                    yield {
                        "passages": of,
                        "chunk": chunk,
                        "min_context": args.min_context,
                        "pattern": name,
                        "task": task,
                        "density": sparse.density,
                        "seconds": sparse.seconds,
                        "seconds_dense": with_dense.seconds,
                    } | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SMOLLM2), help="a folder; default: what tools/get_smollm2.py makes")
    parser.add_argument("--text", nargs="+", default=["pydoc"], help="pydoc, opticks, or a file")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8000], help="of a prompt")
    parser.add_argument("--chunk", type=int, nargs="+", default=[2048], help="max_num_batched_tokens")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="a pattern file, or kind(values)")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, HEADS], default=[*TASKS, HEADS])
    parser.add_argument("--passages", type=int, default=1, help="of each text, evenly spread")
    parser.add_argument("--min-context", type=int, default=1024, help="a chunk that ends below it is read densely")
    parser.add_argument("--rows", type=int, default=32, help="sampled per chunk for 'heads'")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--output", type=Path, default=None, help="append rows to this CSV file")
    parser.add_argument("--picture", type=Path, default=None, help="loss against density: a .png, .svg or .pdf file")
    args = parser.parse_args()
    for option in ("tokens", "chunk", "passages", "rows"):
        values = getattr(args, option)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{option} must be at least 1")
    if min(args.tokens) < max(args.min_context, Settings().min_chunk):
        parser.error(f"a prompt of {min(args.tokens)} tokens is read densely: it is below --min-context or min_chunk")
    if args.model == str(SMOLLM2) and not is_made(SMOLLM2):
        parser.error(f"no model in {SMOLLM2}: run tools/get_smollm2.py, or name one with --model")
    try:
        patterns = {text: load_pattern_file(text) for text in args.patterns}
        texts = [load_text(name) for name in args.text]
        rows = []
        for row in measure(args, texts, patterns):
            emit(row, args.json, None)
            rows.append({name: row.get(name, "") for name in COLUMNS})
            if args.output:
                append(args.output, rounded(rows[-1]) | environment())
    except (OSError, ValueError) as error:
        sys.exit(f"bench_language: {error}")
    if args.picture:
        from plot_language import draw

        draw(rows, args.picture)


if __name__ == "__main__":
    main()
