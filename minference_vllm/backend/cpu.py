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
from minference_vllm.backend.runtime import unsupported_layer_reasons
from minference_vllm.backend.sparse_prefill import SparsePrefillBuilder, SparsePrefillImpl, SparsePrefillMetadata
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.kernels.block_table import cpu_ops
from minference_vllm.kernels.native import library


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
class MInferenceCPUMetadata(SparsePrefillMetadata, CPUAttentionMetadata):
    """Of a batch with at least one sparse chunk; other batches carry the parent's class."""


class MInferenceCPUMetadataBuilder(SparsePrefillBuilder, CPUAttentionMetadataBuilder):
    metadata_cls = MInferenceCPUMetadata


class MInferenceCPUImpl(SparsePrefillImpl, CPUAttentionBackendImpl):
    def dense_reasons(self, vllm_config: Any) -> list[str]:
        dtype, kernel = vllm_config.model_config.dtype, self.runtime.settings.kernel
        reasons = unsupported_layer_reasons(
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            is_decoder=self.attn_type == AttentionType.DECODER,
            kv_cache_dtype=self.kv_cache_dtype,
            dtype=dtype,
        )
        if kernel == "triton":
            raise ValueError("minference: kernel 'triton' needs an NVIDIA GPU; set kernel to 'auto'")
        if (kernel == "native" or self.dual_chunk is not None) and not reasons:
            reason = library.unsupported_reason(dtype, self.head_size)
            if reason and self.dual_chunk is not None:
                raise ValueError(
                    f"minference: dual chunk attention needs kernel 'native', which cannot run here: {reason}"
                )
            if reason:
                raise ValueError(f"minference: kernel 'native' cannot run here: {reason}; set kernel to 'auto'")
        return reasons

    def cache_reasons(self, layer: Any, block_size: int, dtype: torch.dtype) -> list[str]:
        if cpu_ops.layout_for(dtype, block_size, self.head_size) is not None:
            return []
        return [f"unknown page layout of vLLM's CPU kernel ({cpu_ops.isa_for(dtype, block_size, self.head_size)})"]

    def paged_cache(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> PagedCache:
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        key, value = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
        layout = cpu_ops.layout_for(dtype, block_size, self.head_size)
        assert layout is not None
        return PagedCache(key, value, layout)
