"""Columns and diagonals of a head's attention, as a few probe queries of the chunk see them (MInference, arXiv
2407.02490, Algorithm 1).

Sizes: ``h`` query heads asked for, ``H`` query heads over ``HK`` KV heads of size ``D``, ``S`` tokens in the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

PROBE_QUERIES = 64
"""Queries of a chunk that choose its columns and diagonals."""
PROBE_GROUPS = 4
"""Groups of those queries that must agree on a diagonal."""
SPREAD_GROUP = 8
"""Queries in each group but the last, where the groups are spread over the chunk."""
SPREAD_FROM = 256
"""Rows from which on a chunk's groups are spread."""


def probe_groups(chunk: int) -> tuple[tuple[int, int], ...]:
    """Rows ``[begin, end)`` of each group of the queries that choose a chunk's columns and diagonals, ascending.

    Three groups of 8 queries, a quarter, a half and three quarters through the chunk, and its last 40 queries. The last
    ones alone, as in MInference, speak for a question at the prompt's end, but not for rows before it that look
    elsewhere (docs/patterns.md). Chunks shorter than 256 rows use their last 64, in four neighbouring groups.
    """
    if chunk < SPREAD_FROM:
        rows = min(PROBE_QUERIES, chunk)
        groups = min(PROBE_GROUPS, rows)
        borders = [chunk - rows + group * rows // groups for group in range(groups + 1)]
        return tuple(itertools.pairwise(borders))
    ends = [chunk * group // PROBE_GROUPS for group in range(1, PROBE_GROUPS)]
    return (*((end - SPREAD_GROUP, end) for end in ends), (chunk - PROBE_QUERIES + SPREAD_GROUP * len(ends), chunk))


def unlikeness(query: torch.Tensor) -> torch.Tensor:
    """float32 ``[h, chunk]``: squared distance of each query from the head's mean query, scaled to mean 1.

    Outlier rows may look where no other row looks, and a random sample of rows misses them.

    Args:
        query: ``[h, chunk, D]``.
    """
    rows = query.float()
    distance = torch.linalg.vector_norm(rows - rows.mean(1, keepdim=True), dim=2).square_()
    return (distance / distance.mean(1, keepdim=True).clamp_min(1e-20)).nan_to_num_(0.0)


def most_unlike(unlikeness: torch.Tensor, count: int, taken: torch.Tensor) -> torch.Tensor:
    """int64 ``[h, count]``, ascending: the largest outlier of each of ``count`` equal parts of a chunk.

    Args:
        unlikeness: float32 ``[h, chunk]``, at least 0.
        count: at most half of the chunk's rows.
        taken: int64 ``[n]``, rows that others have named; one comes only where its part has no other.
    """
    chunk, device = unlikeness.shape[1], unlikeness.device
    borders = torch.arange(count + 1, device=device) * chunk // max(1, count)
    rows = borders[:-1, None] + torch.arange(-(-chunk // max(1, count)), device=device)
    unlike = unlikeness.index_fill(1, taken, -1.0)[:, rows.clamp(max=chunk - 1)]  # [h, count, rows of a part]
    return unlike.masked_fill_(rows >= borders[1:, None], -2.0).argmax(2) + borders[:-1]


def unseen(positions: torch.Tensor, length: int, window: int = 0) -> torch.Tensor:
    """bool ``[..., length]``: keys that rows at these positions do not see: later keys, and keys before the window.

    Args:
        window: see ``Inputs``.
    """
    places = torch.arange(length, device=positions.device)
    hidden = places > positions[..., None]
    return hidden | (places <= positions[..., None] - window) if window else hidden


def cap_(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """Soft-cap scores ``s`` to ``softcap * tanh(s / softcap)``, in place; 0: no cap."""
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def logits(query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float = 0.0) -> torch.Tensor:
    """float32 ``[..., R, S]``: scaled products of ``query [..., R, D]`` and ``keys [..., S, D]``, with a soft cap.

    CPUs multiply in float32, since few of them multiply bf16 or fp16 at any speed.
    """
    if not query.is_cuda:
        query, keys = query.float(), keys.float()
    return cap_(torch.matmul(query, keys.transpose(-1, -2)).float().mul_(scale), softcap)


def column_diagonal_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    heads: Sequence[int],
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass per column and per diagonal, of the queries in ``probe_groups`` (arXiv 2407.02490, Algorithm 1).

    A strong column lies on 64 diagonals, one for each of the queries, and summed plainly its mass makes all of them
    look strong: the budget of diagonals is then spent on scattered offsets that drag whole blocks in. A true diagonal
    is seen by all groups of queries, a column's trace by one. So a diagonal counts by the smallest mean mass among the
    groups that reach that far; plain sums would be MInference's own score.

    Args:
        query: ``[chunk, H, D]``, the chunk's queries; its last row is the sequence's last token.
        keys: ``[HK, S, D]``.
        heads: query heads wanted.
        scale: softmax scale.
        softcap, window: see ``Inputs``.

    Returns:
        float32 ``[h, S]`` twice. Columns: the mass on key ``j``, summed over the queries. Diagonals: the mass
        at distance ``i - j`` that all groups agree on, times the number of queries.
    """
    group = query.shape[1] // keys.shape[0]
    chunk, length = query.shape[0], keys.shape[1]
    columns = torch.zeros(len(heads), length, device=query.device)
    agreed = torch.full((len(heads), length), torch.inf, device=query.device)
    groups = probe_groups(chunk)
    for begin, end in groups:
        rows, first = end - begin, length - chunk + begin
        hidden = unseen(first + torch.arange(rows, device=query.device), length, window)
        # Row r's weights are shifted r places, so that a diagonal becomes a column of a strided view; zeros on the
        # left stand for keys before the first.
        padded = torch.zeros(len(heads), rows, length + rows, device=query.device)
        for slot, head in enumerate(heads):
            scores = logits(query[begin:end, head], keys[head // group], scale, softcap)
            torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1, out=padded[slot, :, rows:])
        columns += padded[:, :, rows:].sum(1)
        # Key first + r - d stands in row r at place first + r - d + rows: d places left of first + rows, along a step
        # of one row and one place.
        reach, width = first + rows, length + rows
        by_place = padded.as_strided((len(heads), rows, reach), (rows * width, width + 1, 1), 1)
        mean = by_place.mean(1).flip(1)
        agreed[:, :reach] = torch.minimum(agreed[:, :reach], mean)
    return columns, agreed.mul_(sum(end - begin for begin, end in groups))


def beyond_diagonals(
    columns: torch.Tensor, diagonals: torch.Tensor, groups: Sequence[tuple[int, int]], context_len: int
) -> torch.Tensor:
    """float32 ``[h, S]``: the mass of columns without what the diagonals explain.

    A diagonal crosses each of the queries in another key, and the mass there would make a column of it, which no other
    row looks at. What all groups agree on is a diagonal's; what is left is a column's.

    Args:
        columns, diagonals: float32 ``[h, S]``, see ``column_diagonal_scores``.
        groups: the queries that they come from, see ``probe_groups``.
        context_len: tokens before the chunk.
    """
    # Key j is crossed, in the rows from begin to end, by their diagonals: a difference of cumulative sums, backwards.
    nearer = (diagonals / sum(end - begin for begin, end in groups)).cumsum(1)
    rest = columns.clone()
    for begin, end in groups:
        rest[:, : context_len + end] -= nearer[:, : context_len + end].flip(1)
        rest[:, : context_len + begin] += nearer[:, : context_len + begin].flip(1)
    return rest.clamp_(min=0)
