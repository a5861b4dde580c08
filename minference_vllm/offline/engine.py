"""vLLM as the offline commands start it: quiet, and no longer than the model reaches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any


class EngineError(ValueError):
    """vLLM cannot read or start the model."""


def prepare() -> None:
    """Set what vLLM reads from the environment when it is imported, unless the user has set it."""
    # vLLM's lines would stand between a command's own, in every process.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Functions are sent to the engine's processes.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


def model_limit(model: str, engine_args: dict[str, Any]) -> int:
    """The longest sequence that vLLM allows for the model, in tokens; from its configuration alone.

    Raises:
        EngineError: vLLM cannot read it.
    """
    from vllm.engine.arg_utils import EngineArgs

    with failures_named(f"vLLM cannot read {model}"):
        return int(EngineArgs(model, **engine_args).create_model_config().max_model_len)


def start(model: str, options: dict[str, Any], engine_args: dict[str, Any], command: str) -> Any:
    """vLLM's ``LLM``.

    Args:
        options: the command's own arguments.
        engine_args: the user's.

    Raises:
        EngineError: the user set what the command sets, or vLLM does not start.
    """
    from vllm import LLM

    taken = sorted(options.keys() & engine_args.keys())
    if taken:
        raise EngineError(f"--engine-args may not set {', '.join(taken)}: {command} does")
    print(f"starting vLLM with {model} (VLLM_LOGGING_LEVEL=INFO shows its log)", flush=True)
    with failures_named(f"vLLM did not start with {model}"):
        return LLM(model, **options, **engine_args)


@contextlib.contextmanager
def failures_named(what: str) -> Iterator[None]:
    """Give vLLM's errors a beginning that says what was tried."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        raise EngineError(
            f"{what}: {error} (its log above may say more; --engine-args passes on what it needs)"
        ) from error
