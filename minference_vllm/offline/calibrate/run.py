"""A calibration from its prompts to the pattern file, around a vLLM engine in which ``recorder`` measures."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import random
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minference_vllm.offline.calibrate.recorder import CalibrationError, Plan, Recorder, collect
from minference_vllm.offline.calibrate.search import CANDIDATES, FAMILIES, Choice, choose
from minference_vllm.patterns.file import Measurement, PatternFile, to_text
from minference_vllm.patterns.kinds import Dense, HeadPattern

MIN_TOKENS = 4096
CHUNK = 4096
MEASURED_CHUNKS = 4
"""Of every prompt: the last, and others spread evenly from the middle on."""


def key_value_prompt(characters: int) -> str:
    """A JSON object of random keys and values and a question for one of them, as in the paper (section 4)."""
    rng = random.Random(0)

    def word() -> str:
        return "".join(rng.choices(string.hexdigits[:16], k=32))

    pairs = {word(): word() for _ in range(max(1, characters // 76))}
    wanted = rng.choice(list(pairs))
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'{json.dumps(pairs, indent=0)}\n\nKey: "{wanted}"\nThe value associated with the specified key is: '
    )


def read_prompts(path: Path | None, tokens: int) -> list[str]:
    if path is None:
        return [key_value_prompt(8 * tokens)]
    text = path.read_text()
    if path.suffix != ".jsonl":
        return [text]
    try:
        return [json.loads(line)["prompt"] for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise CalibrationError(f'{path}: every line must be a JSON object {{"prompt": "..."}}') from None


def cut(ids: list[int], tokens: int, prompt: int) -> list[int]:
    """The prompt's tokens, the middle left out where they are too many: beginning and question both matter.

    Raises:
        CalibrationError: fewer than MIN_TOKENS.
    """
    if len(ids) < MIN_TOKENS:
        raise CalibrationError(
            f"prompt {prompt} has {len(ids)} tokens; calibration needs at least {MIN_TOKENS}, "
            "better as many as you serve"
        )
    return without_middle(ids, tokens)


def without_middle(ids: list[int], tokens: int) -> list[int]:
    """At most ``tokens`` of them, three quarters from the beginning and the end, where the question stands."""
    if len(ids) <= tokens:
        return ids
    end = tokens // 4
    return ids[: tokens - end] + ids[len(ids) - end :]


def chunk_ends(lengths: Sequence[int]) -> tuple[int, ...]:
    """Ends of the chunks that are measured, of all prompts."""
    ends: set[int] = set()
    for length in lengths:
        later = [end for end in possible_ends(length) if end >= length // 2]
        step = max(1, len(later) // MEASURED_CHUNKS)
        ends |= set(later[::-1][::step][:MEASURED_CHUNKS])
    return tuple(sorted(ends))


def install(worker: Any, *plan: Any) -> tuple[int, int, int]:
    """Runs in an engine's process: measure from now on. ``plan``: a Plan's fields, which travel better than the object.

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
    """Runs in an engine's process."""
    from minference_vllm.backend.runtime import runtime_for

    recorder = runtime_for(worker.vllm_config).recorder
    if recorder is not None:
        recorder.next_prompt(number)


def run(args: argparse.Namespace) -> int:
    """Calibrate, and write the pattern file.

    Raises:
        CalibrationError: prompts, budgets or partial results that cannot be used, or a model that vLLM cannot start.
    """
    if not 0 < args.target_recall < 1:
        raise CalibrationError(f"--target-recall must lie between 0 and 1, not {args.target_recall}")
    if args.budget < 1:
        raise CalibrationError(f"--budget must be at least 1 key per row, not {args.budget}")
    if args.tokens < MIN_TOKENS:
        raise CalibrationError(f"--tokens must be at least {MIN_TOKENS}, not {args.tokens}")
    if not args.output.parent.is_dir():
        raise CalibrationError(f"{args.output.parent} is no directory")
    # Functions are sent to the engine's processes.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    # Before the weights load: a prompt may be too short.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_prompts(args.prompts, args.tokens)
    prompts = [cut(tokenizer.encode(text), args.tokens, number) for number, text in enumerate(texts)]
    lengths = [len(ids) for ids in prompts]
    llm = start(args, max(lengths) + 1)
    plan = Plan(identity(args, prompts), chunk_ends(lengths), args.kernel, f"{args.output}.partial")
    found = llm.collective_rpc(install, args=dataclasses.astuple(plan))
    processes = [process for process, _, _ in found]
    _, num_heads, num_layers = found[0]
    for number, ids in enumerate(prompts):
        llm.collective_rpc(next_prompt, args=(number,))
        llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    llm.collective_rpc(next_prompt, args=(len(prompts),))
    measured = collect(plan, processes, num_heads)
    if not measured:
        raise CalibrationError("no layer was measured: none of them can run sparsely (the log above says why)")
    budget = budget_share(args.budget, lengths)
    choices = {
        layer: [choose(sums, head, FAMILIES, budget, args.target_recall) for head in range(num_heads)]
        for layer, sums in sorted(measured.items())
    }
    report(choices)
    found_patterns = pattern_file(args, choices, num_layers, num_heads, prompts)
    args.output.write_text(to_text(found_patterns.model_dump(mode="json")) + "\n")
    print(f"wrote {args.output}")
    for process in processes:
        plan.path(process).unlink()
    return 0


def start(args: argparse.Namespace, max_model_len: int) -> Any:
    """vLLM with the model, every chunk of every prompt on our path."""
    from vllm import LLM

    settings = {
        "patterns": "vertical_slash_1000_6096", "min_context": CHUNK // 2, "min_chunk": 1, "audit_rows": 0,
        "kernel": args.kernel, "log_interval": 0,
    }  # fmt: skip
    options = {
        "dtype": args.dtype,
        "tensor_parallel_size": args.tensor_parallel_size,
        "attention_backend": "minference",
        "additional_config": {"minference": settings},
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_seqs": 1,
        "max_num_batched_tokens": CHUNK,
        "max_model_len": max_model_len,
    }
    taken = sorted(options.keys() & args.engine_args.keys())
    if taken:
        raise CalibrationError(f"--engine-args may not set {', '.join(taken)}: calibrate does")
    try:
        return LLM(args.model, **options, **args.engine_args)
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        raise CalibrationError(
            f"vLLM did not start with {args.model}: {error} (its log above may say more; --engine-args passes on what "
            "it needs)"
        ) from error


def possible_ends(length: int) -> list[int]:
    """Ends of all chunks of a prompt."""
    return [*range(CHUNK, length, CHUNK), length]


def budget_share(budget: int, lengths: Sequence[int]) -> float:
    """Density of ``budget`` keys per row over the measured chunks."""
    ends = set(chunk_ends(lengths))
    wanted = every = 0.0
    for length in lengths:
        for end in ends.intersection(possible_ends(length)):
            rows = (end - 1) % CHUNK + 1
            wanted += rows * budget
            every += rows * (end - (rows - 1) / 2)
    return min(1.0, wanted / every)


def identity(args: argparse.Namespace, prompts: Sequence[list[int]]) -> str:
    """One line that differs whenever partial results must not be mixed."""
    versions = [importlib.metadata.version(name) for name in ("minference-vllm", "vllm", "torch")]
    options = [args.model, args.dtype, args.kernel, args.tensor_parallel_size, args.engine_args, versions]
    return f"{digest(prompts)} {digest([pattern.model_dump() for pattern in CANDIDATES])} {json.dumps(options)}"


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def pattern_file(
    args: argparse.Namespace,
    choices: dict[int, list[Choice]],
    num_layers: int,
    num_heads: int,
    prompts: Sequence[list[int]],
) -> PatternFile:
    """The choices as a file. Layers that were not measured cannot run sparsely; they are written down as dense."""
    dense = Choice(Dense(), 1.0, 1.0, 0.0)
    layers: dict[int, dict[int, HeadPattern]] = {}
    for layer in range(num_layers):
        layers[layer] = {head: choice.pattern for head, choice in enumerate(choices.get(layer, [dense] * num_heads))}
    source = args.prompts.name if args.prompts else "a generated key-value prompt"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("minference-vllm", "vllm", "torch"))
    revision = args.engine_args.get("revision") or "as found"
    return PatternFile(
        model=args.model,
        provenance=(
            f"minference-vllm calibrate {args.model} (revision {revision}) on {source}, "
            f"{'+'.join(str(len(ids)) for ids in prompts)} tokens (sha256 {digest(prompts)}), budget {args.budget}, "
            f"target recall {args.target_recall}, kernel {args.kernel}; {versions}"
        ),
        layers=layers,
        measured={
            layer: {
                head: Measurement(
                    recall=round(choice.recall, 5),
                    density=round(choice.density, 5),
                    output_error=round(choice.output_error, 5),
                )
                for head, choice in enumerate(found)
            }
            for layer, found in choices.items()
        },
    )


def report(choices: dict[int, list[Choice]]) -> None:
    """Kinds, density and recall per layer, on standard output."""
    print("layer  density  recall  heads")
    every: list[Choice] = []
    for layer, found in choices.items():
        kinds = Counter(choice.pattern.kind for choice in found)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        print(f"{layer:5d}  {mean(found, 'density'):7.3f}  {mean(found, 'recall'):6.3f}  {listed}")
        every += found
    print(f"  all  {mean(every, 'density'):7.3f}  {mean(every, 'recall'):6.3f}")


def mean(choices: Sequence[Choice], name: str) -> float:
    return sum(float(getattr(choice, name)) for choice in choices) / len(choices)
