"""Scores that say where a head's attention lies: last-query columns and diagonals, and scores of whole blocks.

Sizes: ``H`` query heads over ``HK`` KV heads, ``S`` tokens in the sequence, ``D`` head size, ``T`` query tiles, ``N``
key blocks. Every function has its float64 definition in ``reference.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection import low_rank
from minference_vllm.selection.score_bins import Levels

LAST_QUERIES = 64
"""Queries of a chunk that choose its columns and diagonals."""
ROW_GROUPS = 4
"""Groups of those queries that must agree on a diagonal."""
SCOUTS = 8
"""Queries in each group but the last, where the groups are spread over the chunk."""
SPREAD_FROM = 256
"""Rows from which on a chunk's groups are spread."""


def row_groups(chunk: int) -> tuple[tuple[int, int], ...]:
    """Rows ``[begin, end)`` of each group of the queries that choose a chunk's columns and diagonals, ascending.

    Three groups of 8 queries, a quarter, a half and three quarters through the chunk, and its last 40 queries. The last
    ones alone, as in MInference, speak for a question at the prompt's end, but not for rows before it that look
    elsewhere (docs/patterns.md). Chunks shorter than 256 rows use their last 64, in four neighbouring groups.
    """
    if chunk < SPREAD_FROM:
        rows = min(LAST_QUERIES, chunk)
        groups = min(ROW_GROUPS, rows)
        borders = [chunk - rows + group * rows // groups for group in range(groups + 1)]
        return tuple(itertools.pairwise(borders))
    ends = [chunk * group // ROW_GROUPS for group in range(1, ROW_GROUPS)]
    return (*((end - SCOUTS, end) for end in ends), (chunk - LAST_QUERIES + SCOUTS * len(ends), chunk))


def logits(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 ``[..., R, S]``: scaled products of ``query [..., R, D]`` and ``keys [..., S, D]``.

    CPUs multiply in float32, since few of them multiply bf16 or fp16 at any speed.
    """
    if not query.is_cuda:
        query, keys = query.float(), keys.float()
    return torch.matmul(query, keys.transpose(-1, -2)).float().mul_(scale)


def last_query_scores(
    query: torch.Tensor, keys: torch.Tensor, heads: Sequence[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass per column and per diagonal, of the queries in ``row_groups`` (arXiv 2407.02490, Algorithm 1).

    A strong column lies on 64 diagonals, one for each of the queries, and summed plainly its mass makes all of them
    look strong: the budget of diagonals is then spent on scattered offsets that drag whole blocks in. A true diagonal
    is seen by all groups of queries, a column's trace by one. So a diagonal counts by the smallest mean mass among the
    groups that reach that far; plain sums would be MInference's own score.

    Args:
        query: ``[chunk, H, D]``, the chunk's queries; its last row is the sequence's last token.
        keys: ``[HK, S, D]``.
        heads: query heads wanted.
        scale: softmax scale.

    Returns:
        float32 ``[len(heads), S]`` twice. Columns: the mass on key ``j``, summed over the queries. Diagonals: the mass
        at distance ``i - j`` that all groups agree on, times the number of queries.
    """
    group = query.shape[1] // keys.shape[0]
    chunk, length = query.shape[0], keys.shape[1]
    places = torch.arange(length, device=query.device)
    columns = torch.zeros(len(heads), length, device=query.device)
    agreed = torch.full((len(heads), length), torch.inf, device=query.device)
    groups = row_groups(chunk)
    for begin, end in groups:
        rows, first = end - begin, length - chunk + begin
        future = places > (first + torch.arange(rows, device=query.device))[:, None]
        # Row r's weights are shifted r places, so that a diagonal becomes a column of a strided view; zeros on the
        # left stand for keys before the first.
        padded = torch.zeros(len(heads), rows, length + rows, device=query.device)
        for slot, head in enumerate(heads):
            scores = logits(query[begin:end, head], keys[head // group], scale)
            torch.softmax(scores.masked_fill_(future, -torch.inf), -1, out=padded[slot, :, rows:])
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
        columns, diagonals: float32 ``[h, S]``, see ``last_query_scores``.
        groups: the queries that they come from, see ``row_groups``.
        context_len: tokens before the chunk.
    """
    # Key j is crossed, in the rows from begin to end, by their diagonals: a difference of cumulative sums, backwards.
    nearer = (diagonals / sum(end - begin for begin, end in groups)).cumsum(1)
    rest = columns.clone()
    for begin, end in groups:
        rest[:, : context_len + end] -= nearer[:, : context_len + end].flip(1)
        rest[:, : context_len + begin] += nearer[:, : context_len + begin].flip(1)
    return rest.clamp_(min=0)


class Estimates:
    """The estimates of one chunk (``index.Scores``) from its queries and the sequence's keys.

    Args:
        query: ``[chunk, H, D]``; its last row is the sequence's last token.
        keys: ``[HK, S, D]``.
        scale: softmax scale.
        kernels: faster code for ``low_rank``.
    """

    def __init__(
        self, query: torch.Tensor, keys: torch.Tensor, scale: float, kernels: low_rank.Kernels | None = None
    ) -> None:
        self.query, self.keys, self.scale, self.kernels = query, keys, scale, kernels or low_rank.Kernels()

    def last_query(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        columns, diagonals = self.last_query_scores(heads)
        groups, context_len = row_groups(self.query.shape[0]), columns.shape[1] - self.query.shape[0]
        if len(groups) == 1:
            # One row cannot tell a column from a diagonal, and needs no other row's keys.
            return columns, diagonals.zero_()
        return beyond_diagonals(columns, diagonals, groups, context_len), diagonals

    def last_query_scores(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See the function of that name."""
        return last_query_scores(self.query, self.keys, heads, self.scale)

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return pooled_scores(self.query, self.means(tiling), heads, tiling, self.scale)

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return peak_scores(self.query, self.means(tiling), heads, tiling, self.scale)

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return antidiagonal_scores(self.query, self.keys, heads, tiling, stride, self.scale)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> Levels:
        keys, lines = (self.keys,), self.last_query(heads)
        return low_rank.estimate(self.query, lambda: keys, heads, tiling, rank, gamma, self.scale, self.kernels, lines)

    def means(self, tiling: Tiling) -> torch.Tensor:
        """See ``mean_keys``."""
        return mean_keys(self.keys, tiling.block_size)


def mean_keys(keys: torch.Tensor, block_size: int) -> torch.Tensor:
    """float32 ``[HK, N, D]``: mean key of every block; ``keys`` is ``[HK, S, D]`` and its last block may be partial."""
    heads, length, dim = keys.shape
    whole = length // block_size * block_size
    means = keys[:, :whole].reshape(heads, -1, block_size, dim).mean(2, dtype=torch.float32)
    if whole < length:
        means = torch.cat([means, keys[:, whole:].mean(1, keepdim=True, dtype=torch.float32)], 1)
    return means


def _by_tile(query: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """One head's queries ``[chunk, D]`` as ``[T, tile, D]``, zeros where a tile begins or ends outside the chunk."""
    before = tiling.context_len % tiling.tile
    after = tiling.num_tiles * tiling.tile - before - query.shape[0]
    return torch.nn.functional.pad(query, (0, 0, before, after)).view(tiling.num_tiles, tiling.tile, -1)


def pooled_scores(
    query: torch.Tensor, means: torch.Tensor, heads: Sequence[int], tiling: Tiling, scale: float
) -> torch.Tensor:
    """Softmax over blocks of mean query times mean key (MInference's block-sparse estimate), per query tile.

    Args:
        query: ``[chunk, H, D]``.
        means: ``[HK, N, D]``, see ``mean_keys``.
        heads: query heads wanted.

    Returns:
        float32 ``[len(heads), T, N]``, zero where no key of a block is in a tile's reach.
    """
    group = query.shape[1] // means.shape[0]
    rows = tiling.starts[1:] - tiling.starts[:-1]
    scores = torch.empty(len(heads), tiling.num_tiles, means.shape[1], device=query.device)
    for slot, head in enumerate(heads):
        queries = _by_tile(query[:, head].float(), tiling).sum(1) / rows[:, None]
        torch.matmul(queries, means[head // group].T, out=scores[slot])
    return scores.mul_(scale).masked_fill_(~tiling.reachable(), -torch.inf).softmax(-1)


PART_BYTES = 32 << 20
"""Scores of single queries in flight, in float32."""


def peak_scores(
    query: torch.Tensor, means: torch.Tensor, heads: Sequence[int], tiling: Tiling, scale: float
) -> torch.Tensor:
    """Softmax over blocks of every single query times mean keys, averaged over the tile's rows, per query tile.

    FlashPrefill (arXiv 2603.06199) subtracts one maximum per tile, so that rows with high logits count more; here every
    row counts alike, which needs no second pass and never overflows.

    Args:
        query: ``[chunk, H, D]``.
        means: ``[HK, N, D]``, see ``mean_keys``.
        heads: query heads wanted.

    Returns:
        float32 ``[len(heads), T, N]``, zero where no key of a block is in a tile's reach.
    """
    group = query.shape[1] // means.shape[0]
    positions = torch.arange(tiling.num_tiles * tiling.tile, device=query.device).view(tiling.num_tiles, tiling.tile)
    positions += tiling.context_len // tiling.tile * tiling.tile
    there = (positions >= tiling.context_len) & (positions < tiling.seq_len)
    unseen = ~tiling.reachable()
    result = torch.empty(len(heads), *unseen.shape, device=query.device)
    at_once = max(1, PART_BYTES // (4 * tiling.tile * tiling.num_key_blocks))
    for slot, head in enumerate(heads):
        rows, kv_means = _by_tile(query[:, head], tiling), means[head // group].to(query.dtype)
        for first in range(0, tiling.num_tiles, at_once):
            part = slice(first, first + at_once)
            weights = logits(rows[part], kv_means, scale)
            weights = weights.masked_fill_(unseen[part, None], -torch.inf).softmax(-1)
            result[slot, part] = torch.matmul(there[part, None].float(), weights)[:, 0]
    return result.div_((tiling.starts[1:] - tiling.starts[:-1])[:, None])


def squares_per_block(block_size: int, stride: int) -> int:
    """How many squares of ``stride`` tokens a block has along each edge.

    Raises:
        ValueError: ``stride`` does not divide the block size.
    """
    if block_size % stride:
        raise ValueError(f"antidiagonal stride must divide the page size {block_size}, not {stride}")
    return block_size // stride


def antidiagonal_scores(
    query: torch.Tensor, keys: torch.Tensor, heads: Sequence[int], tiling: Tiling, stride: int, scale: float
) -> torch.Tensor:
    """Attention mass of blocks, seen along every ``stride``-th antidiagonal (XAttention, arXiv 2503.16428).

    ``stride`` neighbouring queries and ``stride`` neighbouring keys, the keys in reverse order, make one long query and
    one long key; their product is the mean logit of an antidiagonal, which every column of that square crosses, and for
    an even stride every diagonal of odd distance (one of even distance passes between two of its cells, so that its
    neighbours must speak for it). Softmax over the squares a row of squares can see, then mean over a tile and sum over
    a block.
    Squares lie at multiples of ``stride`` in the prompt; tokens outside the chunk, or past its end, count as zeros.

    Args:
        query: ``[chunk, H, D]``.
        keys: ``[HK, S, D]``.
        heads: query heads wanted.
        stride: divides the block size.

    Returns:
        float32 ``[len(heads), T, N]``, zero where no key of a block is in a tile's reach.

    Raises:
        ValueError: ``stride`` does not divide the block size.
    """
    per_block = squares_per_block(tiling.block_size, stride)
    group = query.shape[1] // keys.shape[0]
    length, dim = keys.shape[1], query.shape[2]
    first = tiling.context_len // stride
    squares = -(-length // stride)
    before, after = tiling.context_len - first * stride, squares * stride - length
    square_rows = torch.arange(first, squares, device=query.device)
    # The tile of a square of rows is that of its last row in the chunk: tiles, too, lie at multiples of the stride.
    last_rows = (square_rows * stride + stride - 1).clamp(max=length - 1)
    tile_of_square = torch.searchsorted(tiling.starts, last_rows, right=True) - 1
    future = torch.arange(squares, device=query.device) > square_rows[:, None]
    missing = tiling.num_key_blocks * per_block - squares
    result = torch.zeros(len(heads), tiling.num_tiles, tiling.num_key_blocks, device=query.device)
    long_keys: dict[int, torch.Tensor] = {}
    for slot, head in enumerate(heads):
        kv_head = head // group
        if kv_head not in long_keys:
            padded = torch.nn.functional.pad(keys[kv_head], (0, 0, 0, after))
            long_keys = {kv_head: padded.view(squares, stride, dim).flip(1).reshape(squares, -1)}
        rows = torch.nn.functional.pad(query[:, head], (0, 0, before, after)).view(-1, stride * dim)
        weights = logits(rows, long_keys[kv_head], scale / stride)
        weights = weights.masked_fill_(future, -torch.inf).softmax(-1)
        by_block = torch.nn.functional.pad(weights, (0, missing)).view(len(rows), -1, per_block).sum(-1)
        result[slot].index_add_(0, tile_of_square, by_block)
    squares_of_tile = torch.zeros(tiling.num_tiles, device=query.device)
    squares_of_tile.index_add_(0, tile_of_square, torch.ones_like(tile_of_square, dtype=torch.float32))
    return result.div_(squares_of_tile.clamp_(min=1)[:, None])
