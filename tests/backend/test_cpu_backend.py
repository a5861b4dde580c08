"""The CPU backend, which takes sparse chunks out of vLLM's batches: builder and implementation, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_layer import FIRST, PAGE, SECOND, Layer, two_chunks
from layer_inputs import ADAPTIVE_KINDS, DIM, HEADS, KINDS, MIN_CONTEXT, MIXED, PEAKS, SPARSE, assert_right, record_once
from native_inputs import needs_native
from paged_inputs import make_batch

from minference_vllm.backend.counters import Counters
from minference_vllm.core.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT
from minference_vllm.kernels.block_table import cpu_ops
from minference_vllm.kernels.native import library


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


def test_layers_that_are_dense_by_their_patterns_count_beside_sparse_ones(make_cpu_layer: Callable[..., Layer]) -> None:
    """Otherwise the density would cover the other layers only. Without any sparse layer there is no density."""
    layer = make_cpu_layer(MIXED, patterns=[{"kind": "dense"}] * HEADS)
    assert layer.metadata().sparse and layer.counters.dense_pairs == 0
    layer.builder = layer.make_builder(layer.layer, layer.make_layer(0, {}))
    pairs = HEADS * sum(chunk.dense_pairs for chunk, _ in layer.metadata().sparse)
    assert layer.counters.dense_pairs == layer.counters.computed_pairs == pairs > 0


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 128},
        {"alibi_slopes": [2.0**-head for head in range(HEADS)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_layers_that_we_do_not_serve_run_as_vllms(
    options: dict[str, Any], make_cpu_layer: Callable[..., Layer]
) -> None:
    """In their own KV-cache group, whose batches the parent plans alone, and in a group with other layers."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    layer = make_cpu_layer(MIXED, options=options)
    alone = layer.metadata()
    assert type(alone) is CPUAttentionMetadata and not layer.counters.sparse_chunks
    layer.builder = layer.make_builder(layer.layer, layer.make_layer(0, {}))
    metadata = layer.metadata()
    assert metadata.sparse and layer.counters.sparse_chunks == len(SPARSE)
    for planned in (alone, metadata):
        assert torch.equal(layer.run(layer.impl, planned), layer.run(layer.parent, planned))
    assert not layer.indices


def test_the_reason_is_logged(monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]) -> None:
    lines = record_once(monkeypatch)
    make_cpu_layer([(0, 10)])
    assert not [line for line in lines if "densely" in line]
    options = {"sliding_window": 128, "logits_soft_cap": 20.0}
    make_cpu_layer([(0, 10)], options=options, settings={"kernel": "block_table"})
    (line,) = [line for line in lines if "densely" in line]
    assert "sliding window, soft cap" in line


def test_the_source_of_the_patterns_is_logged(
    monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]
) -> None:
    lines = record_once(monkeypatch)
    layer = make_cpu_layer([(0, 10)])
    (line,) = [line for line in lines if "patterns from" in line]
    assert str(layer.folder / "patterns.json") in line and f"min_context = {MIN_CONTEXT}" in line


@pytest.mark.parametrize("kernel", ["auto", "block_table", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernels_that_run_are_logged(
    dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]
) -> None:
    if kernel == "native" and library.unsupported_reason(dtype, DIM):
        pytest.skip(str(library.unsupported_reason(dtype, DIM)))
    lines = record_once(monkeypatch)
    layer = make_cpu_layer([(0, 400)], dtype=dtype, settings={"kernel": kernel})
    (line,) = [line for line in lines if "patterns from" in line]
    lines.clear()
    layer.make_builder()
    (without_layers,) = [line for line in lines if "patterns from" in line]
    assert "; no layer of this KV-cache group runs sparsely;" in without_layers
    ran: list[str] = []
    chosen = layer.impl.sparse_layer.kernel
    watched = lambda *arguments: ran.append(chosen.name) or chosen.run(*arguments)  # noqa: E731
    layer.impl.sparse_layer = replace(layer.impl.sparse_layer, kernel=replace(chosen, run=watched))
    layer.run(layer.impl, layer.metadata())
    (name,) = ran
    expected = {
        "native": f"our {library.instructions(dtype)} kernels (kernel 'native')",
        "block_table": "vLLM's CPU kernel (kernel 'block_table'",
    }
    assert expected[name] in line
    assert ("our " in line) == (name == "native")
    if kernel == "auto" and dtype != torch.bfloat16:
        assert (name == "native") == (library.unsupported_reason(dtype, DIM) is None)


@needs_native
def test_without_our_build_for_amx_the_log_says_why_and_where_our_kernels_still_run(
    monkeypatch: pytest.MonkeyPatch, make_cpu_layer: Callable[..., Layer]
) -> None:
    found = []
    monkeypatch.setattr(library, "instructions", lambda dtype=torch.bfloat16: "AVX512-BF16")
    for remainder in (False, True):
        layer = make_cpu_layer([(0, 400)], patterns=[{**PEAKS, "remainder": remainder}] * HEADS)
        assert layer.impl.sparse_layer is not None
        with monkeypatch.context() as patch:
            patch.setattr(cpu_ops, "layout_for", lambda *arguments: "amx")
            layer.make_builder(layer.layer)
        found.append(layer.impl.attends)
    assert found == [
        "vLLM's CPU kernel (kernel 'block_table': the faster one with AMX, for which ours were not built)",
        "our AVX512-BF16 kernels (kernel 'native')",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tensor_parallel_rank_runs_its_own_heads_patterns(rank: int, make_cpu_layer: Callable[..., Layer]) -> None:
    layer = make_cpu_layer(MIXED, rank=rank, ranks=2)
    output = layer.run(layer.impl, layer.metadata())
    assert_right(layer, output, SPARSE)
    assert layer.impl.sparse_layer is not None
    kinds = [pattern.kind for pattern in layer.impl.sparse_layer.patterns]
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
    """It is called without keys and values, also when the batch has dense chunks."""
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
    """In particular no lengths are read, which would copy them from a GPU."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

    from minference_vllm.backend import metadata_builder

    def never(*arguments: Any) -> Any:
        raise AssertionError("called for a batch of decodes")

    layer = make_cpu_layer([(500, 1), (9, 1), (700, 15)])
    metadata = CPUAttentionMetadata.__new__(CPUAttentionMetadata)
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", lambda *arguments: metadata)
    monkeypatch.setattr(metadata_builder, "plan_batch", never)
    monkeypatch.setattr(Counters, "count_batch", never)
    monkeypatch.setattr(Counters, "line", never)
    assert layer.metadata() is metadata


def test_the_statistics_of_a_prompt_in_one_chunk_are_logged_by_its_decodes(
    make_cpu_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minference_vllm.backend import metadata_builder, runtime

    lines: list[str] = []
    for module in (metadata_builder, runtime):
        monkeypatch.setattr(module.logger, "info", lambda message, *values, **options: lines.append(message))
    layer = make_cpu_layer([SECOND])
    lines.clear()
    layer.run(layer.impl, layer.metadata())
    assert not lines, "the chunk had not run when its batch was planned"
    layer.fill(make_batch(query_lens=[1], context_lens=[sum(SECOND)], heads=HEADS, head_size=DIM, block_size=PAGE))
    layer.metadata()
    (line,) = lines
    assert line.startswith(f"minference: 1 prefill chunks ({SECOND[1]} tokens) sparse, density 0.")
    layer.metadata()
    runtime._log_the_rest(layer.impl.runtime)
    assert lines == [line], "nothing has happened since"
    layer.counters.count_layer(1.0, 2.0)
    runtime._log_the_rest(layer.impl.runtime)
    assert len(lines) == 2, "what is left when the process ends"


def test_pooled_estimates_keep_the_pages_of_the_chunk_before(
    make_cpu_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minference_vllm.core import page_means

    reads: dict[bool, list[int]] = {True: [], False: []}
    unpack = page_means.unpack_keys
    outputs = []
    for kept in (True, False):
        count = lambda pages, layout, read=reads[kept]: read.append(len(pages)) or unpack(pages, layout)  # noqa: E731
        monkeypatch.setattr(page_means, "unpack_keys", count)
        layer = make_cpu_layer(
            [FIRST],
            patterns=[{"kind": "block_sparse", "top_k": 1}] * HEADS,
            # A KV connector does not tell which pages it writes.
            kv_connector=None if kept else object(),
        )
        first, second = two_chunks(layer)
        layer.fill(second)  # both chunks' keys; the first chunk's rows do not see later keys
        for layer.batch in (first, second):
            outputs.append(layer.run(layer.impl, layer.metadata()))
        assert (layer.impl.page_means is not None) == kept
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    read, (whole, partial) = reads[True], divmod(FIRST[1], PAGE)
    assert read[0] == whole and read[1] == bool(partial), "all pages of the first chunk"
    assert sum(read[2:]) <= -(-(SECOND[0] + SECOND[1]) // PAGE) - whole + 2, "of the second chunk's, the new ones"


def test_a_runtime_takes_other_patterns_between_batches(make_cpu_layer: Callable[..., Layer]) -> None:
    """Results equal those of a runtime that started with these patterns, and counters are reset."""
    from minference_vllm.patterns.file import load_pattern_file

    layer = make_cpu_layer([FIRST], patterns=[{"kind": "block_sparse", "top_k": 1}] * HEADS)
    runtime, pooled = layer.impl.runtime, layer.run(layer.impl, layer.metadata())
    assert layer.impl.page_means is not None and runtime.counters.sparse_chunks == 1
    runtime.use(load_pattern_file("dense"), "dense")
    assert torch.equal(layer.run(layer.impl, layer.metadata()), layer.run(layer.parent, layer.metadata()))
    assert layer.impl.page_means is None and runtime.counters.dense_pairs == 0
    runtime.use(load_pattern_file("a_shape(32, 64)"), "a_shape(32, 64)")
    fixed = layer.run(layer.impl, layer.metadata())
    assert runtime.counters.density < 1.0 and runtime.source == "a_shape(32, 64)"
    fresh = make_cpu_layer([FIRST], patterns=[{"kind": "a_shape", "sink": 32, "local": 64}] * HEADS)
    assert torch.equal(fixed, fresh.run(fresh.impl, fresh.metadata())) and not torch.equal(fixed, pooled)


def test_patterns_that_do_not_fit_the_pages_are_refused_while_an_engine_runs(
    make_cpu_layer: Callable[..., Layer],
) -> None:
    from minference_vllm.patterns.file import load_pattern_file

    layer = make_cpu_layer([FIRST])
    with pytest.raises(ValueError, match=r"antidiagonal\(3, 0.9\).*stride"):
        layer.impl.runtime.use(load_pattern_file("antidiagonal(3, 0.9)"), "antidiagonal(3, 0.9)")
