"""A vLLM engine in its own process behind a pipe, so that engines with different backends can exist side by side."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # The counters are read by sending a function to the engine's process.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def one_at_a_time(
    model: str, dtype: str, tokens: int, chunk: int, settings: dict[str, Any] | None = None, **others: Any
) -> dict[str, Any]:
    """Options of vLLM's ``LLM`` for an engine that serves one request at a time, by default without prefix caching.

    Args:
        tokens: the longest request.
        chunk: max_num_batched_tokens.
        settings: of minference; None: use vLLM's own backend.
        others: further options, which take precedence.
    """
    options: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "max_model_len": tokens,
        "max_num_batched_tokens": chunk,
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    if settings is not None:
        options |= {"attention_backend": "minference", "additional_config": {"minference": settings}}
    return options | others


class Timed(NamedTuple):
    """The result of one request, timed in the engine's process."""

    tokens: list[int]
    ttft: float
    decode: float
    """Seconds per decoded token."""
    computed_pairs: float
    dense_pairs: float
    """Query-key pairs on the sparse path during this request; both 0 when it was served densely."""


def read_counters(worker: Any) -> tuple[float, float]:
    """Query-key pairs computed on the sparse path so far, and by dense attention. Runs in the engine's process."""
    from minference_vllm.backend.runtime import runtime_for

    counters = runtime_for(worker.vllm_config).counters
    return counters.computed_pairs, counters.dense_pairs


def use_vllms_own_methods(worker: Any, yes: bool) -> None:
    """Replace the methods that minference overrides by vLLM's, or restore ours. Runs in the engine's process.

    Dense and sparse then share process, weights, cache and memory. Two processes differ by several per cent on a small
    machine even if they run the same code.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from minference_vllm.backend.compat import CLASS_PATHS

    backend = resolve_obj_by_qualname(CLASS_PATHS[worker.vllm_config.device_config.device_type])
    for ours, name in ((backend.get_impl_cls(), "forward"), (backend.get_builder_cls(), "build")):
        if yes:
            vllms = next(base for base in ours.__mro__ if base.__module__.startswith("vllm.") and name in vars(base))
            setattr(ours, name, vars(vllms)[name])
        elif name in vars(ours):
            delattr(ours, name)  # uncovers the method of our own base class


def serve(connection: Connection, options: dict[str, Any], environment: dict[str, str], log: str) -> None:
    """Body of an engine's process: answers ``(prompt, decoded tokens, dense)`` with a ``Timed`` until it gets None."""
    # vLLM's own processes join the group of this one and end with it.
    os.setsid()
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    from vllm import LLM

    llm = LLM(**options)
    try:
        connection.send("ready")
        while (work := connection.recv()) is not None:
            prompt, decode, dense = work
            connection.send(answer(llm, prompt, decode, dense, ours="attention_backend" in options))
    except (EOFError, OSError):
        pass  # the benchmark has ended
    finally:
        llm.llm_engine.engine_core.shutdown()


def answer(llm: Any, prompt: list[int], decode: int, dense: bool, ours: bool) -> Timed:
    """Run one request. ``ours``: the engine runs minference, with vLLM's own methods if ``dense``."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=decode + 1, ignore_eos=True, detokenize=False)
    if ours:
        llm.collective_rpc(use_vllms_own_methods, args=(dense,))
    before = llm.collective_rpc(read_counters)[0] if ours else (0.0, 0.0)
    output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
    after = llm.collective_rpc(read_counters)[0] if ours else (0.0, 0.0)
    times = output.metrics
    per_token = (times.last_token_ts - times.first_token_ts) / decode
    pairs = (after[0] - before[0], after[1] - before[1])
    return Timed(list(output.outputs[0].token_ids), times.first_token_latency, per_token, *pairs)


def end_with_us() -> None:
    """Exit normally on SIGTERM, so that the engines are stopped: they are suspended and in their own process groups."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


class Engine:
    """One engine in its own process. Its processes are suspended except while it answers.

    Idle vLLM processes poll and would take CPU time from the engine that is timed.
    """

    def __init__(self, name: str, options: dict[str, Any], environment: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, options, environment, str(log)))
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            sys.exit(f"the engine {self.name!r} died; the end of its log:\n{tail}")

    def start(self) -> None:
        """Wait until the model is loaded."""
        self.receive()
        print(f"{self.name}: engine ready", file=sys.stderr, flush=True)
        self.signal(signal.SIGSTOP)

    def ask(self, prompt: list[int], decode: int, dense: bool = False) -> Timed:
        """Run one request. ``dense``: with vLLM's own methods, in an engine that runs minference."""
        self.signal(signal.SIGCONT)
        self.connection.send((prompt, decode, dense))
        timed: Timed = self.receive()
        self.signal(signal.SIGSTOP)
        return timed

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of this engine, which form one group."""
        if self.process.pid:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.signal(signal.SIGCONT)
            self.connection.send(None)
        self.process.join(30)
        if self.process.is_alive() and self.process.pid:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
