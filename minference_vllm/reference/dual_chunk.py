"""Float64 definition of dual chunk attention, from positions only; for tests only."""

from __future__ import annotations

import torch

from minference_vllm.reference.attention import repeat_heads


def relative_positions(context_len: int, seq_len: int, chunk_size: int, local_size: int) -> torch.Tensor:
    """int64 ``[seq_len - context_len, seq_len]``: by how many positions a query is rotated relative to a key, see
    ``prefill/dual_chunk.py``. Entries of future keys are meaningless."""
    length = chunk_size - local_size
    query, key = torch.arange(context_len, seq_len)[:, None], torch.arange(seq_len)
    chunks_apart = query // length - key // length
    intra = query % length
    successive = (query % length + length).clamp(max=chunk_size)
    inter = torch.full_like(query, min(2 * length - 1, chunk_size))
    position = torch.where(chunks_apart == 0, intra, torch.where(chunks_apart == 1, successive, inter))
    return position - key % length


def dual_chunk_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    context_len: int,
    scale: float,
    frequencies: torch.Tensor,
    chunk_size: int,
    local_size: int,
    original_len: int = 0,
) -> torch.Tensor:
    """Scores before the softmax, including future keys: float64 ``[H, rows, S]``.

    Args:
        query: ``[rows, H, D]``, not rotated. keys: ``[HK, S, D]``, not rotated.
        frequencies: float64 ``[D / 2]``, angle per position of each pair of elements ``d`` and ``d + D / 2``.
        original_len: ``original_max_position_embeddings``; 0: none.
    """
    heads, half = query.shape[1], query.shape[2] // 2
    seq_len = keys.shape[1]
    angles = relative_positions(context_len, seq_len, chunk_size, local_size).double()[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()  # [rows, S, D / 2]
    repeated = repeat_heads(keys.double(), heads)
    tokens = torch.arange(context_len + 1, seq_len + 1, dtype=torch.float64)[:, None]
    factor = (0.1 * (tokens / original_len).log() + 1).clamp(min=1) ** 2 if original_len else torch.ones_like(tokens)
    scores = []
    for head in range(heads):
        first, second = query[:, head, :half].double()[:, None], query[:, head, half:].double()[:, None]
        own, other = repeated[head, :, :half], repeated[head, :, half:]
        turned = (first * own + second * other) * cos + (first * other - second * own) * sin
        scores.append(turned.sum(-1) * scale * factor)
    return torch.stack(scores)


def dual_chunk_attention(scores: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax attention over the keys that the mask allows.

    Args:
        scores: ``[H, rows, S]``, see ``dual_chunk_scores``.
        values: ``[HK, S, D]``.
        mask: bool, broadcast to ``[H, rows, S]``; each row allows at least one key.

    Returns:
        float64 ``[rows, H, D]``.
    """
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ repeat_heads(values.double(), len(scores))).transpose(0, 1)
