"""Code shared by our backends on NVIDIA GPUs.

Each class precedes vLLM's own in the order of base classes, as in ``sparse_prefill`` and ``metadata_builder``.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionType

from minference_vllm.backend import compat
from minference_vllm.backend.dual_chunk_limits import dual_chunk_of
from minference_vllm.backend.kernel_choice import choose_kernels
from minference_vllm.backend.limits import gpu_head_size_reasons, unsupported_layer_reasons
from minference_vllm.backend.metadata_builder import SparsePrefillBuilder
from minference_vllm.backend.request_patterns import Asked
from minference_vllm.backend.sparse_prefill import SparsePrefillImpl
from minference_vllm.backend.warmup import take_memory, warm_up
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.choose import VLLMS

PREFERRED_BLOCK_SIZE = 128
"""Tokens per page unless the user sets them: FlashAttention-3 can then copy whole pages at once, and budgets, which are
rounded up to whole pages, cost the same as on the CPU."""
FP8 = ("fp8", "fp8_e4m3")


class GPUBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return compat.NAME

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(super().get_preferred_block_size(default_block_size), PREFERRED_BLOCK_SIZE)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """No: a chunk's selection depends on where the scheduler splits the prompt."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: a batch is split into runs by the lengths that the host knows (queried since vLLM 0.30)."""
        return False


class GPUBuilder(SparsePrefillBuilder):
    def prepare_layers(self) -> None:
        super().prepare_layers()
        # Builders are made after the weights are loaded and before CUDA graphs are captured.
        if self.device.type == "cuda":
            choose_kernels(self.sparse_layers, self.kv_cache_spec, self.vllm_config, self.device)
            dtype = self.vllm_config.model_config.dtype
            warm_up(self.sparse_layers, self.kv_cache_spec, dtype, self.runtime.settings, self.device)

    def prepare_asked(self, asked: Asked) -> bool:
        found = super().prepare_asked(asked)
        # Compiled now, since the patterns that requests ask for are not known when the server starts.
        if self.device.type == "cuda":
            layers = [layer for layer in self.layers if layer.impl.layer_for(asked.name) is not None]
            dtype = self.vllm_config.model_config.dtype
            warm_up(layers, self.kv_cache_spec, dtype, self.runtime.settings, self.device, asked.name)
        return found

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full CUDA graphs for uniform decode batches only, since Python decides what is sparse in mixed batches. None
        with dual chunk attention, where Python also decides which part a decode's row is in."""
        if dual_chunk_of(vllm_config.model_config) is not None:
            return AttentionCGSupport.NEVER
        parent = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(parent, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)


class GPUImpl(SparsePrefillImpl):
    def dense_reasons(self, vllm_config: Any) -> list[str]:
        dtype, kernel = vllm_config.model_config.dtype, self.runtime.settings.kernel
        if kernel == "native":
            raise ValueError("minference: kernel 'native' runs on CPUs; set kernel to 'auto' or 'triton'")
        # Our own kernel supports soft caps, sinks and FP8 caches; vLLM's and the parts of dual chunks do not.
        fused = kernel not in VLLMS and self.dual_chunk is None
        window = self.sliding_window[0] if self.sliding_window is not None else None
        reasons = unsupported_layer_reasons(
            sliding_window=window,
            logits_soft_cap=None if fused else self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=None if fused else self.sinks,
            is_decoder=self.attn_type == AttentionType.DECODER,
            kv_cache_dtype="auto" if fused and self.kv_cache_dtype in FP8 else self.kv_cache_dtype,
            dtype=dtype,
        )
        reasons += gpu_head_size_reasons(self.head_size)
        for kind in ("dcp", "pcp"):
            if getattr(self, f"{kind}_world_size", 1) > 1:
                reasons.append(f"context parallelism ({kind})")
        return reasons

    @property
    def needs_own_kernel(self) -> bool:
        return bool(self.logits_soft_cap) or self.sinks is not None or self.dual_chunk is not None

    def kernel_for(self, name: str | None) -> str:
        # Patterns of requests run on the kernel that was chosen for the layer: nothing is timed while serving.
        if name is not None and self.sparse_layer is not None:
            return self.sparse_layer.kernel.name
        return super().kernel_for(name)

    def measure(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor) -> None:
        # vLLM also calls layers without a batch later, e.g. to capture CUDA graphs; by then the cache exists.
        if query.is_cuda and not kv_cache.numel() and not self.dense_only:
            take_memory(layer, self.vllm_config, len(query), query.device)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: our kernels write unquantised output."""
        return False

    def cache_reasons(self, layer: Any, block_size: int, dtype: torch.dtype) -> list[str]:
        if self.kv_cache_dtype in FP8 and layer._k_scale.numel() > 1:
            return ["FP8 cache with a scale per head"]
        return []

    def paged_cache(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> PagedCache:
        key, value = compat.gpu_pages(kv_cache, self.head_size)
        if self.kv_cache_dtype not in FP8:
            return PagedCache(key, value, "rows")
        key, value = key.view(torch.float8_e4m3fn), value.view(torch.float8_e4m3fn)
        return PagedCache(key, value, "rows", layer._k_scale_float, layer._v_scale_float)

    def inputs(
        self, layer: Any, query: torch.Tensor, cache: PagedCache, block_table: torch.Tensor, chunk: Chunk
    ) -> Inputs:
        # With an FP8 cache vLLM's attention layer may also pass the queries in FP8.
        quantised = query.dtype == torch.float8_e4m3fn
        scale = self.scale * layer._q_scale_float if quantised else self.scale
        softcap = float(self.logits_soft_cap or 0.0)
        return Inputs.of(query, cache, block_table, chunk, scale, softcap, self.sinks, self.page_means)
