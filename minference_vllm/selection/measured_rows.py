"""The rows of a chunk whose exact attention ``low_rank`` measures, and how far down the bins they need keys.

Sizes: ``h`` query heads of size ``D``, ``R`` measured rows, ``S`` tokens in the sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from minference_vllm.selection import score_bins
from minference_vllm.selection.probe_queries import cap_, most_unlike, unseen

CALIBRATION_ROWS = 128
"""Rows of a chunk whose exact attention in each bin is measured, at most."""
FEW_ROWS, FEWER_ROWS = 16, 64
"""Short chunks measure one row in ``FEW_ROWS``, those of more than half of ``CALIBRATION_ROWS`` one in
``FEWER_ROWS``."""
MIN_ROWS = 16
"""At least so many are measured, also where their attention takes more than ``WEIGHTS_BYTES``."""
LAST_ROWS = 16
"""So many of the measured rows, but no more than a quarter, are among the chunk's last, where a prompt's question
stands."""
UNLIKE_ROWS = 64
"""So many, but no more than half, are rows whose queries are unlike the others': a few rows that look where no
other row looks are in no sample."""
MOST_MISSED = 1.5
"""A single one of the last and the unlike rows may miss so many times what their mean may."""
MOST_NOISE = 3.0
"""Where keys are sampled, such a row may err so many times as much as their mean: that the draw of one small key
decides of it is no reason to draw more of all. At a noise of 0.025 a key with a quarter of it is taken nine times of
ten."""
STANDARD_ERRORS = 2.5
"""How far the mean of the other rows, which are a sample, must lie above what is wanted."""
LEAST_NORM, LARGEST_NORM = 1e-20, 1e20
"""See ``bounded``."""
WEIGHTS_BYTES = 512 << 20
"""Attention of a head's measured rows, as float32: 128 rows of a million keys."""


def least_of_a_row(gamma: float) -> float:
    """The share that every single one of the last and the unlike rows must have."""
    return max(0.0, 1 - MOST_MISSED * (1 - gamma))


class CalibrationRows(NamedTuple):
    """Rows of a chunk whose attention is measured, of each head its own."""

    rows: torch.Tensor
    """int64 ``[h, R]``, ascending."""
    spread: torch.Tensor
    """int64 ``[h, n]``: places in ``rows`` of a sample of all rows."""
    others: tuple[torch.Tensor, ...]
    """Likewise, of groups that speak for themselves: some of the last rows, and those most unlike the others."""
    errors: float = STANDARD_ERRORS
    """So many standard errors the mean of the sample must lie above what is wanted."""

    def threshold(self, mass: torch.Tensor, gamma: float) -> torch.Tensor:
        """int32 ``[h]``: the bin down to which every group has a share ``gamma`` of its attention, and no row of the
        last and the unlike ones misses ``MOST_MISSED`` times as much.

        Args:
            mass: float32 ``[h, R, 256]``, see ``score_bins.mass_by_bin``.
        """
        share = score_bins.covered(mass)
        means = [score_bins.mean_share(_of_rows(share, self.spread), self.errors)]
        means += [score_bins.mean_share(_of_rows(share, group)) for group in self.others]
        found = score_bins.lowest_bin(torch.stack(means), gamma).amin(0)
        if not self.others:
            return found
        of_rows = score_bins.lowest_bin(_of_rows(share, torch.cat(self.others, 1)).amin(1), least_of_a_row(gamma))
        return torch.minimum(found, of_rows)

    def sampling_threshold(self, squares: torch.Tensor, noise: float) -> torch.Tensor:
        """int32 ``[h]``: the highest bin below which keys may be sampled (``score_bins.sampled_keys``), so that the
        output of every group errs no more than that, as a share of itself and root of the mean square over its rows,
        and no row of the last and the unlike ones ``MOST_NOISE`` times as much; 0 where there is none.

        Args:
            squares: float32 ``[h, R, 256]``, of shares, see ``score_bins.mass_by_bin``.
        """
        variance = squares @ score_bins.noise_by_threshold(squares.device)
        spread, limit = _of_rows(variance, self.spread), noise**2
        suffices = score_bins.mean_share(-spread, self.errors) >= -limit
        for group in self.others:
            suffices &= _of_rows(variance, group).mean(1) <= limit
        if self.others:
            suffices &= _of_rows(variance, torch.cat(self.others, 1)).amax(1) <= MOST_NOISE**2 * limit
        return suffices[:, 1 : score_bins.TOP_BIN + 1].cumprod(1).sum(1, dtype=torch.int32)

    def alone(self) -> torch.Tensor:
        """int64 ``[h, n]``: rows of the groups that speak for themselves."""
        places = torch.cat(self.others, 1) if self.others else self.spread[:, :0]
        return self.rows.gather(1, places)


def _of_rows(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``[h, n, 256]``: of ``[h, R, 256]`` the rows at some places, int64 ``[h, n]``."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))


class DrawnRows(NamedTuple):
    """The measured rows that are the same for all heads, and how many there are of each kind."""

    rows: torch.Tensor
    """int64 ``[sampled + last]``: a sample of all rows, and some of the last ones."""
    taken: torch.Tensor
    """bool ``[chunk]``: those."""
    sampled: int
    last: int
    unlike: int
    """Rows most unlike the others, which every head has for itself."""


@functools.lru_cache(maxsize=256)
def drawn_rows(chunk: int, length: int, device: torch.device) -> DrawnRows:
    """One row of each of some equal parts of a chunk, at ever other places in them; and every second of its last.

    Args:
        length: tokens in the sequence.
    """
    wanted = max(min(CALIBRATION_ROWS // 2, chunk // FEW_ROWS), min(CALIBRATION_ROWS, chunk // FEWER_ROWS))
    count = min(chunk, max(MIN_ROWS, min(wanted, WEIGHTS_BYTES // (4 * length))))
    last, most = min(LAST_ROWS, count // 4), min(UNLIKE_ROWS, count // 2)
    before = chunk - 2 * last
    parts = min(count - last - most, before)
    part = torch.arange(parts, device=device)
    begin, end = part * before // parts, (part + 1) * before // parts
    spread = begin + (part.mul(0.618034).frac() * (end - begin)).long()
    rows = torch.cat([spread, before + 1 + 2 * torch.arange(last, device=device)])
    taken = torch.zeros(chunk, dtype=torch.bool, device=device).index_fill_(0, rows, True)
    return DrawnRows(rows, taken, parts, last, most)


def calibration_rows(unlike: torch.Tensor, length: int) -> CalibrationRows:
    """The drawn rows of a chunk, and the ones most unlike the others.

    Args:
        unlike: float32 ``[h, chunk]``: how unlike the others each row is, see ``probe_queries.unlikeness``.
        length: tokens in the sequence.
    """
    drawn = drawn_rows(unlike.shape[1], length, unlike.device)
    found = [drawn.rows.expand(len(unlike), -1), most_unlike(unlike, drawn.unlike, drawn.rows)]
    rows, order = torch.cat(found, 1).sort(1)
    sample, *others = order.argsort(1).split([drawn.sampled, drawn.last, drawn.unlike], 1)
    return CalibrationRows(rows, sample, tuple(group for group in others if group.shape[1]))


def row_weights(
    query: torch.Tensor,
    keys: Iterable[torch.Tensor],
    positions: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """float32 ``[h, R, S]``: softmax weights of some rows.

    Args:
        query: ``[h, R, D]``.
        keys: ``[h, n, D]`` each, pieces that together are the sequence.
        positions: int64 ``[h, R]``.
        softcap, window: see ``Inputs``.
    """
    query = query.float() * scale
    scores = cap_(joined([torch.matmul(query, piece.float().transpose(1, 2)) for piece in keys], -1), softcap)
    scores.masked_fill_(unseen(positions, scores.shape[-1], window), -torch.inf)
    return torch.softmax(scores, -1, out=scores)


def by_value(weights: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Each key's share of what a row's output is made of: its weight times the norm of its value, summing to 1.

    Many heads put most of their weight on one key (an attention sink) whose value is close to zero. By weight alone
    that key would use up the budget, and the keys that make the output would be left out.

    Args:
        weights: float32 ``[h, R, S]``, softmax weights; overwritten.
        norms: float32 ``[h, S]``.
    """
    shares = weights.mul_(bounded(norms)[:, None])
    return shares.div_(shares.sum(-1, keepdim=True))


def bounded(norms: torch.Tensor) -> torch.Tensor:
    """Norms of values as shares count them. Where all values are zero the weights alone count; norms that float32 does
    not hold count as its largest."""
    return norms.clamp(LEAST_NORM, LARGEST_NORM)


def joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """``torch.cat``, but one part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
