"""One request with dual chunk attention: rotated as vLLM passes it, and unrotated for the definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from paged_inputs import PagedBatch, make_batch

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.prefill.dual_chunk import DualChunk, Part
from minference_vllm.reference import dual_chunk as reference_dual_chunk

BASE = 10_000.0


def frequencies(head_size: int, base: float = BASE) -> torch.Tensor:
    """float64 ``[D / 2]``."""
    return base ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)


def rotate(rows: torch.Tensor, positions: torch.Tensor, base: float = BASE) -> torch.Tensor:
    """``[n, heads, D]`` rotated to these positions (Neox style), float64."""
    angles = positions.double()[:, None, None] * frequencies(rows.shape[2], base)
    first, second = rows.double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotations(query: torch.Tensor, positions: torch.Tensor, geometry: DualChunk, base: float = BASE) -> torch.Tensor:
    """float64 ``[n, 5, H, D]``: the rotations of vLLM's ``DualChunkRotaryEmbedding``."""
    length, size = geometry.chunk_len, geometry.chunk_size
    place = positions % length
    bounded = (place + length).clamp(max=size)
    last = torch.full_like(place, min(2 * length - 1, size))
    wanted = (place, bounded, last, place + length, place + size)
    return torch.stack([rotate(query, position, base) for position in wanted], 1)


@dataclass
class DualChunkBatch:
    """One request; its pages hold rotated keys."""

    paged: PagedBatch
    geometry: DualChunk
    query: torch.Tensor
    """``[rows, H, D]``, not rotated."""
    keys: torch.Tensor
    """``[HK, S, D]``, not rotated."""
    rotated: torch.Tensor
    """``[rows, 5, H, D]``, in the type of the cache."""

    @property
    def inputs(self) -> Inputs:
        """With the first rotation as its query."""
        paged = self.paged
        paged.query = self.rotated[:, 0]
        return paged.inputs()

    @property
    def context_len(self) -> int:
        return self.paged.context_lens[0]

    @property
    def seq_len(self) -> int:
        return int(self.paged.seq_lens[0])

    def scores(self) -> torch.Tensor:
        """float64 ``[H, rows, S]``."""
        geometry = self.geometry
        return reference_dual_chunk.dual_chunk_scores(
            self.query, self.keys, self.context_len, self.paged.scale, frequencies(self.query.shape[2]),
            geometry.chunk_size, geometry.local_size, geometry.original_len,
        )  # fmt: skip

    def exact(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """float64 ``[rows, H, D]``: attention over the keys that a mask allows; None: all earlier ones."""
        mask = reference.causal_mask(self.context_len, self.seq_len) if mask is None else mask
        return reference_dual_chunk.dual_chunk_attention(self.scores(), self.paged.values(0), mask)

    def mask(self, parts: list[Part]) -> torch.Tensor:
        """bool ``[H, rows, S]``: the keys in the indices of all parts."""
        found = torch.zeros(self.query.shape[1], len(self.query), self.seq_len, dtype=torch.bool)
        for part in parts:
            rows = slice(*(position - self.context_len for position in part.rows))
            first, last = part.keys
            found[:, rows, first:last] = part.index.to_mask()[..., : last - first]
        return found


def turn(paged: PagedBatch, geometry: DualChunk) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rotate the keys in a batch's pages.

    Returns:
        the queries as vLLM hands them over, ``[tokens, 5, H, D]``; of every request the keys before, ``[HK, S, D]``.
    """
    size, rotated, keys = paged.key_cache.shape[1], [], []
    for request, context_len in enumerate(paged.context_lens):
        before = paged.keys(request)
        positions = torch.arange(before.shape[1])
        pages = paged.block_table[request, positions // size].long()
        turned = rotate(before.transpose(0, 1), positions % geometry.chunk_len)
        paged.key_cache[pages, positions % size] = turned.to(paged.key_cache.dtype)
        query = paged.query[paged.rows(request)]
        rotated.append(rotations(query, positions[context_len:], geometry).to(query.dtype))
        keys.append(before)
    return torch.cat(rotated), keys


def make_dual_chunk_batch(
    geometry: DualChunk,
    context_len: int,
    rows: int,
    dtype: torch.dtype = torch.float32,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 32,
    block_size: int = 32,
) -> DualChunkBatch:
    paged = make_batch([rows], [context_len], heads, kv_heads, head_size, block_size, dtype)
    query = paged.query
    rotated, (keys,) = turn(paged, geometry)
    return DualChunkBatch(paged, geometry, query, keys, rotated)
