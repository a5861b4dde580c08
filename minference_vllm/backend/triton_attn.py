"""The backend on top of vLLM's Triton backend, for GPUs without FlashAttention in vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from minference_vllm.backend.gpu import GPUBackend, GPUBuilder, GPUImpl
from minference_vllm.backend.metadata_builder import SparsePrefillMetadata
from minference_vllm.kernels.choose import VLLMS


class MInferenceTritonBackend(GPUBackend, TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[MInferenceTritonImpl]:
        return MInferenceTritonImpl

    @staticmethod
    def get_builder_cls() -> type[MInferenceTritonMetadataBuilder]:
        return MInferenceTritonMetadataBuilder


@dataclass
class MInferenceTritonMetadata(SparsePrefillMetadata, TritonAttentionMetadata):
    """For batches with a chunk that our path serves; other batches use the parent's class."""


class MInferenceTritonMetadataBuilder(GPUBuilder, TritonAttentionMetadataBuilder):
    metadata_cls = MInferenceTritonMetadata


class MInferenceTritonImpl(GPUImpl, TritonAttentionImpl):
    @property
    def needs_own_kernel(self) -> bool:
        """Yes: ``block_table`` and ``fa4`` need FlashAttention."""
        return True

    def dense_reasons(self, vllm_config: Any) -> list[str]:
        kernel = self.runtime.settings.kernel
        if kernel in VLLMS:
            raise ValueError(
                f"minference: kernel {kernel!r} runs on vLLM's FlashAttention, which this GPU does not have; set "
                "kernel to 'auto' or 'triton'"
            )
        return super().dense_reasons(vllm_config)
