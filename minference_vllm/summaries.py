"""Page summaries: the mean key of every page of a layer's cache, kept from one chunk to the next.

A page's mean depends on its content alone. Kept beside the cache and keyed by physical page, it serves the next chunk,
and the next request that shares the prefix, without reading the page again.

Sizes: ``HK`` KV heads, ``N`` pages of ``B`` tokens, ``D`` head size.
"""

from __future__ import annotations

import torch

from minference_vllm.paged_cache import PagedCache, unpack_keys


class PageMeans:
    """Mean keys of one layer. Whoever writes to the cache has to call ``forget``."""

    def __init__(self) -> None:
        self._means = torch.empty(0)
        self._known = torch.empty(0, dtype=torch.bool)
        self._cache: tuple[int, torch.Size] | None = None

    def forget(self, slots: torch.Tensor, block_size: int) -> None:
        """Tokens were written at these slots (int ``[n]``, page times ``B`` plus place; negative ones are padding)."""
        if self._cache is not None:
            self._known[slots[slots >= 0].long() // block_size] = False

    def of(self, cache: PagedCache, pages: torch.Tensor, seq_len: int) -> torch.Tensor:
        """float32 ``[HK, N, D]``: mean key of every page of a sequence; of the last, over the sequence's tokens only.

        Only pages that were written since they were last asked for are read.

        Args:
            pages: int64 ``[N]``, physical page of each logical block, ``N = ceil(seq_len / B)``.
        """
        key, size = cache.key, cache.block_size
        if self._cache != (key.data_ptr(), key.shape):
            self._cache = (key.data_ptr(), key.shape)
            self._means = torch.empty(len(key), cache.num_kv_heads, cache.head_size, device=key.device)
            self._known = torch.zeros(len(key), dtype=torch.bool, device=key.device)
        whole = pages[: seq_len // size]
        missing = whole[~self._known[whole]]
        if len(missing):
            rows = unpack_keys(key.index_select(0, missing), cache.layout)
            self._means[missing] = rows.mean(2, dtype=torch.float32)
            self._known[missing] = True
        means = self._means[whole]
        if seq_len % size:
            rows = unpack_keys(key.index_select(0, pages[len(whole) :]), cache.layout)[:, :, : seq_len % size]
            means = torch.cat([means, rows.mean(2, dtype=torch.float32)])
        return means.transpose(0, 1)
