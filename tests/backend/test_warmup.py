"""Kernels compiled at start-up: each variant that serving needs once, and named errors.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm.backend.serving import SparseLayer
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.choose import choose
from minference_vllm.patterns.kinds import (
    MAX_STEP,
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PeakThreshold,
    VerticalSlash,
)
from minference_vllm.settings import Settings
from minference_vllm.triton_kernels.launch import launcher

pytest.importorskip("triton")
PAGE, DIM = 32, 64


def make_layer(*patterns: HeadPattern, sinks: bool = False, softcap: float = 0.0, quantised: bool = False) -> Any:
    """What warm-up reads of a layer of 4 heads over 2; patterns are repeated. Under Triton's interpreter its kernel is
    the one for GPUs."""
    kernel_name = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "auto"

    def paged_cache(layer: Any, memory: torch.Tensor, dtype: torch.dtype) -> PagedCache:
        memory = memory.view(torch.float8_e4m3fn) if memory.dtype == torch.uint8 else memory
        return PagedCache(memory[..., :DIM], memory[..., DIM:], "rows")

    def inputs(layer: Any, query: torch.Tensor, cache: PagedCache, pages: torch.Tensor, chunk: Chunk) -> Inputs:
        return Inputs.of(query, cache, pages, chunk, 1.0, softcap, torch.zeros(4) if sinks else None)

    memory = torch.zeros(1, 2, PAGE, 2 * DIM, dtype=torch.bfloat16)
    kernel = choose(kernel_name, torch.bfloat16, paged_cache(None, memory, torch.bfloat16))
    impl = SimpleNamespace(
        num_heads=4,
        num_kv_heads=2,
        head_size=DIM,
        sparse_layer=SparseLayer(0, 0, (patterns * 4)[:4], kernel),
        paged_cache=paged_cache,
        dual_chunk=None,
        inputs=inputs,
        layer_for=lambda name: impl.sparse_layer if name is None else impl.asked_layers[name],
        asked_layers={},
    )
    return SimpleNamespace(impl=impl, query_quant=object() if quantised else None)


def spec(dtype: torch.dtype = torch.bfloat16) -> Any:
    return SimpleNamespace(block_size=PAGE, dtype=dtype)


@pytest.fixture
def warm_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """``warm_up`` of layers in a process that has not compiled anything; returns the chunks that it would run."""
    from minference_vllm.backend import warmup

    monkeypatch.setattr(warmup, "_ready", set())

    def run(*layers: Any, cache: torch.dtype = torch.bfloat16, **settings: Any) -> list[dict[str, Any]]:
        chunks: list[dict[str, Any]] = []

        def stand_in(inputs: Inputs, patterns: Any, kernel: Any, out: torch.Tensor, tile: Any) -> None:
            chunk = inputs.chunk
            assert len(inputs.query) == len(out) == chunk.query_len
            assert len(inputs.pages) * PAGE >= chunk.seq_len
            assert kernel is layers[0].impl.sparse_layer.kernel and tile == Settings(**settings).tile
            chunks.append({"query": inputs.query, "cache": inputs.cache, "patterns": patterns, "out": out})

        monkeypatch.setattr(warmup, "attend_chunk", stand_in)
        warmup.warm_up(layers, spec(cache), torch.bfloat16, Settings(**settings), torch.device("cpu"))
        return chunks

    return run


def test_each_variant_is_compiled_once(warm_up: Callable[..., list[dict[str, Any]]]) -> None:
    layers = [
        make_layer(Coverage()),
        make_layer(Coverage(gamma=0.5), Coverage(min_budget=5)),
        make_layer(Coverage(), Dense()),
        make_layer(AShape(), AShape(local=1)),
        make_layer(AShape()),
        make_layer(Antidiagonal(stride=8)),
        make_layer(Antidiagonal(stride=16)),
        make_layer(LowRank(), LowRank(gamma=0.5)),
        make_layer(LowRank(rank=16)),
        make_layer(PeakThreshold()),
        make_layer(PeakThreshold(remainder=True), PeakThreshold(alpha=0.5, remainder=True)),
        make_layer(LowRank(remainder=True)),
        make_layer(LowRank(queries=16)),
        make_layer(Coverage(), sinks=True),
        make_layer(Coverage(), softcap=30.0),
    ]
    # Heads of one KV head share lists and programs if they have the same pattern, and it reads no scores.
    assert len(warm_up(*layers)) == len(layers) - 1, "budgets change no kernel"
    assert warm_up(*layers) == [], "another builder of the same layers"
    (fresh,) = warm_up(make_layer(Coverage(), quantised=True), cache=torch.uint8)
    assert fresh["query"].dtype == fresh["cache"].key.dtype == torch.float8_e4m3fn
    assert fresh["out"].dtype == torch.bfloat16


def test_a_floor_may_raise_heads_to_other_patterns(warm_up: Callable[..., list[dict[str, Any]]]) -> None:
    plain, raised, dense = warm_up(make_layer(AShape()), recall_floor=0.9)
    assert plain["patterns"] == [AShape()] * 4
    assert raised["patterns"] == [LowRank()] * 4
    assert dense["patterns"] == [Dense()] * 4


@pytest.fixture
def take_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Chunk, Any, bool]]]:
    """``take_memory`` of a layer in a process that has not run it; returns the chunks that it would run, their
    patterns, and whether they are audited."""
    from minference_vllm.backend import warmup

    monkeypatch.setattr(warmup, "_profiled", {})
    monkeypatch.setattr(warmup, "MEMORY_LIMIT", 1)

    def run(layer: Any, tokens: int, max_len: int = 32768, **settings: Any) -> list[tuple[Chunk, Any, bool]]:
        chunks: list[tuple[Chunk, Any, bool]] = []

        def stand_in(inputs: Inputs, patterns: Any, kernel: Any, out: torch.Tensor, tile: Any, check: Any) -> None:
            assert len(inputs.query) == len(out) == inputs.chunk.query_len
            assert len(inputs.cache.key) == 1 and not inputs.pages.any()
            assert len(inputs.pages) == -(-inputs.chunk.seq_len // PAGE)
            chunks.append((inputs.chunk, patterns, check is not None and check.floor is None))

        monkeypatch.setattr(warmup, "attend_chunk", stand_in)
        prepared = []
        layer.get_kv_cache_spec = lambda config: spec()
        layer.impl.prepare = lambda *arguments: prepared.append(arguments)
        layer.impl.runtime = SimpleNamespace(settings=Settings(**settings))
        model = SimpleNamespace(dtype=torch.bfloat16, max_model_len=max_len)
        warmup.take_memory(layer, SimpleNamespace(model_config=model), tokens, torch.device("cpu"))
        assert prepared == [(layer, spec(), torch.bfloat16, torch.device("cpu"))]
        return chunks

    return run


def test_the_largest_chunk_is_served_once_where_vllm_measures_memory(
    take_memory: Callable[..., list[tuple[Chunk, Any, bool]]],
) -> None:
    layer, same, other = make_layer(AShape()), make_layer(AShape()), make_layer(AShape(local=64))
    largest = Chunk(0, 0, 32768 - 2048, 32768)
    assert take_memory(layer, 2048) == [(largest, [AShape()] * 4, True)]
    assert take_memory(layer, 2048) == take_memory(same, 1024) == [], "the same memory"
    assert take_memory(same, 4096) == [(Chunk(0, 0, 32768 - 4096, 32768), [AShape()] * 4, True)]
    assert take_memory(other, 2048, audit_rows=0) == [(largest, [AShape(local=64)] * 4, False)]


def test_memory_of_a_floor_and_of_prompts_that_fit_into_one_batch(
    take_memory: Callable[..., list[tuple[Chunk, Any, bool]]],
) -> None:
    whole = Chunk(0, 0, 0, 10000)
    found = take_memory(make_layer(AShape()), 16384, max_len=10000, recall_floor=0.9)
    assert found == [(whole, [AShape().at_step(step)] * 4, True) for step in range(MAX_STEP + 1)]


@pytest.mark.parametrize(
    ("tokens", "max_len", "patterns"),
    [(2048, 8191, AShape()), (255, 32768, AShape()), (2048, 32768, None)],
    ids=["short prompts", "short chunks", "dense layers"],
)
def test_nothing_is_taken_where_no_chunk_is_sparse(
    tokens: int, max_len: int, patterns: HeadPattern | None, take_memory: Callable[..., list[tuple[Chunk, Any, bool]]]
) -> None:
    layer = make_layer(patterns or AShape())
    if patterns is None:
        layer.impl.sparse_layer = None
    assert take_memory(layer, tokens, max_len) == []


def test_a_line_says_how_long_it_took(
    warm_up: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minference_vllm.backend import warmup

    lines: list[str] = []
    monkeypatch.setattr(warmup.logger, "info", lambda message, *values: lines.append(message % values))
    for _ in range(2):
        warm_up(make_layer(Coverage()), make_layer(BlockSparse()))
    (line,) = lines
    assert line.startswith("minference: kernels for 2 kinds of layers ready after ") and line.endswith(" s")


def test_a_kernel_that_does_not_run_stops_the_start_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from minference_vllm.backend import warmup

    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("Triton kernel such_and_such cannot run")

    monkeypatch.setattr(warmup, "_ready", set())
    monkeypatch.setattr(warmup, "attend_chunk", broken)
    layer = make_layer(Coverage(), BlockSparse(), sinks=True)
    named = (
        "bfloat16 over bfloat16, 4 heads over 2 of size 64, pages of 32, sinks, block_sparse, coverage .*: "
        "Triton kernel such_and_such"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=named):
            warmup.warm_up([layer], spec(), torch.bfloat16, Settings(), torch.device("cpu"))


class BrokenKernel:
    __name__ = "some_kernel"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*arguments: Any, **constants: Any) -> None:
            raise ValueError("out of resource: shared memory")

        return start


def test_a_launch_that_fails_names_the_kernel_and_its_shapes() -> None:
    with pytest.raises(RuntimeError) as error:
        launcher(BrokenKernel(), (4, 2))(torch.zeros(3, 5, dtype=torch.float16), 7, HEAD_SIZE=64, PAGE=16, num_warps=8)
    for part in ("some_kernel", "(4, 2)", "HEAD_SIZE=64, PAGE=16, num_warps=8", "float16[3, 5]", "out of resource"):
        assert part in str(error.value)


def test_serving_meets_no_variant_that_was_not_compiled(interpreted: dict[str, Any]) -> None:
    assert {name for name, *_ in interpreted["compiled"]} == {
        "left_out_kernel",
        "physical_lists_kernel",
        "remainder_kernel",
        "sparse_attention_kernel",
        "row_lse_kernel",
        "column_diagonal_kernel",
        "block_mean_kernel",
        "square_lse_kernel",
        "square_mass_kernel",
        "approx_lse_kernel",
        "tile_bins_kernel",
        "representative_bins_kernel",
        "unlike_rows_kernel",
        "moments_kernel",
        "fit_kernel",
        "query_codes_kernel",
        "representatives_kernel",
        "key_codes_kernel",
        "value_norms_kernel",
        "share_levels_kernel",
        "threshold_kernel",
        "key_lists_kernel",
    }
    assert interpreted["served"]
    for variant in interpreted["served"]:
        assert variant in interpreted["compiled"], variant


def interpret() -> None:
    from launch_variants import Variants

    from minference_vllm.backend import warmup
    from minference_vllm.prefill.attend import attend_chunk

    layers = [
        make_layer(VerticalSlash(vertical=40, slash=64), BlockSparse(top_k=2), Coverage(gamma=0.5), Antidiagonal()),
        make_layer(AShape(sink=40, local=40), LowRank(gamma=0.5), LowRank(gamma=0.5, queries=16)),
        make_layer(LowRank(noise=0.2), LowRank(noise=0.2, queries=16), AShape(sink=40, local=40)),
        make_layer(AShape(sink=40, local=40)),
        make_layer(PeakThreshold(sink=0, window=0, remainder=True)),
    ]
    settings = Settings(kernel="triton", tile=64)

    with Variants(run_attention=False) as compiled:
        warmup.warm_up(layers, spec(), torch.bfloat16, settings, torch.device("cpu"))
    with Variants(run_attention=False) as served:
        for context, length, heads_first in ((0, 70, True), (77, 210, False)):
            for layer in layers:
                memory = torch.randn(9, 2, PAGE, 2 * DIM).bfloat16()
                if not heads_first:
                    memory = memory.transpose(1, 2).contiguous().transpose(1, 2)
                # A view of a joint projection, as in vLLM, with the rows of a later request.
                query = torch.randn(5 + length - context, 8, DIM).bfloat16()[5:, :4]
                cache = layer.impl.paged_cache(layer, memory, torch.bfloat16)
                out = torch.empty(query.shape, dtype=query.dtype)
                chunk = Chunk(0, 0, context, length)
                inputs = Inputs.of(query, cache, torch.randperm(9), chunk, 0.1)
                attend_chunk(inputs, layer.impl.sparse_layer.patterns, layer.impl.sparse_layer.kernel, out, 64)
    print(json.dumps({"compiled": compiled.found, "served": served.found}))


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401

    interpret()
