"""The backend on top of vLLM's CPU backend, which gets all but the sparse chunks of a batch."""

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
from minference_vllm.backend.limits import check_cpu_kernel, unsupported_layer_reasons
from minference_vllm.backend.metadata_builder import SparsePrefillBuilder, SparsePrefillMetadata
from minference_vllm.backend.sparse_prefill import SparsePrefillImpl
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.kernels.block_table import cpu_ops
from minference_vllm.kernels.choose import own_kernel_reason


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
    """For batches with a chunk that our path serves; other batches use the parent's class."""


class MInferenceCPUMetadataBuilder(SparsePrefillBuilder, CPUAttentionMetadataBuilder):
    metadata_cls = MInferenceCPUMetadata


class MInferenceCPUImpl(SparsePrefillImpl, CPUAttentionBackendImpl):
    def dense_reasons(self, vllm_config: Any) -> list[str]:
        dtype, kernel = vllm_config.model_config.dtype, self.runtime.settings.kernel
        # Our own kernel supports soft caps, sinks and windows, but not in parts of dual chunks. vLLM's kernel, the
        # fallback for what ours cannot run, is not given them.
        own = own_kernel_reason(kernel, dtype, self.head_size) is None and self.dual_chunk is None
        reasons = unsupported_layer_reasons(
            sliding_window=self.sliding_window,
            logits_soft_cap=None if own else self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=None if own else self.sinks,
            is_decoder=self.attn_type == AttentionType.DECODER,
            kv_cache_dtype=self.kv_cache_dtype,
            dtype=dtype,
            # With a shorter window a row attends fewer keys than the context at which sparse prefill begins.
            min_window=self.runtime.settings.min_context if own else None,
        )
        if not reasons:  # a layer that is dense in any case needs none of our kernels
            check_cpu_kernel(kernel, dtype, self.head_size, self.dual_chunk is not None)
        return reasons

    def cache_reasons(self, layer: Any, block_size: int, dtype: torch.dtype) -> list[str]:
        if cpu_ops.layout_for(dtype, block_size, self.head_size) is None:
            return [f"unknown page layout of vLLM's CPU kernel ({cpu_ops.isa_for(dtype, block_size, self.head_size)})"]
        reason = own_kernel_reason(self.runtime.settings.kernel, dtype, self.head_size, block_size)
        return [f"soft cap, attention sinks or sliding window ({reason})"] if reason and self.needs_own_kernel else []

    @property
    def needs_own_kernel(self) -> bool:
        return bool(self.logits_soft_cap or self.window) or self.sinks is not None

    @property
    def window(self) -> int:
        return max(0, self.sliding_window)

    def paged_cache(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> PagedCache:
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        key, value = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
        layout = cpu_ops.layout_for(dtype, block_size, self.head_size)
        assert layout is not None
        return PagedCache(key, value, layout)
