"""The backend on vLLM's CPU engine: vLLM's own classes, with the sparse chunks of a batch taken out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from minference_vllm.backend.compat import NAME, slice_requests
from minference_vllm.backend.runtime import check_page_size, runtime_for, unsupported_layer_reasons
from minference_vllm.backend.serving import serve_chunk
from minference_vllm.engines import cpu_kernel, native
from minference_vllm.paged_cache import PagedCache
from minference_vllm.patterns import Dense, HeadPattern
from minference_vllm.plan import PREFILL_FROM, Plan, plan_batch

# A child of vLLM's own logger, so that our lines appear where vLLM's do.
logger = init_logger(f"vllm.{__name__}")


class MInferenceCPUBackend(CPUAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[MInferenceCPUImpl]:
        return MInferenceCPUImpl

    @staticmethod
    def get_builder_cls() -> type[MInferenceCPUMetadataBuilder]:
        return MInferenceCPUMetadataBuilder


@dataclass
class MInferenceCPUMetadata(CPUAttentionMetadata):
    """Metadata of a batch with at least one sparse chunk; other batches carry the parent's class."""

    plan: Plan | None = None
    dense_runs: tuple[tuple[slice, CPUAttentionMetadata], ...] = ()
    """Query rows of each run of dense requests, and its metadata for the parent's kernel."""


class MInferenceCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.runtime = runtime_for(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        # A group of windowed layers, say: its batches are the parent's alone, and are not counted.
        self.dense_only = bool(layers) and all(getattr(layer.impl, "dense_only", True) for layer in layers)
        logger.info_once("minference: %s", self.runtime.summary)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if common_attn_metadata.max_query_len < PREFILL_FROM or self.dense_only:
            return metadata  # nothing but decodes, most of the time
        if common_attn_metadata.causal is not True:
            return metadata
        settings, counters = self.runtime.settings, self.runtime.counters
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        lengths = common_attn_metadata.seq_lens[: common_attn_metadata.num_reqs].tolist()
        plan = plan_batch(starts, lengths, settings.min_context, settings.min_chunk)
        counters.count_batch(plan)
        line = counters.line_when_due(settings.log_interval)
        if line:
            logger.info(line)
        if not plan.sparse:
            return metadata
        runs = tuple(
            (
                slice(starts[first], starts[last]),
                super(MInferenceCPUMetadataBuilder, self).build(
                    0, slice_requests(common_attn_metadata, first, last), fast_build
                ),
            )
            for first, last in plan.dense_runs
        )
        inherited = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
        return MInferenceCPUMetadata(**inherited, plan=plan, dense_runs=runs)


class MInferenceCPUImpl(CPUAttentionBackendImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        self.runtime = runtime_for(vllm_config)
        self.first_head = get_tensor_model_parallel_rank() * self.num_heads
        self.layer_number = -1
        self.patterns: tuple[HeadPattern, ...] | None = None
        dtype, block_size = vllm_config.model_config.dtype, vllm_config.cache_config.block_size
        check_page_size(self.runtime, block_size)
        reasons = unsupported_layer_reasons(
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            is_decoder=self.attn_type == AttentionType.DECODER,
            kv_cache_dtype=self.kv_cache_dtype,
            dtype=dtype,
        )
        if not reasons and cpu_kernel.layout_for(dtype, block_size, self.head_size) is None:
            isa = cpu_kernel.isa_for(dtype, block_size, self.head_size)
            reasons.append(f"unknown page layout of vLLM's CPU kernel ({isa})")
        self.dense_only = bool(reasons)
        if reasons:
            logger.info_once("minference: some layers run densely: %s", ", ".join(reasons))
        elif self.runtime.settings.engine == "native":
            reason = native.unsupported_reason(dtype, block_size, self.head_size)
            if reason:
                raise ValueError(f"minference: engine 'native' cannot run here: {reason}; set engine to 'auto'")

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the parent's; chunks that the plan names are computed under a sparse index."""
        plan = getattr(attn_metadata, "plan", None)
        if plan is None or self.dense_only or self._all_dense(layer):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        assert isinstance(attn_metadata, MInferenceCPUMetadata) and self.patterns is not None
        for rows, metadata in attn_metadata.dense_runs:
            super().forward(
                layer, query[rows], key[rows], value[rows], kv_cache, metadata, output[rows],
                output_scale, output_block_scale,
            )  # fmt: skip
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        key_cache, value_cache = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
        layout = cpu_kernel.layout_for(query.dtype, block_size, self.head_size)
        assert layout is not None
        cache = PagedCache(key_cache, value_cache, layout)
        out = output.view(-1, self.num_heads, self.head_size)
        for chunk in plan.sparse:
            rows = slice(chunk.query_start, chunk.query_start + chunk.query_len)
            pages = attn_metadata.block_table[chunk.request].long()
            serve_chunk(
                self.runtime, self.layer_number, self.first_head, query[rows], cache, pages, chunk, self.patterns,
                self.scale, out[rows],
            )  # fmt: skip
        return output

    def _all_dense(self, layer: Any) -> bool:
        """Whether every head of this layer has the dense pattern; finds the layer's patterns on first use."""
        if self.patterns is None:
            self.layer_number = _layer_number(layer.layer_name)
            self.patterns = self.runtime.patterns.for_layer(self.layer_number, self.num_heads, self.first_head)
        return all(isinstance(pattern, Dense) for pattern in self.patterns)


def _layer_number(layer_name: str) -> int:
    """The layer's number in its name, or -1, which no pattern file has, for a name without a clear one."""
    try:
        return int(extract_layer_index(layer_name))
    except (AssertionError, ValueError):
        logger.info_once("minference: layer %s has no clear number and runs the default pattern", layer_name)
        return -1
