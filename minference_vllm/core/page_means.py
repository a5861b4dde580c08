"""Kept for every page of a layer's cache from one chunk to the next: the mean key and the norms of the values.

All of it depends on the page's content only. It is keyed by physical page and reused by the next chunk, and by the
next request that shares the prefix, without reading the page again. Each is computed on first use.

Sizes: ``HK`` KV heads, ``N`` pages of ``B`` tokens, ``D`` head size, ``S`` tokens in the sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minference_vllm.core.paged_cache import PagedCache, unpack_keys, unpack_values


class PageMeans:
    """The kept data of one layer. Every write to the cache must be followed by ``forget``."""

    def __init__(self) -> None:
        self._keys, self._norms = _Kept(_mean), _Kept(_norms)

    def forget(self, slots: torch.Tensor, block_size: int) -> None:
        """Invalidate the pages of written slots (int ``[n]``, page times ``B`` plus offset; negative: padding)."""
        for kept in (self._keys, self._norms):
            kept.forget(slots, block_size)

    def of(self, cache: PagedCache, pages: torch.Tensor, seq_len: int) -> torch.Tensor:
        """float32 ``[HK, N, D]``: mean key of every page of a sequence, the last one's over the sequence's tokens only.

        Reads only pages that were written since they were last read.

        Args:
            pages: int64 ``[N]``, physical page of each logical block, ``N = ceil(seq_len / B)``.
        """
        return self._keys.of(cache.key, lambda stored: unpack_keys(stored, cache.layout), pages, seq_len)

    def value_norms_of(self, cache: PagedCache, pages: torch.Tensor, seq_len: int) -> torch.Tensor:
        """float32 ``[HK, S]``: Euclidean norm of every token's value."""
        found = self._norms.of(cache.value, lambda stored: unpack_values(stored, cache.layout), pages, seq_len)
        return found.flatten(1)[:, :seq_len]


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """``[n, HK, b, D]`` -> float32 ``[n, HK, D]``."""
    return rows.mean(2, dtype=torch.float32)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """``[n, HK, b, D]`` -> float32 ``[n, HK, b]``."""
    return rows.float().norm(dim=3)


class _Kept:
    """Results of ``reduce`` for the pages of one tensor of a cache, ``[num_blocks, HK, B, D]``."""

    def __init__(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._reduce = reduce
        self._kept = torch.empty(0)
        self._known = torch.empty(0, dtype=torch.bool)
        self._cache: tuple[int, torch.Size] | None = None

    def forget(self, slots: torch.Tensor, block_size: int) -> None:
        if self._cache is not None:
            self._known[slots[slots >= 0].long() // block_size] = False

    def of(
        self, stored: torch.Tensor, unpack: Callable[[torch.Tensor], torch.Tensor], pages: torch.Tensor, seq_len: int
    ) -> torch.Tensor:
        """float32 ``[HK, N, ...]``. The last page covers its tokens up to ``seq_len``; zeros follow."""
        count, heads, size, dim = stored.shape
        if self._cache != (stored.data_ptr(), stored.shape):
            self._cache = (stored.data_ptr(), stored.shape)
            width = self._reduce(torch.empty(0, heads, size, dim)).shape[2]
            self._kept = torch.empty(count, heads, width, device=stored.device)
            self._known = torch.zeros(count, dtype=torch.bool, device=stored.device)
        whole = pages[: seq_len // size]
        missing = whole[~self._known[whole]]
        if len(missing):
            self._kept[missing] = self._reduce(unpack(stored.index_select(0, missing)))
            self._known[missing] = True
        kept = self._kept[whole]
        if seq_len % size:
            rows = unpack(stored.index_select(0, pages[len(whole) :]))[:, :, : seq_len % size]
            last = self._reduce(rows)
            kept = torch.cat([kept, torch.nn.functional.pad(last, (0, kept.shape[2] - last.shape[2]))])
        return kept.transpose(0, 1)
