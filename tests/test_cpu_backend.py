"""vLLM's CPU backend with the sparse chunks taken out: builder and implementation, driven without an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm import reference
from minference_vllm.attend import attend_chunk
from minference_vllm.index import SparseIndex
from minference_vllm.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT

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
    indices: list[SparseIndex] = field(default_factory=list)

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
                "minference": {"patterns": str(path), "min_context": MIN_CONTEXT, "min_chunk": MIN_CHUNK}
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

    def watched_attend_chunk(self, *arguments: Any, **keywords: Any) -> SparseIndex:
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
    """Sparse requests as their index says, all others dense; in the accuracy of the type."""
    batch = layer.batch
    indices = dict(zip(sparse, layer.indices, strict=True))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_mixed_batch(dtype: torch.dtype, make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED, dtype=dtype)
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
