"""Compare sparse prefill with dense attention on a model: what it loses and what it gains.

vLLM starts once. Every prompt is read densely and under each pattern, one after the other:

- a text, of whose second half every token is scored (perplexity), and the same text with questions, repeated lines and
  single words planted in it, whose answers are scored where they stand;
- seven tasks of RULER (needles, variable tracking, common and frequent words), where lm-eval is installed
  (pip install 'minference-vllm[evaluate]');
- the time to the first token, without and with each pattern in turns.

A report is written as Markdown, CSV and, where matplotlib is installed, a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minference_vllm.commands.options import count, json_object, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="as for vllm serve")
    parser.add_argument(
        "--patterns",
        nargs="+",
        metavar="PATTERN",
        help="pattern files, or patterns such as 'low_rank(32, 0.95)'; 'default' is what the model is served with "
        "(default: that alone)",
    )
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[16384, 32768],
        metavar="N",
        help="of prompts with their answers, in tokens; cut to the model's limit (default: 16384 32768)",
    )
    parser.add_argument(
        "--chunk", type=positive, default=2048, metavar="N", help="max_num_batched_tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--text", default="pydoc", help="pydoc (Python's help topics), opticks, or a text file (default: %(default)s)"
    )
    parser.add_argument("--passages", type=positive, default=1, metavar="N", help="of the text (default: %(default)s)")
    parser.add_argument(
        "--samples", type=count, default=3, metavar="N", help="of each RULER task; 0: none (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="of timed runs (default: %(default)s)")
    parser.add_argument("--apply-chat-template", action="store_true", help="for RULER's questions")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    parser.add_argument(
        "--max-loss", type=float, metavar="NATS", help="exit with 1 where the text loses more per token than this"
    )
    parser.add_argument(
        "--settings", type=json_object, default={}, metavar="JSON", help="of minference, as in --additional-config"
    )
    parser.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON", help="more arguments for vLLM's LLM(...)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("evaluation"), metavar="FOLDER", help="(default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    # Imported late: it loads torch, which --help does not need.
    from minference_vllm.offline.evaluate.run import run

    return run(args)
