"""Shared by all tests: a quiet, offline environment, and batches over a paged cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from minference_vllm import reference
from minference_vllm.attend import choose_engine
from minference_vllm.engines import native
from minference_vllm.paged_cache import PagedCache
from minference_vllm.patterns import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PeakThreshold,
    TriShape,
    VerticalSlash,
)

ENGINES = ("block_table", "native")
"""Engines that every test of ``sparse_prefill`` runs with; another one needs its name here and nothing else."""
GPU_ENGINES = ("triton", "block_table")
"""The same for tensors on a GPU."""

# With fewer heads than patterns the first ones are taken, so those that differ most come first.
PATTERNS: tuple[HeadPattern, ...] = (
    VerticalSlash(vertical=60, slash=120),
    BlockSparse(top_k=2),
    AShape(sink=16, local=100),
    VerticalSlash(vertical=300, slash=100),
    TriShape(sink=16, local=64, last=40),
    Dense(),
    VerticalSlash(vertical=33, slash=0),
    AShape(sink=0, local=1),
)
# The tests' attention is nearly flat: small shares of its mass leave something out.
ADAPTIVE: tuple[HeadPattern, ...] = (
    Coverage(gamma=0.4, min_budget=0),
    Antidiagonal(stride=16, tau=0.4),
    PeakThreshold(alpha=0.9, sink=16, window=40),
    LowRank(gamma=0.3),
    Coverage(gamma=0.9, min_budget=0),
    LowRank(gamma=0.3),
    PeakThreshold(alpha=0.3, sink=0, window=0),
    Antidiagonal(stride=2, tau=0.1),
    LowRank(rank=32, gamma=0.02),
)


def pytest_configure(config: pytest.Config) -> None:
    """A quiet, offline environment; vLLM reads it when a test imports or starts it."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="0",
    )
    # A developer's own settings must not decide what the tests see.
    for name in [name for name in os.environ if name.startswith("MINFERENCE_")]:
        del os.environ[name]
    # The tests' tensors are so small that threads would mostly wait for each other, above all on a busy machine.
    torch.set_num_threads(1)
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts vLLM engines, and run it last: what is quick to fail comes first."""
    slow = Path(__file__).parent / "engine"
    for item in items:
        if item.path.is_relative_to(slow):
            item.add_marker(pytest.mark.engine)
    items.sort(key=lambda item: item.path.is_relative_to(slow))


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a test file prints, as JSON in its last line, when it runs as a script in Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, str(request.path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
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
    params=[*ENGINES, *(pytest.param(f"cuda:{name}", marks=pytest.mark.gpu) for name in GPU_ENGINES)],
)
def engine_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each engine; the test is skipped where it cannot run on this machine at all. With a GPU's engine all tensors that
    the test makes, but for the random ones, are made on the GPU."""
    device, _, name = str(request.param).rpartition(":")
    if name == "native" and native.unavailable_reason():
        pytest.skip(str(native.unavailable_reason()))
    if device and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    if device and name == "block_table":
        pytest.importorskip("vllm.vllm_flash_attn")
    with torch.device(device or "cpu"):
        yield name


@pytest.fixture(scope="session")
def skip_unless_served() -> Callable[[str, PagedBatch], None]:
    return _skip_unless_served


def _skip_unless_served(engine_name: str, batch: PagedBatch) -> None:
    """Skip the test, with the engine's own reason, when it does not serve such a cache."""
    cache = PagedCache(batch.key_cache.transpose(1, 2), batch.value_cache.transpose(1, 2), "rows")
    try:
        choose_engine(engine_name, batch.query.dtype, cache)
    except ValueError as reason:
        pytest.skip(str(reason))


@dataclass
class PagedBatch:
    """Requests whose keys and values lie in shuffled pages; everything that belongs to nobody is NaN."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    context_lens: list[int]

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """The leading arguments of ``sparse_prefill``."""
        return self.query, self.key_cache, self.value_cache, self.block_table, self.query_start_loc, self.seq_lens

    @property
    def scale(self) -> float:
        return float(self.query.shape[2]) ** -0.5

    @property
    def patterns(self) -> list[HeadPattern]:
        """One per head, of the kinds whose budgets are fixed."""
        return [PATTERNS[head % len(PATTERNS)] for head in range(self.query.shape[1])]

    @property
    def adaptive_patterns(self) -> list[HeadPattern]:
        """One per head, of the kinds whose budgets follow the attention."""
        return [ADAPTIVE[head % len(ADAPTIVE)] for head in range(self.query.shape[1])]

    def rows(self, request: int) -> slice:
        return slice(int(self.query_start_loc[request]), int(self.query_start_loc[request + 1]))

    def keys(self, request: int) -> torch.Tensor:
        """float64 ``[HK, S, D]``."""
        return reference.gather_sequence(self.key_cache, self.block_table[request], int(self.seq_lens[request]))

    def values(self, request: int) -> torch.Tensor:
        return reference.gather_sequence(self.value_cache, self.block_table[request], int(self.seq_lens[request]))


def make_batch(
    query_lens: Sequence[int] = (300,),
    context_lens: Sequence[int] = (0,),
    heads: int = 8,
    kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> PagedBatch:
    generator = torch.Generator("cpu").manual_seed(seed)
    lengths = [query + context for query, context in zip(query_lens, context_lens, strict=True)]
    blocks = [-(-length // block_size) for length in lengths]
    total = sum(blocks) + 3  # three pages that belong to nobody
    shape = (total, block_size, kv_heads, head_size)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    here = torch.empty(0).device
    order = torch.randperm(total, generator=generator, device="cpu").to(here, torch.int32)
    table = torch.full((len(lengths), max(blocks) + 1), int(order[-1]), dtype=torch.int32)
    first = 0
    for request, (count, length) in enumerate(zip(blocks, lengths, strict=True)):
        pages = order[first : first + count]
        table[request, :count] = pages
        first += count
        for cache in caches:
            # A kernel may load the slots behind the last token and drop them afterwards, so those are finite (they
            # are in a real cache, too), but large enough to show.
            rows = torch.full((count * block_size, kv_heads, head_size), 100.0)
            rows[:length] = torch.randn(length, kv_heads, head_size, generator=generator, device="cpu")
            cache[pages.long()] = rows.view(count, block_size, kv_heads, head_size).to(dtype)
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    query = torch.randn(int(starts[-1]), heads, head_size, generator=generator, device="cpu").to(here, dtype)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return PagedBatch(query, caches[0], caches[1], table, starts, seq_lens, list(context_lens))


@pytest.fixture(scope="session")
def paged_batch() -> Callable[..., PagedBatch]:
    """``make_batch``, as a fixture: test files do not import each other."""
    return make_batch


@pytest.fixture
def served_batch(engine_name: str) -> Callable[..., PagedBatch]:
    """``make_batch``, for caches that the engine serves; the test is skipped for others."""

    def make(**arguments: Any) -> PagedBatch:
        batch = make_batch(**arguments)
        _skip_unless_served(engine_name, batch)
        return batch

    return make
