"""Tiny models created on the fly, and vLLM engines, each in its own process, since vLLM keeps global state."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from tiny_models import VOCABULARY, save

HERE = Path(__file__).parent
HEADS, LAYERS = 8, 3
MIN_CONTEXT = 512
SPARSE_KINDS: list[dict[str, Any]] = [
    {"kind": "vertical_slash", "vertical": 64, "slash": 128},
    {"kind": "block_sparse", "top_k": 2},
    {"kind": "a_shape", "sink": 64, "local": 128},
    {"kind": "tri_shape", "sink": 64, "local": 128, "last": 64},
    {"kind": "vertical_slash", "vertical": 200, "slash": 0},
    {"kind": "dense"},
]
FULL_KINDS: list[dict[str, Any]] = [
    {"kind": "vertical_slash", "vertical": 100_000, "slash": 100_000},
    {"kind": "block_sparse", "top_k": 100_000},
    {"kind": "a_shape", "sink": 0, "local": 100_000},
    {"kind": "tri_shape", "sink": 0, "local": 0, "last": 100_000},
]


# Models and pattern files


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, a fixed seed and a tokenizer whose words are ``w0`` ... ``w511``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rope_theta=1e6,
        # Large enough that attention is peaked and that the best token leads clearly.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return save(LlamaForCausalLM(config), folder)


@pytest.fixture(scope="session")
def hybrid_llama(llama: Path) -> Path:
    """The same weights with a sliding window in the first layer."""
    folder = llama.parent / "hybrid"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((llama / "config.json").read_text())
    config |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 200}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_patterns(path: Path, kinds: list[dict[str, Any]], layers: int = LAYERS, heads: int = HEADS) -> str:
    """A file in which neighbouring heads differ, and each layer begins with a different kind."""
    content = {
        "schema_version": 1,
        "provenance": "written by a test",
        "layers": {
            str(layer): {str(head): kinds[(layer + head) % len(kinds)] for head in range(heads)}
            for layer in range(layers)
        },
    }
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture(scope="session")
def sparse_patterns(llama: Path) -> str:
    return write_patterns(llama.parent / "sparse.json", SPARSE_KINDS)


@pytest.fixture(scope="session")
def full_patterns(llama: Path) -> str:
    return write_patterns(llama.parent / "full.json", FULL_KINDS)


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """Random tokens; the same seed gives the same ones."""

    def make(length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    return make


def minference(patterns: str, **settings: Any) -> dict[str, Any]:
    """Arguments of ``LLM`` that select us, with a low threshold and a line of statistics at every step."""
    values = {"patterns": patterns, "min_context": MIN_CONTEXT, "log_interval": 0.001, **settings}
    return {"attention_backend": "minference", "additional_config": {"minference": values}}


@pytest.fixture(scope="session")
def with_minference() -> Callable[..., dict[str, Any]]:
    return minference


# Engines


@dataclass
class Answer:
    """What an engine answered, by batch and prompt, and what it logged."""

    tokens: list[list[list[int]]]
    leads: list[list[list[float]]]
    cached: list[list[int]]
    log: str
    counted: list[dict[str, Any]] = field(default_factory=list)
    """``Counters.report`` of each batch that named its patterns."""
    drafts: int = 0
    """Total number of drafted tokens."""
    stats: list[dict[str, Any]] = field(default_factory=list)
    """``Counters.report`` of every worker that runs minference."""

    @property
    def density(self) -> float:
        """The density in the last line of statistics."""
        return density_in(self.log)


def density_in(log: str) -> float:
    lines = re.findall(r"minference: .* density ([\d.]+)", log)
    assert lines, "no line of statistics in the log:\n" + log[-3000:]
    return float(lines[-1])


@pytest.fixture(scope="session", autouse=True)
def own_cores() -> None:
    """Give the engines of each pytest process their own cores; vLLM would bind all of them to the same ones."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes == 1:
        return
    # The replacement of a crashed process has a higher number.
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % processes
    if cores := sorted(os.sched_getaffinity(0))[number::processes]:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))


def environment(**changes: str) -> dict[str, str]:
    """One thread also where vLLM binds none, in the calling process: AMX products of two threads round differently."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Callable[..., Answer]:
    def run(
        model: Path,
        batches: list[dict[str, Any]],
        llm: dict[str, Any],
        max_tokens: int = 8,
        python: str = sys.executable,
        **changes: str,
    ) -> Answer:
        folder = tmp_path_factory.mktemp("engine")
        request = {
            "llm": {"model": str(model), "max_model_len": 4096, **llm},
            "batches": batches,
            "max_tokens": max_tokens,
        }
        (folder / "request.json").write_text(json.dumps(request))
        script, files, log = HERE / "engine_process.py", ["request.json", "answer.json"], folder / "log"
        # The interpreter is set up when Triton is imported.
        if python == sys.executable and "TRITON_INTERPRET" not in changes:
            status = fork_server.run(script, files, environment(**changes), log, log, folder)
        else:
            with log.open("wb") as output:
                status = subprocess.run(
                    [python, str(script), *files],
                    cwd=folder,
                    env=environment(**changes),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=600,
                    check=False,
                ).returncode
        assert status == 0, f"the engine failed ({llm}):\n{log.read_text()[-6000:]}"
        return Answer(**json.loads((folder / "answer.json").read_text()), log=log.read_text())

    return run


@contextmanager
def process_group(command: list[str], log: Path, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose whole process group is killed afterwards, however the test ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(**changes),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        # All that is left of the group, including the first process.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def served(model: Path, arguments: list[str], log: Path, **changes: str) -> Iterator[str]:
    """Address of ``vllm serve MODEL`` with these arguments, once it answers; the model's name is ``tiny``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "tiny", *arguments]
    with process_group(command, log, **changes) as process:
        address = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + 400
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-6000:]
                assert time.monotonic() < give_up, "the server did not start:\n" + log.read_text()[-6000:]
                time.sleep(0.5)
        yield address


@pytest.fixture(scope="session", name="served_at")
def served_at_fixture() -> Any:
    return served


@pytest.fixture(scope="session", name="process_group")
def process_group_fixture() -> Any:
    return process_group


@pytest.fixture(scope="session", name="density_in")
def density_in_fixture() -> Callable[[str], float]:
    return density_in


@pytest.fixture(scope="session", name="write_patterns")
def write_patterns_fixture() -> Callable[..., str]:
    return write_patterns


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``minference-vllm`` as a user does; its output and errors together."""

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).parent / "minference-vllm"), *arguments],
            env=environment(HF_HUB_OFFLINE="1", **changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=800,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def vllm_command() -> list[str]:
    """The ``vllm`` command of this environment."""
    return [str(Path(sys.executable).parent / "vllm")]
