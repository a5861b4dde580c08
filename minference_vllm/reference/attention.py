"""Attention under an index's mask, with the remainder, and recall, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from minference_vllm.core.tiling import Tiling


def gather_sequence(cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> torch.Tensor:
    """``[num_blocks, block_size, HK, D]`` pages of one request -> float64 ``[HK, seq_len, D]``."""
    blocks = -(-seq_len // cache.shape[1])
    rows = cache[block_table[:blocks].long()].flatten(0, 1)[:seq_len]
    return rows.double().transpose(0, 1)


def repeat_heads(keys: torch.Tensor, num_heads: int) -> torch.Tensor:
    """``[HK, S, D]`` -> ``[H, S, D]``: query head ``h`` uses KV head ``h // (H / HK)``."""
    return keys.repeat_interleave(num_heads // keys.shape[0], dim=0)


def capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """``softcap * tanh(scores / softcap)``; 0: unchanged."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def logits(query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float = 0.0) -> torch.Tensor:
    """float64 ``[H, rows, S]``: scores of ``query [rows, H, D]`` and ``keys [HK, S, D]``."""
    repeated = repeat_heads(keys.double(), query.shape[1])
    return capped(query.double().transpose(0, 1) @ repeated.transpose(1, 2) * scale, softcap)


def masked_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the keys that the mask allows.

    Args:
        query: ``[rows, H, D]``. keys, values: ``[HK, S, D]``.
        mask: bool ``[H, rows, S]``; each row allows at least one key.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2); 0: no cap.
        sinks: ``[H]``: one more score in every row's softmax, without a value and without a cap (gpt-oss).
        counts: ``[H, rows, S]``: how often each key counts; None: once.

    Returns:
        float64 ``[rows, H, D]``.
    """
    heads = query.shape[1]
    scores = logits(query, keys, scale, softcap).masked_fill(~mask, -torch.inf)
    if counts is not None:
        scores += counts.double().log()
    total = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.double()[:, None, None])
    weights = (scores - total).exp()
    return (weights @ repeat_heads(values.double(), heads)).transpose(0, 1)


def with_remainder(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    tiling: Tiling,
    scale: float,
    heads: Sequence[int],
    positions: torch.Tensor,
    step: int,
    softcap: float = 0.0,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention under a mask with the remainder (``prefill.remainder``): the keys that a tile leaves out take part in
    its rows' softmax as one key.

    Args:
        query: ``[rows, H, D]``. keys, values: ``[HK, S, D]``. mask: bool ``[H, rows, S]``.
        heads: query heads that have it.
        positions: int64, the sampled keys, each of which stands for ``step`` keys.
        counts: see ``masked_attention``.

    Returns:
        float64 ``[rows, H, D]``.
    """
    num_heads, starts = query.shape[1], tiling.starts.tolist()
    query = query.double().transpose(0, 1)
    keys, values = (repeat_heads(part.double(), num_heads) for part in (keys, values))
    out = torch.empty_like(query)
    for head in range(num_heads):
        for begin, end in itertools.pairwise(starts):
            rows = slice(begin - tiling.context_len, end - tiling.context_len)
            scores = capped(query[head, rows] @ keys[head].T * scale, softcap).masked_fill(
                ~mask[head, rows], -torch.inf
            )
            if counts is not None:
                scores += counts[head, rows].double().log()
            # Only keys that all of the tile's rows see.
            own_values, first = values[head], end - tiling.window if tiling.window else 0
            left_out = positions[(positions >= first) & (positions < begin)]
            left_out = left_out[~mask[head, rows.start, left_out]]
            if head in heads and len(left_out):
                mean = query[head, rows].mean(0)
                at_mean = capped(keys[head, left_out] @ mean * scale, softcap)
                weights = at_mean.softmax(0)
                key, value = weights @ keys[head, left_out], weights @ values[head, left_out]
                bias = at_mean.logsumexp(0) + math.log(step) - capped(mean @ key * scale, softcap)
                one_more = capped(query[head, rows] @ key * scale, softcap) + bias
                scores = torch.cat([scores, one_more[:, None]], 1)
                own_values = torch.cat([own_values, value[None]])
            out[head, rows] = scores.softmax(1) @ own_values
    return out.transpose(0, 1)


def causal_mask(context_len: int, seq_len: int, window: int = 0) -> torch.Tensor:
    """bool ``[seq_len - context_len, seq_len]``; a row sees only its last ``window`` keys, itself included; 0: all."""
    keys, rows = torch.arange(seq_len), torch.arange(context_len, seq_len)[:, None]
    return (keys <= rows) & (keys > rows - window) if window else keys <= rows


def attention_recall(
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor,
    context_len: int,
    scale: float,
    values: torch.Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """Share of each row's dense softmax mass that the mask keeps, ``exp(lse_sparse - lse_dense)``; with values, each
    weight counts times the norm of its key's value (value recall).

    Args: as ``masked_attention``.

    Returns:
        float64 ``[H, rows]``.
    """
    heads, seq_len = query.shape[1], keys.shape[1]
    scores = logits(query, keys, scale, softcap)
    if values is not None:
        scores = scores + repeat_heads(values.double(), heads).norm(dim=2).log()[:, None]
    dense = scores.masked_fill(~causal_mask(context_len, seq_len, window), -torch.inf).logsumexp(-1)
    return (scores.masked_fill(~mask, -torch.inf).logsumexp(-1) - dense).exp()
