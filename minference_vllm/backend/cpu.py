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

from minference_vllm.backend.compat import NAME
from minference_vllm.backend.runtime import check_page_size, refuse_mean_correction, unsupported_layer_reasons
from minference_vllm.backend.splitting import SplittingBuilder, SplittingImpl, SplittingMetadata
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.kernels.block_table import cpu_ops as cpu_kernel
from minference_vllm.kernels.native import attention as native
from minference_vllm.prefill.attend import no_lse_reason


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

    def paged_cache(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> PagedCache:
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        key, value = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
        layout = cpu_kernel.layout_for(dtype, block_size, self.head_size)
        assert layout is not None
        return PagedCache(key, value, layout)
