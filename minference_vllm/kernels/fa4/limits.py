"""Limits of the kernel ``fa4``, and the reasons why it cannot run."""

from __future__ import annotations

import functools

import torch

from minference_vllm.core.paged_cache import PagedCache

BLOCK = 128
"""Query rows per list of blocks, and keys per block."""
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 128
"""Above it FlashAttention 4 takes fewer than 128 keys per block on Hopper, and has another kernel on Blackwell."""
MAJORS = (9, 10)
"""Major compute capabilities: Hopper, and Blackwell for data centres. Others use other block sizes."""
ALIGNMENT = 16
"""In bytes. FlashAttention 4 would copy the whole cache if it were not aligned."""


def unsupported_reason(dtype: torch.dtype, cache: PagedCache) -> str | None:
    """Why FlashAttention 4 cannot serve this cache, or None when it can."""
    reason = unsupported_cache_reason(dtype, cache)
    if reason is None and not cache.key.is_cuda:
        return "it needs tensors on an NVIDIA GPU"
    return reason or unsupported_gpu_reason(torch.cuda.get_device_capability(cache.key.device)) or unavailable_reason()


def unsupported_cache_reason(dtype: torch.dtype, cache: PagedCache) -> str | None:
    """The part of ``unsupported_reason`` that depends on the cache only, on any device."""
    if dtype not in DTYPES or cache.key.dtype != dtype:
        return f"queries in {dtype} and a cache in {cache.key.dtype}; it takes both in bf16 or fp16"
    if cache.block_size != BLOCK:
        return f"pages of {cache.block_size} tokens; it takes pages of {BLOCK} (vLLM's --block-size {BLOCK})"
    if cache.head_size % 8 or cache.head_size > MAX_HEAD_SIZE:
        return f"heads of size {cache.head_size} are no multiple of 8 up to {MAX_HEAD_SIZE}"
    stride_page, stride_head, stride_slot, stride_dim = cache.key.stride()
    if cache.key.stride() != cache.value.stride() or stride_dim != 1:
        return "keys and values differ in strides, or a head's elements do not lie side by side"
    if stride_page % (BLOCK * stride_slot):
        return f"a page's stride, {stride_page}, is no multiple of {BLOCK} tokens', {BLOCK * stride_slot}"
    size = cache.key.element_size()
    strides = (stride_slot, stride_head if cache.num_kv_heads > 1 else 0)
    addresses = (cache.key.data_ptr(), cache.value.data_ptr(), *(stride * size for stride in strides))
    if any(address % ALIGNMENT for address in addresses):
        return f"keys, values or their strides are not aligned to {ALIGNMENT} bytes"
    if len(cache.key) * (stride_page // stride_slot) >= 1 << 31:
        return "tokens of the cache would not be numbered in 32 bits"
    return None


def unsupported_gpu_reason(capability: tuple[int, int]) -> str | None:
    if capability[0] in MAJORS:
        return None
    major, minor = capability
    return f"a GPU of compute capability {major}.{minor}; it takes {' and '.join(f'{major}.x' for major in MAJORS)}"


@functools.cache
def unavailable_reason() -> str | None:
    """Why this process cannot load FlashAttention 4, or None. Loading it takes seconds, so this is checked last."""
    # If a required package is missing or incompatible, the exception depends on the package.
    try:
        from minference_vllm.kernels.fa4.attention import flash_attention_4

        flash_attention_4()
    except Exception as error:
        return f"vLLM's FlashAttention 4 cannot be loaded ({type(error).__name__}: {error})"
    return None
