"""The backend on vLLM's CPU engine: vLLM's own classes, with the sparse chunks of a batch taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from minference_vllm.attend import choose_engine, no_lse_reason
from minference_vllm.backend.compat import NAME
from minference_vllm.backend.runtime import check_page_size, refuse_mean_correction, unsupported_layer_reasons
from minference_vllm.backend.splitting import SplittingBuilder, SplittingImpl, SplittingMetadata
from minference_vllm.engines import cpu_kernel, native
from minference_vllm.mean_correction import heads_with
from minference_vllm.paged_cache import PagedCache


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
class MInferenceCPUMetadata(SplittingMetadata, CPUAttentionMetadata):
    """Of a batch with at least one sparse chunk; other batches carry the parent's class."""


class MInferenceCPUMetadataBuilder(SplittingBuilder, CPUAttentionMetadataBuilder):
    metadata_cls = MInferenceCPUMetadata


class MInferenceCPUImpl(SplittingImpl, CPUAttentionBackendImpl):
    keeps_page_means = True

    def dense_reasons(self, vllm_config: Any) -> list[str]:
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
        engine = self.runtime.settings.engine
        if engine == "triton":
            raise ValueError("minference: engine 'triton' needs an NVIDIA GPU; set engine to 'auto'")
        if not reasons:
            reason = native.unsupported_reason(dtype, block_size, self.head_size)
            if reason and engine == "native":
                raise ValueError(f"minference: engine 'native' cannot run here: {reason}; set engine to 'auto'")
            if reason or engine == "block_table":
                refuse_mean_correction(self.runtime, no_lse_reason(reason))
        return reasons

    def kernels(self, dtype: torch.dtype, block_size: int) -> str:
        assert self.patterns is not None
        wanted, corrected = self.runtime.settings.engine, bool(heads_with(self.patterns))
        pages = torch.empty(1, self.num_kv_heads, block_size, 2 * self.head_size, dtype=dtype)
        cache = self.paged_cache(None, pages, dtype)
        if choose_engine(wanted, dtype, cache, with_lse=corrected) == "native":
            return f"our {native.instructions(dtype)} kernels (engine 'native')"
        if wanted != "auto":
            return "vLLM's CPU kernel (engine 'block_table')"
        reason = native.unsupported_cache_reason(dtype, cache) or "the faster one with AMX"
        return f"vLLM's CPU kernel (engine 'block_table': {reason})"

    def paged_cache(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> PagedCache:
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        key, value = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
        layout = cpu_kernel.layout_for(dtype, block_size, self.head_size)
        assert layout is not None
        return PagedCache(key, value, layout)
