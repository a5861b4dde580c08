"""``low_rank``: which single keys some row of a query tile looks at.

A head that looks things up sends every row to a few keys of its own. No column, diagonal or whole block holds them, and
all query-key products, which find them, are half of what dense attention computes. To rank keys a few dimensions are
enough (Loki, arXiv 2406.02542; Double Sparsity, arXiv 2408.07092). A key's level says how near it comes to the best of
its tile's rows; how much of the attention the levels hold is measured exactly, on sampled rows, so that poor scores
cost keys and not recall.

Sizes: ``h`` query heads, ``T`` query tiles, ``S`` tokens in the sequence, ``D`` head size, ``r`` rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection import score_bins as levels
from minference_vllm.selection.projection import Factors, fit, in_units, whole_keys, whole_queries
from minference_vllm.selection.score_bins import Levels
from minference_vllm.selection.vertical_slash import line_worth

CALIBRATION_ROWS = 64
"""Rows of a chunk on which the attention at each level is measured, at most."""
ROWS_PER_SAMPLE = 16
"""Short chunks measure one row in so many."""
LEAST_ROWS = 16
"""But as many at least, also where their attention takes more than ``WEIGHTS_BYTES``."""
LAST_ROWS = 16
"""Of these rows so many, but no more than a quarter, are among the chunk's last, where a prompt's question stands."""
STANDARD_ERRORS = 3.0
"""How far the mean of the other rows, which are a sample, must lie above what is wanted."""
FIT_ROWS = 4096
"""Queries, and keys, from which dimensions are fitted, at most about."""
ENOUGH = 1.0
"""Error of a score, in nats, below which more dimensions would not tell keys apart much better."""
WEIGHTS_BYTES = 64 << 20
"""Attention of a head's sampled rows."""
ROWS_FOR_KEYS = 200
"""Rows whose attention takes as long as the fit, the keys in few dimensions and what lies at their levels (measured on
AVX2)."""


def scoring_cost(rank: int, head_size: int, chunk: int, device: torch.device) -> float:
    """What scoring a chunk costs, as a share of what dense attention takes for it: ``rank`` of ``2 * head_size``
    products. On CPUs those of whole numbers take half of the time, and what is done once for every key as long as the
    attention of ``ROWS_FOR_KEYS`` rows."""
    share = rank / (2 * head_size)
    return share / 2 + min(1.0, ROWS_FOR_KEYS / chunk) if device.type == "cpu" else share


class CalibrationRows(NamedTuple):
    """Rows of a chunk whose attention is measured."""

    rows: torch.Tensor
    """int64 ``[R]``, ascending; the last one is the chunk's last."""
    last: int
    """So many in the end speak for the chunk's last rows, the others for all."""

    def threshold(self, mass: torch.Tensor, gamma: float) -> torch.Tensor:
        """int32 ``[h]``: the level down to which both groups have a share ``gamma`` of their attention.

        Args:
            mass: float32 ``[h, R, 256]``, see ``levels.mass_by_level``.
        """
        spread = mass.shape[1] - self.last
        found = levels.threshold(mass[:, :spread], gamma, STANDARD_ERRORS)
        return torch.minimum(found, levels.threshold(mass[:, spread:], gamma)) if self.last else found


def calibration_rows(chunk: int, length: int, device: torch.device) -> CalibrationRows:
    """One row of each of some equal parts of a chunk, at ever other places in them, and every second of its last."""
    room = min(WEIGHTS_BYTES // (4 * length), chunk // ROWS_PER_SAMPLE)
    count = min(chunk, CALIBRATION_ROWS, max(LEAST_ROWS, room))
    last = min(LAST_ROWS, count // 4)
    before = chunk - 2 * last
    parts = min(count - last, before)
    part = torch.arange(parts, device=device)
    begin, end = part * before // parts, (part + 1) * before // parts
    spread = begin + (part.mul(0.618034).frac() * (end - begin)).long()
    return CalibrationRows(torch.cat([spread, before + 1 + 2 * torch.arange(last, device=device)]), last)


def row_weights(
    query: torch.Tensor, keys: Iterable[torch.Tensor], positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """float32 ``[h, R, S]``: softmax weights of some rows.

    Args:
        query: ``[h, R, D]``.
        keys: ``[h, n, D]`` each, pieces that together are the sequence.
        positions: int64 ``[R]``.
    """
    query = query.float() * scale
    found = [torch.matmul(query, piece.float().transpose(1, 2)) for piece in keys]
    scores = joined(found, -1)
    scores.masked_fill_(torch.arange(scores.shape[-1], device=query.device) > positions[:, None], -torch.inf)
    return torch.softmax(scores, -1, out=scores)


def line_levels(tiling: Tiling, by_column: torch.Tensor, by_offset: torch.Tensor) -> torch.Tensor:
    """Levels of keys, as ``levels.tile_levels`` gives them, by columns and diagonals alone.

    A key counts by what ``selection.coverage`` takes it for: its share of the attention as a token of a page at this
    distance from the tile, or as a column.

    Args:
        by_column, by_offset: float32 ``[h, S]``, see ``index.Scores.last_query``.

    Returns:
        uint8 ``[h, T, S]``.
    """
    worth = line_worth(tiling, by_column, by_offset)
    distance, size = tiling.distance(), tiling.block_size
    before = (distance > 0).to(torch.uint8)
    by_distance, of_column = (levels.as_levels(part.log2()) for part in (worth.of_distance, worth.alone))
    pages = by_distance[:, distance.clamp(min=1) - 1] * before
    pages[:, tiling.own()] = levels.OWN_LEVEL
    missing = tiling.num_key_blocks * size - tiling.seq_len
    columns = torch.nn.functional.pad(of_column, (0, missing)).view(len(of_column), 1, -1, size)
    found = torch.maximum(pages[..., None], columns * before[..., None])
    return found.flatten(2)[..., : tiling.seq_len].contiguous()


def joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """``torch.cat``, but one part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class Kernels(NamedTuple):
    """What may be replaced by faster code of the same meaning."""

    tile_levels: Callable[[Factors, Tiling, torch.Tensor], torch.Tensor] = levels.tile_levels
    row_mass: Callable[[Factors, torch.Tensor, Tiling, torch.Tensor], torch.Tensor] = levels.row_mass
    mass_by_level: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = levels.mass_by_level
    page_counts: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = levels.page_counts
    lists: Callable[[Tiling, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
    """See ``Levels``."""
    row_weights: Callable[[torch.Tensor, Sequence[int]], torch.Tensor] | None = None
    """Of the chunk at hand: for rows (int64 ``[R]``, ascending) and query heads what ``row_weights`` gives for their
    queries and keys."""


def needed_keys(weights: torch.Tensor, gamma: float, kernels: Kernels) -> torch.Tensor:
    """float32 ``[h]``: how many keys hold a share ``gamma`` of a row's attention, if every row has its own; the mean.

    Args:
        weights: float32 ``[h, R, S]``.
    """
    rows = torch.arange(weights.shape[1], device=weights.device)
    found = levels.as_levels(weights.clamp(min=1e-20).log2_())
    wanted = levels.threshold(kernels.mass_by_level(found, rows, weights), gamma)
    return kernels.page_counts(found, wanted, weights.shape[2]).sum(2).float().mean(1)


def estimate(
    query: torch.Tensor,
    key_pieces: Callable[[], Iterable[torch.Tensor]],
    heads: Sequence[int],
    tiling: Tiling,
    rank: int,
    gamma: float,
    scale: float,
    kernels: Kernels = Kernels(),  # noqa: B008, it is immutable
    lines: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Levels:
    """Levels of every key for some heads, and how far down to go.

    Columns and diagonals are tried first, where they are given: where so few keys hold the wanted share of the sampled
    rows' attention that scoring would cost more than it could save, on all heads, nothing is scored.

    A sampled row's keys are looked up twice: at the levels that the row itself gives them, which says what levels need
    not be told apart, and then at those of its tile, which are no lower.

    Args:
        query: ``[chunk, H, D]``; its last row is the sequence's last token.
        key_pieces: ``[HK, n, D]`` each, pieces that together are the sequence; called more than once.
        heads: query heads wanted.
        rank: dimensions; no more than the head has are used.
        gamma: share of the rows' attention that is wanted; ``CalibrationRows`` says of which rows.
        lines: mass of every column and diagonal, see ``index.Scores.last_query``. None: all heads are scored, in
            ``rank`` dimensions, and nothing waits for a GPU. Otherwise no more dimensions are used than the head needs
            (``ENOUGH``).
    """
    # A list as an index would be copied to a GPU, and waited for.
    by_head = torch.stack([query[:, head] for head in heads])

    def pieces(step: int = 1) -> Iterator[torch.Tensor]:
        for piece in key_pieces():
            group = query.shape[1] // piece.shape[0]
            runs = [(kv_head, len(list(run))) for kv_head, run in itertools.groupby(head // group for head in heads)]
            yield joined([piece[kv_head : kv_head + 1, ::step].expand(run, -1, -1) for kv_head, run in runs], 0)

    sample = calibration_rows(query.shape[0], tiling.seq_len, query.device)
    rows = sample.rows
    positions = rows + tiling.context_len
    if kernels.row_weights is None:
        weights = row_weights(by_head[:, rows], pieces(), positions, scale)
    else:
        weights = kernels.row_weights(rows, heads)
    tiles = torch.searchsorted(tiling.starts, positions, right=True) - 1
    rank = min(rank, query.shape[2])
    if lines is not None:
        cost = scoring_cost(rank, query.shape[2], query.shape[0], query.device)
        cost *= float(tiling.reachable().sum()) * tiling.block_size
        by_line = line_levels(tiling, *lines)
        wanted = sample.threshold(kernels.mass_by_level(by_line, tiles, weights), gamma)
        keys = kernels.page_counts(by_line, wanted, tiling.block_size).sum((1, 2))
        most_saved = keys - tiling.num_tiles * needed_keys(weights[:, ::8], gamma, kernels)
        if bool(((wanted > 0) & (most_saved <= cost)).all()):
            return Levels(by_line, wanted, kernels.lists, scored=False)

    queries = by_head[:, :: math.ceil(query.shape[0] / FIT_ROWS)]
    # Copies: views would keep all keys.
    some_keys = joined([piece.clone() for piece in pieces(math.ceil(tiling.seq_len / FIT_ROWS))], 1)
    projection = in_units(fit(queries, some_keys, rank, None if lines is None else ENOUGH / scale), some_keys)
    whole = joined([whole_keys(piece, projection) for piece in pieces()], 1)
    low_query, step = whole_queries(by_head, projection, scale)
    factors = Factors(low_query, whole, step)
    # One less: kernels may round otherwise.
    lowest = sample.threshold(kernels.row_mass(factors, rows, tiling, weights), gamma).sub_(1).clamp_(min=0)
    found = kernels.tile_levels(factors, tiling, lowest)
    wanted = sample.threshold(kernels.mass_by_level(found, tiles, weights), gamma)
    # Standard errors need not fall where every row has more: but what suffices the rows themselves does.
    return Levels(found, torch.maximum(wanted, lowest), kernels.lists)
