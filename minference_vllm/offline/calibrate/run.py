"""A calibration from prompts to pattern file, with a vLLM engine in which ``recorder`` measures."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minference_vllm.offline import engine
from minference_vllm.offline.calibrate.recorder import CalibrationError, Plan, Recorder, collect
from minference_vllm.offline.calibrate.search import CANDIDATES, DEFAULT, Measured, choose
from minference_vllm.offline.texts import key_value_prompt, load_text, read_prompts, without_middle
from minference_vllm.patterns.file import Measurement, PatternFile, to_text
from minference_vllm.patterns.kinds import Dense, HeadPattern

MIN_TOKENS = 8000
"""Minimum prompt length. Shorter prompts say little about the heads, since most of their attention is local."""
MIN_PROMPTS = 2
MEASURED_CHUNKS = 4
"""Per prompt: the last, held out for the check at the end, and others spread evenly over the second half."""
MIN_GAIN = 0.05
"""Minimum share of the default's cost that a file saves: the default adapts to a prompt, a file only partly."""


def prompts_for(path: Path | None, tokens: int) -> tuple[list[str], str]:
    """The texts to measure on, and their description. Built-in ones are added up to ``MIN_PROMPTS``."""
    texts = [] if path is None else read_prompts(path)
    sources = [] if path is None else [f"{path.name} ({len(texts)} prompt{'s'[: len(texts) > 1]})"]
    others = (("a generated key-value prompt", key_value_prompt(8 * tokens)), load_text("pydoc"))
    for name, text in others[: max(0, MIN_PROMPTS - len(texts))]:
        texts.append(text)
        sources.append(name)
    return texts, ", ".join(sources)


def cut(ids: list[int], tokens: int, prompt: int) -> list[int]:
    """The prompt's tokens, without the middle if there are too many: beginning and question both matter.

    Raises:
        CalibrationError: fewer than MIN_TOKENS.
    """
    if len(ids) < MIN_TOKENS:
        raise CalibrationError(
            f"prompt {prompt} has {len(ids)} tokens; calibration needs at least {MIN_TOKENS}, "
            "better as many as you serve"
        )
    return without_middle(ids, tokens)


def chunk_size(lengths: Sequence[int]) -> int:
    """Tokens of a chunk, chosen so that the second half of the shortest prompt has several."""
    return 4096 if min(lengths) >= 16000 else 2048


def chunk_ends(lengths: Sequence[int]) -> tuple[int, ...]:
    """Ends of the chunks that are measured, of all prompts."""
    ends: set[int] = set()
    chunk = chunk_size(lengths)
    for length in lengths:
        later = [end for end in (*range(chunk, length, chunk), length) if end >= length // 2]
        step = max(1, len(later) // MEASURED_CHUNKS)
        ends |= set(later[::-1][::step][:MEASURED_CHUNKS])
    return tuple(sorted(ends))


def install(worker: Any, *plan: Any) -> tuple[int, int, int]:
    """Start measuring; runs in an engine's process. ``plan``: a Plan's fields, easier to send than the object.

    Returns:
        the process's number, the model's query heads and layers.
    """
    import torch

    from minference_vllm.backend.runtime import runtime_for, total_query_heads

    config = worker.vllm_config
    process = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    layers = config.model_config.get_num_layers(config.parallel_config)
    runtime_for(config).recorder = Recorder(Plan(*plan), process, layers)
    model = config.model_config
    return process, total_query_heads(model), model.get_total_num_hidden_layers()


def next_prompt(worker: Any, number: int) -> None:
    """Tell the recorder which prompt follows; runs in an engine's process."""
    from minference_vllm.backend.runtime import runtime_for

    recorder = runtime_for(worker.vllm_config).recorder
    if recorder is not None:
        recorder.next_prompt(number)


def run(args: argparse.Namespace) -> int:
    """Calibrate, and write the pattern file if it is better than none.

    Returns:
        0: the file was written; 1: no file is better than the default.

    Raises:
        CalibrationError: prompts or partial results that cannot be used.
        EngineError: a model that vLLM cannot start.
    """
    if args.tokens < MIN_TOKENS:
        raise CalibrationError(f"--tokens must be at least {MIN_TOKENS}, not {args.tokens}")
    if not args.output.parent.is_dir():
        raise CalibrationError(f"{args.output.parent} is no directory")
    engine.prepare()
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    # One token is generated after the prompt.
    config = engine.model_config(args.model, args.engine_args)
    limit = int(config.max_model_len) - 1
    if limit < MIN_TOKENS:
        raise CalibrationError(
            f"{args.model} reads prompts of {limit} tokens; calibration needs at least {MIN_TOKENS}. A model this "
            "short gains little from sparse prefill"
        )
    if args.tokens > limit:
        print(f"--tokens {args.tokens}: cut to {limit}, the longest prompt of the model")
        args.tokens = limit
    # Before the weights load, since a prompt may be too short.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts, source = prompts_for(args.prompts, args.tokens)
    prompts = [cut(tokenizer.encode(text), args.tokens, number) for number, text in enumerate(texts)]
    lengths = [len(ids) for ids in prompts]
    print(f"calibrating on {source}: {' and '.join(map(str, lengths))} tokens")
    llm = engine.start(config, engine_options(args, lengths), args.engine_args, "calibrate")
    plan = Plan(identity(args, prompts), chunk_ends(lengths), args.kernel, f"{args.output}.partial")
    found = llm.collective_rpc(install, args=dataclasses.astuple(plan))
    processes = [process for process, _, _ in found]
    _, num_heads, num_layers = found[0]
    for number, ids in enumerate(prompts):
        llm.collective_rpc(next_prompt, args=(number,))
        llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    llm.collective_rpc(next_prompt, args=(len(prompts),))
    engine.stop(llm)
    measured = collect(plan, processes, num_heads)
    if not measured:
        raise CalibrationError(
            "no layer was measured: none of them can run sparsely (VLLM_LOGGING_LEVEL=INFO shows why)"
        )
    layers = {layer: Layer.of(chunks, lengths) for layer, chunks in sorted(measured.items())}
    better = report(layers)
    if better:
        patterns = pattern_file(args, layers, num_layers, num_heads, prompts, source)
        args.output.write_text(to_text(patterns.model_dump(mode="json")) + "\n")
        print(f"wrote {args.output}")
    else:
        print(f"{args.output} was not written: serve without a file")
    for process in processes:
        plan.path(process).unlink()
    return 0 if better else 1


def engine_options(args: argparse.Namespace, lengths: Sequence[int]) -> dict[str, Any]:
    """vLLM's arguments, with which every chunk of every prompt runs on our path."""
    chunk = chunk_size(lengths)
    settings = {
        "patterns": "default_cpu", "min_context": chunk // 2, "min_chunk": 1, "audit_rows": 0, "kernel": args.kernel,
        "log_interval": 0,
    }  # fmt: skip
    return {
        "dtype": args.dtype,
        "tensor_parallel_size": args.tensor_parallel_size,
        "attention_backend": "minference",
        "additional_config": {"minference": settings},
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_seqs": 1,
        "max_num_batched_tokens": chunk,
        "max_model_len": max(lengths) + 1,
    }


def identity(args: argparse.Namespace, prompts: Sequence[list[int]]) -> str:
    """One line that differs whenever partial results must not be mixed."""
    versions = [importlib.metadata.version(name) for name in ("minference-vllm", "vllm", "torch")]
    options = [args.model, args.dtype, args.kernel, args.tensor_parallel_size, args.engine_args, versions]
    measured = [field.name for field in dataclasses.fields(Measured)]
    candidates = [pattern.model_dump() for pattern in CANDIDATES]
    return f"{digest(prompts)} {digest([candidates, measured])} {json.dumps(options)}"


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Layer(NamedTuple):
    """The candidates chosen for the heads of a layer, and their results on the held-out chunks."""

    numbers: torch.Tensor
    """int64 ``[H]``, indices into ``CANDIDATES``."""
    chosen: Measured
    """On the last chunk of every prompt, ``[1, H]``."""
    default: Measured
    """The same for the default."""

    @classmethod
    def of(cls, chunks: dict[tuple[int, int], Measured], lengths: Sequence[int]) -> Layer:
        """From the measurements of a layer, see ``collect``."""
        held_out = [found for (prompt, end), found in chunks.items() if end == lengths[prompt]]
        numbers = choose([found for (prompt, end), found in chunks.items() if end != lengths[prompt]])
        last = Measured.together(held_out)
        return cls(numbers, last.of(numbers), last.of(torch.zeros_like(numbers)))

    @property
    def patterns(self) -> list[HeadPattern]:
        return [CANDIDATES[number] for number in self.numbers.tolist()]


def pattern_file(
    args: argparse.Namespace,
    layers: dict[int, Layer],
    num_layers: int,
    num_heads: int,
    prompts: Sequence[list[int]],
    source: str,
) -> PatternFile:
    """The choices as a file. Layers that were not measured cannot run sparsely; they are written as dense.

    Args:
        source: description of the prompts.
    """
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("minference-vllm", "vllm", "torch"))
    revision = args.engine_args.get("revision") or "as found"
    patterns = {number: layer.patterns for number, layer in layers.items()}
    return PatternFile(
        model=args.model,
        provenance=(
            f"minference-vllm calibrate {args.model} (revision {revision}) on {source}, "
            f"{'+'.join(str(len(ids)) for ids in prompts)} tokens (sha256 {digest(prompts)}), kernel {args.kernel}; "
            f"per head the cheapest pattern with no more output error than {DEFAULT}; {versions}"
        ),
        default=DEFAULT,
        layers={number: dict(enumerate(patterns.get(number, [Dense()] * num_heads))) for number in range(num_layers)},
        measured={number: dict(enumerate(measurements(layer.chosen))) for number, layer in layers.items()},
    )


def measurements(measured: Measured) -> list[Measurement]:
    """The measurements of every head of a layer, on the last chunks."""
    columns = {
        "recall": measured.recall,
        "value_recall": measured.value_recall,
        "density": measured.computed / measured.pairs,
        "cost": measured.cost / measured.pairs,
        "output_error": measured.squared_error.sqrt(),
    }
    heads = zip(*(values[0].tolist() for values in columns.values()), strict=True)
    return [Measurement(**dict(zip(columns, [round(value, 5) for value in head], strict=True))) for head in heads]


def report(layers: dict[int, Layer]) -> bool:
    """Print the results beside the default's, on the held-out last chunk of every prompt.

    Returns:
        Whether the file is better: no more output error, and cheaper by at least ``MIN_GAIN``.
    """
    print("\nOn the last chunk of every prompt, which no pattern was chosen by (the default in brackets):")
    print("density: computed pairs, as in the log of a server; cost: with what low_rank spends to score keys")
    print("layer     density          cost          value recall      output error    heads")
    for number, layer in layers.items():
        kinds = Counter(pattern.kind for pattern in layer.patterns).most_common()
        print(row(str(number), layer.chosen, layer.default) + ", ".join(f"{count} {kind}" for kind, count in kinds))
    chosen = Measured.joined([layer.chosen for layer in layers.values()])
    default = Measured.joined([layer.default for layer in layers.values()])
    print(row("all", chosen, default))
    saved = 1 - chosen.cost_share / default.cost_share
    if chosen.output_error > default.output_error:
        print("No file is better than the default: the one that was found loses more of the output there.")
        return False
    if saved < MIN_GAIN:
        print(
            f"No file is better than the default: the one that was found saves {saved:.1%} of its cost, less than "
            f"{MIN_GAIN:.0%}."
        )
        return False
    print(f"{saved:.0%} cheaper than the default, at no more output error.")
    return True


def row(name: str, chosen: Measured, default: Measured) -> str:
    """One line of the report."""
    columns = [
        (chosen.density, default.density),
        (chosen.cost_share, default.cost_share),
        (float(chosen.value_recall.mean()), float(default.value_recall.mean())),
        (chosen.output_error, default.output_error),
    ]
    return f"{name:>5}  " + "  ".join(f"{found:6.3f} ({before:.3f})" for found, before in columns) + "  "
