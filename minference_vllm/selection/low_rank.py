"""``low_rank``: single keys for every query tile, ranked by scores in a few dimensions.

A head that looks things up sends every row to a few keys of its own. No column, diagonal or whole block holds them, and
all query-key products, which find them, are half of what dense attention computes. To rank keys a few dimensions are
enough (Loki, arXiv 2406.02542; Double Sparsity, arXiv 2408.07092). How much of the output lies in each score bin is
measured exactly, on sampled rows, so that poor scores cost keys and not accuracy. A key counts by its weight times the
norm of its value (``by_value``).

Sizes: ``h`` query heads, ``H`` query heads over ``HK`` KV heads of size ``D``, ``T`` query tiles, ``S`` tokens in the
sequence, ``r`` rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from minference_vllm.core.tiling import DEFAULT_TILE, Tiling
from minference_vllm.patterns.kinds import LowRank
from minference_vllm.selection import score_bins
from minference_vllm.selection.compaction import Capacity, Selection, WritesLists
from minference_vllm.selection.family import Family, Room
from minference_vllm.selection.measured_rows import CALIBRATION_ROWS, CalibrationRows, calibration_rows
from minference_vllm.selection.probe_queries import unlikeness
from minference_vllm.selection.projection import (
    Projection,
    QuantizedQK,
    fit,
    fit_within,
    for_int8,
    project_queries,
)
from minference_vllm.selection.score_bins import ScoreBins
from minference_vllm.selection.scores import Scores
from minference_vllm.selection.tile_queries import TileQueries, all_rows

FIT_SHARE = 1.0
"""How much the last and the unlike rows together count in the fit, beside all rows: dimensions in which few rows look
carry next to nothing of the mean square."""
FIT_ROWS = 2048
"""Queries, and keys, from which dimensions are fitted, at most about."""
SCORE_ERROR = 1.0
"""Error of a score, in nats, below which more dimensions would not tell keys apart much better."""
SINGLE_LOOKS, LOOK_STEP = 0.25, 4
"""Scores of heads with more than that of ``single_looks``, of one measured row in so many, are set against all keys."""
BATCH_BYTES = 96 << 20
"""Bins and measured attention of the heads that are selected together on CPUs: what is done by torch takes as long for
one head as for some. No tensor of them is larger than the 32 MiB that glibc's allocator keeps when they are freed."""
MOST_COLUMNS = 6144
"""The most single keys of a tile that there is planned room for; lists are written where they stay, and take less
memory than those of other patterns."""
USUAL_RANK = 32
"""Dimensions of every head, on GPUs at the most. Of patterns with more each head takes as many as ``SCORE_ERROR`` asks
for."""
ROWS_FOR_KEYS = 200
"""Rows whose attention takes as long as the fit, the keys in few dimensions and what lies in their bins (measured on
AVX2)."""


def gpu_rank(pattern: LowRank) -> int:
    """Dimensions of every head on a GPU: the host would have to wait to learn which heads need more."""
    return min(pattern.rank, USUAL_RANK)


class LowRankOps(Protocol):
    """What ``low_rank`` needs of the class of scores, which may have kernels for it."""

    scale: float

    def queries_of(self, heads: Sequence[int]) -> torch.Tensor:
        """``[h, chunk, D]``."""

    def some_keys(self, heads: Sequence[int], step: int) -> torch.Tensor:
        """``[h, n, D]``: one key in ``step``."""

    def key_codes(self, heads: Sequence[int], projection: Projection) -> torch.Tensor:
        """int8 ``[h, S, r]``: ``projection.quantize_keys`` of all keys."""

    def row_shares(self, rows: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        """float32 or bf16 ``[h, R, S]``: ``measured_rows.by_value`` of the exact attention of rows of the chunk (int64
        ``[h, R]``, ascending)."""

    def threshold(self, sample: CalibrationRows, mass: torch.Tensor, gamma: float) -> torch.Tensor:
        """``CalibrationRows.threshold``."""

    def representatives(self, low: torch.Tensor, key_size: torch.Tensor, tiling: Tiling, count: int) -> TileQueries:
        """See ``tile_queries.representatives``."""

    def tile_bins(self, quantized: QuantizedQK, tiling: Tiling, all_groups: torch.Tensor) -> torch.Tensor:
        """See ``score_bins.tile_bins``."""

    def mass_by_bin(
        self, bins: torch.Tensor, bin_row: torch.Tensor, weights: torch.Tensor, squared: bool = False
    ) -> torch.Tensor:
        """See ``score_bins.mass_by_bin``."""


class Measured(NamedTuple):
    """Exact attention of a chunk's calibration rows, for some heads."""

    queries: torch.Tensor
    """``[h, chunk, D]``, all of the chunk."""
    sample: CalibrationRows
    weights: torch.Tensor
    """float32 or bf16 ``[h, R, S]``, see ``measured_rows.by_value``."""
    tile: torch.Tensor
    """int64 ``[h, R]``: the tile of each row."""

    @classmethod
    def of(cls, scores: LowRankOps, heads: Sequence[int], tiling: Tiling) -> Measured:
        queries = scores.queries_of(heads)
        # Head by head: float32 copies of all are larger than what the allocator keeps.
        unlike = torch.cat([unlikeness(head) for head in queries.split(1)])
        sample = calibration_rows(unlike, tiling.seq_len)
        tile = torch.searchsorted(tiling.starts, sample.rows + tiling.context_len, right=True) - 1
        return cls(queries, sample, scores.row_shares(sample.rows, heads), tile)


def fitted(
    queries: torch.Tensor, alone: torch.Tensor, keys: torch.Tensor, rank: int, error: float = 0.0
) -> Iterator[tuple[list[int], Projection]]:
    """The dimensions in which a chunk is scored.

    Args:
        queries: ``[h, n, D]``, some of the chunk's.
        alone: ``[h, m, D]``, those of rows that speak for themselves, which together count ``FIT_SHARE`` times as much.
        keys: ``[h, k, D]``, some of the sequence's.
        error: see ``projection.fit_within``; 0: all heads have ``rank`` dimensions, and a GPU is not waited for.

    Yields:
        Places of heads, and their projection.
    """
    rank = min(rank, queries.shape[2])
    if alone.shape[1]:
        weight = math.sqrt(FIT_SHARE * queries.shape[1] / alone.shape[1])
        queries = torch.cat([queries.float(), alone.float().mul_(weight)], 1)
    if not error:
        yield list(range(len(keys))), for_int8(fit(queries, keys, rank), keys)
        return
    for places, projection in fit_within(queries, keys, rank, error):
        yield places, for_int8(projection, keys[places])


def fit_step(length: int, rows: int = FIT_ROWS) -> int:
    """One of so many queries, or keys, is fitted to."""
    return math.ceil(length / rows)


def single_looks(measured: Measured, tiling: Tiling) -> torch.Tensor:
    """float32 ``[h]``: the largest share of a row's attention that one key before its tile has, the first ``PEAK_KEYS``
    apart; the mean over some measured rows. A sample of the keys may miss it."""
    own = tiling.first_own()[measured.tile[:, ::LOOK_STEP]].tolist()
    looks = torch.zeros(len(own), len(own[0]))
    # Row by row, since of all together what is masked would be a copy.
    for head, rows in enumerate(own):
        for row, end in enumerate(rows):
            if end > score_bins.PEAK_KEYS:
                looks[head, row] = measured.weights[head, row * LOOK_STEP, score_bins.PEAK_KEYS : end].amax()
    return looks.mean(1)


def score_keys(
    scores: LowRankOps, measured: Measured, heads: Sequence[int], tiling: Tiling, pattern: LowRank
) -> ScoreBins:
    """Bins of every key by scores in at most ``pattern.rank`` dimensions, and how far down to go, by the measured rows'
    attention in each bin."""
    some_keys = scores.some_keys(heads, fit_step(tiling.seq_len))
    queries, sample, weights = measured.queries, measured.sample, measured.weights
    some_queries = queries[:, :: fit_step(queries.shape[1])]
    rank = gpu_rank(pattern) if queries.is_cuda else pattern.rank
    # Which has to be read, and a GPU would be waited for.
    heads_differ = rank > USUAL_RANK
    error = SCORE_ERROR / scores.scale if heads_differ else 0.0
    alone = queries.gather(1, sample.alone()[..., None].expand(-1, -1, queries.shape[2]))
    if heads_differ:
        all_groups = single_looks(measured, tiling) > SINGLE_LOOKS
    else:
        all_groups = torch.zeros(len(heads), dtype=torch.bool, device=queries.device)
    bins = None
    for places, projection in fitted(some_queries, alone, some_keys, rank, error):
        every = len(places) == len(heads)
        low = project_queries(queries if every else queries[places], projection, scores.scale)
        keys = scores.key_codes([heads[place] for place in places], projection)
        if pattern.queries:
            chosen = scores.representatives(low, projection.key_size, tiling, pattern.queries)
        else:
            chosen = all_rows(low, tiling)
        found = scores.tile_bins(QuantizedQK.of(*chosen, keys), tiling, all_groups if every else all_groups[places])
        if every:
            bins = found
        else:
            bins = found.new_empty(len(heads), *found.shape[1:]) if bins is None else bins
            bins[places] = found
    assert bins is not None
    bins = score_bins.hide_before_window(bins, tiling)
    mass = scores.mass_by_bin(bins, measured.tile, weights, pattern.samples)
    if pattern.samples:
        return ScoreBins(bins, sample.sampling_threshold(mass, pattern.noise), sampled=True)
    return ScoreBins(bins, scores.threshold(sample, mass, pattern.gamma))


class LowRankFamily(Family[LowRank]):
    pattern = LowRank
    colour = "#000000"
    reads_page_means = True
    writes_lists = True

    def select(
        self, pattern: LowRank, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection | WritesLists:
        return scores.select_bins(tiling, scores.low_rank(heads, tiling, pattern), capacity)

    def heads_at_once(self, pattern: LowRank, tiling: Tiling) -> int:
        # Attention of measured rows in 16 bits, and again as torch works on it.
        return max(1, BATCH_BYTES // (tiling.seq_len * (tiling.num_tiles + 6 * CALIBRATION_ROWS)))

    def room(self, pattern: LowRank, block_size: int, adaptive: int) -> Room:
        return Room(adaptive, min(adaptive, MOST_COLUMNS))

    def selection_bytes(self, pattern: LowRank, tiles: int, seq_len: int, key_blocks: int, columns: int) -> int:
        # A bin for every tile and key, keys and queries in few dimensions, the queries' positions and partial sums,
        # counts of pages; and what is measured of rows, and of moments, whatever the length.
        queries, rank = tiles * DEFAULT_TILE, gpu_rank(pattern)
        scores = (tiles + rank) * seq_len + queries * (rank + 8 + 4 * seq_len // (1 << 16))
        return scores + 4 * tiles * key_blocks + (4 << 20)

    def scoring_cost(self, pattern: LowRank, head_size: int, chunk: int, device: torch.device) -> float:
        # Of 2 * head_size products, for most heads. On CPUs int8 products take half of the time.
        share = min(pattern.rank, head_size, USUAL_RANK) / (2 * head_size)
        cost = share / 2 + min(1.0, ROWS_FOR_KEYS / chunk) if device.type == "cpu" else share
        # Twice as many as of a tile for which they speak, since the others are asked in full.
        return cost * min(1.0, 2 * pattern.queries / DEFAULT_TILE) if pattern.queries else cost

    def kernel_sizes(self, pattern: LowRank) -> tuple[int, ...]:
        return gpu_rank(pattern), pattern.queries, pattern.samples


FAMILY = LowRankFamily()
