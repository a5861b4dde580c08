"""What minference would run for a model: which pattern file is taken and why, and the pattern of every layer and head.

Reads the configuration alone: no weights, no engine. Exit code 1 when the model cannot be served or the file does not
fit it.
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from minference_vllm.patterns.file import PatternFile
from minference_vllm.patterns.kinds import HeadPattern

Item = TypeVar("Item", bound=Hashable)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--patterns", metavar="FILE", help="pattern file, as in the setting of that name")
    parser.add_argument("--trust-remote-code", action="store_true", help="as vLLM's option of that name")


def run(args: argparse.Namespace) -> int:
    # Imported late: both load torch and transformers, which --help does not need.
    from minference_vllm.backend.limits import unsupported_model_reasons
    from minference_vllm.offline.checkpoint import Checkpoint, planned_patterns

    checkpoint = Checkpoint(args.model, args.trust_remote_code)
    print(f"model     {checkpoint}")
    reasons = unsupported_model_reasons(checkpoint)
    for reason in reasons:
        print(f"refused   {reason}")
    if reasons:
        return 1
    patterns, source, settings = planned_patterns(checkpoint, args.patterns)
    print(f"patterns  {source}")
    if patterns.provenance:
        print(f"          {patterns.provenance}")
    if any(patterns.measured.values()):
        print(f"measured  {measured_line(patterns)}")
    print(f"sparse    prompts from {settings.min_context} tokens, in chunks of at least {settings.min_chunk}")
    fixed = checkpoint.fixed_layers(settings)
    heads = checkpoint.num_heads
    rows = [
        (("all", fixed[layer]),) if layer in fixed else head_rows(patterns.for_layer(layer, heads))
        for layer in range(checkpoint.get_total_num_hidden_layers())
    ]
    print()
    print("\n".join(table(rows)))
    return 0


def measured_line(patterns: PatternFile) -> str:
    """Summary of what was measured when the file was made."""
    heads = {(layer, head): found for layer, row in patterns.measured.items() for head, found in row.items()}
    density = sum(found.density for found in heads.values()) / len(heads)
    recall = sum(found.recall for found in heads.values()) / len(heads)
    layer, head = min(heads, key=lambda place: heads[place].recall)
    lowest = heads[layer, head].recall
    return f"density {density:.3f}; recall {recall:.3f}, lowest {lowest:.3f} (layer {layer}, head {head})"


def head_rows(patterns: Sequence[HeadPattern]) -> tuple[tuple[str, str], ...]:
    """Heads and their pattern, one row per distinct pattern of a layer."""
    alike = positions(patterns)
    return tuple(
        ("all" if len(heads) == len(patterns) else spans(heads), str(pattern)) for pattern, heads in alike.items()
    )


def table(layers: Sequence[tuple[tuple[str, str], ...]]) -> list[str]:
    """Lines of a table of all layers; layers with equal patterns share their rows."""
    cells = [("layers", "heads", "pattern")]
    for rows, numbers in positions(layers).items():
        cells += [(spans(numbers) if row == 0 else "", *cell) for row, cell in enumerate(rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    return [f"{layer:{widths[0]}}  {heads:{widths[1]}}  {pattern}" for layer, heads, pattern in cells]


def positions(items: Iterable[Item]) -> dict[Item, list[int]]:
    """The positions of each item, in order of first appearance."""
    found: dict[Item, list[int]] = {}
    for position, item in enumerate(items):
        found.setdefault(item, []).append(position)
    return found


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, abbreviated: ``0-3, 7``; with a stride: ``0-24 by 2``."""
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{numbers[0]}-{numbers[-1]} by {step}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
