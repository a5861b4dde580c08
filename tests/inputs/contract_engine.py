"""A whole attention path of a CUDA release of vLLM around our backend: configuration, layers, cache, builders, batches.

Only used inside ``contract_process``. Real are vLLM's configuration, selection of the backend, attention layers, plan
of the cache, groups, builders, metadata of both model runners and forward context; see ``faked_cuda`` for the rest.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton_interpreter  # noqa: F401
from paged_inputs import PagedBatch, make_batch

from minference_vllm import reference
from minference_vllm.core.sparse_index import SparseIndex

MODEL = Path(__file__).parents[2] / "examples" / "demo" / "model"
HEADS, KV_HEADS, DIM, MODEL_LAYERS = 4, 2, 64, 3
"""The model's."""
PATTERNS: list[dict[str, Any]] = [
    {"kind": "vertical_slash", "vertical": 40, "slash": 110},
    {"kind": "block_sparse", "top_k": 2},
    {"kind": "a_shape", "sink": 16, "local": 100},
    {"kind": "coverage", "gamma": 0.4, "min_budget": 0},
]
MIXED = [(200, 1), (90, 1), (0, 40), (300, 200), (0, 160), (20, 30), (128, 150)]
"""(context, new tokens): decodes, prefills that are too short, and sparse ones, in vLLM's order."""
SPARSE = (3, 4, 6)
SETTINGS = {"min_context": 150, "min_chunk": 100, "kernel": "triton", "log_interval": 0, "audit_share": 0.0}


def register() -> None:
    """Load our plugin as vLLM does, and import what every case needs."""
    import vllm.v1.worker.gpu.attn_utils  # noqa: F401
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    from minference_vllm import plugin
    from minference_vllm.backend import sparse_prefill

    # A subprocess would find the installed vLLM.
    registry._run_in_subprocess = lambda function: function()
    plugin.register()
    sparse_prefill.get_tensor_model_parallel_rank = lambda: 0  # no process group
    # Modules that vLLM imports lazily and keeps.
    EngineArgs(model=str(MODEL), enforce_eager=True).create_engine_config()


class Engine:
    """Layers of the demo's model, all of them ours, over one cache."""

    def __init__(
        self,
        patterns: Sequence[dict[str, Any]] = tuple(PATTERNS),
        layers: int = 1,
        shared: int = 0,
        settings: dict[str, Any] | None = None,
        pages: int = 64,
        **arguments: Any,
    ) -> None:
        """
        Args:
            patterns: one per query head, of every layer.
            shared: number of last layers that read the first layer's cache and have none of their own.
            pages: pages of the cache.
            arguments: arguments of vLLM's ``EngineArgs``.
        """
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers.attention import Attention
        from vllm.platforms import current_platform
        from vllm.v1.worker.gpu import attn_utils

        from minference_vllm.backend import serving

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "patterns.json"
            by_layer = {layer: dict(enumerate(patterns)) for layer in range(MODEL_LAYERS)}
            path.write_text(json.dumps({"schema_version": 1, "layers": by_layer}))
            options = {
                "model": str(MODEL), "dtype": "bfloat16", "max_model_len": 4096, "enforce_eager": True,
                "attention_backend": "minference", "load_format": "dummy", "enable_prefix_caching": False,
                "additional_config": {"minference": {**SETTINGS, "patterns": str(path), **(settings or {})}},
            }  # fmt: skip
            self.config = config = EngineArgs(**options | arguments).create_engine_config()
            names = [f"model.layers.{number}.self_attn.attn" for number in range(layers)]
            with set_current_vllm_config(config):
                torch.set_default_dtype(torch.bfloat16)  # as while vLLM makes a model
                self.layers = [
                    Attention(
                        HEADS, DIM, DIM**-0.5, KV_HEADS, cache_config=config.cache_config, prefix=name,
                        kv_sharing_target_layer_name=names[0] if number >= layers - shared else None,
                    )
                    for number, name in enumerate(names)
                ]  # fmt: skip
                torch.set_default_dtype(torch.float32)
        for layer in self.layers:
            layer.process_weights_after_loading(torch.bfloat16)
            # The operators for torch.compile are registered for CUDA only; they call the same functions.
            layer.use_direct_call = True
            if layer.query_quant is not None:
                layer.query_quant._forward_method = layer.query_quant.forward_native
        current_platform.update_block_size_for_backend(config)
        device = torch.device("cpu")
        with set_current_vllm_config(config):
            specs = attn_utils.get_kv_cache_spec(config)
            memory = pages * sum(spec.page_size_bytes for spec in specs.values())
            room = (pages - 1) * config.cache_config.block_size
            config.model_config.max_model_len = min(config.model_config.max_model_len, room)
            self.cache_config = _planned_cache(config, specs, memory)
            self.groups, self.graphs, sizes = attn_utils.init_attn_backend(self.cache_config, config, device)
            context = config.compilation_config.static_forward_context
            if "cache_dtype" in attn_utils.init_kv_cache.__annotations__:  # before 0.29
                attn_utils.init_kv_cache(
                    [], context, self.cache_config, self.groups, device, config.cache_config.cache_dtype, sizes, config
                )
            else:
                attn_utils.init_kv_cache(context, self.cache_config, device, sizes, config)
        self.builder = self.groups[0][0].get_metadata_builder(0)
        self.page: int = self.builder.kv_cache_spec.block_size
        self.indices: list[SparseIndex] = []
        attend = serving.attend_chunk

        def watched(*inputs: Any, **options: Any) -> SparseIndex:
            self.indices.append(attend(*inputs, **options))
            return self.indices[-1]

        serving.attend_chunk = watched

    def batch(self, requests: Sequence[tuple[int, int]] = tuple(MIXED), pages_from: int = 0) -> PagedBatch:
        """Random requests, (context, new tokens) each, whose contexts lie in the cache of every layer.

        Args:
            pages_from: the first page of the cache that they may take.
        """
        batch = make_batch(
            query_lens=[new for _, new in requests],
            context_lens=[context for context, _ in requests],
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_size=DIM,
            block_size=self.page,
        )
        batch.block_table += pages_from
        for part in ("key_cache", "value_cache"):
            stored = getattr(batch, part)
            setattr(batch, part, torch.cat([torch.full_like(stored[:pages_from], torch.nan), stored]))
        assert int(batch.block_table.max()) < self.layers[0].kv_cache.shape[0], "the cache has too few pages"
        for layer in self.layers:
            layer.kv_cache.view(torch.uint8).fill_(0xFF)  # NaN, read as bf16 or as FP8
        for request in range(len(batch.context_lens)):
            self.write(batch, request)
        return batch

    def write(self, batch: PagedBatch, request: int) -> None:
        """Let the layers write a request's context into their caches."""
        end = batch.context_lens[request]
        key, value = (_rows(part(request)[:, :end]) for part in (batch.keys, batch.values))
        for layer in self.layers:
            if layer.kv_sharing_target_layer_name is None:
                layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, self._slots(batch, request, 0, end))

    def _slots(self, batch: PagedBatch, request: int, begin: int, end: int) -> torch.Tensor:
        positions = torch.arange(begin, end)
        return batch.block_table[request, positions // self.page].long() * self.page + positions % self.page

    def slot_mapping(self, batch: PagedBatch) -> torch.Tensor:
        lengths = zip(batch.context_lens, batch.seq_lens.tolist(), strict=True)
        return torch.cat([self._slots(batch, request, *ends) for request, ends in enumerate(lengths)])

    def common(self, batch: PagedBatch, **changes: Any) -> Any:
        """The batch as model runner V1 describes it to builders."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts, lengths = batch.query_start_loc, batch.seq_lens
        fields = {
            "query_start_loc": starts,
            "query_start_loc_cpu": starts.clone(),
            "seq_lens": lengths,
            "seq_lens_cpu_upper_bound": lengths.clone(),
            "_seq_lens_cpu": lengths.clone(),
            "num_reqs": len(lengths),
            "num_actual_tokens": int(starts[-1]),
            "max_query_len": int(starts.diff().max()),
            "max_seq_len": int(lengths.max()),
            "block_table_tensor": batch.block_table,
            "slot_mapping": self.slot_mapping(batch),
            "causal": True,
        }
        known = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
        return CommonAttentionMetadata(**{name: value for name, value in fields.items() if name in known} | changes)

    def metadata(self, batch: PagedBatch, common_prefix: int = 0) -> dict[str, Any]:
        """Metadata of model runner V1, by layer."""
        common = self.common(batch)
        return {
            name: built
            for group in self.groups[0]
            for built in [group.get_metadata_builder(0).build(common_prefix, common)]
            for name in group.layer_names
        }

    def metadata_v2(self, batch: PagedBatch) -> dict[str, Any]:
        """Metadata of model runner V2, by layer."""
        from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

        starts, lengths = batch.query_start_loc, batch.seq_lens
        built = build_attn_metadata(
            attn_groups=self.groups,
            num_reqs=len(lengths),
            num_tokens=int(starts[-1]),
            query_start_loc_gpu=starts,
            query_start_loc_cpu=starts.clone(),
            max_query_len=int(starts.diff().max()),
            seq_lens=lengths,
            max_seq_len=int(lengths.max()),
            block_tables=[batch.block_table],
            slot_mappings=self.slot_mapping(batch)[None],
            kv_cache_config=self.cache_config,
            seq_lens_cpu_upper_bound=lengths.clone(),
            is_prefilling=starts.diff() > 1,
        )
        assert isinstance(built, dict)
        return built

    def run(self, batch: PagedBatch, metadata: dict[str, Any] | None, padding: int = 5) -> list[torch.Tensor]:
        """``[tokens, H, D]`` of every layer: vLLM's own layers called as a model calls them, with rows behind the
        batch as vLLM pads it. The new tokens' keys and values are written by the layers.

        Args:
            metadata: None: as in a profiling run.
        """
        from vllm.forward_context import set_forward_context

        tokens = len(batch.query)
        new = [torch.cat(list(self._new_rows(batch, part))) for part in (batch.keys, batch.values)]
        query, key, value = (
            torch.nn.functional.pad(rows.flatten(1), (0, 0, 0, padding), value=torch.nan)
            for rows in (batch.query, *new)
        )
        slots = {layer.layer_name: self.slot_mapping(batch) for layer in self.layers} if metadata else {}
        outputs = []
        with set_forward_context(metadata, self.config, num_tokens=tokens + padding, slot_mapping=slots):
            for layer in self.layers:
                shares = layer.kv_sharing_target_layer_name is not None
                # Models call a layer that shares another one's cache without keys and values.
                output = layer(query, None if shares else key, None if shares else value)
                outputs.append(output[:tokens].view(tokens, HEADS, DIM))
        return outputs

    def _new_rows(self, batch: PagedBatch, part: Any) -> Any:
        for request, context in enumerate(batch.context_lens):
            yield _rows(part(request)[:, context:])

    def check(self, batch: PagedBatch, outputs: Sequence[torch.Tensor], sparse: Sequence[int], step: float) -> None:
        """Check that sparse requests match attention under their index, and all others dense attention.

        Args:
            step: relative precision of queries, keys and values.
        """
        assert len(self.indices) == len(sparse) * len(outputs), "chunks that were served sparsely"
        indices = iter(self.indices)
        for number, output in enumerate(outputs):
            by_request = {request: next(indices) for request in sparse}
            for request, context in enumerate(batch.context_lens):
                length = int(batch.seq_lens[request])
                mask = reference.causal_mask(context, length).expand(HEADS, -1, -1)
                if request in by_request:
                    index = by_request[request]
                    assert (index.tiling.context_len, index.tiling.seq_len) == (context, length)
                    mask = index.to_mask()
                rows = batch.rows(request)
                keys, values = batch.keys(request), batch.values(request)
                exact = reference.masked_attention(batch.query[rows], keys, values, mask, DIM**-0.5)
                error = float((output[rows].double() - exact).abs().max())
                allowed = 3 * step * float(exact.abs().max())
                assert error <= allowed, f"layer {number}, request {request}: error {error:.4f}, allowed {allowed:.4f}"
        self.indices.clear()


def as_fp8(batch: PagedBatch, query: float, key: float, value: float) -> PagedBatch:
    """The batch after a round trip through FP8 with these scales."""

    def rounded(stored: torch.Tensor, scale: float) -> torch.Tensor:
        return (stored.float() / scale).to(torch.float8_e4m3fn).float().mul_(scale).to(stored.dtype)

    return dataclasses.replace(
        batch,
        query=rounded(batch.query, query),
        key_cache=rounded(batch.key_cache, key),
        value_cache=rounded(batch.value_cache, value),
    )


def _planned_cache(config: Any, specs: dict[str, Any], memory: int) -> Any:
    """vLLM's plan of the cache, made as its engine core does."""
    from vllm.v1.attention.backends import utils
    from vllm.v1.worker.worker_base import WorkerBase

    planning: Any
    try:
        from vllm.v1.core import kv_cache_planning as planning
    except ImportError:  # the older name
        from vllm.v1.core import kv_cache_utils as planning
    if hasattr(utils, "resolve_kv_cache_layout"):
        worker = object.__new__(WorkerBase)
        worker.vllm_config = config
        supported = worker.get_supported_kv_cache_layouts()
        layout = utils.resolve_kv_cache_layout(config, [supported], list(specs.values()))
        utils.record_kv_cache_layout(config.cache_config, layout.name)
    groups = []
    if hasattr(planning, "get_global_kv_cache_groups"):
        groups = [planning.get_global_kv_cache_groups(config, [specs])]
    (planned,) = planning.get_kv_cache_configs(config, [specs], [memory], *groups)
    return planned


def _rows(by_head: torch.Tensor) -> torch.Tensor:
    """float64 ``[HK, n, D]`` -> bf16 ``[n, HK, D]``, exact."""
    return by_head.transpose(0, 1).bfloat16()
