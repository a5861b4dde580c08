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

PEAK_KEYS = 128
"""Keys whose largest score stands for all of them in the sum that a row's scores are measured by."""
LEVELS_PER_NAT = 8
OWN_LEVEL = 255
"""Level of the keys in a tile's own pages, which it always attends. 0: further below than the levels reach."""
CALIBRATION_ROWS = 64
"""Rows of a chunk on which the attention at each level is measured."""
FIT_ROWS = 4096
"""Queries, and keys, from which dimensions are fitted, at most about."""
ITERATIONS = 8


class Projection(NamedTuple):
    """Products of centred keys and queries in ``r`` dimensions: ``(query @ to_query) @ ((key - mean) @ to_key)``."""

    to_query: torch.Tensor
    """float32 ``[h, D, r]``."""
    to_key: torch.Tensor
    """float32 ``[h, D, r]``."""
    mean: torch.Tensor
    """float32 ``[h, 1, D]``. What all keys have in common changes no softmax."""


def fit(query: torch.Tensor, keys: torch.Tensor, rank: int) -> Projection:
    """The ``rank`` dimensions that keep the products of queries and keys best in the mean square.

    With ``A`` the second moment of the queries and ``L L'`` that of the centred keys, they are the leading eigenvectors
    ``V`` of ``L' A L``: a query becomes ``V' L' q``, a key ``V' L^-1 k``, and in that eigenspace ``L^-T V`` is
    ``A L V (V' L' A L V)^-1``, which needs no inverse of ``L``. Nothing waits for a GPU.

    Args:
        query: ``[h, n, D]``. keys: ``[h, m, D]``.
        rank: at most ``D``.
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
    to_query = root @ vectors
    within = vectors.transpose(1, 2) @ moment @ vectors
    inverse = torch.linalg.inv_ex(within + _ridge(within, 1e-9) * identity[:rank, :rank]).inverse
    return Projection(to_query.float(), (queries @ to_query @ inverse).float(), mean)


def _ridge(moment: torch.Tensor, share: float) -> torch.Tensor:
    """float64 ``[h, 1, 1]``: a share of the mean eigenvalue, above zero."""
    return (moment.diagonal(dim1=1, dim2=2).mean(1) * share + 1e-30)[:, None, None]


def tile_levels(query: torch.Tensor, keys: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """How near every key comes to the best of a tile's rows.

    A row's scores are measured by ``norm``, the log-sum-exp of the largest score of each ``PEAK_KEYS`` keys: close to
    its softmax's denominator, for one exponential in so many. A key counts by the row that rates it highest.

    Args:
        query: bf16 ``[h, chunk, r]``, softmax scale included; its last row is the sequence's last token.
        keys: bf16 ``[h, S, r]``.

    Returns:
        uint8 ``[h, T, S]``: ``254 + LEVELS_PER_NAT * max over rows of (score - norm)``, rounded down, 0 to 254; of the
        tile's own pages ``OWN_LEVEL``, of later ones 0.
    """
    heads, length, _ = keys.shape
    levels = torch.zeros(heads, tiling.num_tiles, length, dtype=torch.uint8, device=query.device)
    borders = borders_of(tiling)
    for tile in range(tiling.num_tiles):
        begin, end = borders[tile], borders[tile + 1]
        own = begin // tiling.tile * tiling.tile
        rows = query[:, begin - tiling.context_len : end - tiling.context_len].float()
        for head in range(heads):
            scores = rows[head] @ keys[head, :end].float().T
            scores[:, begin:].masked_fill_(_future(end - begin, query.device), -torch.inf)
            padded = torch.nn.functional.pad(scores, (0, -end % PEAK_KEYS), value=-torch.inf)
            norm = padded.unflatten(1, (-1, PEAK_KEYS)).amax(2).logsumexp(1, keepdim=True)
            best = (scores[:, :own] - norm).amax(0)
            levels[head, tile, :own] = best.mul_(LEVELS_PER_NAT).add_(254).floor_().clamp_(0, 254).to(torch.uint8)
        levels[:, tile, own:end] = OWN_LEVEL
    return levels


def calibration_rows(chunk: int, device: torch.device) -> torch.Tensor:
    """int64: one row of each of up to ``CALIBRATION_ROWS`` equal parts of the chunk, at ever other places in them, and
    its last row."""
    count = min(CALIBRATION_ROWS, chunk)
    part = torch.arange(count, dtype=torch.float64, device=device)
    rows = ((part + part.mul(0.618034).frac()) * chunk / count).long()
    rows[-1:] = chunk - 1
    return rows


def _future(rows: int, device: torch.device) -> torch.Tensor:
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu_(1)


def borders_of(tiling: Tiling) -> list[int]:
    """``tiling.starts``, from numbers that the host knows."""
    first = tiling.context_len // tiling.tile
    inner = [(first + tile) * tiling.tile for tile in range(1, tiling.num_tiles)]
    return [tiling.context_len, *inner, tiling.seq_len]


def mass_by_level(
    query: torch.Tensor,
    keys: Iterable[torch.Tensor],
    levels: torch.Tensor,
    rows: torch.Tensor,
    tiling: Tiling,
    scale: float,
) -> torch.Tensor:
    """The share of sampled rows' exact attention that lies on the keys of each level.

    Args:
        query: ``[h, chunk, D]``.
        keys: ``[h, n, D]`` each, pieces that together are the sequence.
        levels: see ``tile_levels``.
        rows: int64 ``[R]``, rows of the chunk.

    Returns:
        float32 ``[h, 256]``, summing to 1.
    """
    positions = rows + tiling.context_len
    tiles = torch.searchsorted(tiling.starts, positions, right=True) - 1
    sampled = query[:, rows].float()
    # An online softmax, of all levels at once.
    largest = torch.full((*sampled.shape[:2], 1), -torch.inf, device=query.device)
    mass = torch.zeros(*sampled.shape[:2], 256, device=query.device)
    first = 0
    for piece in keys:
        last = first + piece.shape[1]
        scores = torch.matmul(sampled, piece.float().transpose(1, 2)).mul_(scale)
        scores.masked_fill_(torch.arange(first, last, device=query.device) > positions[:, None], -torch.inf)
        # Every row sees the first key of the sequence, so this is never -inf.
        new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
        mass.mul_((largest - new_largest).exp_())
        mass.scatter_add_(2, levels[:, tiles, first:last].long(), scores.sub_(new_largest).exp_())
        largest, first = new_largest, last
    return (mass / mass.sum(-1, keepdim=True)).mean(1)


def estimate(
    query: torch.Tensor,
    key_pieces: Callable[[], Iterable[torch.Tensor]],
    heads: Sequence[int],
    tiling: Tiling,
    rank: int,
    scale: float,
    levels_of: Callable[[torch.Tensor, torch.Tensor, Tiling], torch.Tensor] = tile_levels,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of every key, and the attention at each level, of some heads.

    Args:
        query: ``[chunk, H, D]``; its last row is the sequence's last token.
        key_pieces: ``[HK, n, D]`` each, pieces that together are the sequence; called more than once.
        heads: query heads wanted.
        rank: dimensions; no more than the head has are used.
        levels_of: ``tile_levels``, or a kernel for it.

    Returns:
        uint8 ``[len(heads), T, S]`` and float32 ``[len(heads), 256]``.
    """
    # A list as an index would be copied to a GPU, and waited for.
    by_head = torch.stack([query[:, head] for head in heads])

    def pieces(step: int = 1) -> Iterator[torch.Tensor]:
        for piece in key_pieces():
            group = query.shape[1] // piece.shape[0]
            runs = [(kv_head, len(list(run))) for kv_head, run in itertools.groupby(head // group for head in heads)]
            yield torch.cat([piece[kv_head : kv_head + 1, ::step].expand(run, -1, -1) for kv_head, run in runs])

    queries = by_head[:, :: math.ceil(query.shape[0] / FIT_ROWS)]
    sample = torch.cat(list(pieces(math.ceil(tiling.seq_len / FIT_ROWS))), 1)
    projection = fit(queries, sample, min(rank, query.shape[2]))
    low_query = torch.matmul(by_head.float(), projection.to_query).mul_(scale).bfloat16()
    centred = (piece.float() - projection.mean for piece in pieces())
    low_keys = torch.cat([torch.matmul(keys, projection.to_key).bfloat16() for keys in centred], 1)
    levels = levels_of(low_query, low_keys, tiling)
    rows = calibration_rows(query.shape[0], query.device)
    return levels, mass_by_level(by_head, pieces(), levels, rows, tiling, scale)
