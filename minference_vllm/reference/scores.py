"""Scores by which keys and pages are selected, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.reference.attention import capped, causal_mask, logits, repeat_heads


def column_diagonal_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    groups: Sequence[tuple[int, int]],
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column and diagonal mass of groups of queries (arXiv 2407.02490, Algorithm 1), float64 ``[H, S]`` each.

    The mass of a diagonal is the smallest mean over a group's queries, among the groups whose last query lies at least
    that far from the first key, times the total number of queries. With one group it is the paper's plain sum.

    Args:
        groups: rows ``[begin, end)`` of ``query``.
    """
    chunk, heads, _ = query.shape
    seq_len = keys.shape[1]
    repeated = repeat_heads(keys.double(), heads)
    columns = torch.zeros(heads, seq_len, dtype=torch.float64)
    diagonals = torch.full((heads, seq_len), torch.inf, dtype=torch.float64)
    for begin, end in groups:
        mass = torch.zeros(heads, seq_len, dtype=torch.float64)
        for row in range(begin, end):
            position = seq_len - chunk + row
            scores = torch.einsum("hd,hsd->hs", query[row].double(), repeated[:, : position + 1]) * scale
            seen = causal_mask(position, position + 1, window)
            weights = capped(scores, softcap).masked_fill(~seen, -torch.inf).softmax(-1)
            columns[:, : position + 1] += weights
            mass[:, : position + 1] += weights.flip(1)
        reach = seq_len - chunk + end
        diagonals[:, :reach] = torch.minimum(diagonals[:, :reach], mass[:, :reach] / (end - begin))
    return columns, diagonals * sum(end - begin for begin, end in groups)


def distance_scores(by_offset: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """Diagonal mass by how many blocks before a tile's first block a row meets the diagonal.

    Args:
        by_offset: ``[H, S]``, the mass of each diagonal ``j = i - offset``.

    Returns:
        float64 ``[H, N]``, mean over the rows of a tile; column ``d - 1`` is distance ``d``.
    """
    heads, seq_len = by_offset.shape
    scores = torch.zeros(heads, tiling.num_key_blocks, dtype=torch.float64)
    for row in range(min(tiling.tile, seq_len - 1)):
        offset = torch.arange(row + 1, seq_len)
        distance = -((row - offset) // tiling.block_size)
        offset, distance = offset[distance <= tiling.num_key_blocks], distance[distance <= tiling.num_key_blocks]
        scores.index_add_(1, distance - 1, by_offset[:, offset].double() / tiling.tile)
    return scores


def page_means(rows: torch.Tensor, block_size: int) -> torch.Tensor:
    """float64 ``[HK, N, D]``: mean of the rows ``[HK, S, D]`` of every page; the last page may have fewer rows."""
    return torch.stack([block.mean(1) for block in rows.double().split(block_size, dim=1)], dim=1)


def pooled_scores(
    query: torch.Tensor, keys: torch.Tensor, tiling: Tiling, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """Softmax over blocks of mean query times mean key, float64 ``[H, T, N]``."""
    heads = query.shape[1]
    starts = (tiling.starts - tiling.context_len).tolist()
    queries = torch.stack([query[a:b].double().mean(0) for a, b in itertools.pairwise(starts)], dim=1)
    scores = queries @ repeat_heads(page_means(keys, tiling.block_size), heads).transpose(1, 2) * scale
    return capped(scores, softcap).masked_fill(~tiling.reachable(), -torch.inf).softmax(-1)


def peak_scores(
    query: torch.Tensor, keys: torch.Tensor, tiling: Tiling, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """Softmax over blocks of every single query times mean key, mean over a tile's rows, float64 ``[H, T, N]``."""
    heads, found = query.shape[1], logits(query, page_means(keys, tiling.block_size), scale, softcap)
    reachable = tiling.reachable()
    scores = torch.zeros(heads, tiling.num_tiles, tiling.num_key_blocks, dtype=torch.float64)
    starts = (tiling.starts - tiling.context_len).tolist()
    for tile, (first, end) in enumerate(itertools.pairwise(starts)):
        rows = found[:, first:end].masked_fill(~reachable[tile], -torch.inf)
        scores[:, tile] = rows.softmax(-1).mean(1)
    return scores


def antidiagonal_scores(
    query: torch.Tensor, keys: torch.Tensor, tiling: Tiling, stride: int, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """Attention mass of blocks, by the mean logits of antidiagonals of ``stride`` x ``stride`` squares.

    Squares lie at multiples of ``stride`` in the prompt; a square's logit is the mean over its antidiagonal, in which
    tokens outside the chunk (queries) or past its end (keys) count as zero. Softmax over the squares up to the row's
    own, mean over the rows of squares of a tile, sum over the squares of a block. A soft cap is applied to the means.

    Returns:
        float64 ``[H, T, N]``.
    """
    heads, seq_len = query.shape[1], keys.shape[1]
    of_pairs = logits(query, keys, scale)
    scores = torch.zeros(heads, tiling.num_tiles, tiling.num_key_blocks, dtype=torch.float64)
    for tile, (first, end) in enumerate(itertools.pairwise(tiling.starts.tolist())):
        square_rows = range(first // stride, -(-end // stride))
        for square_row in square_rows:
            begin = torch.arange(square_row + 1) * stride  # the first key of each square
            means = torch.zeros(heads, square_row + 1, dtype=torch.float64)
            for place in range(stride):
                row, key = square_row * stride + place, begin + stride - 1 - place
                if tiling.context_len <= row < seq_len:
                    there = key < seq_len
                    means[:, there] += of_pairs[:, row - tiling.context_len, key[there]] / stride
            means = capped(means, softcap)
            if tiling.window:  # squares that end before the window of the first row of squares
                means[:, begin + stride - 1 <= square_row * stride - tiling.window] = -torch.inf
            weights = means.softmax(-1) / len(square_rows)
            scores[:, tile].index_add_(1, begin // tiling.block_size, weights)
    return scores


def low_rank_bins(
    query: torch.Tensor,
    position: torch.Tensor,
    keys: torch.Tensor,
    tiling: Tiling,
    peak_keys: int,
    group_steps: Sequence[int],
    per_bit: int,
) -> torch.Tensor:
    """``254 + per_bit * (score - approx_lse)`` of every key, the maximum over the tile's queries; float64
    ``[H, T, S]``, not rounded. Keys in a tile's own pages and after them are -inf.

    ``approx_lse`` is the log-sum-exp, in bits, of the largest score of each group of ``peak_keys`` keys that the query
    sees. In the tile's own pages every group counts. Before them, every ``group_steps``-th group counts
    ``group_steps`` times, except for the first group, which counts once.

    Args:
        query: ``[H, T, n, r]``, for every tile. keys: ``[H, S, r]``. Their products are scores in bits.
        position: ``[H, T, n]``, positions of the queries.
        group_steps: one per tile.
    """
    scores = query.double() @ keys.double().transpose(1, 2)[:, None]
    scores.masked_fill_(torch.arange(tiling.seq_len) > position[..., None], -torch.inf)
    bins = torch.full((len(query), tiling.num_tiles, tiling.seq_len), -torch.inf, dtype=torch.float64)
    for tile, (begin, end) in enumerate(itertools.pairwise(tiling.starts.tolist())):
        own, mass = begin // tiling.tile * tiling.tile, torch.zeros(())
        for first in range(0, end, peak_keys):
            group, last = first // peak_keys, min(first + peak_keys, end)
            if first < own and group % group_steps[tile] == 0:
                peak = scores[:, tile, :, first : min(last, own)].amax(-1, keepdim=True)
                mass = mass + torch.exp2(peak) * (group_steps[tile] if group else 1)
            if last > own:
                mass = mass + torch.exp2(scores[:, tile, :, max(first, own) : last].amax(-1, keepdim=True))
        bins[:, tile, :own] = 254 + per_bit * (scores[:, tile, :, :own] - mass.log2()).amax(1)
    return bins


def beyond_diagonals(
    columns: torch.Tensor, diagonals: torch.Tensor, groups: Sequence[tuple[int, int]], context_len: int
) -> torch.Tensor:
    """float64 ``[H, S]``: mass of columns minus the mean mass of the diagonals that cross them, at least 0."""
    rest = columns.double().clone()
    for row in (row for begin, end in groups for row in range(begin, end)):
        seen = context_len + row + 1
        rest[:, :seen] -= diagonals.double()[:, :seen].flip(1) / sum(end - begin for begin, end in groups)
    return rest.clamp(min=0)


def mass_per_token(
    by_column: torch.Tensor, by_offset: torch.Tensor, tiling: Tiling, forced_columns: int, forced_distances: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mass of columns and page distances, and mass per token of cost of keys (seen from the last tile) and distances.

    A page distance has the mass of its diagonals, shared by the tokens of a page; a column has its own mass. A key has
    the larger mass per token of the two. The tile's own blocks, the nearest distances and the first columns are always
    selected: their mass per token is infinite.

    Args:
        by_column, by_offset: ``[H, S]``, mass of columns and diagonals.

    Returns:
        float64: mass of columns and mass per token of keys, ``[H, S]`` each; mass and mass per token of distances,
        ``[H, N + 1]`` each, of which the first is the tile's own pages. The masses of a head sum to 1.
    """
    heads, seq_len = by_column.shape
    total = (by_column.double() + by_offset.double()).sum(1, keepdim=True)
    mass = distance_scores(by_offset, tiling) / total
    own = 1 - by_column.double().sum(1, keepdim=True) / total - mass.sum(1, keepdim=True)
    of_distance = mass / tiling.block_size
    of_distance[:, :forced_distances] = torch.inf
    first_own = int(tiling.starts[-2]) // tiling.tile * tiling.tile // tiling.block_size
    of_key = torch.full((heads, seq_len), torch.inf, dtype=torch.float64)
    for key in range(forced_columns, seq_len):
        distance = first_own - key // tiling.block_size
        if distance > forced_distances:
            of_key[:, key] = torch.maximum(of_distance[:, distance - 1], by_column[:, key].double() / total[:, 0])
    always = torch.full((heads, 1), torch.inf, dtype=torch.float64)
    return by_column.double() / total, of_key, torch.cat([own, mass], 1), torch.cat([always, of_distance], 1)
