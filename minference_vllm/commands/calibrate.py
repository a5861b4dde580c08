"""Find the pattern of every head of a model: vLLM starts, reads long prompts, and a pattern file is written.

Every head gets the cheapest of some fifty candidates that errs no more than the default does, in the attention output,
on every measured chunk. A check follows on chunks that nothing was chosen by. Where the file is not cheaper there, or
errs more, none is written, and the exit code is 1.

An interrupted run goes on where it stopped when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minference_vllm.commands.options import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="as for vllm serve")
    parser.add_argument("-o", "--output", type=Path, required=True, help="pattern file to write")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="long texts like those you serve: a text file with one prompt, or a .jsonl with one "
        '{"prompt": "..."} per line; where there are fewer than two, a generated key-value retrieval prompt and '
        "Python's help topics join",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=32768,
        help="prompts are cut to this length, and to the model's (default 32768); take what you serve",
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kernel", default="auto", help="the setting of that name; costs are counted as it works")
    parser.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON", help="more arguments for vLLM's LLM(...)"
    )


def run(args: argparse.Namespace) -> int:
    # Imported late: it loads torch, which --help does not need.
    from minference_vllm.offline.calibrate.run import run

    return run(args)
