"""``block_sparse``: the strongest key blocks of every query tile, by mean queries and mean keys (MInference, arXiv
2407.02490).

Sizes: ``h`` query heads, ``H`` query heads over ``HK`` KV heads of size ``D``, ``T`` query tiles, ``N`` key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import ESTIMATION_BLOCK, BlockSparse
from minference_vllm.selection.compaction import Capacity, Selection
from minference_vllm.selection.family import Family, Room
from minference_vllm.selection.probe_queries import cap_
from minference_vllm.selection.scores import Scores


def pooled_scores(
    query: torch.Tensor, means: torch.Tensor, heads: Sequence[int], tiling: Tiling, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """Softmax over blocks of mean query times mean key (MInference's block-sparse estimate), per query tile.

    Args:
        query: ``[chunk, H, D]``.
        means: ``[HK, N, D]``, see ``mean_keys``.
        heads: query heads wanted.
        softcap: see ``Inputs``.

    Returns:
        float32 ``[h, T, N]``, zero where no key of a block is in a tile's reach.
    """
    group = query.shape[1] // means.shape[0]
    rows = tiling.starts[1:] - tiling.starts[:-1]
    scores = torch.empty(len(heads), tiling.num_tiles, means.shape[1], device=query.device)
    for slot, head in enumerate(heads):
        queries = tiling.by_tile(query[:, head].float()).sum(1) / rows[:, None]
        torch.matmul(queries, means[head // group].T, out=scores[slot])
    return cap_(scores.mul_(scale), softcap).masked_fill_(~tiling.reachable(), -torch.inf).softmax(-1)


def top_blocks(tiling: Tiling, scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """bool ``[h, T, N]``: each tile's own blocks and its ``top_k`` best others.

    Args:
        scores: float ``[h, T, N]``; where blocks are out of reach the value is ignored.
    """
    before = tiling.reachable() & ~tiling.own()
    scores = scores.masked_fill(~before, -torch.inf)
    best = scores.topk(min(top_k, scores.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(before.expand_as(scores)).scatter(-1, best, True)
    return (chosen & before) | tiling.own()


class BlockSparseFamily(Family[BlockSparse]):
    pattern = BlockSparse
    colour = "#009E73"
    may_be_dense = False
    reads_page_means = True

    def select(
        self, pattern: BlockSparse, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection:
        top_k = -(-pattern.top_k * ESTIMATION_BLOCK // tiling.block_size)
        return Selection(top_blocks(tiling, scores.pooled(heads, tiling), top_k))

    def room(self, pattern: BlockSparse, block_size: int, adaptive: int) -> Room:
        return Room(-(-pattern.top_k * ESTIMATION_BLOCK // block_size), 0)

    def tokens(self, pattern: BlockSparse) -> float:
        return pattern.top_k * ESTIMATION_BLOCK


FAMILY = BlockSparseFamily()
