"""vLLM's FlashAttention and Triton backends with the sparse chunks taken out, driven on CPU tensors.

Their kernels cannot run here: the parent's ``forward`` is stood in for by the float64 reference. Builder, metadata,
cache views and everything of ours are the real ones.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
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
    {"kind": "dense"},
] * 2
MIXED = [(500, 1), (0, 400), (700, 1), (20, 30), (350, 150), (0, 120), (600, 40), (128, 300)]
"""(context, new tokens): decodes, long and short prompts, chunks of others, and the last few tokens of one."""
SPARSE = (1, 4, 7)
DTYPE = torch.bfloat16


def side_by_side(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, num_kv_heads, block_size, 2 * D]``, heads outside of tokens (HND)."""
    return torch.cat([key, value], -1).transpose(1, 2).contiguous()


def side_by_side_tokens_first(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same shape with tokens outside of heads (NHD)."""
    return torch.cat([key, value], -1).transpose(1, 2)


def two_caches(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[2, num_blocks, block_size, num_kv_heads, D]``."""
    return torch.stack([key, value])


def two_caches_heads_first(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same shape with heads outside of tokens (HND)."""
    return torch.stack([key, value]).transpose(2, 3).contiguous().transpose(2, 3)


def two_per_block(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, 2, block_size, num_kv_heads, D]``."""
    return torch.stack([key, value], 1)


PARENTS = {
    "FlashAttention": ("flash_attn", "cuda", "MInferenceCUDA"),
    "TritonAttention": ("triton_attn", "triton_attn", "MInferenceTriton"),
}
"""What the names of vLLM's classes begin with: vLLM's module, ours, and what the names of ours begin with."""


class Parent:
    def __init__(self, name: str) -> None:
        theirs, ours, prefix = PARENTS[name]
        self.theirs = importlib.import_module(f"vllm.v1.attention.backends.{theirs}")
        ours_module = importlib.import_module(f"minference_vllm.backend.{ours}")
        self.backend, self.impl, self.metadata, self.builder = (
            getattr(self.theirs, name + part) for part in ("Backend", "Impl", "Metadata", "MetadataBuilder")
        )
        self.our_backend, self.our_impl, self.our_builder = (
            getattr(ours_module, prefix + part) for part in ("Backend", "Impl", "MetadataBuilder")
        )


@pytest.fixture(params=PARENTS)
def parent(request: pytest.FixtureRequest) -> Parent:
    return Parent(request.param)


def only(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("parent", [name], indirect=True)


LAYOUTS = (side_by_side, side_by_side_tokens_first, two_caches, two_caches_heads_first, two_per_block)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_cache_is_viewed_as_pages(layout: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    from minference_vllm.backend.compat import gpu_pages

    key, value = (torch.randn(5, 32, 3, 16).to(dtype) for _ in range(2))
    memory = layout(key.view(torch.int8), value.view(torch.int8)) if dtype.itemsize == 1 else layout(key, value)
    views = gpu_pages(memory, 16)
    for view, rows in zip(views, (key, value), strict=True):
        assert view.shape == (5, 3, 32, 16) and view.stride(3) == 1
        assert torch.equal(view.view(dtype).float(), rows.transpose(1, 2).float())
        assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr(), "not a view"


@pytest.mark.parametrize("shape", [(5, 3, 32, 16), (5, 32, 3, 16, 2), (2, 2, 32, 3, 16), (5, 32, 48)])
def test_unknown_caches_are_refused(shape: tuple[int, ...]) -> None:
    from minference_vllm.backend.compat import gpu_pages

    with pytest.raises(ValueError, match="does not know a KV cache of shape"):
        gpu_pages(torch.empty(shape), 16)


class Layer:
    """One attention layer with its builder and cache, and a batch in it."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        parent: Parent,
        batch: Any,
        patterns: Sequence[dict[str, Any]] = tuple(KINDS),
        layout: Callable[..., torch.Tensor] = side_by_side,
        options: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        speculative: int = 0,
    ) -> None:
        from vllm.config import CUDAGraphMode
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from minference_vllm.backend import serving, splitting

        self.batch = batch
        path = folder / "patterns.json"
        path.write_text(json.dumps({"schema_version": 1, "layers": {0: {}, 1: dict(enumerate(patterns))}}))
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                model="some/model",
                dtype=DTYPE,
                runner_type="generate",
                hf_config=SimpleNamespace(model_type="llama"),
                hf_text_config=SimpleNamespace(num_attention_heads=HEADS),
                get_total_num_hidden_layers=lambda: 2,
                get_num_attention_heads=lambda parallel: HEADS,
                get_num_kv_heads=lambda parallel: KV_HEADS,
                get_head_size=lambda: DIM,
                rswa_window=None,
                is_mm_prefix_lm=False,
            ),
            cache_config=SimpleNamespace(block_size=PAGE, cache_dtype="auto"),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1, cp_kv_cache_interleave_size=1),
            kernel_config=SimpleNamespace(enable_jit_warmup=False),
            attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32, flash_attn_version=None),
            compilation_config=SimpleNamespace(
                static_forward_context={},
                cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
                cudagraph_capture_sizes=[1, 512],
                max_cudagraph_capture_size=512,
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=8192),
            speculative_config=SimpleNamespace(num_speculative_tokens=speculative) if speculative else None,
            additional_config={
                "minference": {"patterns": str(path), "min_context": MIN_CONTEXT, "min_chunk": MIN_CHUNK}
                | (settings or {})
            },
        )
        monkeypatch.setattr(splitting, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(splitting, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(serving, "attend_chunk", self.watched_attend_chunk)
        monkeypatch.setattr(parent.impl, "forward", self.dense_forward)
        arguments = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto", **(options or {})}
        self.impl = parent.our_impl(HEADS, DIM, DIM**-0.5, KV_HEADS, **arguments)
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=DIM, dtype=DTYPE)
        self.builder = parent.our_builder(spec, [], config, torch.device("cpu"))
        self.layer = SimpleNamespace(layer_name="model.layers.1.self_attn.attn", _k_scale=torch.tensor(1.0))
        self.cache = layout(batch.key_cache, batch.value_cache)
        self.indices: list[SparseIndex] = []
        self.dense_calls: list[Any] = []

    def watched_attend_chunk(self, *arguments: Any, **keywords: Any) -> SparseIndex:
        index = attend_chunk(*arguments, **keywords)
        self.indices.append(index)
        return index

    def dense_forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, *scales: Any
    ) -> torch.Tensor:
        """In place of the parent: dense causal attention of the metadata's requests."""
        self.dense_calls.append(metadata)
        starts = metadata.query_start_loc.tolist()
        assert len(query) >= metadata.num_actual_tokens == starts[-1]
        for request, seq_len in enumerate(metadata.seq_lens.tolist()):
            rows = slice(starts[request], starts[request + 1])
            context = seq_len - (rows.stop - rows.start)
            table = metadata.block_table[request]
            keys, values = (
                reference.gather_sequence(cache, table, seq_len)
                for cache in (self.batch.key_cache, self.batch.value_cache)
            )
            mask = reference.causal_mask(context, seq_len).expand(HEADS, -1, -1)
            exact = reference.masked_attention(query[rows], keys, values, mask, DIM**-0.5)
            output[rows] = exact.to(output.dtype)
        return output

    def common(self, **changes: Any) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        batch = self.batch
        starts = batch.query_start_loc
        fields: dict[str, Any] = {
            "query_start_loc": starts,
            "query_start_loc_cpu": starts,
            "seq_lens": batch.seq_lens,
            "seq_lens_cpu_upper_bound": batch.seq_lens,
            "num_reqs": len(batch.seq_lens),
            "num_actual_tokens": int(starts[-1]),
            "max_query_len": int((starts[1:] - starts[:-1]).max()),
            "max_seq_len": int(batch.seq_lens.max()),
            "block_table_tensor": batch.block_table,
            "slot_mapping": torch.zeros(int(starts[-1]), dtype=torch.int64),
        }
        return CommonAttentionMetadata(**fields | changes)

    def run(self, metadata: Any, padding: int = 5) -> torch.Tensor:
        """Forward, with rows behind the batch as vLLM pads it, and an output full of NaN."""
        tokens = self.batch.query.shape[0] + padding
        query = torch.full((tokens, HEADS, DIM), torch.nan, dtype=DTYPE)
        query[: tokens - padding] = self.batch.query
        key = torch.zeros(tokens, KV_HEADS, DIM, dtype=DTYPE)
        output = torch.full_like(query, torch.nan)
        assert self.impl.forward(self.layer, query, key, key, self.cache, metadata, output) is output
        assert torch.isnan(output[tokens - padding :]).all(), "rows behind the batch were written"
        return output[: tokens - padding]


@pytest.fixture
def make_layer(
    parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paged_batch: Callable[..., Any]
) -> Callable[..., Layer]:
    def make(requests: Sequence[tuple[int, int]], **arguments: Any) -> Layer:
        batch = paged_batch(
            query_lens=[new for _, new in requests],
            context_lens=[context for context, _ in requests],
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_size=DIM,
            block_size=PAGE,
            dtype=DTYPE,
        )
        return Layer(tmp_path, monkeypatch, parent, batch, **arguments)

    return make


def assert_right(layer: Layer, output: torch.Tensor, sparse: Sequence[int]) -> None:
    """Sparse requests as their index says, all others dense; in the accuracy of the type."""
    batch = layer.batch
    indices = dict(zip(sparse, layer.indices, strict=True))
    for request, context in enumerate(batch.context_lens):
        seq_len = int(batch.seq_lens[request])
        mask = reference.causal_mask(context, seq_len).expand(HEADS, -1, -1)
        if request in indices:
            mask = indices[request].to_mask()
        query = batch.query[batch.rows(request)]
        exact = reference.masked_attention(query, batch.keys(request), batch.values(request), mask, DIM**-0.5)
        error = (output[batch.rows(request)].double() - exact).abs().max()
        assert float(error) <= 3 * torch.finfo(DTYPE).eps * float(exact.abs().max()), f"request {request}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_batch(layout: Callable[..., torch.Tensor], make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED, layout=layout)
    metadata = layer.builder.build(0, layer.common())
    assert [chunk.request for chunk, _ in metadata.sparse] == list(SPARSE)
    assert_right(layer, layer.run(metadata), SPARSE)
    assert [call.seq_lens.tolist() for call in layer.dense_calls] == [[501], [701, 50], [120, 640]]
    assert all(float(index.density().mean()) < 0.95 for index in layer.indices)
    counters = layer.impl.runtime.counters
    assert counters.dense_chunks == {BELOW_MIN_CHUNK: 2, BELOW_MIN_CONTEXT: 1}
    assert counters.computed_pairs == sum(float(index.to_mask().sum()) for index in layer.indices)


@pytest.mark.parametrize("requests", [[(500, 1), (9, 1), (700, 1)], [(0, 50)], [(0, 299)], [(700, 99), (3, 1)]])
def test_batches_without_a_sparse_chunk_take_the_parents_path(
    requests: list[tuple[int, int]], parent: Parent, make_layer: Callable[..., Layer]
) -> None:
    layer = make_layer(requests)
    metadata = layer.builder.build(0, layer.common())
    assert type(metadata) is parent.metadata
    layer.run(metadata)
    assert layer.dense_calls == [metadata] and not layer.indices


def test_decodes_are_never_sparse_whatever_the_setting(make_layer: Callable[..., Layer]) -> None:
    """Their batches replay a CUDA graph of the parent's path."""
    layer = make_layer([(700, 21), (900, 21)], settings={"min_chunk": 1}, speculative=20)
    assert not getattr(layer.builder.build(0, layer.common()), "sparse", ())
    layer = make_layer([(700, 22), (900, 21)], settings={"min_chunk": 1}, speculative=20)
    assert [chunk.request for chunk, _ in layer.builder.build(0, layer.common()).sparse] == [0]


def test_whole_cuda_graphs_for_uniform_batches_alone(
    monkeypatch: pytest.MonkeyPatch, parent: Parent, make_layer: Callable[..., Layer]
) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    builder = make_layer([(0, 400)]).builder
    for theirs, ours in (("ALWAYS", "UNIFORM_BATCH"), ("UNIFORM_BATCH", "UNIFORM_BATCH"), ("NEVER", "NEVER")):
        monkeypatch.setattr(parent.builder, "_cudagraph_support", AttentionCGSupport[theirs])
        assert builder.get_cudagraph_support(None, None) is AttentionCGSupport[ours]


def test_kernels_are_compiled_with_the_builder_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, parent: Parent, make_layer: Callable[..., Layer]
) -> None:
    from vllm.v1.attention.backend import AttentionMetadataBuilder

    from minference_vllm.backend import gpu, splitting

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu, "warm_up", lambda *arguments: calls.append(arguments))
    layer = make_layer([(0, 400)])
    assert not calls
    attention = SimpleNamespace(layer_name=layer.layer.layer_name, impl=layer.impl, _k_scale=torch.tensor(1.0))
    dense = SimpleNamespace(impl=SimpleNamespace(dense_only=True))
    layers = {"sparse": attention, "somebody else's": dense}
    monkeypatch.setattr(splitting, "get_layers_from_vllm_config", lambda *arguments: layers)
    spec, config = layer.builder.kv_cache_spec, layer.builder.vllm_config
    # The parent's would allocate.
    monkeypatch.setattr(parent.builder, "__init__", AttentionMetadataBuilder.__init__)
    type(layer.builder)(spec, list(layers), config, torch.device("cuda"))
    assert calls == [([attention], spec, DTYPE, layer.impl.runtime.settings, torch.device("cuda"))]


@only("FlashAttention")
def test_runs_do_not_share_the_parents_schedule(
    monkeypatch: pytest.MonkeyPatch, parent: Parent, make_layer: Callable[..., Layer]
) -> None:
    """FlashAttention-3's ahead-of-time schedule lies in one buffer per builder: the batch's own must survive."""
    layer = make_layer(MIXED)
    layer.builder.aot_schedule, layer.builder.scheduler_metadata = True, torch.zeros(64, dtype=torch.int32)
    layer.builder.aot_sliding_window = (-1, -1)
    schedules = iter(range(1, 9))
    monkeypatch.setattr(
        parent.theirs,
        "get_scheduler_metadata",
        lambda **arguments: torch.full((4,), next(schedules), dtype=torch.int32),
        raising=False,
    )
    metadata = layer.builder.build(0, layer.common())
    assert metadata.scheduler_metadata.tolist() == [1] * 4
    assert all(run.scheduler_metadata is None for _, _, run in metadata.dense_runs)


@only("FlashAttention")
def test_the_block_table_of_another_group_of_layers(make_layer: Callable[..., Layer]) -> None:
    layer = make_layer(MIXED)
    metadata = layer.builder.build(0, layer.common())
    table, slots = layer.batch.block_table + 7, torch.arange(int(layer.batch.query_start_loc[-1]))
    other = layer.builder.update_block_table(metadata, table, slots)
    assert torch.equal(other.block_table, table) and torch.equal(other.slot_mapping, slots)
    for chunk, pages in other.sparse:
        assert torch.equal(pages, table[chunk.request].long())
    for (first, last), rows, run in other.dense_runs:
        assert torch.equal(run.block_table, table[first:last]) and torch.equal(run.slot_mapping, slots[rows])
    assert torch.equal(metadata.block_table, layer.batch.block_table), "the first group's stays"
    plain = make_layer([(0, 50)])
    short = plain.builder.build(0, plain.common())
    assert torch.equal(plain.builder.update_block_table(short, table, slots).block_table, table)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"causal": False}, "not causal"),
        ({"mm_req_doc_ranges": {0: [(3, 9)]}}, "both ways"),
        ({"rswa_prefix_lens": torch.zeros(1, dtype=torch.int32)}, "reference sliding window"),
        ({"seq_lens_cpu_upper_bound": None, "seq_lens": torch.zeros(1, device="meta")}, "on the GPU only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches_that_we_do_not_serve(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, make_layer: Callable[..., Layer]
) -> None:
    from minference_vllm.backend import splitting

    layer = make_layer([(0, 400)])
    lines: list[str] = []
    record = lambda message, *values: lines.append(message % values)  # noqa: E731
    monkeypatch.setattr(splitting.logger, "info_once", record, raising=False)
    assert not getattr(layer.builder.build(0, layer.common(**change)), "sparse", ())
    assert len(lines) == 1 and reason in lines[0]


@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        ({"sliding_window": 128}, {}, "sliding window"),
        ({"alibi_slopes": [2.0**-head for head in range(HEADS)]}, {}, "ALiBi"),
        ({"kv_cache_dtype": "fp8_e5m2"}, {}, "KV cache of fp8_e5m2"),
        ({"head_size": 512}, {}, "head size 512 is above 256"),
    ],
    ids=str,
)
def test_layers_that_we_do_not_serve_run_as_vllms(
    options: dict[str, Any],
    settings: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    make_layer: Callable[..., Layer],
) -> None:
    layer = make_layer(MIXED, settings=settings)
    for name, value in options.items():
        monkeypatch.setattr(layer.impl, name, (value - 1, 0) if name == "sliding_window" else value)
    reasons = layer.impl.dense_reasons(SimpleNamespace(model_config=SimpleNamespace(dtype=DTYPE)))
    assert [reason] == reasons
    layer.impl.dense_only = True
    metadata = layer.builder.build(0, layer.common())
    layer.run(metadata)
    assert layer.dense_calls == [metadata] and not layer.indices


@only("FlashAttention")
def test_the_block_table_engine_knows_no_soft_cap(
    monkeypatch: pytest.MonkeyPatch, make_layer: Callable[..., Layer]
) -> None:
    layer = make_layer([(0, 400)], settings={"engine": "block_table"})
    monkeypatch.setattr(layer.impl, "logits_soft_cap", 20.0)
    model = SimpleNamespace(model_config=SimpleNamespace(dtype=DTYPE))
    assert layer.impl.dense_reasons(model) == ["soft cap on logits"]


@pytest.mark.parametrize("options", [{"logits_soft_cap": 20.0}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_our_kernel_knows_soft_caps_and_fp8_caches(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, make_layer: Callable[..., Layer]
) -> None:
    layer = make_layer([(0, 400)])
    for name, value in options.items():
        monkeypatch.setattr(layer.impl, name, value)
    assert not layer.impl.dense_reasons(SimpleNamespace(model_config=SimpleNamespace(dtype=DTYPE)))


def test_fp8_caches_come_with_their_scales(monkeypatch: pytest.MonkeyPatch, make_layer: Callable[..., Layer]) -> None:
    layer = make_layer([(0, 400)])
    monkeypatch.setattr(layer.impl, "kv_cache_dtype", "fp8")
    scales = {"_q_scale_float": 0.5, "_k_scale_float": 0.25, "_v_scale_float": 2.0}
    attention = SimpleNamespace(layer_name="model.layers.1.self_attn.attn", _k_scale=torch.tensor(1.0), **scales)
    memory = torch.zeros(5, KV_HEADS, PAGE, 2 * DIM, dtype=torch.uint8)
    cache = layer.impl.paged_cache(attention, memory, DTYPE)
    assert cache.key.dtype == cache.value.dtype == torch.float8_e4m3fn
    assert (cache.key_scale, cache.value_scale) == (0.25, 2.0)
    query = torch.zeros(1, HEADS, DIM, dtype=DTYPE)
    assert layer.impl.attend_options(attention, query)["scale"] == layer.impl.scale
    assert layer.impl.attend_options(attention, query.to(torch.float8_e4m3fn))["scale"] == layer.impl.scale / 2
    assert not layer.impl.runs_densely(attention)
    attention._k_scale = torch.ones(KV_HEADS)
    assert layer.impl.runs_densely(attention), "one scale per head is not ours"


def test_engines_of_the_other_machine_are_refused(make_layer: Callable[..., Layer]) -> None:
    with pytest.raises(ValueError, match="engine 'native' runs on CPUs"):
        make_layer([(0, 400)], settings={"engine": "native"})


@only("TritonAttention")
def test_the_block_table_engine_needs_flash_attention(make_layer: Callable[..., Layer]) -> None:
    with pytest.raises(ValueError, match="'block_table' runs on vLLM's FlashAttention, which this GPU does not have"):
        make_layer([(0, 400)], settings={"engine": "block_table"})


def test_our_classes_stand_where_vllm_looks_for_them(parent: Parent, make_layer: Callable[..., Layer]) -> None:
    backend = parent.our_backend
    assert issubclass(backend, parent.backend) and not backend.supports_batch_invariance()
    assert backend.get_name() == "MINFERENCE"
    assert backend.get_impl_cls() is parent.our_impl
    assert backend.get_builder_cls() is parent.our_builder
    assert backend.get_preferred_block_size(16) == 128 and backend.get_preferred_block_size(256) == 256
    assert all(backend.supports_block_size(size) for size in (16, 48, 64, 128))
    assert not make_layer([(0, 400)]).impl.fused_output_quant_supported("any"), "our kernels write what they compute"


@pytest.mark.parametrize(
    ("gpu", "parent", "reason"),
    [
        ((True, (9, 0), None), "FLASH_ATTN", "FlashAttention runs here"),
        ((True, (8, 0), None), "FLASH_ATTN", "FlashAttention runs here"),
        ((True, None, None), "FLASH_ATTN", "FlashAttention runs here"),
        ((True, (7, 5), None), "TRITON_ATTN", "FlashAttention needs compute capability 8.0, this GPU has 7.5"),
        ((True, (9, 0), "No module named 'x'"), "TRITON_ATTN", "No module named 'x'"),
    ],
    ids=str,
)
def test_which_parent(gpu: tuple[Any, ...], parent: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from minference_vllm.backend import compat, cuda, triton_attn

    assert compat.choose_gpu_parent(*gpu) == (parent, reason)
    monkeypatch.setattr(compat, "this_gpu", lambda: gpu)
    classes = {"FLASH_ATTN": cuda.MInferenceCUDABackend, "TRITON_ATTN": triton_attn.MInferenceTritonBackend}
    assert resolve_obj_by_qualname(compat.CLASS_PATHS["cuda"]) is classes[parent]


@pytest.mark.parametrize(("version", "problem"), [(3, None), (None, "vLLM finds no version of FlashAttention")])
def test_vllm_says_whether_there_is_flash_attention(
    version: int | None, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.platforms
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends import fa_utils

    from minference_vllm.backend import compat

    platform = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: DeviceCapability(8, 6))
    monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda: version)
    is_cuda, capability, found = compat.this_gpu()
    assert is_cuda and capability == (8, 6)
    assert found is None if problem is None else str(found).startswith(problem)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from minference_vllm.backend import compat

    assert compat.this_gpu() == (False, None, None), "this is the CPU build"
    with pytest.raises(ValueError, match="minference runs on CPUs and NVIDIA GPUs"):
        resolve_obj_by_qualname(compat.CLASS_PATHS["cuda"])
