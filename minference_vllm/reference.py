"""Float64 definitions of every estimate and of attention under an index's mask; for tests and benchmarks alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from minference_vllm.tiling import Tiling


def gather_sequence(cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> torch.Tensor:
    """``[num_blocks, block_size, HK, D]`` pages of one request -> float64 ``[HK, seq_len, D]``."""
    blocks = -(-seq_len // cache.shape[1])
    rows = cache[block_table[:blocks].long()].flatten(0, 1)[:seq_len]
    return rows.double().transpose(0, 1)


def repeat_heads(keys: torch.Tensor, num_heads: int) -> torch.Tensor:
    """``[HK, S, D]`` -> ``[H, S, D]``: query head ``h`` uses KV head ``h // (H / HK)``."""
    return keys.repeat_interleave(num_heads // keys.shape[0], dim=0)


def masked_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention over the keys that the mask allows.

    Args:
        query: ``[rows, H, D]``. keys, values: ``[HK, S, D]``.
        mask: bool ``[H, rows, S]``; each row allows at least one key.

    Returns:
        float64 ``[rows, H, D]``.
    """
    heads = query.shape[1]
    scores = query.double().transpose(0, 1) @ repeat_heads(keys.double(), heads).transpose(1, 2) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ repeat_heads(values.double(), heads)).transpose(0, 1)


def causal_mask(context_len: int, seq_len: int) -> torch.Tensor:
    """bool ``[seq_len - context_len, seq_len]``."""
    return torch.arange(seq_len) <= torch.arange(context_len, seq_len)[:, None]


def attention_recall(
    query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, context_len: int, scale: float
) -> torch.Tensor:
    """Share of each row's dense softmax mass that the mask keeps, ``exp(lse_sparse - lse_dense)``.

    Args: as ``masked_attention``.

    Returns:
        float64 ``[H, rows]``.
    """
    heads, seq_len = query.shape[1], keys.shape[1]
    scores = query.double().transpose(0, 1) @ repeat_heads(keys.double(), heads).transpose(1, 2) * scale
    dense = scores.masked_fill(~causal_mask(context_len, seq_len), -torch.inf).logsumexp(-1)
    return (scores.masked_fill(~mask, -torch.inf).logsumexp(-1) - dense).exp()


def last_query_scores(
    query: torch.Tensor, keys: torch.Tensor, scale: float, groups: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column and diagonal mass of groups of queries (arXiv 2407.02490, Algorithm 1), float64 ``[H, S]`` each.

    The mass of a diagonal is the smallest that a group's query gives it on average, of the groups whose last query
    lies at least that far from the first key, times the number of queries. With one group it is the paper's plain sum.

    Args:
        groups: rows ``[begin, end)`` of ``query``.
    """
    chunk, heads, _ = query.shape
    seq_len = keys.shape[1]
    repeated = repeat_heads(keys.double(), heads)
    columns = torch.zeros(heads, seq_len, dtype=torch.float64)
    diagonals = torch.full((heads, seq_len), torch.inf, dtype=torch.float64)
    for begin, end in groups:
        mass = torch.zeros(heads, seq_len, dtype=torch.float64)
        for row in range(begin, end):
            position = seq_len - chunk + row
            scores = torch.einsum("hd,hsd->hs", query[row].double(), repeated[:, : position + 1]) * scale
            weights = scores.softmax(-1)
            columns[:, : position + 1] += weights
            mass[:, : position + 1] += weights.flip(1)
        reach = seq_len - chunk + end
        diagonals[:, :reach] = torch.minimum(diagonals[:, :reach], mass[:, :reach] / (end - begin))
    return columns, diagonals * sum(end - begin for begin, end in groups)


def distance_scores(by_offset: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """Diagonal mass by the distance, in blocks before a tile's first, of the block that a tile's row meets it in.

    Args:
        by_offset: ``[H, S]``, the mass of each diagonal ``j = i - offset``.

    Returns:
        float64 ``[H, N]``, mean over the rows of a tile; column ``d - 1`` is distance ``d``.
    """
    heads, seq_len = by_offset.shape
    scores = torch.zeros(heads, tiling.num_key_blocks, dtype=torch.float64)
    for row in range(tiling.tile):
        for offset in range(row + 1, seq_len):
            distance = -((row - offset) // tiling.block_size)
            if distance <= tiling.num_key_blocks:
                scores[:, distance - 1] += by_offset[:, offset].double() / tiling.tile
    return scores


def pooled_scores(query: torch.Tensor, keys: torch.Tensor, tiling: Tiling, scale: float) -> torch.Tensor:
    """Softmax over blocks of mean query times mean key, float64 ``[H, T, N]``."""
    heads = query.shape[1]
    starts = (tiling.starts - tiling.context_len).tolist()
    queries = torch.stack([query[a:b].double().mean(0) for a, b in itertools.pairwise(starts)], dim=1)
    means = torch.stack([block.mean(1) for block in keys.double().split(tiling.block_size, dim=1)], dim=1)
    scores = queries @ repeat_heads(means, heads).transpose(1, 2) * scale
    return scores.masked_fill(~tiling.reachable(), -torch.inf).softmax(-1)
