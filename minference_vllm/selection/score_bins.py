"""Score bins of keys: a key's score relative to the softmax denominator of a row, or of the rows of a query tile, in
256 steps; how much attention lies in each bin, and which keys lie from one bin up.

Sizes: ``h`` query heads, ``T`` query tiles, ``N`` key blocks (pages), ``S`` tokens in the sequence, ``r`` rank.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.projection import BINS_PER_BIT, QuantizedQK

PEAK_KEYS = 32
"""Keys of which the largest score alone counts in ``approx_lse``."""
LEAST_GROUPS, MAX_GROUP_STEP = 64, 16
"""Groups of ``PEAK_KEYS`` before a tile that are asked for its ``approx_lse``: so many at least, and one in so many."""
MAX_CODE = 60
"""Keys below a threshold are drawn less and less often, at least one in ``2 ** (MAX_CODE / BINS_PER_BIT)``."""
TILE_FRACTION = 40503
"""Where the sums of chances of neighbouring tiles begin, they lie so many 65536ths apart: two samples differ."""
TOP_BIN = 254
LOCAL_BIN = 255
"""Bin of the keys in a tile's own pages, which it always attends."""
DENSE_FROM = 0.5
"""A tile whose budget the data decide and that needs this share of all keys is computed densely: listing them would
cost more than it saves."""


class ScoreBins(NamedTuple):
    """What scores say of some heads' keys."""

    bins: torch.Tensor
    """uint8 ``[h, T, S]``, see ``tile_bins``."""
    threshold: torch.Tensor
    """int32 ``[h]``: the bin from which on keys are selected; 0 means that bins do not tell them apart."""
    sampled: bool = False
    """Whether keys below the threshold are sampled (``sampled_keys``); else they are left out."""


def group_step(own: int) -> int:
    """One in so many groups of ``PEAK_KEYS`` before a tile whose first key is ``own`` is asked for ``approx_lse``."""
    return min(max(own // (PEAK_KEYS * LEAST_GROUPS), 1), MAX_GROUP_STEP)


def approx_lse(scores: torch.Tensor, own: int, step: int) -> torch.Tensor:
    """What the scores of a tile's queries are set against: close to the softmax's denominator, for one exponential in
    up to 512 keys. It is the log-sum-exp of the largest score of each of some groups of ``PEAK_KEYS`` keys: before the
    tile of the first, which holds attention sinks, and one in ``step``, which stands for as many; and of all in the
    tile.

    Args:
        scores: float32 ``[n, S]``, in bits, up to the tile's last key; -inf where a query does not look.
        own: the tile's first own key.
        step: ``group_step``, or 1: all groups.

    Returns:
        float32 ``[n, 1]``.
    """
    groups = torch.arange(scores.shape[-1], device=scores.device) // PEAK_KEYS
    far = torch.arange(own, device=scores.device)[groups[:own] % step == 0]
    peaks = [_group_peaks(scores[:, far], groups[far] // step)]
    peaks[0][:, 1:] += math.log2(step)
    peaks.append(_group_peaks(scores[:, own:], groups[own:] - own // PEAK_KEYS))
    return torch.cat(peaks, 1).mul_(math.log(2)).logsumexp(-1, keepdim=True).div_(math.log(2))


def _group_peaks(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """float32 ``[n, G]``: the largest score of each group; groups, int64 ``[S]``, count from 0 and ascend."""
    count = int(groups[-1]) + 1 if len(groups) else 0
    found = scores.new_full((len(scores), count), -torch.inf)
    return found.scatter_reduce_(1, groups.expand(scores.shape), scores, "amax")


def as_bins(scores: torch.Tensor) -> torch.Tensor:
    """uint8: bins of scores less their ``approx_lse`` (float32, in bits, overwritten)."""
    return scores.mul_(BINS_PER_BIT).add_(TOP_BIN).clamp_(0, TOP_BIN).round_().to(torch.uint8)


def tile_bins(quantized: QuantizedQK, tiling: Tiling, all_groups: torch.Tensor) -> torch.Tensor:
    """The bin of every key for every tile: of its queries the one that gives the key the highest bin decides.

    Args:
        all_groups: bool ``[h]``: heads whose ``approx_lse`` comes from all groups.

    Returns:
        uint8 ``[h, T, S]``: ``TOP_BIN + BINS_PER_BIT * (score - approx_lse)``, rounded; of the tile's own pages
        ``LOCAL_BIN``, of later ones 0.
    """
    heads, length, _ = quantized.keys.shape
    bins = torch.zeros(heads, tiling.num_tiles, length, dtype=torch.uint8, device=quantized.keys.device)
    queries, positions = (part.unflatten(1, (tiling.num_tiles, -1)) for part in quantized[:2])
    bits, places = quantized.bits(), torch.arange(length, device=bins.device)
    for tile, (begin, end) in enumerate(itertools.pairwise(tiling.starts.tolist())):
        own = begin // tiling.tile * tiling.tile
        for head in range(heads):
            unit = bits[head, tile]
            asked = queries[head, tile, : quantized.count[head, tile]].float()
            products = asked @ quantized.keys[head, :end].float().T
            # Whole numbers are compared.
            position = positions[head, tile, : quantized.count[head, tile], None]
            scores = (products * unit).masked_fill_(places[:end] > position, -torch.inf)
            lse = approx_lse(scores, own, 1 if all_groups[head] else group_step(own)).div_(unit).round_()
            bins[head, tile, :own] = as_bins((products[:, :own] - lse).amax(0).mul_(unit))
        bins[:, tile, own:end] = LOCAL_BIN
    return bins


def hide_before_window(bins: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """The bins, uint8 ``[h, T, S]``, 0 for keys that no row of a tile has in its window; overwritten."""
    if not tiling.window:
        return bins
    places = torch.arange(tiling.seq_len, device=bins.device)
    return bins.masked_fill_(places < tiling.first_seen()[:, None], 0)


def mass_by_bin(
    bins: torch.Tensor, bin_row: torch.Tensor, weights: torch.Tensor, squared: bool = False
) -> torch.Tensor:
    """float32 ``[h, R, 256]``: the share of each row's attention that lies on the keys of each bin.

    Args:
        bins: uint8 ``[h, L, S]``.
        bin_row: int64 ``[h, R]``: which of the ``L`` holds each row's bins.
        weights: float32 ``[h, R, S]``.
        squared: sum the squares of shares instead.
    """
    mass = torch.zeros(*weights.shape[:2], 256, device=weights.device)
    weights = weights.square() if squared else weights
    return mass.scatter_add_(2, bins.gather(1, bin_row[..., None].expand(weights.shape)).long(), weights)


def covered(mass: torch.Tensor) -> torch.Tensor:
    """float32 ``[..., 256]``: the share of a row's attention at or above each bin, the highest bin first.

    Args:
        mass: float32 ``[..., 256]``, see ``mass_by_bin``.
    """
    share = mass.flip(-1).cumsum(-1)
    return share / share[..., -1:]


def lowest_bin(share: torch.Tensor, gamma: float) -> torch.Tensor:
    """int32 ``[...]``: the bin down to which a share ``gamma`` lies; 0 where no other bin has it.

    Args:
        share: float32 ``[..., 256]``, rising, see ``covered``.
    """
    reached = share >= gamma
    reached[..., -1] = True
    return 255 - reached.int().argmax(-1).int()


def mean_share(share: torch.Tensor, errors: float = 0.0) -> torch.Tensor:
    """float32 ``[h, 256]``: the mean over rows, less so many of its standard errors, where the rows are a sample.

    Args:
        share: float32 ``[h, R, 256]``, see ``covered``.
    """
    mean = share.mean(1)
    return mean - errors / math.sqrt(share.shape[1]) * share.std(1, correction=0) if errors else mean


def page_counts(bins: torch.Tensor, threshold: torch.Tensor, block_size: int) -> torch.Tensor:
    """int32 ``[h, T, N]``: how many keys of each page reach the threshold.

    Args:
        bins: uint8 ``[h, T, S]``. threshold: int32 ``[h]``.
    """
    return _marks(bins, threshold, block_size).sum(3, dtype=torch.int32)


def _marks(bins: torch.Tensor, threshold: torch.Tensor, block_size: int) -> torch.Tensor:
    """bool ``[h, T, N, B]``: keys that reach the threshold."""
    heads, tiles, length = bins.shape
    marks = torch.zeros(heads, tiles, -(-length // block_size), block_size, dtype=torch.bool, device=bins.device)
    torch.ge(bins, threshold[:, None, None].to(torch.uint8), out=marks.flatten(2)[..., :length])
    return marks


def whole_pages(tiling: Tiling, counts: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of which half or more is wanted: attended in place they cost less than gathered keys.

    Args:
        counts: int32 ``[h, T, N]``, see ``page_counts``.
        threshold: int32 ``[h]``; 0 means that the bins do not tell the keys apart.

    Returns:
        bool ``[h, T, N]``; and bool ``[h, T]``: tiles that need more than ``DENSE_FROM`` of their keys, or of a head
        whose threshold is 0. They have every reachable page.
    """
    size, reachable = tiling.block_size, tiling.reachable()
    pages = (2 * counts >= size) | tiling.own()
    cost = torch.where(pages, size, counts).sum(2)
    dense = (threshold == 0)[:, None] | (cost > DENSE_FROM * size * reachable.sum(1))
    return torch.where(dense[..., None], reachable, pages), dense


def keys_above(tiling: Tiling, bins: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each tile's keys from one bin up.

    Args:
        bins: uint8 ``[h, T, S]``, see ``tile_bins``.
        threshold: int32 ``[h]``.

    Returns:
        blocks (bool ``[h, T, N]``, see ``whole_pages``) and single keys (bool ``[h, T, S]``), none in a block.
    """
    # The largest tensor by far: marks are made and taken back in place.
    marks = _marks(bins, threshold, tiling.block_size)
    blocks, dense = whole_pages(tiling, marks.sum(3, dtype=torch.int32), threshold)
    marks &= ~(blocks | dense[..., None])[..., None]
    return blocks, marks.flatten(2)[..., : bins.shape[2]]


@functools.lru_cache(maxsize=8)
def increments(device: torch.device) -> torch.Tensor:
    """int32 ``[MAX_CODE + 1]``: how likely a key so many bins below the threshold is drawn, in 65536ths."""
    codes = torch.arange(MAX_CODE + 1, device=device)
    return torch.exp2(16 - codes.double() / BINS_PER_BIT).round_().int()


@functools.lru_cache(maxsize=8)
def noise_by_threshold(device: torch.device) -> torch.Tensor:
    """float32 ``[256, 256]``: what the square of a share adds to the variance of a row's output, by the key's bin and
    the threshold: ``1 / p - 1`` of a key that is drawn with a chance ``p`` and then counts ``1 / p`` times."""
    bins = torch.arange(256, device=device)
    return torch.exp2((bins - bins[:, None]).clamp(0, MAX_CODE).float() / BINS_PER_BIT) - 1


def sampled_keys(
    tiling: Tiling, bins: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each tile's keys from one bin up, and a sample of the keys below, which stand for those that are not drawn.

    A key ``c`` bins below the threshold is drawn with a chance of ``2 ** (-c / BINS_PER_BIT)``, as its attention falls,
    and counts for as many keys as its chance says: what a row gives all keys, and what comes of it, is right in the
    mean (Horvitz and Thompson 1952), whatever the scores are worth. The sample is systematic: chances are added up
    along the keys, and the one that carries the sum past a whole number is drawn. Equal bins give an equal sample.

    Args:
        bins: uint8 ``[h, T, S]``, see ``tile_bins``; 0 counts as far below.
        threshold: int32 ``[h]``; 0: the bins do not tell the keys apart.

    Returns:
        blocks (bool ``[h, T, N]``, see ``whole_pages``), single keys (bool ``[h, T, S]``), none in a block, and their
        codes (uint8 ``[h, T, S]``, see ``SparseIndex.column_codes``).
    """
    size, places = tiling.block_size, torch.arange(tiling.seq_len, device=bins.device)
    blocks, dense = whole_pages(tiling, page_counts(bins, threshold, size), threshold)
    before = (places >= tiling.first_seen()[:, None]) & (places < tiling.first_own()[:, None])
    codes = (threshold[:, None, None] - bins.int()).clamp_(0, MAX_CODE)
    chances = increments(bins.device)[codes].long().masked_fill_(~before | (codes == 0), 0)
    tiles = torch.arange(tiling.num_tiles, device=bins.device)[:, None]
    sums = chances.cumsum(2) + tiles * TILE_FRACTION % 65536
    drawn = (sums >> 16) > ((sums - chances) >> 16)
    listed = ~(blocks | dense[..., None]).repeat_interleave(size, 2)[..., : tiling.seq_len]
    return blocks, before & listed & ((codes == 0) | drawn), codes.to(torch.uint8)
