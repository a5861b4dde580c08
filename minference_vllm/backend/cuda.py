"""The backend over vLLM's FlashAttention backend, with the sparse chunks of a batch taken out."""

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
    """Of a batch with at least one sparse chunk; other batches carry the parent's class."""


class MInferenceCUDAMetadataBuilder(GPUBuilder, FlashAttentionMetadataBuilder):
    metadata_cls = MInferenceCUDAMetadata


class MInferenceCUDAImpl(GPUImpl, FlashAttentionImpl):
    """All of it is ours on any GPU, or the parent's."""
