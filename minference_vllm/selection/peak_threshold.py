"""``peak_threshold``: the key blocks whose score comes near the tile's highest (FlashPrefill, arXiv 2603.06199).

Sizes: ``h`` query heads, ``H`` query heads over ``HK`` KV heads of size ``D``, ``T`` query tiles, ``N`` key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import PeakThreshold
from minference_vllm.selection.compaction import Capacity, Selection
from minference_vllm.selection.family import Family, Room
from minference_vllm.selection.probe_queries import logits
from minference_vllm.selection.scores import Scores
from minference_vllm.selection.static import sink_and_local_blocks

PART_BYTES = 32 << 20
"""Scores of single queries in flight, in float32."""


def peak_scores(
    query: torch.Tensor, means: torch.Tensor, heads: Sequence[int], tiling: Tiling, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """Softmax over blocks of every single query times mean keys, averaged over the tile's rows, per query tile.

    FlashPrefill (arXiv 2603.06199) subtracts one maximum per tile, so that rows with high logits count more; here every
    row counts alike, which needs no second pass and never overflows.

    Args:
        query: ``[chunk, H, D]``.
        means: ``[HK, N, D]``, see ``mean_keys``.
        heads: query heads wanted.
        softcap: see ``Inputs``.

    Returns:
        float32 ``[h, T, N]``, zero where no key of a block is in a tile's reach.
    """
    group = query.shape[1] // means.shape[0]
    positions = torch.arange(tiling.num_tiles * tiling.tile, device=query.device).view(tiling.num_tiles, tiling.tile)
    positions += tiling.context_len // tiling.tile * tiling.tile
    there = (positions >= tiling.context_len) & (positions < tiling.seq_len)
    unseen = ~tiling.reachable()
    result = torch.empty(len(heads), *unseen.shape, device=query.device)
    at_once = max(1, PART_BYTES // (4 * tiling.tile * tiling.num_key_blocks))
    for slot, head in enumerate(heads):
        rows, kv_means = tiling.by_tile(query[:, head]), means[head // group].to(query.dtype)
        for first in range(0, tiling.num_tiles, at_once):
            part = slice(first, first + at_once)
            weights = logits(rows[part], kv_means, scale, softcap)
            weights = weights.masked_fill_(unseen[part, None], -torch.inf).softmax(-1)
            result[slot, part] = torch.matmul(there[part, None].float(), weights)[:, 0]
    return result.div_((tiling.starts[1:] - tiling.starts[:-1])[:, None])


def peak_blocks(tiling: Tiling, scores: torch.Tensor, pattern: PeakThreshold) -> torch.Tensor:
    """bool ``[h, T, N]``: A-shape of ``sink`` and ``window``, and blocks near the tile's highest score.

    Args:
        scores: float ``[h, T, N]``, zero out of reach.
    """
    always = sink_and_local_blocks(tiling, pattern.sink, pattern.window)
    peaks = scores >= pattern.alpha * scores.amax(-1, keepdim=True)
    return (peaks & tiling.reachable()) | always


class PeakThresholdFamily(Family[PeakThreshold]):
    pattern = PeakThreshold
    colour = "#D55E00"
    reads_page_means = True

    def select(
        self, pattern: PeakThreshold, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection:
        return Selection(peak_blocks(tiling, scores.peaks(heads, tiling), pattern))

    def room(self, pattern: PeakThreshold, block_size: int, adaptive: int) -> Room:
        return Room(adaptive, 0)


FAMILY = PeakThresholdFamily()
