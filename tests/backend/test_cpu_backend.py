"""vLLM's CPU backend with the sparse chunks taken out: builder and implementation, driven without an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_layer import FIRST, PAGE, SECOND, Layer, two_chunks
from layer_inputs import ADAPTIVE_KINDS, DIM, HEADS, KINDS, MIN_CONTEXT, MIXED, SPARSE, assert_right

from minference_vllm import attend
from minference_vllm.backend.counters import Counters
from minference_vllm.core.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT
from minference_vllm.engines import cpu_kernel, native


def builder_with(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A builder that is told of the layer, as vLLM's engine does."""
    from minference_vllm.prefill.api import sparse_prefill

    layer.layer.impl = layer.impl
    monkeypatch.setattr(sparse_prefill, "get_layers_from_vllm_config", lambda *arguments: {"layer": layer.layer})
    return type(layer.builder)(layer.builder.kv_cache_spec, [], layer.builder.vllm_config, torch.device("cpu"))


@pytest.mark.parametrize("kinds", [KINDS, ADAPTIVE_KINDS], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_mixed_batch(dtype: torch.dtype, kinds: list[dict[str, Any]], make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED, dtype=dtype, patterns=kinds)
    metadata = layer.metadata()
    assert [chunk.request for chunk, _ in metadata.sparse] == list(SPARSE)
    output = layer.run(layer.impl, metadata)
    assert len(layer.indices) == len(SPARSE)
    assert_right(layer, output, SPARSE)
    assert all(float(index.density().mean()) < 0.95 for index in layer.indices)


def test_one_long_prompt(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer([(0, 700)])
    assert_right(layer, layer.run(layer.impl, layer.metadata()), [0])


@pytest.mark.parametrize("requests", [[(500, 1), (9, 1), (700, 1)], [(0, 50)], [(0, 299)], [(700, 99), (3, 1)]])
def test_batches_without_a_sparse_chunk_take_the_parents_path(
    requests: list[tuple[int, int]], make_cpu_layer: Callable[..., Layer]
) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    layer = make_cpu_layer(requests)
    metadata = layer.metadata()
    assert type(metadata) is CPUAttentionMetadata
    assert torch.equal(layer.run(layer.impl, metadata), layer.run(layer.parent, metadata))
    assert not layer.indices


def test_layers_whose_heads_are_all_dense_take_the_parents_path(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED, patterns=[{"kind": "dense"}] * HEADS)
    metadata = layer.metadata()
    assert metadata.sparse
    assert torch.equal(layer.run(layer.impl, metadata), layer.run(layer.parent, metadata))
    assert not layer.indices


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 128},
        {"logits_soft_cap": 20.0},
        {"alibi_slopes": [2.0**-head for head in range(HEADS)]},
        {"sinks": torch.linspace(-2, 2, HEADS)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_layers_that_we_do_not_serve_run_as_vllms(
    options: dict[str, Any], make_cpu_layer: Callable[..., Layer]
) -> None:
    layer = make_cpu_layer(MIXED, options=options)
    metadata = layer.metadata()
    assert metadata.sparse
    assert torch.equal(layer.run(layer.impl, metadata), layer.run(layer.parent, metadata))
    assert not layer.indices


def test_the_reason_is_logged(monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]) -> None:
    from minference_vllm.prefill.api import sparse_prefill

    lines: list[str] = []
    record = lambda message, *values: lines.append(message % values)  # noqa: E731
    monkeypatch.setattr(sparse_prefill.logger, "info_once", record, raising=False)
    make_cpu_layer([(0, 10)])
    assert not [line for line in lines if "densely" in line]
    make_cpu_layer([(0, 10)], options={"sliding_window": 128, "logits_soft_cap": 20.0})
    (line,) = [line for line in lines if "densely" in line]
    assert "sliding window, soft cap" in line


def test_the_source_of_the_patterns_is_logged(
    monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]
) -> None:
    from minference_vllm.prefill.api import sparse_prefill

    lines: list[str] = []
    record = lambda message, *values: lines.append(message % values)  # noqa: E731
    monkeypatch.setattr(sparse_prefill.logger, "info_once", record, raising=False)
    layer = make_cpu_layer([(0, 10)])
    (line,) = [line for line in lines if "patterns from" in line]
    assert str(layer.folder / "patterns.json") in line and f"min_context = {MIN_CONTEXT}" in line


@pytest.mark.parametrize("engine", ["auto", "block_table", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernels_that_run_are_logged(
    dtype: torch.dtype, engine: str, monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]
) -> None:
    from minference_vllm.prefill.api import sparse_prefill

    if engine == "native" and native.unsupported_reason(dtype, PAGE, DIM):
        pytest.skip(str(native.unsupported_reason(dtype, PAGE, DIM)))
    lines: list[str] = []
    record = lambda message, *values: lines.append(message % values)  # noqa: E731
    monkeypatch.setattr(sparse_prefill.logger, "info_once", record, raising=False)
    layer = make_cpu_layer([(0, 400)], dtype=dtype, settings={"kernel": engine})
    (line,) = [line for line in lines if "patterns from" in line]
    assert "; no layer of this KV-cache group runs sparsely;" in line, "this builder was given no layers"
    lines.clear()
    layer.builder = builder_with(layer, monkeypatch)
    (line,) = [line for line in lines if "patterns from" in line]
    ran: list[str] = []
    runner = attend._runner
    monkeypatch.setattr(attend, "_runner", lambda engine, query: ran.append(engine) or runner(engine, query))
    layer.run(layer.impl, layer.metadata())
    (name,) = ran
    expected = {
        "native": f"our {native.instructions(dtype)} kernels (engine 'native')",
        "block_table": "vLLM's CPU kernel (engine 'block_table'",
    }
    assert expected[name] in line
    assert ("our " in line) == (name == "native")
    if dtype == torch.float16 and engine == "auto":
        assert "(engine 'block_table': torch.float16 is neither bfloat16 nor float32)" in line


@pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
def test_with_amx_the_log_says_why_and_where_our_kernels_still_run(
    monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]
) -> None:
    found = []
    for corrected in (False, True):
        layer = make_cpu_layer([(0, 400)], patterns=[{**CORRECTED, "mean_correction": corrected}] * HEADS)
        assert not layer.impl.runs_densely(layer.layer)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernel, "layout_for", lambda *arguments: "amx")
            found.append(layer.impl.kernels(torch.bfloat16, PAGE))
    assert found == [
        "vLLM's CPU kernel (engine 'block_table': the faster one with AMX)",
        f"our {native.instructions()} kernels (engine 'native')",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tensor_parallel_rank_runs_its_own_heads_patterns(rank: int, make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED, rank=rank, ranks=2)
    output = layer.run(layer.impl, layer.metadata())
    assert_right(layer, output, SPARSE)
    assert layer.impl.patterns is not None
    kinds = [pattern.kind for pattern in layer.impl.patterns]
    assert kinds == [entry["kind"] for entry in KINDS[4 * rank : 4 * rank + 4]]


@pytest.mark.parametrize("stride", [3, 24, 48])
def test_a_stride_that_does_not_fit_the_pages_is_refused_at_the_start(
    stride: int, make_cpu_layer: Callable[..., Layer]
) -> None:
    """Not at the first long prompt."""
    with pytest.raises(
        ValueError, match=rf"patterns\.json.*: antidiagonal stride {stride} must divide the page size.* 64"
    ):
        make_cpu_layer([(0, 10)], patterns=[*KINDS[:7], {"kind": "antidiagonal", "stride": stride}])


def test_a_layer_that_shares_another_ones_cache(make_cpu_layer: Callable[..., Layer]) -> None:
    """It is called without keys and values, beside chunks that are served densely, too."""
    layer = make_cpu_layer(MIXED)
    metadata = layer.metadata()
    assert metadata.sparse and metadata.dense_runs
    output = layer.run(layer.impl, metadata, shares_cache=True)
    assert_right(layer, output, SPARSE)
    assert torch.equal(output, layer.run(layer.impl, metadata))


def test_warm_up_without_metadata_writes_nothing(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer([(0, 400)])
    assert torch.isnan(layer.run(layer.impl, None)).all()


def test_batches_and_layers_are_counted(make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED)
    metadata = layer.metadata()
    layer.run(layer.impl, metadata)
    counters = layer.impl.runtime.counters
    assert (counters.sparse_chunks, counters.sparse_tokens) == (3, 400 + 150 + 300)
    assert counters.dense_chunks == {BELOW_MIN_CHUNK: 2, BELOW_MIN_CONTEXT: 1}
    pairs = sum(float(index.to_mask().sum()) for index in layer.indices)
    assert counters.computed_pairs == pairs
    assert counters.dense_pairs == HEADS * sum(index.dense_pairs() for index in layer.indices)


def test_non_causal_batches_take_the_parents_path(make_cpu_layer: Callable[..., Layer]) -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    layer = make_cpu_layer([(0, 400)])
    common = CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, 400], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, 400], dtype=torch.int32),
        seq_lens=torch.tensor([400], dtype=torch.int32),
        num_reqs=1,
        num_actual_tokens=400,
        max_query_len=400,
        max_seq_len=400,
        block_table_tensor=layer.batch.block_table,
        slot_mapping=torch.zeros(400, dtype=torch.int64),
        causal=False,
    )
    assert getattr(layer.builder.build(0, common), "sparse", None) is None


def test_our_classes_stand_where_vllm_looks_for_them() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from minference_vllm.backend import cpu

    assert issubclass(cpu.MInferenceCPUBackend, CPUAttentionBackend)
    assert cpu.MInferenceCPUBackend.get_impl_cls() is cpu.MInferenceCPUImpl
    assert cpu.MInferenceCPUBackend.get_builder_cls() is cpu.MInferenceCPUMetadataBuilder
    assert cpu.MInferenceCPUBackend.get_supported_head_sizes() == CPUAttentionBackend.get_supported_head_sizes()


def test_nothing_of_ours_runs_for_decodes(
    make_cpu_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all no reading of lengths, which would copy them from a GPU."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

    from minference_vllm.prefill.api import sparse_prefill

    def never(*arguments: Any) -> Any:
        raise AssertionError("called for a batch of decodes")

    layer = make_cpu_layer([(500, 1), (9, 1), (700, 15)])
    metadata = CPUAttentionMetadata.__new__(CPUAttentionMetadata)
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", lambda *arguments: metadata)
    monkeypatch.setattr(sparse_prefill, "plan_batch", never)
    monkeypatch.setattr(Counters, "count_batch", never)
    monkeypatch.setattr(Counters, "line_when_due", never)
    assert layer.metadata() is metadata


def test_pooled_estimates_keep_the_pages_of_the_chunk_before(
    make_cpu_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minference_vllm.core import page_means as summaries
    from minference_vllm.prefill.api import sparse_prefill

    read: list[int] = []
    unpack = summaries.unpack_keys
    monkeypatch.setattr(
        summaries, "unpack_keys", lambda pages, layout: read.append(len(pages)) or unpack(pages, layout)
    )
    outputs = []
    for kept in (True, False):
        layer = make_cpu_layer([FIRST], patterns=[{"kind": "block_sparse", "top_k": 1}] * HEADS)
        layer.layer.impl = layer.impl
        found = {"layer": layer.layer} if kept else {}
        monkeypatch.setattr(sparse_prefill, "get_layers_from_vllm_config", lambda *arguments, found=found: found)
        builder = type(layer.builder)(
            layer.builder.kv_cache_spec, [], layer.builder.vllm_config, torch.device("cpu")
        )  # fmt: skip
        layer.builder = builder
        first, second = two_chunks(layer)
        layer.fill(second)  # both chunks' keys; the first one's rows see no later ones
        for layer.batch in (first, second):
            outputs.append(layer.run(layer.impl, layer.metadata()))
        assert (layer.impl.page_means is not None) == kept
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    whole, partial = divmod(FIRST[1], PAGE)
    assert read[0] == whole and read[1] == bool(partial), "all pages of the first chunk"
    assert sum(read[2:]) <= -(-(SECOND[0] + SECOND[1]) // PAGE) - whole + 2, "of the second chunk's, the new ones"


# Mean correction

CORRECTED = {"kind": "peak_threshold", "alpha": 0.99, "sink": 0, "window": 0, "mean_correction": True}


@pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
def test_heads_with_mean_correction_are_served(make_cpu_layer: Callable[..., Layer]) -> None:
    kinds = [CORRECTED, *KINDS[1:]]
    plain = [{**CORRECTED, "mean_correction": False}, *KINDS[1:]]
    outputs = []
    for chosen in (kinds, plain):
        layer = make_cpu_layer(MIXED, patterns=chosen)
        outputs.append(layer.run(layer.impl, layer.metadata()))
        assert len(layer.indices) == len(SPARSE)
    starts, served = layer.batch.query_start_loc.tolist(), torch.zeros(len(outputs[0]), dtype=torch.bool)
    for request in SPARSE:
        served[starts[request] : starts[request + 1]] = True
    differs = (outputs[0] != outputs[1]).any(-1)
    assert not differs[:, 1:].any() and not differs[~served].any() and differs[served, 0].any()


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"kernel": "block_table"}, torch.bfloat16, "vLLM's CPU kernel does not give"),
        ({}, torch.float16, "engine 'native' does, but .*"),
    ],
    ids=["block_table", "auto without native kernels for the dtype"],
)
def test_mean_correction_without_its_engine_is_refused_at_the_start(
    settings: dict[str, Any], dtype: torch.dtype, message: str, make_cpu_layer: Callable[..., Layer]
) -> None:
    with pytest.raises(ValueError, match=rf"patterns\.json.*: mean_correction cannot run here: .*{message}"):
        make_cpu_layer(MIXED, patterns=[CORRECTED, *KINDS[1:]], settings=settings, dtype=dtype)
