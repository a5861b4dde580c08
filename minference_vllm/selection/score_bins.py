"""Score bins: keys ranked in 256 steps by their approximate softmax weight, the attention in each bin, and the keys at
or above a bin.

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
"""Size of the groups of keys in ``approx_lse``, each represented by its largest score."""
LEAST_GROUPS, MAX_GROUP_STEP = 64, 16
"""``approx_lse`` samples the groups before a tile: ``LEAST_GROUPS``, or one in ``MAX_GROUP_STEP`` if that is more."""
MAX_CODE = 60
"""Bins below the threshold at which the sampling probability stops falling: ``2 ** (-MAX_CODE / BINS_PER_BIT)``."""
TILE_FRACTION = 40503
"""Difference, in 65536ths, between the starting values of neighbouring tiles' systematic samples, so that they draw
different keys."""
TOP_BIN = 254
LOCAL_BIN = 255
"""Bin of the keys in a tile's own pages, which are always attended."""
DENSE_FROM = 0.5
"""A tile that would select more than this share of its keys is computed densely; lists would cost more than they
save."""


class ScoreBins(NamedTuple):
    """The bins of some heads' keys, and the threshold of each head."""

    bins: torch.Tensor
    """uint8 ``[h, T, S]``, see ``tile_bins``."""
    threshold: torch.Tensor
    """int32 ``[h]``: keys in this bin or a higher one are selected; 0 (the scores do not tell keys apart): all."""
    sampled: bool = False
    """Whether keys below the threshold are sampled (``sampled_keys``) or left out."""


def group_step(own: int) -> int:
    """Stride of the sampled groups in ``approx_lse``, for a tile whose own keys begin at ``own``."""
    return min(max(own // (PEAK_KEYS * LEAST_GROUPS), 1), MAX_GROUP_STEP)


def approx_lse(scores: torch.Tensor, own: int, step: int) -> torch.Tensor:
    """Approximate log-sum-exp of the scores of a tile's queries, the logarithm of their softmax denominators.

    It takes one exponential for up to 512 keys. Keys are in groups of ``PEAK_KEYS``, and each group counts by its
    largest score. All groups of the tile itself are used. Before the tile, it is the first group, which holds attention
    sinks, and every ``step``-th, which counts ``step`` times.

    Args:
        scores: float32 ``[n, S]``, in bits, up to the tile's last key; -inf where a query does not see the key.
        own: position of the tile's first own key.
        step: ``group_step``, or 1 for all groups.

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
    """float32 ``[n, G]``: the largest score of each group. ``groups``: int64 ``[S]``, ascending from 0."""
    count = int(groups[-1]) + 1 if len(groups) else 0
    found = scores.new_full((len(scores), count), -torch.inf)
    return found.scatter_reduce_(1, groups.expand(scores.shape), scores, "amax")


def as_bins(scores: torch.Tensor) -> torch.Tensor:
    """uint8: bins of scores minus ``approx_lse`` (float32, in bits, overwritten)."""
    return scores.mul_(BINS_PER_BIT).add_(TOP_BIN).clamp_(0, TOP_BIN).round_().to(torch.uint8)


def tile_bins(quantized: QuantizedQK, tiling: Tiling, all_groups: torch.Tensor) -> torch.Tensor:
    """The bin of every key for every tile: the highest that any of the tile's queries gives it.

    Args:
        all_groups: bool ``[h]``: heads whose ``approx_lse`` uses all groups.

    Returns:
        uint8 ``[h, T, S]``: ``TOP_BIN + BINS_PER_BIT * (score - approx_lse)``, rounded. ``LOCAL_BIN`` in the tile's own
        pages, 0 after them.
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
            # Products stay integers until the largest is known, as in the kernels.
            position = positions[head, tile, : quantized.count[head, tile], None]
            scores = (products * unit).masked_fill_(places[:end] > position, -torch.inf)
            lse = approx_lse(scores, own, 1 if all_groups[head] else group_step(own)).div_(unit).round_()
            bins[head, tile, :own] = as_bins((products[:, :own] - lse).amax(0).mul_(unit))
        bins[:, tile, own:end] = LOCAL_BIN
    return bins


def hide_before_window(bins: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """Set the bins, uint8 ``[h, T, S]``, of keys before the sliding window of all of a tile's rows to 0, in place."""
    if not tiling.window:
        return bins
    places = torch.arange(tiling.seq_len, device=bins.device)
    return bins.masked_fill_(places < tiling.first_seen()[:, None], 0)


def mass_by_bin(
    bins: torch.Tensor, bin_row: torch.Tensor, weights: torch.Tensor, squared: bool = False
) -> torch.Tensor:
    """float32 ``[h, R, 256]``: the share of each row's attention in each bin.

    Args:
        bins: uint8 ``[h, L, S]``.
        bin_row: int64 ``[h, R]``: index of each row's bins in ``L``.
        weights: float32 ``[h, R, S]``.
        squared: sum the squares of the shares instead.
    """
    mass = torch.zeros(*weights.shape[:2], 256, device=weights.device)
    weights = weights.square() if squared else weights
    return mass.scatter_add_(2, bins.gather(1, bin_row[..., None].expand(weights.shape)).long(), weights)


def covered(mass: torch.Tensor) -> torch.Tensor:
    """float32 ``[..., 256]``: the share of a row's attention at or above each bin, highest bin first.

    Args:
        mass: float32 ``[..., 256]``, see ``mass_by_bin``.
    """
    share = mass.flip(-1).cumsum(-1)
    return share / share[..., -1:]


def lowest_bin(share: torch.Tensor, gamma: float) -> torch.Tensor:
    """int32 ``[...]``: the highest bin at or above which a share ``gamma`` lies; 0 if there is none.

    Args:
        share: float32 ``[..., 256]``, rising, see ``covered``.
    """
    reached = share >= gamma
    reached[..., -1] = True
    return 255 - reached.int().argmax(-1).int()


def mean_share(share: torch.Tensor, errors: float = 0.0) -> torch.Tensor:
    """float32 ``[h, 256]``: the mean over rows minus ``errors`` standard errors (for rows that are a sample).

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
    """bool ``[h, T, N, B]``: keys whose bin reaches the threshold."""
    heads, tiles, length = bins.shape
    marks = torch.zeros(heads, tiles, -(-length // block_size), block_size, dtype=torch.bool, device=bins.device)
    torch.ge(bins, threshold[:, None, None].to(torch.uint8), out=marks.flatten(2)[..., :length])
    return marks


def whole_pages(tiling: Tiling, counts: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of which at least half is selected. Attending the whole page costs less than gathering its keys.

    Args:
        counts: int32 ``[h, T, N]``, see ``page_counts``.
        threshold: int32 ``[h]``, see ``ScoreBins``.

    Returns:
        bool ``[h, T, N]``: whole pages. bool ``[h, T]``: dense tiles, which have every reachable page. A tile is dense
        if it needs more than ``DENSE_FROM`` of its keys, or if its head's threshold is 0.
    """
    size, reachable = tiling.block_size, tiling.reachable()
    pages = (2 * counts >= size) | tiling.own()
    cost = torch.where(pages, size, counts).sum(2)
    dense = (threshold == 0)[:, None] | (cost > DENSE_FROM * size * reachable.sum(1))
    return torch.where(dense[..., None], reachable, pages), dense


def keys_above(tiling: Tiling, bins: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each tile's keys at or above the threshold.

    Args:
        bins: uint8 ``[h, T, S]``, see ``tile_bins``.
        threshold: int32 ``[h]``.

    Returns:
        Blocks (bool ``[h, T, N]``, see ``whole_pages``) and single keys outside of them (bool ``[h, T, S]``).
    """
    # By far the largest tensor, so it is updated in place.
    marks = _marks(bins, threshold, tiling.block_size)
    blocks, dense = whole_pages(tiling, marks.sum(3, dtype=torch.int32), threshold)
    marks &= ~(blocks | dense[..., None])[..., None]
    return blocks, marks.flatten(2)[..., : bins.shape[2]]


@functools.lru_cache(maxsize=8)
def increments(device: torch.device) -> torch.Tensor:
    """int32 ``[MAX_CODE + 1]``: sampling probability, in 65536ths, by the number of bins below the threshold."""
    codes = torch.arange(MAX_CODE + 1, device=device)
    return torch.exp2(16 - codes.double() / BINS_PER_BIT).round_().int()


@functools.lru_cache(maxsize=8)
def noise_by_threshold(device: torch.device) -> torch.Tensor:
    """float32 ``[256, 256]``: variance of a row's output per squared share of a key, by the key's bin and the
    threshold. It is ``1 / p - 1`` for a key that is drawn with probability ``p`` and then weighted by ``1 / p``."""
    bins = torch.arange(256, device=device)
    return torch.exp2((bins - bins[:, None]).clamp(0, MAX_CODE).float() / BINS_PER_BIT) - 1


def sampled_keys(
    tiling: Tiling, bins: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each tile's keys at or above the threshold, and a sample of the keys below it.

    A key ``c`` bins below the threshold is drawn with probability ``p = 2 ** (-c / BINS_PER_BIT)``, proportional to its
    approximate weight, and then weighted by ``1 / p`` (Horvitz and Thompson 1952). The softmax's numerator and
    denominator are therefore unbiased, however inaccurate the scores are. The sample is systematic: probabilities are
    summed along the keys, and a key is drawn where the sum passes an integer. Equal bins give equal samples.

    Args:
        bins: uint8 ``[h, T, S]``, see ``tile_bins``.
        threshold: int32 ``[h]``, see ``ScoreBins``.

    Returns:
        Blocks (bool ``[h, T, N]``, see ``whole_pages``), single keys outside of them (bool ``[h, T, S]``), and the
        codes of all keys (uint8 ``[h, T, S]``, see ``SparseIndex.column_codes``).
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
