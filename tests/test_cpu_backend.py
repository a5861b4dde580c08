"""vLLM's CPU backend with the sparse chunks taken out: builder and implementation, driven without an engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm import patterns, recall, reference
from minference_vllm.attend import attend_chunk
from minference_vllm.audit import Counters
from minference_vllm.backend.runtime import Runtime
from minference_vllm.backend.serving import audit_is_due
from minference_vllm.capacity import audit_frequency
from minference_vllm.engines import native
from minference_vllm.index import SparseIndex
from minference_vllm.patterns import MAX_LEVEL, Coverage, PatternFile
from minference_vllm.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT, Chunk
from minference_vllm.recall import Audit
from minference_vllm.settings import Settings

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 64, 64
MIN_CONTEXT, MIN_CHUNK = 300, 100
KINDS: list[dict[str, Any]] = [
    {"kind": "vertical_slash", "vertical": 40, "slash": 110},
    {"kind": "block_sparse", "top_k": 2},
    {"kind": "a_shape", "sink": 16, "local": 100},
    {"kind": "tri_shape", "sink": 16, "local": 64, "last": 40},
    {"kind": "dense"},
    {"kind": "a_shape", "sink": 0, "local": 1},
    {"kind": "vertical_slash", "vertical": 100, "slash": 0},
    {"kind": "block_sparse", "top_k": 1},
]
ADAPTIVE_KINDS: list[dict[str, Any]] = [
    {"kind": "coverage", "gamma": 0.4, "min_budget": 0},
    {"kind": "antidiagonal", "stride": 16, "tau": 0.4},
    {"kind": "peak_threshold", "alpha": 0.9, "sink": 16, "window": 40},
    {"kind": "low_rank", "gamma": 0.1},
    {"kind": "antidiagonal", "stride": 64, "tau": 0.1},
    {"kind": "peak_threshold", "alpha": 0.95, "sink": 0, "window": 0},
    {"kind": "dense"},
    {"kind": "coverage", "gamma": 0.99, "min_budget": 0},
]
MIXED = [(500, 1), (0, 400), (700, 1), (20, 30), (350, 150), (0, 120), (600, 40), (128, 300)]
"""(context, new tokens): decodes, long and short prompts, chunks of others, and the last few tokens of one."""
SPARSE = (1, 4, 7)


@dataclass
class Layer:
    """One attention layer with its builder and cache, and a batch in it."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    dtype: torch.dtype = torch.bfloat16
    patterns: Sequence[dict[str, Any]] = tuple(KINDS)
    rank: int = 0
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    indices: list[SparseIndex] = field(default_factory=list)
    audits: list[Audit | None] = field(default_factory=list)
    levels_before: list[tuple[int, ...]] = field(default_factory=list)
    """That each audit began with."""

    def __post_init__(self) -> None:
        from vllm.v1.attention.backends import cpu_attn
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from minference_vllm.backend import cpu, serving, splitting

        path = self.folder / "patterns.json"
        heads = dict(enumerate(self.patterns))
        path.write_text(json.dumps({"schema_version": 1, "layers": {0: {}, 1: heads}}))
        self.heads, self.kv_heads = HEADS // self.ranks, KV_HEADS // self.ranks
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                model="some/model",
                dtype=self.dtype,
                runner_type="generate",
                hf_config=SimpleNamespace(),
                hf_text_config=SimpleNamespace(num_attention_heads=HEADS),
                get_total_num_hidden_layers=lambda: 2,
                get_num_attention_heads=lambda parallel: self.heads,
            ),
            cache_config=SimpleNamespace(block_size=PAGE, cache_dtype="auto"),
            parallel_config=SimpleNamespace(),
            compilation_config=SimpleNamespace(static_forward_context={}),
            additional_config={
                "minference": {
                    "patterns": str(path),
                    "min_context": MIN_CONTEXT,
                    "min_chunk": MIN_CHUNK,
                    **self.settings,
                }
            },
        )
        for module in (splitting, cpu_attn):
            self.monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
        self.monkeypatch.setattr(splitting, "get_tensor_model_parallel_rank", lambda: self.rank)
        self.monkeypatch.setattr(serving, "attend_chunk", self.watched_attend_chunk)
        options = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto", **self.options}
        self.impl = cpu.MInferenceCPUImpl(self.heads, DIM, self.scale, self.kv_heads, **options)
        self.parent = cpu_attn.CPUAttentionBackendImpl(self.heads, DIM, self.scale, self.kv_heads, **options)
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=self.kv_heads, head_size=DIM, dtype=self.dtype)
        self.builder = cpu.MInferenceCPUMetadataBuilder(spec, [], config, torch.device("cpu"))
        self.layer = SimpleNamespace(
            layer_name="model.layers.1.self_attn.attn", isa=self.builder.isa, _k_scale_float=1.0, _v_scale_float=1.0
        )

    @property
    def scale(self) -> float:
        return DIM**-0.5

    @property
    def counters(self) -> Counters:
        return self.impl.runtime.counters

    def watched_attend_chunk(self, *arguments: Any, **keywords: Any) -> SparseIndex:
        given = [*arguments, *keywords.values()]
        audit = next((argument for argument in given if isinstance(argument, Audit)), None)
        self.audits.append(audit)
        self.levels_before.append(audit.levels if audit else ())
        index = attend_chunk(*arguments, **keywords)
        self.indices.append(index)
        return index

    def fill(self, batch: Any) -> None:
        """Put a batch's keys and values into a cache of vLLM's own layout, with vLLM's own function."""
        blocks = batch.key_cache.shape[0]
        self.batch = batch
        self.cache = torch.zeros(blocks, self.kv_heads, PAGE, 2 * DIM, dtype=self.dtype)
        rows = batch.key_cache.nan_to_num().flatten(0, 1), batch.value_cache.nan_to_num().flatten(0, 1)
        self.impl.do_kv_cache_update(self.layer, *rows, self.cache, torch.arange(blocks * PAGE))

    def metadata(self) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        batch = self.batch
        starts = batch.query_start_loc
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=batch.seq_lens,
            num_reqs=len(batch.seq_lens),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int((starts[1:] - starts[:-1]).max()),
            max_seq_len=int(batch.seq_lens.max()),
            block_table_tensor=batch.block_table,
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        )
        return self.builder.build(0, common)

    def run(self, impl: Any, metadata: Any, padding: int = 5) -> torch.Tensor:
        """Forward, with rows behind the batch as vLLM pads it, and an output full of NaN."""
        tokens = self.batch.query.shape[0] + padding
        query = torch.full((tokens, self.heads, DIM), torch.nan, dtype=self.dtype)
        query[: tokens - padding] = self.batch.query
        key = torch.zeros(tokens, self.kv_heads, DIM, dtype=self.dtype)
        output = torch.full_like(query, torch.nan)
        assert impl.forward(self.layer, query, key, key, self.cache, metadata, output) is output
        assert torch.isnan(output[tokens - padding :]).all(), "rows behind the batch were written"
        return output[: tokens - padding]


@pytest.fixture
def make_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paged_batch: Callable[..., Any]
) -> Callable[..., Layer]:
    def make(requests: Sequence[tuple[int, int]], **arguments: Any) -> Layer:
        layer = Layer(tmp_path, monkeypatch, **arguments)
        layer.fill(
            paged_batch(
                query_lens=[new for _, new in requests],
                context_lens=[context for context, _ in requests],
                heads=layer.heads,
                kv_heads=layer.kv_heads,
                head_size=DIM,
                block_size=PAGE,
                dtype=layer.dtype,
            )
        )
        return layer

    return make


def assert_right(layer: Layer, output: torch.Tensor, sparse: Sequence[int]) -> None:
    """Sparse requests as their (latest) index says, all others dense; in the accuracy of the type."""
    batch = layer.batch
    indices = dict(zip(sparse, layer.indices[-len(sparse) :], strict=True))
    for request, context in enumerate(batch.context_lens):
        seq_len = int(batch.seq_lens[request])
        if request in indices:
            index = indices[request]
            assert (index.context_len, index.seq_len) == (context, seq_len)
            mask = index.to_mask()
        else:
            mask = reference.causal_mask(context, seq_len).expand(layer.heads, -1, -1)
        query = batch.query[batch.rows(request)]
        exact = reference.masked_attention(query, batch.keys(request), batch.values(request), mask, layer.scale)
        found = output[batch.rows(request)]
        assert torch.isfinite(found).all(), f"request {request}"
        budget = 3 * max(torch.finfo(layer.dtype).eps, 1e-6) * float(exact.abs().max())
        assert float((found.double() - exact).abs().max()) <= budget, f"request {request}"


@pytest.mark.parametrize("kinds", [KINDS, ADAPTIVE_KINDS], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_mixed_batch(dtype: torch.dtype, kinds: list[dict[str, Any]], make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED, dtype=dtype, patterns=kinds)
    metadata = layer.metadata()
    assert [chunk.request for chunk, _ in metadata.sparse] == list(SPARSE)
    output = layer.run(layer.impl, metadata)
    assert len(layer.indices) == len(SPARSE)
    assert_right(layer, output, SPARSE)
    assert all(float(index.density().mean()) < 0.95 for index in layer.indices)


def test_one_long_prompt(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer([(0, 700)])
    assert_right(layer, layer.run(layer.impl, layer.metadata()), [0])


@pytest.mark.parametrize("requests", [[(500, 1), (9, 1), (700, 1)], [(0, 50)], [(0, 299)], [(700, 99), (3, 1)]])
def test_batches_without_a_sparse_chunk_take_the_parents_path(
    requests: list[tuple[int, int]], make_layer: Callable[..., Layer]
) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    layer = make_layer(requests)
    metadata = layer.metadata()
    assert type(metadata) is CPUAttentionMetadata
    assert torch.equal(layer.run(layer.impl, metadata), layer.run(layer.parent, metadata))
    assert not layer.indices


def test_layers_whose_heads_are_all_dense_take_the_parents_path(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED, patterns=[{"kind": "dense"}] * HEADS)
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
def test_layers_that_we_do_not_serve_run_as_vllms(options: dict[str, Any], make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED, options=options)
    metadata = layer.metadata()
    assert metadata.sparse
    assert torch.equal(layer.run(layer.impl, metadata), layer.run(layer.parent, metadata))
    assert not layer.indices


def test_the_reason_is_logged(monkeypatch: pytest.MonkeyPatch, make_layer: Callable[..., Layer]) -> None:
    from minference_vllm.backend import splitting

    lines: list[str] = []
    record = lambda message, *values: lines.append(message % values)  # noqa: E731
    monkeypatch.setattr(splitting.logger, "info_once", record, raising=False)
    make_layer([(0, 10)])
    assert not [line for line in lines if "densely" in line]
    make_layer([(0, 10)], options={"sliding_window": 128, "logits_soft_cap": 20.0})
    (line,) = [line for line in lines if "densely" in line]
    assert "sliding window, soft cap" in line


def test_the_source_of_the_patterns_is_logged(
    monkeypatch: pytest.MonkeyPatch, make_layer: Callable[..., Layer]
) -> None:
    from minference_vllm.backend import splitting

    lines: list[str] = []
    record = lambda message, *values: lines.append(message % values)  # noqa: E731
    monkeypatch.setattr(splitting.logger, "info_once", record, raising=False)
    layer = make_layer([(0, 10)])
    (line,) = [line for line in lines if "patterns from" in line]
    assert str(layer.folder / "patterns.json") in line and f"min_context = {MIN_CONTEXT}" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tensor_parallel_rank_runs_its_own_heads_patterns(rank: int, make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED, rank=rank, ranks=2)
    output = layer.run(layer.impl, layer.metadata())
    assert_right(layer, output, SPARSE)
    assert layer.impl.patterns is not None
    kinds = [pattern.kind for pattern in layer.impl.patterns]
    assert kinds == [entry["kind"] for entry in KINDS[4 * rank : 4 * rank + 4]]


@pytest.mark.parametrize("stride", [3, 24, 48])
def test_a_stride_that_does_not_fit_the_pages_is_refused_at_the_start(
    stride: int, make_layer: Callable[..., Layer]
) -> None:
    """Not at the first long prompt."""
    with pytest.raises(
        ValueError, match=rf"patterns\.json.*: antidiagonal stride {stride} must divide the page size.* 64"
    ):
        make_layer([(0, 10)], patterns=[*KINDS[:7], {"kind": "antidiagonal", "stride": stride}])


def test_warm_up_without_metadata_writes_nothing(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer([(0, 400)])
    assert torch.isnan(layer.run(layer.impl, None)).all()


def test_batches_and_layers_are_counted(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED)
    metadata = layer.metadata()
    layer.run(layer.impl, metadata)
    counters = layer.impl.runtime.counters
    assert (counters.sparse_chunks, counters.sparse_tokens) == (3, 400 + 150 + 300)
    assert counters.dense_chunks == {BELOW_MIN_CHUNK: 2, BELOW_MIN_CONTEXT: 1}
    pairs = sum(float(index.to_mask().sum()) for index in layer.indices)
    assert counters.computed_pairs == pairs
    assert counters.dense_pairs == HEADS * sum(index.dense_pairs() for index in layer.indices)


def test_non_causal_batches_take_the_parents_path(make_layer: Callable[..., Layer]) -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    layer = make_layer([(0, 400)])
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


# Audit and floor


def runtime(sparse_seconds: float = 0.0, audit_seconds: float = 0.0, **settings: Any) -> Runtime:
    counters = Counters(sparse_seconds=sparse_seconds, audit_seconds=audit_seconds)
    return Runtime(Settings(**settings), PatternFile(), "a test", counters)


def is_due(runtime: Runtime, layer: int = 0, on_gpu: bool = False) -> bool:
    chunk = Chunk(request=0, query_start=0, context_len=24576, seq_len=32768)
    return audit_is_due(runtime, layer, chunk, [Coverage()] * HEADS, on_gpu)


def test_audits_keep_their_share_of_the_time() -> None:
    assert is_due(runtime()), "the first chunk, so that every short run shows some recall"
    assert is_due(runtime(sparse_seconds=100.0, audit_seconds=0.99))
    assert not is_due(runtime(sparse_seconds=100.0, audit_seconds=1.01))
    assert is_due(runtime(sparse_seconds=100.0, audit_seconds=1.01, audit_share=0.02))
    assert not is_due(runtime(sparse_seconds=100.0, audit_seconds=0.01, audit_share=0.0))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_without_rows_nothing_is_audited(on_gpu: bool) -> None:
    assert not is_due(runtime(audit_rows=0), on_gpu=on_gpu)
    assert not is_due(runtime(sparse_seconds=100.0, audit_rows=0, audit_share=1.0), on_gpu=on_gpu)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_under_a_floor_everything_is_audited(on_gpu: bool) -> None:
    assert is_due(runtime(recall_floor=0.9), on_gpu=on_gpu)
    assert is_due(runtime(sparse_seconds=1.0, audit_seconds=50.0, recall_floor=0.9, audit_share=0.0), on_gpu=on_gpu)


def test_on_a_gpu_audits_are_drawn_by_lot() -> None:
    """As often as their share of the planned work allows, in every layer, and the same again in every rank."""
    layers, chunks = 32, 300
    found = torch.zeros(chunks, layers)
    for turn in range(2):
        served = runtime()
        for chunk in range(chunks):
            served.counters.sparse_chunks += 1
            for layer in range(layers):
                due = is_due(served, layer, on_gpu=True)
                assert not turn or due == bool(found[chunk, layer])
                found[chunk, layer] = due
    expected = audit_frequency([Coverage()], 24576, 32768, 4, 0.01)
    assert float(found.mean()) == pytest.approx(expected, rel=0.2)
    assert bool(found.any(0).all())
    assert not is_due(runtime(audit_share=0.0), on_gpu=True)


def test_recall_of_audited_chunks_is_counted_per_layer_and_head(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED, settings={"audit_share": 1.0})
    layer.counters.sparse_seconds = 1e6
    layer.run(layer.impl, layer.metadata())
    assert len(layer.audits) == len(SPARSE) and all(layer.audits)
    assert set(layer.counters.recall) == {(1, head) for head in range(HEADS)}
    exact = torch.zeros(len(SPARSE), HEADS, dtype=torch.float64)
    for number, (request, audit, index) in enumerate(zip(SPARSE, layer.audits, layer.indices, strict=True)):
        assert audit is not None and audit.recall is not None and audit.levels == (0,) * HEADS
        query, keys = layer.batch.query[layer.batch.rows(request)], layer.batch.keys(request)
        recall = reference.attention_recall(query, keys, index.to_mask(), index.context_len, layer.scale)
        exact[number] = recall[:, audit.rows].mean(1)
        assert audit.recall.tolist() == pytest.approx(exact[number].tolist(), abs=0.01)
    for (_, head), found in layer.counters.recall.items():
        assert found.count == len(SPARSE)
        assert found.mean == pytest.approx(float(exact[:, head].mean()), abs=0.01)
        assert found.least == pytest.approx(float(exact[:, head].min()), abs=0.01)
    assert layer.counters.audit_seconds > 0
    assert not layer.counters.raised and not layer.counters.raised_to_dense, "there is no floor"


def test_audits_stop_when_they_have_had_their_share(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED)
    layer.counters.audit_seconds = 1e6
    layer.run(layer.impl, layer.metadata())
    assert layer.audits == [None] * len(SPARSE) and not layer.counters.recall
    assert layer.counters.sparse_seconds > 0


def test_the_audit_changes_no_answer(make_layer: Callable[..., Layer]) -> None:
    outputs = []
    for rows in (0, 64):
        layer = make_layer(MIXED, settings={"audit_rows": rows, "audit_share": 1.0})
        layer.counters.sparse_seconds = 1e6
        outputs.append(layer.run(layer.impl, layer.metadata()))
        assert [audit is not None for audit in layer.audits] == [rows > 0] * len(SPARSE)
    assert torch.equal(*outputs)


def test_a_ranks_recall_is_counted_under_its_own_heads(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer([(0, 400)], rank=1, ranks=2)
    layer.run(layer.impl, layer.metadata())
    assert set(layer.counters.recall) == {(1, head) for head in range(HEADS // 2, HEADS)}


FIRST, SECOND = (0, 420), (420, 290)
MISFITS: list[dict[str, Any]] = [
    {"kind": "a_shape", "sink": 0, "local": 1},
    {"kind": "dense"},
    {"kind": "vertical_slash", "vertical": 0, "slash": 0},
    {"kind": "block_sparse", "top_k": 1},
    {"kind": "a_shape", "sink": 0, "local": 100_000},
    {"kind": "tri_shape", "sink": 0, "local": 1, "last": 0},
    {"kind": "peak_threshold", "alpha": 0.999999, "sink": 0, "window": 0},
    {"kind": "antidiagonal", "stride": 16, "tau": 0.01},
]
"""On attention that is nearly flat, all of them misfits but the second and the fifth."""
FITTING = (1, 4)


@pytest.fixture
def two_chunks(paged_batch: Callable[..., Any]) -> Callable[[Layer], tuple[Any, Any]]:
    """Both chunks of one request, as batches over the same pages; attention is nearly flat."""

    def make(layer: Layer, seed: int = 0) -> tuple[Any, Any]:
        shape = {"heads": layer.heads, "kv_heads": layer.kv_heads, "head_size": DIM, "block_size": PAGE, "seed": seed}
        second = paged_batch(query_lens=[SECOND[1]], context_lens=[SECOND[0]], **shape)
        query = paged_batch(query_lens=[FIRST[1]], context_lens=[0], **shape).query
        first = dataclasses.replace(
            second,
            query=query / 4,
            query_start_loc=torch.tensor([0, FIRST[1]], dtype=torch.int32),
            seq_lens=torch.tensor([FIRST[1]], dtype=torch.int32),
            context_lens=[0],
        )
        return first, dataclasses.replace(second, query=second.query / 4)

    return make


@pytest.mark.parametrize("max_level", [1, MAX_LEVEL])
def test_heads_below_the_floor_are_served_right_and_stay_raised(
    max_level: int,
    make_layer: Callable[..., Layer],
    two_chunks: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minference_vllm.backend import serving

    # With one level only, no head gets the chance to be served by low_rank.
    for module in (patterns, recall, serving):
        monkeypatch.setattr(module, "MAX_LEVEL", max_level)

    lines: list[str] = []
    monkeypatch.setattr(
        serving.logger, "warning_once", lambda message, *values: lines.append(message % values), raising=False
    )
    layer = make_layer([FIRST], patterns=MISFITS, settings={"recall_floor": 0.999})
    raised = tuple(head not in FITTING for head in range(HEADS))
    for number, batch in enumerate(two_chunks(layer)):
        layer.fill(batch)
        output = layer.run(layer.impl, layer.metadata())
        index, audit = layer.indices[number], layer.audits[number]
        assert audit is not None and audit.recall is not None
        assert tuple(level > 0 for level in audit.levels) == raised
        assert float(audit.recall.min()) >= 0.999
        assert_right(layer, output, [0])
        # Flat attention has no key that may be missing: what is not dense by itself was made so.
        dense = [head for head in range(HEADS) if raised[head]]
        assert index.density()[dense].tolist() == [1.0] * len(dense)
        expected = layer.run(layer.parent, layer.metadata())
        torch.testing.assert_close(output[:, dense], expected[:, dense], rtol=0.02, atol=0.01)
    assert layer.levels_before == [(), layer.audits[0].levels]
    # Both chunks are counted under each raised head, and the log names those heads.
    counters = layer.counters
    both = counters.raised + counters.raised_to_dense
    assert both == {(1, head): 2 for head in range(HEADS) if raised[head]}
    for head in range(HEADS):
        assert any(f"layer 1, head {head}: recall below the floor of 0.999" in line for line in lines) == raised[head]
    done = "dense" if max_level == 1 else "more keys"
    assert any(f"layer 1, head 2: recall below the floor of 0.999, {done} for the rest" in line for line in lines)


def test_another_request_begins_with_its_own_patterns(
    make_layer: Callable[..., Layer], two_chunks: Callable[..., Any]
) -> None:
    layer = make_layer([FIRST], patterns=MISFITS, settings={"recall_floor": 0.98})
    layer.fill(two_chunks(layer)[0])
    layer.run(layer.impl, layer.metadata())
    assert any(layer.audits[0].levels)
    # The second chunk of one whose pages are others: shift every page by one place.
    other = two_chunks(layer)[1]
    other = dataclasses.replace(
        other,
        key_cache=other.key_cache.roll(1, 0),
        value_cache=other.value_cache.roll(1, 0),
        block_table=(other.block_table + 1) % other.key_cache.shape[0],
    )
    layer.fill(other)
    layer.run(layer.impl, layer.metadata())
    layer.fill(two_chunks(layer)[0])
    layer.run(layer.impl, layer.metadata())
    assert layer.levels_before == [(), (), ()], "and a request's first chunk begins anew"


def test_the_log_line_tells_recall_and_raised_heads(
    make_layer: Callable[..., Layer], two_chunks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minference_vllm.backend import splitting

    lines: list[str] = []
    monkeypatch.setattr(splitting.logger, "info", lambda message, *values, **options: lines.append(message % values))
    layer = make_layer([FIRST], patterns=MISFITS, settings={"recall_floor": 0.98, "log_interval": 1e-9})
    for batch in two_chunks(layer):
        layer.fill(batch)
        layer.run(layer.impl, layer.metadata())
    (line,) = [line for line in lines if "density" in line]
    assert ", recall 0.9" in line or ", recall 1.0" in line
    assert "below the floor" in line and "times dense" in line


def test_nothing_of_ours_runs_for_decodes(make_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Above all no reading of lengths, which would copy them from a GPU."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

    from minference_vllm.backend import splitting

    def never(*arguments: Any) -> Any:
        raise AssertionError("called for a batch of decodes")

    layer = make_layer([(500, 1), (9, 1), (700, 15)])
    metadata = CPUAttentionMetadata.__new__(CPUAttentionMetadata)
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", lambda *arguments: metadata)
    monkeypatch.setattr(splitting, "plan_batch", never)
    monkeypatch.setattr(Counters, "count_batch", never)
    monkeypatch.setattr(Counters, "line_when_due", never)
    assert layer.metadata() is metadata


# Mean correction

CORRECTED = {"kind": "peak_threshold", "alpha": 0.99, "sink": 0, "window": 0, "mean_correction": True}


@pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
def test_heads_with_mean_correction_are_served(make_layer: Callable[..., Layer]) -> None:
    kinds = [CORRECTED, *KINDS[1:]]
    plain = [{**CORRECTED, "mean_correction": False}, *KINDS[1:]]
    outputs = []
    for chosen in (kinds, plain):
        layer = make_layer(MIXED, patterns=chosen)
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
        ({"engine": "block_table"}, torch.bfloat16, "vLLM's CPU kernel does not give"),
        ({}, torch.float32, "engine 'native' does, but .*"),
    ],
    ids=["block_table", "auto without native kernels for the dtype"],
)
def test_mean_correction_without_its_engine_is_refused_at_the_start(
    settings: dict[str, Any], dtype: torch.dtype, message: str, make_layer: Callable[..., Layer]
) -> None:
    with pytest.raises(ValueError, match=rf"patterns\.json.*: mean_correction cannot run here: .*{message}"):
        make_layer(MIXED, patterns=[CORRECTED, *KINDS[1:]], settings=settings, dtype=dtype)


# Page summaries


def test_pooled_estimates_keep_the_pages_of_the_chunk_before(
    make_layer: Callable[..., Layer], two_chunks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minference_vllm import summaries
    from minference_vllm.backend import splitting

    read: list[int] = []
    unpack = summaries.unpack_keys
    monkeypatch.setattr(
        summaries, "unpack_keys", lambda pages, layout: read.append(len(pages)) or unpack(pages, layout)
    )
    outputs = []
    for kept in (True, False):
        layer = make_layer([FIRST], patterns=[{"kind": "block_sparse", "top_k": 1}] * HEADS)
        layer.layer.impl = layer.impl
        found = {"layer": layer.layer} if kept else {}
        monkeypatch.setattr(splitting, "get_layers_from_vllm_config", lambda *arguments, found=found: found)
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
