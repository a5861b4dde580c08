"""The backend on top of vLLM's FlashAttention backend, which gets all but the sparse chunks of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from minference_vllm.backend.gpu import GPUBackend, GPUBuilder, GPUImpl
from minference_vllm.backend.metadata_builder import SparsePrefillMetadata


class MInferenceCUDABackend(GPUBackend, FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[MInferenceCUDAImpl]:
        return MInferenceCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[MInferenceCUDAMetadataBuilder]:
        return MInferenceCUDAMetadataBuilder


@dataclass
class MInferenceCUDAMetadata(SparsePrefillMetadata, FlashAttentionMetadata):
    """For batches with a chunk that our path serves; other batches use the parent's class."""


class MInferenceCUDAMetadataBuilder(GPUBuilder, FlashAttentionMetadataBuilder):
    metadata_cls = MInferenceCUDAMetadata


class MInferenceCUDAImpl(GPUImpl, FlashAttentionImpl):
    """Everything is defined by ``GPUImpl`` or the parent."""
