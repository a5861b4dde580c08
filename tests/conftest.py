"""Shared by all tests: a quiet, offline environment, and fixtures."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import index_inputs
import pytest
import torch
from fork_server import ForkServer
from paged_inputs import PagedBatch, make_batch

from minference_vllm.kernels.choose import choose
from minference_vllm.kernels.native import library

KERNELS = ("block_table", "native")
"""Kernels that every test of ``sparse_prefill`` runs with. A new kernel only needs its name here."""
GPU_KERNELS = ("triton", "block_table")
"""The same for tensors on a GPU."""


def pytest_configure(config: pytest.Config) -> None:
    """A quiet, offline environment; vLLM reads it when a test imports or starts it."""
    # Before a test file imports them, so that pytest rewrites their assertions too.
    pytest.register_assert_rewrite("cpu_layer", "gpu_layer", "layer_inputs", "prefill_checks")
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="0",
    )
    # A developer's own settings must not decide what the tests see.
    for name in [name for name in os.environ if name.startswith("MINFERENCE_") or name == "VLLM_LOGGING_LEVEL"]:
        del os.environ[name]
    # The tests' tensors are too small to profit from threads, above all on a busy machine.
    torch.set_num_threads(1)
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start vLLM engines, and run them last, so that quick failures come first."""
    slow = Path(__file__).parent / "engine"
    for item in items:
        if item.path.is_relative_to(slow):
            item.add_marker(pytest.mark.engine)
    items.sort(key=lambda item: item.path.is_relative_to(slow))


def pytest_sessionfinish() -> None:
    """Statistics logged at process exit would go to a stream that pytest has closed; nobody needs them."""
    logging.raiseExceptions = False


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Undo changes that a test, or a command that runs in its process, makes to the environment."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., str]:
    """Install a platform plugin for vLLM: ``install(name, entry_point, source of the module)`` gives its folder."""

    def write(name: str, entry_point: str, source: str = "") -> str:
        folder = tmp_path / name
        metadata = folder / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[vllm.platform_plugins]\n{name} = {entry_point}\n")
        (folder / f"{name}.py").write_text(source)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts processes that import vLLM, one server for all tests of a process."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a test file prints, as JSON in its last line, when it runs as a script in Triton's interpreter."""
    folders = [str(Path(__file__).parent / "inputs"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(request.path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.fixture(
    params=[*KERNELS, *(pytest.param(f"cuda:{name}", marks=pytest.mark.gpu) for name in GPU_KERNELS)],
)
def kernel_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kernel; the test is skipped if the machine cannot run it. With a GPU kernel all tensors that the test makes,
    except random ones, are made on the GPU."""
    device, _, name = str(request.param).rpartition(":")
    if name == "native" and library.unavailable_reason():
        pytest.skip(str(library.unavailable_reason()))
    if device and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    if device and name == "block_table":
        pytest.importorskip("vllm.vllm_flash_attn")
    with torch.device(device) if device else nullcontext():
        yield name


@pytest.fixture(scope="session")
def skip_unless_served() -> Callable[[str, PagedBatch], None]:
    return _skip_unless_served


def _skip_unless_served(kernel_name: str, batch: PagedBatch) -> None:
    """Skip the test, with the kernel's own reason, if it does not serve such a cache."""
    try:
        choose(kernel_name, batch.query.dtype, batch.cache)
    except ValueError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def paged_batch() -> Callable[..., PagedBatch]:
    """``make_batch``, as a fixture: test files do not import each other."""
    return make_batch


@pytest.fixture
def served_batch(kernel_name: str) -> Callable[..., PagedBatch]:
    """``make_batch``, for caches that the kernel serves; the test is skipped for others."""

    def make(**arguments: Any) -> PagedBatch:
        batch = make_batch(**arguments)
        _skip_unless_served(kernel_name, batch)
        return batch

    return make


@pytest.fixture(params=[False, True], ids=["single_columns", "pages_of_columns"])
def whole_pages(request: pytest.FixtureRequest) -> bool:
    """Whether an index lists columns in whole pages."""
    return bool(request.param)


@pytest.fixture(params=index_inputs.TILINGS)
def built(request: pytest.FixtureRequest, whole_pages: bool) -> index_inputs.Built:
    """An index of every pattern, for every tiling."""
    return index_inputs.build(request.param, whole_pages)


@pytest.fixture
def make_cpu_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``Layer`` of ``cpu_layer.py`` with given requests."""
    from cpu_layer import Layer

    return partial(Layer, tmp_path, monkeypatch)


@pytest.fixture(params=["FlashAttention", "TritonAttention"])
def parent(request: pytest.FixtureRequest) -> Any:
    """vLLM's backend that ours replaces on a GPU."""
    from gpu_layer import Parent

    return Parent(request.param)


@pytest.fixture
def make_gpu_layer(parent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``Layer`` of ``gpu_layer.py`` with given requests."""
    from gpu_layer import Layer

    return partial(Layer, tmp_path, monkeypatch, parent)
