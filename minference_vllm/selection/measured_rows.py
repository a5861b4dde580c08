"""The calibration rows of ``low_rank``: rows of a chunk whose attention is computed exactly, and the threshold of score
bins that they need.

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
"""Maximum number of calibration rows of a chunk."""
FEW_ROWS, FEWER_ROWS = 16, 64
"""Short chunks measure one row in ``FEW_ROWS``, up to half of ``CALIBRATION_ROWS``; long chunks one in
``FEWER_ROWS``."""
MIN_ROWS = 16
"""Minimum number of calibration rows, even if their attention needs more than ``WEIGHTS_BYTES``."""
LAST_ROWS = 16
"""Number of calibration rows taken from the end of the chunk, where a prompt's question stands; a quarter at most."""
UNLIKE_ROWS = 64
"""Number of outlier rows, whose queries differ most from the others; half at most. A sample misses the few rows that
look where no other row looks."""
MOST_MISSED = 1.5
"""A single last or outlier row may miss this many times the share that the mean may miss."""
MOST_NOISE = 3.0
"""Where keys are sampled, the error of a single last or outlier row may be this many times the mean's limit. A stricter
limit would let the draw of one small key raise the number of keys of all tiles. At a noise of 0.025 a key with a
quarter of a row's attention is taken nine times out of ten."""
STANDARD_ERRORS = 2.5
"""Safety margin for the sampled rows: their mean must exceed the target by this many standard errors."""
LEAST_NORM, LARGEST_NORM = 1e-20, 1e20
"""See ``bounded``."""
WEIGHTS_BYTES = 512 << 20
"""Memory for the attention of a head's calibration rows in float32: 128 rows of a million keys."""


def least_of_a_row(gamma: float) -> float:
    """The attention share that each last or outlier row must keep."""
    return max(0.0, 1 - MOST_MISSED * (1 - gamma))


class CalibrationRows(NamedTuple):
    """The calibration rows of a chunk, chosen per head."""

    rows: torch.Tensor
    """int64 ``[h, R]``, ascending."""
    spread: torch.Tensor
    """int64 ``[h, n]``: indices into ``rows`` of the rows that sample the whole chunk."""
    others: tuple[torch.Tensor, ...]
    """Likewise for the last rows and the outlier rows. They are not a sample, so each group counts as it is."""
    errors: float = STANDARD_ERRORS
    """Safety margin of ``spread``, see ``STANDARD_ERRORS``."""

    def threshold(self, mass: torch.Tensor, gamma: float) -> torch.Tensor:
        """int32 ``[h]``: the lowest bin that must be selected so that every group keeps a share ``gamma`` of its
        attention on average, and no last or outlier row misses more than ``MOST_MISSED * (1 - gamma)``.

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
        """int32 ``[h]``: the highest bin below which keys may be sampled (``score_bins.sampled_keys``); 0: none.

        The expected error of the output (root mean square over a group's rows) stays within ``noise`` for every group,
        and within ``MOST_NOISE * noise`` for each last or outlier row. It is relative to the sum of weights times norms
        of values, which exceeds the norm of the output where values cancel.

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
        """int64 ``[h, n]``: the last and the outlier rows."""
        places = torch.cat(self.others, 1) if self.others else self.spread[:, :0]
        return self.rows.gather(1, places)


def _of_rows(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``[h, n, 256]``: the rows of ``[h, R, 256]`` at indices int64 ``[h, n]``."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))


class DrawnRows(NamedTuple):
    """The calibration rows that all heads share, and the number of each kind."""

    rows: torch.Tensor
    """int64 ``[sampled + last]``: a sample of all rows, and some of the last ones."""
    taken: torch.Tensor
    """bool ``[chunk]``: the same rows as a mask."""
    sampled: int
    last: int
    unlike: int
    """Number of outlier rows, which are chosen per head."""


@functools.lru_cache(maxsize=256)
def drawn_rows(chunk: int, length: int, device: torch.device) -> DrawnRows:
    """A stratified sample of a chunk's rows, one of each equal part at varying offsets, and every second of its last
    rows.

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
    """The drawn rows of a chunk together with its outlier rows.

    Args:
        unlike: float32 ``[h, chunk]``: how much each row differs from the others, see ``probe_queries.unlikeness``.
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
        keys: ``[h, n, D]`` each: the sequence in pieces.
        positions: int64 ``[h, R]``.
        softcap, window: see ``Inputs``.
    """
    query = query.float() * scale
    scores = cap_(joined([torch.matmul(query, piece.float().transpose(1, 2)) for piece in keys], -1), softcap)
    scores.masked_fill_(unseen(positions, scores.shape[-1], window), -torch.inf)
    return torch.softmax(scores, -1, out=scores)


def by_value(weights: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Each key's share of a row's output: its softmax weight times the norm of its value, normalised to sum to 1.

    Many heads put most of their weight on an attention sink, a key whose value is close to zero. By weight alone that
    key would use up the budget, and the keys that make up the output would be left out.

    Args:
        weights: float32 ``[h, R, S]``, softmax weights; overwritten.
        norms: float32 ``[h, S]``.
    """
    shares = weights.mul_(bounded(norms)[:, None])
    return shares.div_(shares.sum(-1, keepdim=True))


def bounded(norms: torch.Tensor) -> torch.Tensor:
    """Norms of values, clamped so that shares stay finite. If all values are zero, the weights alone count."""
    return norms.clamp(LEAST_NORM, LARGEST_NORM)


def joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """``torch.cat`` that does not copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
