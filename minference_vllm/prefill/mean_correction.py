"""Mean correction: pages that a tile leaves out still take part in its softmax, each as its mean key and mean value.

A page ``J`` of ``B`` keys that is left out adds ``B * exp(scale * q.kbar_J) * (vbar_J, 1)`` to the numerator and the
denominator of every row ``q`` of the tile (FlashPrefill, arXiv 2603.06199). That is computed apart, and
merged by log-sum-exp with what a kernel computed under the index, so that kernels know nothing of it.

Sizes: ``H`` query heads over ``HK`` KV heads of size ``D``, ``N`` pages of ``B`` tokens in the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.selection.peak_threshold import PART_BYTES
from minference_vllm.selection.probe_queries import cap_
from minference_vllm.selection.torch_scores import TorchScores


def add(scores: TorchScores, index: SparseIndex, heads: Sequence[int], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Add the pages that tiles leave out to the attention of some heads, in place.

    Left out are the pages before a tile's own that are none of its blocks, all of them whole; a tile without a list
    leaves none out. Beside the means, scores of ``PART_BYTES`` are in memory at once. Nothing waits for a GPU.

    Args:
        scores: of the chunk, for its queries and the means of its pages; a soft cap is applied to pages, too.
        index: what ``out`` was computed under, of these heads without single columns.
        heads: query heads wanted.
        out: ``[chunk, H, D]``, attention under the index; becomes the corrected one.
        lse: float32 ``[H, chunk]``, natural log-sum-exp of each row's scores under the index, a sink's included.
    """
    query, keys, values = scores.query, scores.mean_keys, scores.mean_values
    scale, softcap, tiling = scores.scale, scores.softcap, index.tiling
    group, size, tile = query.shape[1] // keys.shape[0], tiling.block_size, tiling.tile
    context, first_tile = tiling.context_len, tiling.context_len // tile
    at_once = max(1, PART_BYTES // (4 * tile * keys.shape[1]))
    for first in range(0, index.num_tiles, at_once):
        last = min(first + at_once, index.num_tiles)
        num_pages = (first_tile + last - 1) * tile // size  # before the last of these tiles
        begin = max((first_tile + first) * tile, context) - context
        rows = slice(begin, min((first_tile + last) * tile, tiling.seq_len) - context)
        if not num_pages:
            continue
        tiles = torch.arange(first, last, device=query.device)
        tile_of_row = torch.arange(context + rows.start, context + rows.stop, device=query.device)
        tile_of_row = tile_of_row // tile - (first_tile + first)
        own = (first_tile + tiles[:, None]) * (tile // size) <= torch.arange(num_pages, device=query.device)
        for head in heads:
            taken = index.block_mask(tiles, slice(head, head + 1), 0, num_pages)[0] | own
            logits = torch.matmul(query[rows, head].float(), keys[head // group, :num_pages].T).mul_(scale)
            cap_(logits, softcap).add_(math.log(size)).masked_fill_(taken[tile_of_row], -torch.inf)
            own_lse = lse[head, rows]
            # A row attends itself: this is never -inf.
            largest = torch.maximum(own_lse, logits.amax(-1))[:, None]
            weights, own_weight = logits.sub_(largest).exp_(), (own_lse[:, None] - largest).exp_()
            total = own_weight + weights.sum(-1, keepdim=True)
            merged = torch.addmm(out[rows, head].float().mul_(own_weight), weights, values[head // group, :num_pages])
            out[rows, head] = merged.div_(total).to(out.dtype)
