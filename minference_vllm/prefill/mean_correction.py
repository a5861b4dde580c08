"""Mean correction: pages that a tile leaves out still take part in its softmax, each as its mean key and mean value.

A page ``J`` of ``B`` keys that is left out adds ``B * exp(scale * q.kbar_J) * (vbar_J, 1)`` to the numerator and the
denominator of every row ``q`` of the tile (FlashPrefill, arXiv 2603.06199). That is computed apart, and
merged by log-sum-exp with what an engine computed under the index, so that engines know nothing of it.

Sizes: ``H`` query heads over ``HK`` KV heads of size ``D``, ``N`` pages of ``B`` tokens in the sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.patterns.kinds import HeadPattern, PeakThreshold
from minference_vllm.selection.build import SparseIndex
from minference_vllm.selection.probe_queries import PART_BYTES


def heads_with(patterns: Sequence[HeadPattern]) -> list[int]:
    """The query heads whose pattern asks for the correction."""
    return [
        head for head, pattern in enumerate(patterns) if isinstance(pattern, PeakThreshold) and pattern.mean_correction
    ]


def page_means(
    cache: PagedCache, pages: torch.Tensor, seq_len: int, kept: PageMeans | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[HK, N, D]`` each: mean key and mean value of every page of a sequence, of a quantised cache scaled.

    Args:
        pages: int64 ``[N]``, physical page of each logical block.
        kept: the layer's page summaries; None: the Triton kernel reads the pages.
    """
    if kept is not None:
        return kept.of(cache, pages, seq_len), kept.values_of(cache, pages, seq_len)
    from minference_vllm.triton_kernels import estimate

    values = dataclasses.replace(cache, key=cache.value, key_scale=cache.value_scale)
    keys, values = (estimate.mean_keys(part, pages, seq_len, 0, cache.num_kv_heads) for part in (cache, values))
    return keys, values


def add(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: SparseIndex,
    heads: Sequence[int],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    softcap: float = 0.0,
) -> None:
    """Add the pages that tiles leave out to the attention of some heads, in place.

    Left out are the pages before a tile's own that are none of its blocks, all of them whole; a tile without a list
    leaves none out. Beside the means, scores of ``PART_BYTES`` are in memory at once. Nothing waits for a GPU.

    Args:
        query: ``[chunk, H, D]``.
        keys, values: float32 ``[HK, N, D]``, see ``page_means``.
        index: what ``out`` was computed under, of these heads without single columns.
        heads: query heads wanted.
        out: ``[chunk, H, D]``, attention under the index; becomes the corrected one.
        lse: float32 ``[H, chunk]``, natural log-sum-exp of each row's scores under the index, a sink's included.
        softcap: as the engine had it; applied to the scores of pages, too.
    """
    group, size, tile = query.shape[1] // keys.shape[0], index.block_size, index.tile
    context, first_tile = index.context_len, index.context_len // index.tile
    at_once = max(1, PART_BYTES // (4 * tile * keys.shape[1]))
    for first in range(0, index.num_tiles, at_once):
        last = min(first + at_once, index.num_tiles)
        num_pages = (first_tile + last - 1) * tile // size  # before the last of these tiles
        begin = max((first_tile + first) * tile, context) - context
        rows = slice(begin, min((first_tile + last) * tile, index.seq_len) - context)
        if not num_pages:
            continue
        tiles = torch.arange(first, last, device=query.device)
        tile_of_row = torch.arange(context + rows.start, context + rows.stop, device=query.device)
        tile_of_row = tile_of_row // tile - (first_tile + first)
        own = (first_tile + tiles[:, None]) * (tile // size) <= torch.arange(num_pages, device=query.device)
        for head in heads:
            taken = index.block_mask(tiles, slice(head, head + 1), 0, num_pages)[0] | own
            scores = torch.matmul(query[rows, head].float(), keys[head // group, :num_pages].T).mul_(scale)
            if softcap:
                scores.div_(softcap).tanh_().mul_(softcap)
            scores.add_(math.log(size)).masked_fill_(taken[tile_of_row], -torch.inf)
            own_lse = lse[head, rows]
            # A row attends itself: this is never -inf.
            largest = torch.maximum(own_lse, scores.amax(-1))[:, None]
            weights, own_weight = scores.sub_(largest).exp_(), (own_lse[:, None] - largest).exp_()
            total = own_weight + weights.sum(-1, keepdim=True)
            merged = torch.addmm(out[rows, head].float().mul_(own_weight), weights, values[head // group, :num_pages])
            out[rows, head] = merged.div_(total).to(out.dtype)
