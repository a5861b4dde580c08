"""Scores that say where a head's attention lies: last-query columns and diagonals, pooled blocks.

Sizes: ``H`` query heads over ``HK`` KV heads, ``S`` tokens in the sequence, ``D`` head size, ``T`` query tiles, ``N``
key blocks. Every function has its float64 definition in ``reference.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from minference_vllm.index import Tiling

LAST_QUERIES = 64
"""Queries at a chunk's end that choose its columns and diagonals (MInference; Qwen2.5-1M for chunks)."""
ROW_GROUPS = 4
"""Groups of the last queries that must agree on a diagonal."""


def last_query_scores(
    query: torch.Tensor, keys: torch.Tensor, heads: Sequence[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass of the chunk's last queries per column and per diagonal (arXiv 2407.02490, Algorithm 1).

    A strong column lies on 64 diagonals, one for each of the queries, and summed plainly its mass makes all of them
    look strong: the budget of diagonals is then spent on scattered offsets that drag whole blocks in. A true diagonal
    is seen by all queries, a column's trace by one. So the queries are split into 4 neighbouring groups, and a
    diagonal counts 4 times its smallest mass among them; plain sums would be MInference's own score.

    Args:
        query: ``[chunk, H, D]``, the chunk's queries; its last row is the sequence's last token.
        keys: ``[HK, S, D]``.
        heads: query heads wanted.
        scale: softmax scale.

    Returns:
        float32 ``[len(heads), S]`` twice. Columns: the mass on key ``j``. Diagonals: the mass at distance ``i - j``
        that all groups agree on.
    """
    group = query.shape[1] // keys.shape[0]
    length = keys.shape[1]
    rows = min(LAST_QUERIES, query.shape[0])
    last = query[-rows:].permute(1, 0, 2)
    # Row r's scores are shifted r places, so that a diagonal becomes a column of a strided view; zeros on the left
    # stand for keys before the first.
    padded = torch.zeros(len(heads), rows, length + rows, device=query.device)
    future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    for slot, head in enumerate(heads):
        scores = torch.matmul(last[head], keys[head // group].T).float().mul_(scale)
        scores[:, length - rows :].masked_fill_(future, -torch.inf)
        torch.softmax(scores, -1, out=padded[slot, :, rows:])
    columns = padded[:, :, rows:].sum(1)
    # Distance i - j of row r (i = length - rows + r) at padded place p (j = p - rows) is length + r - p.
    width = length + rows
    by_place = padded.as_strided((len(heads), rows, length), (rows * width, width + 1, 1), 1)
    groups = min(ROW_GROUPS, rows)
    borders = [group * rows // groups for group in range(groups + 1)]
    agreed = by_place[:, : borders[1]].sum(1)
    for begin, end in itertools.pairwise(borders):
        agreed = torch.minimum(agreed, by_place[:, begin:end].sum(1))
    return columns, agreed.mul_(groups).flip(1)


def pooled_scores(
    query: torch.Tensor, keys: torch.Tensor, heads: Sequence[int], tiling: Tiling, scale: float
) -> torch.Tensor:
    """Softmax over blocks of mean query times mean key (MInference's block-sparse estimate), per query tile.

    Args:
        query: ``[chunk, H, D]``.
        keys: ``[HK, S, D]``.
        heads: query heads wanted.

    Returns:
        float32 ``[len(heads), T, N]``, zero where no key of a block is in a tile's reach.
    """
    length = keys.shape[1]
    block_of_key = torch.arange(length, device=query.device) // tiling.block_size
    counts = torch.bincount(block_of_key, minlength=tiling.num_key_blocks)
    means = torch.zeros(keys.shape[0], tiling.num_key_blocks, keys.shape[2], device=query.device)
    means.index_add_(1, block_of_key, keys.float())
    means /= counts[:, None]
    group = query.shape[1] // keys.shape[0]
    return mean_scores(query, [means[head // group] for head in heads], heads, tiling, scale)


def mean_scores(
    query: torch.Tensor, means: Sequence[torch.Tensor], heads: Sequence[int], tiling: Tiling, scale: float
) -> torch.Tensor:
    """``pooled_scores`` from the mean key of each block.

    Args:
        means: float32 ``[N, D]`` for each of the wanted heads.
    """
    rows = tiling.starts[1:] - tiling.starts[:-1]
    before = tiling.context_len % tiling.tile
    behind = tiling.num_tiles * tiling.tile - before - query.shape[0]
    scores = torch.empty(len(heads), tiling.num_tiles, tiling.num_key_blocks, device=query.device)
    for slot, head in enumerate(heads):
        whole = torch.nn.functional.pad(query[:, head].float(), (0, 0, before, behind))
        queries = whole.view(tiling.num_tiles, tiling.tile, -1).sum(1) / rows[:, None]
        torch.matmul(queries, means[slot].T, out=scores[slot])
    return scores.mul_(scale).masked_fill_(~tiling.reachable(), -torch.inf).softmax(-1)
