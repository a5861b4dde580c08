"""Start vLLM for the offline commands: with few log lines, and within the model's maximum length."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any


class EngineError(ValueError):
    """vLLM cannot read or start the model."""


def prepare() -> None:
    """Set the environment variables that vLLM reads on import; a log level that the user has set stays."""
    # Otherwise the log lines of every vLLM process would mix with the command's output.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # ``collective_rpc`` sends functions to the engine's processes.
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
        config: from ``model_config``.
        options: the command's own arguments, ``max_model_len`` among them.
        engine_args: the user's.

    Raises:
        EngineError: the user set an argument that the command sets, or vLLM does not start.
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
    """Shut down the engine's processes in order, before the interpreter exits."""
    llm.llm_engine.engine_core.shutdown()


def cache_gib(config: Any, tokens: int) -> int:
    """KV cache of one sequence, GiB. On CPUs vLLM would reserve nearly all memory, and not start if some is in use."""
    per_token = 2 * config.get_total_num_kv_heads() * config.get_head_size() * config.dtype.itemsize
    # 10% more for rounding up to pages, and for the one page that vLLM reserves.
    return math.ceil(1.1 * tokens * per_token * config.get_total_num_hidden_layers() / 2**30)


@contextlib.contextmanager
def failures_named(what: str) -> Iterator[None]:
    """Prefix vLLM's errors with what was tried."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        raise EngineError(
            f"{what}: {error} (its log above may say more; --engine-args passes on what it needs)"
        ) from error
