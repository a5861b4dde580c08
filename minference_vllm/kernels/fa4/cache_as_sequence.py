"""``CacheAsSequence``: a paged cache as the keys and values of one long sequence.

On Hopper FlashAttention 4's block-sparse path reads no page table; it takes blocks of a sequence by their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.kernels.fa4.limits import unsupported_cache_reason


@dataclass(frozen=True)
class CacheAsSequence:
    """Page ``p`` of the cache is block ``p * page_step``. Heads may be interleaved within tokens (NHD), or be separate
    parts of a page (HND), in which case the view overlaps itself."""

    key: torch.Tensor
    """``[1, tokens, HK, D]``, a view."""
    value: torch.Tensor
    """Like ``key``."""
    page_step: int

    @classmethod
    def of(cls, cache: PagedCache) -> CacheAsSequence:
        """Raises ValueError, see ``unsupported_cache_reason``."""
        reason = unsupported_cache_reason(cache.key.dtype, cache)
        if reason:
            raise ValueError(f"kernel 'fa4' cannot run: {reason}")
        blocks, kv_heads, size, dim = cache.key.shape
        stride_page, stride_head, stride_slot, _ = cache.key.stride()
        page_step = stride_page // (size * stride_slot)
        if kv_heads == 1:
            stride_head = stride_slot  # it is arbitrary, and FlashAttention 4 copies unaligned tensors
        tokens = ((blocks - 1) * page_step + 1) * size
        shape, strides = (1, tokens, kv_heads, dim), (tokens * stride_slot, stride_slot, stride_head, 1)
        return cls(cache.key.as_strided(shape, strides), cache.value.as_strided(shape, strides), page_step)
