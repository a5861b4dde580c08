"""vLLM as the offline commands start it: quiet, and no longer than the model reaches."""

from __future__ import annotations

import contextlib
import math
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


def model_config(model: str, engine_args: dict[str, Any]) -> Any:
    """vLLM's ``ModelConfig``, before any weight loads; its ``max_model_len`` is the longest sequence that it allows.

    Raises:
        EngineError: vLLM cannot read the model.
    """
    from vllm.engine.arg_utils import EngineArgs

    with failures_named(f"vLLM cannot read {model}"):
        return EngineArgs(model, **engine_args).create_model_config()


def start(config: Any, options: dict[str, Any], engine_args: dict[str, Any], command: str) -> Any:
    """vLLM's ``LLM``, for one sequence at a time.

    Args:
        config: of ``model_config``.
        options: the command's own arguments, ``max_model_len`` among them.
        engine_args: the user's.

    Raises:
        EngineError: the user set what the command sets, or vLLM does not start.
    """
    from vllm import LLM

    taken = sorted(options.keys() & engine_args.keys())
    if taken:
        raise EngineError(f"--engine-args may not set {', '.join(taken)}: {command} does")
    if not engine_args.keys() & {"gpu_memory_utilization", "kv_cache_memory_bytes"}:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib(config, options["max_model_len"])))
    print(f"starting vLLM with {config.model} (VLLM_LOGGING_LEVEL=INFO shows its log)", flush=True)
    with failures_named(f"vLLM did not start with {config.model}"):
        return LLM(config.model, **options, **engine_args)


def stop(llm: Any) -> None:
    """End the engine's processes, before Python ends and finds them gone in any order."""
    llm.llm_engine.engine_core.shutdown()


def cache_gib(config: Any, tokens: int) -> int:
    """KV cache of one sequence, GiB: on CPUs vLLM would take nearly all memory, and not start where some is in use."""
    per_token = 2 * config.get_total_num_kv_heads() * config.get_head_size() * config.dtype.itemsize
    # A tenth more for whole pages, and the one page that vLLM keeps for itself.
    return math.ceil(1.1 * tokens * per_token * config.get_total_num_hidden_layers() / 2**30)


@contextlib.contextmanager
def failures_named(what: str) -> Iterator[None]:
    """Give vLLM's errors a beginning that says what was tried."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        raise EngineError(
            f"{what}: {error} (its log above may say more; --engine-args passes on what it needs)"
        ) from error
