"""Paged inputs for tests of the Triton kernels, which run in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minference_vllm import SparseIndex, sparse_prefill
from minference_vllm.patterns.kinds import HeadPattern


def paged(rows: torch.Tensor, pages: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[S, HK, D]`` rows as ``[num_blocks, HK, B, D]``; everything that the sequence does not own is NaN."""
    length, kv_heads, dim = rows.shape
    padded = torch.full((len(pages) * block_size, kv_heads, dim), torch.nan)
    padded[:length] = rows.float()
    cache = torch.full((len(pages) + 2, block_size, kv_heads, dim), torch.nan)
    cache[pages] = padded.view(len(pages), block_size, kv_heads, dim)
    return cache.to(rows.dtype).transpose(1, 2)


def prefill(
    context_len: int, seq_len: int, block_size: int, patterns: Sequence[HeadPattern], sharpness: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, SparseIndex]:
    """``sparse_prefill`` through the Triton kernels on random float32 inputs: one query head per pattern over two KV
    heads, of size 32.

    Returns:
        queries ``[chunk, H, D]``, keys and values ``[HK, S, D]``, the output, and the index.
    """
    torch.manual_seed(1)
    kv_heads, dim = 2, 32
    blocks = -(-seq_len // block_size)
    pages = torch.randperm(blocks + 2)[:blocks]
    query = torch.randn(seq_len - context_len, len(patterns), dim) * sharpness
    keys, values = (torch.randn(seq_len, kv_heads, dim) for _ in range(2))
    out, (index,) = sparse_prefill(
        query,
        *(paged(rows, pages, block_size).transpose(1, 2) for rows in (keys, values)),
        pages[None].to(torch.int32),
        torch.tensor([0, len(query)]),
        torch.tensor([seq_len]),
        patterns,
        kernel="triton",
        return_index=True,
    )
    return query, keys.transpose(0, 1), values.transpose(0, 1), out, index
