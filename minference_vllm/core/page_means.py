"""Page means: the mean key and the mean value of every page of a layer's cache, kept from one chunk to the next.

A page's means depend on its content alone. Kept beside the cache and keyed by physical page, they serve the next chunk,
and the next request that shares the prefix, without reading the page again. Values are read once they are asked for.

Sizes: ``HK`` KV heads, ``N`` pages of ``B`` tokens, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minference_vllm.core.paged_cache import PagedCache, unpack_keys, unpack_values


class PageMeans:
    """Mean keys and values of one layer. Whoever writes to the cache has to call ``forget``."""

    def __init__(self) -> None:
        self._keys, self._values = _Means(), _Means()

    def forget(self, slots: torch.Tensor, block_size: int) -> None:
        """Tokens were written at these slots (int ``[n]``, page times ``B`` plus place; negative ones are padding)."""
        for means in (self._keys, self._values):
            means.forget(slots, block_size)

    def of(self, cache: PagedCache, pages: torch.Tensor, seq_len: int) -> torch.Tensor:
        """float32 ``[HK, N, D]``: mean key of every page of a sequence; of the last, over the sequence's tokens only.

        Only pages that were written since they were last asked for are read.

        Args:
            pages: int64 ``[N]``, physical page of each logical block, ``N = ceil(seq_len / B)``.
        """
        return self._keys.of(cache.key, lambda stored: unpack_keys(stored, cache.layout), pages, seq_len)

    def values_of(self, cache: PagedCache, pages: torch.Tensor, seq_len: int) -> torch.Tensor:
        """The same of the values."""
        return self._values.of(cache.value, lambda stored: unpack_values(stored, cache.layout), pages, seq_len)


class _Means:
    """Means of what one tensor of a cache, ``[num_blocks, HK, B, D]``, holds."""

    def __init__(self) -> None:
        self._means = torch.empty(0)
        self._known = torch.empty(0, dtype=torch.bool)
        self._cache: tuple[int, torch.Size] | None = None

    def forget(self, slots: torch.Tensor, block_size: int) -> None:
        if self._cache is not None:
            self._known[slots[slots >= 0].long() // block_size] = False

    def of(
        self, stored: torch.Tensor, unpack: Callable[[torch.Tensor], torch.Tensor], pages: torch.Tensor, seq_len: int
    ) -> torch.Tensor:
        count, heads, size, dim = stored.shape
        if self._cache != (stored.data_ptr(), stored.shape):
            self._cache = (stored.data_ptr(), stored.shape)
            self._means = torch.empty(count, heads, dim, device=stored.device)
            self._known = torch.zeros(count, dtype=torch.bool, device=stored.device)
        whole = pages[: seq_len // size]
        missing = whole[~self._known[whole]]
        if len(missing):
            self._means[missing] = unpack(stored.index_select(0, missing)).mean(2, dtype=torch.float32)
            self._known[missing] = True
        means = self._means[whole]
        if seq_len % size:
            rows = unpack(stored.index_select(0, pages[len(whole) :]))[:, :, : seq_len % size]
            means = torch.cat([means, rows.mean(2, dtype=torch.float32)])
        return means.transpose(0, 1)
