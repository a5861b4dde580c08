"""Layouts of keys and values in the pages of a KV cache, and how to read them back.

The layout depends on the kernel: vLLM's CPU kernels store keys transposed (``vec``) or in tiles of the AMX unit
(``amx``). Estimation and column gathering need plain ``[tokens, head_size]`` rows from every layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["rows", "transposed", "amx"]
"""``rows``: ``[B, D]`` as written. ``transposed``: a page's keys as ``[D, B]``, values as rows. ``amx``: keys in groups
of 16 tokens and pairs of dimensions, values in groups of 16 dimensions and pairs of tokens."""


def unpack_keys(pages: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[..., B, D]`` pages as stored -> ``[..., B, D]`` keys as rows."""
    *lead, size, dim = pages.shape
    if layout == "transposed":
        return pages.reshape(*lead, dim, size).transpose(-1, -2)
    if layout == "amx":
        packed = pages.reshape(*lead, size // 16, dim // 2, 16, 2)
        return packed.transpose(-3, -2).reshape(*lead, size, dim)
    return pages


def unpack_values(pages: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[..., B, D]`` pages as stored -> ``[..., B, D]`` values as rows."""
    *lead, size, dim = pages.shape
    if layout == "amx":
        packed = pages.reshape(*lead, dim // 16, size // 2, 16, 2)
        # [.., D/16, B/2, 16, 2] -> [.., B/2, 2, D/16, 16]
        return packed.transpose(-4, -3).movedim(-1, -3).reshape(*lead, size, dim)
    return pages


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer, in pages of ``block_size`` tokens."""

    key: torch.Tensor
    """``[num_blocks, num_kv_heads, block_size, head_size]``, any strides over the first two dimensions; each page is
    one contiguous piece unless the layout is ``rows``."""
    value: torch.Tensor
    """Like ``key``."""
    layout: Layout
    key_scale: float = 1.0
    """Factor that dequantises a stored key's elements; 1 except in quantised (FP8) caches."""
    value_scale: float = 1.0

    @property
    def block_size(self) -> int:
        return self.key.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def head_size(self) -> int:
        return self.key.shape[3]

    def keys_by_head(self, pages: torch.Tensor) -> torch.Tensor:
        """Keys of the given pages in order, one copy: ``[HK, D, n * B]`` viewed as ``[HK, n * B, D]``.

        Args:
            pages: int64 ``[n]``, physical pages.
        """
        stored = self.key.index_select(0, pages)
        rows = unpack_keys(stored, self.layout)
        transposed = rows.permute(1, 3, 0, 2).reshape(self.num_kv_heads, self.head_size, -1)
        return transposed.transpose(1, 2)

    def values_by_head(self, pages: torch.Tensor) -> torch.Tensor:
        """Values of the given pages in order, one copy, ``[HK, n * B, D]``."""
        return self._by_head(unpack_values(self.value.index_select(0, pages), self.layout))

    def rows_by_head(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the given pages in order, a copy of each: ``[HK, n * B, D]``, contiguous."""
        return self._by_head(unpack_keys(self.key.index_select(0, pages), self.layout)), self.values_by_head(pages)

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        # For a single page, stored transposed, reshape would return a strided view.
        return rows.transpose(0, 1).reshape(self.num_kv_heads, -1, self.head_size).contiguous()

    def gather_rows(self, pages: torch.Tensor, slots: torch.Tensor, kv_heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of single tokens, as rows.

        Args:
            pages, slots, kv_heads: int64 tensors of one shape: physical page, slot in it, KV head.

        Returns:
            keys and values, each ``[*shape, head_size]``.
        """
        keys = self.gather_keys(pages, slots, kv_heads)
        if self.layout != "amx":
            return keys, self.value[pages, kv_heads, slots]
        values = self.value.flatten(2).unflatten(2, (self.head_size // 16, self.block_size // 2, 16, 2))
        return keys, values[pages, kv_heads, :, slots // 2, :, slots % 2].flatten(-2)

    def gather_keys(self, pages: torch.Tensor, slots: torch.Tensor, kv_heads: torch.Tensor) -> torch.Tensor:
        """The keys of ``gather_rows``."""
        if self.layout == "rows":
            return self.key[pages, kv_heads, slots]
        if self.layout == "transposed":
            keys = self.key.flatten(2).unflatten(2, (self.head_size, self.block_size))
            return keys[pages, kv_heads, :, slots]
        keys = self.key.flatten(2).unflatten(2, (self.block_size // 16, self.head_size // 2, 16, 2))
        return keys[pages, kv_heads, slots // 16, :, slots % 16].flatten(-2)
