"""The command line tool ``minference-vllm``.

Exit codes: 0, done and fine; 1, a problem, in one line on stderr or in the report that was asked for; 2, wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from minference_vllm import __version__


class Command(NamedTuple):
    module: str
    """Has ``add_arguments(parser)`` and ``run(args)``, which returns the exit code; imported only when used."""
    help: str


# A new command is one line here and its module.
COMMANDS = {
    "calibrate": Command("minference_vllm.commands.calibrate", "find the pattern of every head on long prompts"),
    "evaluate": Command("minference_vllm.commands.evaluate", "sparse beside dense: loss, answers, time to first token"),
    "inspect": Command("minference_vllm.commands.inspect", "what would run for a model: per layer and head, and why"),
    "convert": Command("minference_vllm.commands.convert", "translate a pattern file into another format"),
    "plot": Command("minference_vllm.commands.plot", "draw a model's patterns, attention, density and recall"),
    "doctor": Command("minference_vllm.commands.doctor", "what is installed, what can run here, what is missing"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="minference-vllm", description="Sparse prefill for vLLM: the offline tools.")
    parser.add_argument("--version", action="version", version=f"minference-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help)
        if name in arguments[:1]:
            module = importlib.import_module(command.module)
            subparser.description = module.__doc__
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output (``| head``) has closed it; Python must not try to flush the rest on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, ImportError) as error:
        # Expected: a missing or invalid file (PatternError, SettingsError), an unknown model, an optional package that
        # is not installed. Anything else is a bug and keeps its traceback.
        remedy = "; minference-vllm doctor says what is missing" if isinstance(error, ImportError) else ""
        print(f"minference-vllm {args.command}: {_one_line(error)}{remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
