"""Levels of keys: how near each comes to the best that a row, or a query tile, could look at; what lies at each level,
and which keys are wanted from one level up.

Sizes: ``h`` query heads, ``T`` query tiles, ``N`` key blocks (pages), ``S`` tokens in the sequence, ``r`` rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.projection import LEVELS_PER_BIT, Factors
from minference_vllm.selection.vertical_slash import DENSE_FROM

PEAK_KEYS = 32
"""Keys whose largest score stands for all of them in the sum that a row's scores are measured by."""
TOP_LEVEL = 254
OWN_LEVEL = 255
"""Level of the keys in a tile's own pages, which it always attends."""


class Levels(NamedTuple):
    """What an estimate says of some heads' keys."""

    of_keys: torch.Tensor
    """uint8 ``[h, T, S]``, see ``tile_levels``."""
    threshold: torch.Tensor
    """int32 ``[h]``: the level from which on keys are wanted; 0 means that levels do not tell them apart."""
    lists: Callable[[Tiling, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
    """Faster code for ``keys_at_levels`` and ``lists.single_keys`` in one, where columns need not fill pages."""
    scored: bool = True
    """Whether keys were scored, as ``low_rank.scoring_cost`` counts; else columns and diagonals sufficed."""


def norms(scores: torch.Tensor) -> torch.Tensor:
    """What rows' scores are measured by: the log-sum-exp of the largest of each ``PEAK_KEYS`` scores, close to the
    softmax's denominator for one exponential in so many.

    Args:
        scores: float32 ``[..., S]``, in bits; -inf where a row does not look.

    Returns:
        float32 ``[..., 1]``.
    """
    whole = scores.shape[-1] // PEAK_KEYS * PEAK_KEYS
    peaks = scores[..., :whole].unflatten(-1, (-1, PEAK_KEYS)).amax(-1)
    if whole < scores.shape[-1]:
        peaks = torch.cat([peaks, scores[..., whole:].amax(-1, keepdim=True)], -1)
    return peaks.mul_(math.log(2)).logsumexp(-1, keepdim=True).div_(math.log(2))


def as_levels(scores: torch.Tensor) -> torch.Tensor:
    """uint8: levels of scores (float32, in bits, overwritten) above their row's norm."""
    return scores.mul_(LEVELS_PER_BIT).add_(TOP_LEVEL).clamp_(0, TOP_LEVEL).round_().to(torch.uint8)


def tile_levels(factors: Factors, tiling: Tiling, lowest: torch.Tensor) -> torch.Tensor:
    """How near every key comes to the norm of a tile's rows; the row that rates it highest decides.

    Args:
        lowest: int32 ``[h]``: levels below are not wanted.

    Returns:
        uint8 ``[h, T, S]``: ``TOP_LEVEL + LEVELS_PER_BIT * (score - norm)``, rounded, 0 if below ``lowest``; of the
        tile's own pages ``OWN_LEVEL``, of later ones 0.
    """
    heads, length, _ = factors.keys.shape
    device, bits = factors.keys.device, factors.bits()
    levels = torch.zeros(heads, tiling.num_tiles, length, dtype=torch.uint8, device=device)
    for tile, (begin, end) in enumerate(itertools.pairwise(tiling.starts.tolist())):
        own = begin // tiling.tile * tiling.tile
        rows = slice(begin - tiling.context_len, end - tiling.context_len)
        future = torch.ones(end - begin, end - begin, dtype=torch.bool, device=device).triu_(1)
        for head in range(heads):
            scores = factors.query[head, rows].float() @ factors.keys[head, :end].float().T
            scores.mul_(bits[head, rows])[:, begin:].masked_fill_(future, -torch.inf)
            found = as_levels((scores[:, :own] - norms(scores)).amax(0))
            levels[head, tile, :own] = found.masked_fill_(found < lowest[head], 0)
        levels[:, tile, own:end] = OWN_LEVEL
    return levels


def row_levels(factors: Factors, positions: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """Levels that single rows give the keys: no higher than those of their tiles.

    Args:
        factors: ``Factors.rows`` of ``R`` rows.
        positions: int64 ``[R]``, theirs.

    Returns:
        uint8 ``[h, R, S]``.
    """
    places = torch.arange(factors.keys.shape[1], device=factors.keys.device)
    scores = torch.matmul(factors.query.float(), factors.keys.float().transpose(1, 2)).mul_(factors.bits())
    scores.masked_fill_(places > positions[:, None], -torch.inf)
    own = places >= (positions // tiling.tile * tiling.tile)[:, None]
    return as_levels(scores.sub_(norms(scores))).masked_fill_(own, OWN_LEVEL)


def mass_by_level(levels: torch.Tensor, lists: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """float32 ``[h, R, 256]``: the share of each row's attention that lies on the keys of each level.

    Args:
        levels: uint8 ``[h, L, S]``.
        lists: int64 ``[R]``: which of the ``L`` holds each row's levels.
        weights: float32 ``[h, R, S]``.
    """
    mass = torch.zeros(*weights.shape[:2], 256, device=weights.device)
    return mass.scatter_add_(2, levels[:, lists].long(), weights)


def row_mass(factors: Factors, rows: torch.Tensor, tiling: Tiling, weights: torch.Tensor) -> torch.Tensor:
    """``mass_by_level`` of some rows at the levels that they themselves give the keys.

    Args:
        rows: int64 ``[R]``, rows of the chunk, ascending.
        weights: float32 ``[h, R, S]``.
    """
    own = row_levels(factors.rows(rows), rows + tiling.context_len, tiling)
    return mass_by_level(own, torch.arange(len(rows), device=rows.device), weights)


def threshold(mass: torch.Tensor, gamma: float, errors: float = 0.0) -> torch.Tensor:
    """int32 ``[h]``: the level down to which rows have a share ``gamma`` of their attention, in the mean.

    Args:
        mass: float32 ``[h, R, 256]``, see ``mass_by_level``.
        errors: the mean less so many of its standard errors must reach ``gamma``, where the rows are a sample.
    """
    covered = mass.flip(2).cumsum(2)
    covered /= covered[..., -1:].clone()
    bound = covered.mean(1) - errors / math.sqrt(covered.shape[1]) * covered.std(1, correction=0)
    bound[:, -1] = 1.0
    return 255 - (bound >= gamma).int().argmax(1).int()


def page_counts(levels: torch.Tensor, threshold: torch.Tensor, block_size: int) -> torch.Tensor:
    """int32 ``[h, T, N]``: how many keys of each page reach the threshold.

    Args:
        levels: uint8 ``[h, T, S]``. threshold: int32 ``[h]``.
    """
    return _marks(levels, threshold, block_size).sum(3, dtype=torch.int32)


def _marks(levels: torch.Tensor, threshold: torch.Tensor, block_size: int) -> torch.Tensor:
    """bool ``[h, T, N, B]``: keys that reach the threshold."""
    heads, tiles, length = levels.shape
    marks = torch.zeros(heads, tiles, -(-length // block_size), block_size, dtype=torch.bool, device=levels.device)
    torch.ge(levels, threshold[:, None, None].to(torch.uint8), out=marks.flatten(2)[..., :length])
    return marks


def whole_pages(tiling: Tiling, counts: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of which half or more is wanted: attended in place they cost less than gathered keys.

    Args:
        counts: int32 ``[h, T, N]``, see ``page_counts``.
        threshold: int32 ``[h]``; 0 means that the levels do not tell the keys apart.

    Returns:
        bool ``[h, T, N]``; and bool ``[h]``: heads that need more than half of all keys, or whose threshold is 0. They
        have every reachable page.
    """
    size = tiling.block_size
    pages = (2 * counts >= size) | tiling.own()
    cost = torch.where(pages, size, counts).sum((1, 2))
    dense = (threshold == 0) | (cost > DENSE_FROM * size * tiling.reachable().sum())
    return torch.where(dense[:, None, None], tiling.reachable(), pages), dense


def keys_at_levels(tiling: Tiling, levels: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each tile's keys from one level up.

    Args:
        levels: uint8 ``[h, T, S]``, see ``tile_levels``.
        threshold: int32 ``[h]``.

    Returns:
        blocks (bool ``[h, T, N]``, see ``whole_pages``) and single keys (bool ``[h, T, S]``), none in a block.
    """
    # The largest tensor by far: marks are made and taken back in place.
    marks = _marks(levels, threshold, tiling.block_size)
    blocks, dense = whole_pages(tiling, marks.sum(3, dtype=torch.int32), threshold)
    marks &= ~(blocks | dense[:, None, None])[..., None]
    return blocks, marks.flatten(2)[..., : levels.shape[2]]
