"""Low-rank scores: which single keys some row of a query tile looks at.

A head that looks things up sends every row to a few keys of its own. No column, diagonal or whole block holds them, and
all query-key products, which find them, are half of what dense attention computes. To rank keys a few dimensions are
enough (Loki, arXiv 2406.02542; Double Sparsity, arXiv 2408.07092). Here they are those that keep the products of this
chunk's queries with this sequence's keys best, fitted anew for every head and chunk, so that nothing is trained or
stored. A key's level says how near it comes to the best of its tile's rows; how much of the attention the levels hold
is measured exactly, on sampled rows, so that poor scores cost keys and not recall.

Sizes: ``h`` query heads, ``T`` query tiles, ``S`` tokens in the sequence, ``D`` head size, ``r`` rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from minference_vllm.tiling import Tiling

PEAK_KEYS = 32
"""Keys whose largest score stands for all of them in the sum that a row's scores are measured by."""
LEVELS_PER_BIT = 6
"""Levels between a score and twice its exponential: 254 of them span 42 bits, or 29 nats."""
TOP_LEVEL = 254
OWN_LEVEL = 255
"""Level of the keys in a tile's own pages, which it always attends."""
CALIBRATION_ROWS = 64
"""Rows of a chunk on which the attention at each level is measured, at most."""
ROWS_PER_SAMPLE = 16
"""Short chunks measure one row in so many."""
LEAST_ROWS = 16
"""But as many at least, also where their attention takes more than ``WEIGHTS_BYTES``."""
MOST_QUERY, MOST_KEY = 63, 127
"""Largest elements of queries and keys as whole numbers: 2 * 63 * 255 fits 16 bits."""
MOST_PRODUCT = 24576
"""Largest product of theirs; the rest of 16 bits is for norms above it."""
KEY_NORM = 156
"""Length of the longest keys: near the square root of ``MOST_PRODUCT``, which makes rounding errors least."""
LEAST_RANGE = 40
"""Bits that ``MOST_PRODUCT`` stands for at least, also where no score comes near that."""
FIT_ROWS = 4096
"""Queries, and keys, from which dimensions are fitted, at most about."""
ITERATIONS = 8
ENOUGH = 1.0
"""Error of a score, in nats, below which more dimensions would not tell keys apart much better."""
WEIGHTS_BYTES = 64 << 20
"""Attention of a head's sampled rows."""


class Projection(NamedTuple):
    """Products of centred keys and queries in ``r`` dimensions: ``(query @ to_query) @ ((key - mean) @ to_key)``."""

    to_query: torch.Tensor
    """float32 ``[h, D, r]``."""
    to_key: torch.Tensor
    """float32 ``[h, D, r]``."""
    mean: torch.Tensor
    """float32 ``[h, 1, D]``. What all keys have in common changes no softmax."""


class Factors(NamedTuple):
    """Queries and keys in ``r`` dimensions, as whole numbers, so that products take a quarter of the time.

    The products have errors of a few thousandths of the largest that a row could have, at the most.
    """

    query: torch.Tensor
    """int8 ``[h, chunk, r]``, at most ``MOST_QUERY`` in size; the last row is the sequence's last token."""
    keys: torch.Tensor
    """int8 ``[h, S, r]``."""
    step: torch.Tensor
    """int16 ``[h, chunk]``: a product of a row counts for so many levels, times ``2 ** 15``."""

    def rows(self, rows: torch.Tensor) -> Factors:
        """Those of some rows of the chunk."""
        return Factors(self.query[:, rows], self.keys, self.step[:, rows])

    def bits(self) -> torch.Tensor:
        """float32 ``[h, chunk, 1]``: what a product of a row counts for."""
        return self.step.float().div_(LEVELS_PER_BIT << 15)[..., None]


def fit(query: torch.Tensor, keys: torch.Tensor, rank: int, enough: float | None = None) -> Projection:
    """The ``rank`` dimensions, or fewer if they are enough, that keep the products of queries and keys best in the mean
    square.

    With ``A`` the second moment of the queries and ``L L'`` that of the centred keys, they are the leading eigenvectors
    ``V`` of ``L' A L``: a query becomes ``V' L' q``, a key ``V' L^-1 k``, and in that eigenspace ``L^-T V`` is
    ``A L V (V' L' A L V)^-1``, which needs no inverse of ``L``.

    Args:
        query: ``[h, n, D]``. keys: ``[h, m, D]``.
        rank: at most ``D``.
        enough: root of the mean square of what products may lose; steps of 16 dimensions up to ``rank`` are tried.
            None: always ``rank``, so that nothing waits for a GPU.
    """
    query, keys = query.float(), keys.float()
    mean = keys.mean(1, keepdim=True)
    keys = keys - mean
    queries, spread = (((x.transpose(1, 2) @ x) / x.shape[1]).double() for x in (query, keys))
    dim = query.shape[2]
    identity = torch.eye(dim, dtype=torch.float64, device=query.device)
    root = torch.linalg.cholesky_ex(spread + _ridge(spread, 1e-6) * identity).L
    moment = root.transpose(1, 2) @ queries @ root
    # Orthogonal iteration from vectors that are orthogonal to nothing in particular.
    places = torch.arange(1, dim + 1, dtype=torch.float64, device=query.device)
    vectors = (places[:, None] * places[:rank] + places[:rank]).cos().expand(len(query), -1, -1)
    for _ in range(ITERATIONS):
        vectors = torch.linalg.qr(moment @ vectors).Q
    within = vectors.transpose(1, 2) @ moment @ vectors
    if enough is not None:
        total = moment.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        lost = (total - within.diagonal(dim1=1, dim2=2).cumsum(1))[:, 15:-1:16].amax(0)
        rank = next((16 * (step + 1) for step, rest in enumerate(lost.tolist()) if rest <= enough**2), rank)
        vectors, within = vectors[:, :, :rank], within[:, :rank, :rank]
    to_query = root @ vectors
    inverse = torch.linalg.inv_ex(within + _ridge(within, 1e-9) * identity[:rank, :rank]).inverse
    to_key = queries @ to_query @ inverse
    # Both are as large in every dimension, which rounding wants.
    balance = (within.diagonal(dim1=1, dim2=2).clamp(min=0) + _ridge(within, 1e-9)[..., 0]).pow(0.25)[:, None]
    return Projection((to_query / balance).float(), (to_key * balance).float(), mean)


def in_units(projection: Projection, sample: torch.Tensor) -> Projection:
    """The same products from keys of the size that ``whole_keys`` wants; ``sample`` is ``[h, n, D]``, some of them."""
    keys = torch.matmul(sample.float() - projection.mean, projection.to_key)
    longest = keys.norm(dim=2).amax(1) / KEY_NORM
    unit = torch.maximum(longest, keys.abs().amax((1, 2)) / MOST_KEY).clamp_(min=1e-20)[:, None, None]
    return Projection(projection.to_query * unit, projection.to_key / unit, projection.mean)


def whole_keys(keys: torch.Tensor, projection: Projection) -> torch.Tensor:
    """int8 ``[h, n, r]`` of keys ``[h, n, D]``. Keys longer than ``KEY_NORM`` are shortened to it."""
    low = torch.matmul(keys.float() - projection.mean, projection.to_key)
    low *= KEY_NORM / low.norm(dim=2, keepdim=True).clamp_(min=KEY_NORM)
    return low.round_().clamp_(-MOST_KEY, MOST_KEY).to(torch.int8)


def whole_queries(query: torch.Tensor, projection: Projection, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``Factors.query`` and ``Factors.step`` of queries ``[h, chunk, D]``."""
    low = torch.matmul(query.float(), projection.to_query).mul_(scale / math.log(2))
    most = (low.norm(dim=2) * KEY_NORM).clamp_(min=LEAST_RANGE) / MOST_PRODUCT
    unit = torch.maximum(most, low.abs().amax(2) / MOST_QUERY)
    step = (unit * (LEVELS_PER_BIT << 15)).ceil_()
    low *= (LEVELS_PER_BIT << 15) / step[..., None]
    return low.round_().to(torch.int8), step.clamp_(max=(1 << 15) - 1).to(torch.int16)


def _ridge(moment: torch.Tensor, share: float) -> torch.Tensor:
    """float64 ``[h, 1, 1]``: a share of the mean eigenvalue, above zero."""
    return (moment.diagonal(dim1=1, dim2=2).mean(1) * share + 1e-30)[:, None, None]


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


def calibration_rows(chunk: int, length: int, device: torch.device) -> torch.Tensor:
    """int64: one row of each of some equal parts of a chunk, at ever other places in them; of the last its last row."""
    room = min(WEIGHTS_BYTES // (4 * length), chunk // ROWS_PER_SAMPLE)
    count = min(chunk, CALIBRATION_ROWS, max(LEAST_ROWS, room))
    part = torch.arange(count, device=device)
    begin, end = part * chunk // count, (part + 1) * chunk // count
    rows = begin + (part.mul(0.618034).frac() * (end - begin)).long()
    rows[-1:] = chunk - 1
    return rows


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


def mass_by_level(levels: torch.Tensor, lists: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """float32 ``[h, 256]``: the mean share of rows' attention that lies on the keys of each level.

    Args:
        levels: uint8 ``[h, L, S]``.
        lists: int64 ``[R]``: which of the ``L`` holds each row's levels.
        weights: float32 ``[h, R, S]``.
    """
    mass = torch.zeros(*weights.shape[:2], 256, device=weights.device)
    return mass.scatter_add_(2, levels[:, lists].long(), weights).mean(1)


def row_mass(factors: Factors, rows: torch.Tensor, tiling: Tiling, weights: torch.Tensor) -> torch.Tensor:
    """``mass_by_level`` of some rows at the levels that they themselves give the keys.

    Args:
        rows: int64 ``[R]``, rows of the chunk, ascending.
        weights: float32 ``[h, R, S]``.
    """
    own = row_levels(factors.rows(rows), rows + tiling.context_len, tiling)
    return mass_by_level(own, torch.arange(len(rows)), weights)


def threshold(mass: torch.Tensor, gamma: float) -> torch.Tensor:
    """int32 ``[h]``: the level down to which a share ``gamma`` of the attention lies; ``mass`` is ``[h, 256]``."""
    covered = mass.flip(1).cumsum(1)
    return 255 - (covered >= gamma * covered[:, -1:]).int().argmax(1).int()


def joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """``torch.cat``, but one part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class Kernels(NamedTuple):
    """What may be replaced by faster code of the same meaning."""

    tile_levels: Callable[[Factors, Tiling, torch.Tensor], torch.Tensor] = tile_levels
    row_mass: Callable[[Factors, torch.Tensor, Tiling, torch.Tensor], torch.Tensor] = row_mass
    mass_by_level: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = mass_by_level
    row_weights: Callable[[torch.Tensor, Sequence[int]], torch.Tensor] | None = None
    """Of the chunk at hand: for rows (int64 ``[R]``, ascending) and query heads what ``row_weights`` gives for their
    queries and keys."""


def estimate(
    query: torch.Tensor,
    key_pieces: Callable[[], Iterable[torch.Tensor]],
    heads: Sequence[int],
    tiling: Tiling,
    rank: int,
    gamma: float,
    scale: float,
    kernels: Kernels = Kernels(),  # noqa: B008, it is immutable
    cheaper: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of every key for some heads, and how far down to go.

    A sampled row's keys are looked up twice: at the levels that the row itself gives them, which says what levels need
    not be told apart, and then at those of its tile, which are no lower.

    Args:
        query: ``[chunk, H, D]``; its last row is the sequence's last token.
        key_pieces: ``[HK, n, D]`` each, pieces that together are the sequence; called more than once.
        heads: query heads wanted.
        rank: dimensions; no more than the head has are used, and on CPUs no more than it needs (``ENOUGH``).
        gamma: share of the sampled rows' attention that is wanted.
        cheaper: levels from another source, uint8 ``[len(heads), T, S]``. They are taken where fewer keys than scoring
            costs hold as much on every head; to know that, a GPU is waited for.

    Returns:
        uint8 ``[len(heads), T, S]``, and int32 ``[len(heads)]``: the level from which on keys are wanted.
    """
    # A list as an index would be copied to a GPU, and waited for.
    by_head = torch.stack([query[:, head] for head in heads])

    def pieces(step: int = 1) -> Iterator[torch.Tensor]:
        for piece in key_pieces():
            group = query.shape[1] // piece.shape[0]
            runs = [(kv_head, len(list(run))) for kv_head, run in itertools.groupby(head // group for head in heads)]
            yield joined([piece[kv_head : kv_head + 1, ::step].expand(run, -1, -1) for kv_head, run in runs], 0)

    rows = calibration_rows(query.shape[0], tiling.seq_len, query.device)
    positions = rows + tiling.context_len
    if kernels.row_weights is None:
        weights = row_weights(by_head[:, rows], pieces(), positions, scale)
    else:
        weights = kernels.row_weights(rows, heads)
    tiles = torch.searchsorted(tiling.starts, positions, right=True) - 1
    rank = min(rank, query.shape[2])
    if cheaper is not None:
        wanted = threshold(kernels.mass_by_level(cheaper, tiles, weights), gamma)
        keys = (cheaper >= wanted[:, None, None].to(torch.uint8)).sum((1, 2))
        reach = tiling.reachable().sum() * tiling.block_size
        if bool(((wanted > 0) & (keys <= reach * rank / (2 * query.shape[2]))).all()):
            return cheaper, wanted

    queries = by_head[:, :: math.ceil(query.shape[0] / FIT_ROWS)]
    sample = joined(list(pieces(math.ceil(tiling.seq_len / FIT_ROWS))), 1)
    enough = ENOUGH / scale if query.device.type == "cpu" else None
    projection = in_units(fit(queries, sample, rank, enough), sample)
    whole = joined([whole_keys(piece, projection) for piece in pieces()], 1)
    low_query, step = whole_queries(by_head, projection, scale)
    factors = Factors(low_query, whole, step)
    # One less: kernels may round otherwise.
    lowest = threshold(kernels.row_mass(factors, rows, tiling, weights), gamma).sub_(1).clamp_(min=0)
    levels = kernels.tile_levels(factors, tiling, lowest)
    return levels, threshold(kernels.mass_by_level(levels, tiles, weights), gamma)
