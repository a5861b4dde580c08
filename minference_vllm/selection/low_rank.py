"""``low_rank``: single keys for every query tile, ranked by approximate scores in a few dimensions.

In a retrieval head every row attends a few keys of its own. No column, diagonal or block covers them, and computing
all query-key products to find them would be half the cost of dense attention. Ranking keys needs only a few dimensions
(Loki, arXiv 2406.02542; Double Sparsity, arXiv 2408.07092). The steps, for every head and chunk:

1. ``Measured.of``: exact attention of up to 128 rows. A key counts by its weight times its value's norm (``by_value``).
2. ``fitted``: the ``rank`` dimensions in which this chunk's queries and this sequence's keys are compared.
3. ``representatives``: the rows of each tile that are scored.
4. ``tile_bins``: a score bin for every tile and key.
5. ``mass_by_bin`` and a threshold: how low the selection must go so that the measured rows are served well enough.
   Inaccurate scores therefore cost keys, not accuracy.

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
"""Weight in the fit of the last and the outlier rows together, relative to all other rows. Without it, dimensions that
only a few rows use would be lost: they add almost nothing to the mean square."""
FIT_ROWS = 2048
"""Number of queries, and of keys, that the fit samples (approximately)."""
SCORE_ERROR = 1.0
"""Target error of a score, in nats. A head takes more dimensions until its scores are this accurate."""
SINGLE_LOOKS, LOOK_STEP = 0.25, 4
"""Heads whose ``single_looks`` exceeds the first compute ``approx_lse`` from all groups of keys. One measured row in
``LOOK_STEP`` is checked."""
BATCH_BYTES = 96 << 20
"""Memory for the bins and the measured attention of the heads that are selected together on CPUs. Batching saves
torch's overhead per call. With this limit no tensor exceeds 32 MiB, above which glibc returns memory to the kernel on
every free."""
MOST_COLUMNS = 6144
"""Planned capacity for single keys of a tile. The kernels write the lists in place, so this pattern needs less memory
per key than others."""
USUAL_RANK = 32
"""Dimensions of every head of patterns up to this rank, and the maximum on GPUs. With a larger rank each head takes as
many as ``SCORE_ERROR`` requires."""
ROWS_FOR_KEYS = 200
"""The fit, the key codes and the sums per bin cost as much as dense attention of this many rows (measured on AVX2)."""


def gpu_rank(pattern: LowRank) -> int:
    """Dimensions of every head on a GPU. A rank per head would need a host synchronisation."""
    return min(pattern.rank, USUAL_RANK)


class LowRankOps(Protocol):
    """The operations that ``low_rank`` needs. ``TorchScores`` defines them; native and Triton scores override them with
    kernels."""

    scale: float

    def queries_of(self, heads: Sequence[int]) -> torch.Tensor:
        """``[h, chunk, D]``."""

    def some_keys(self, heads: Sequence[int], step: int) -> torch.Tensor:
        """``[h, n, D]``: every ``step``-th key."""

    def key_codes(self, heads: Sequence[int], projection: Projection) -> torch.Tensor:
        """int8 ``[h, S, r]``: ``projection.quantize_keys`` of all keys."""

    def row_shares(self, rows: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        """float32 or bf16 ``[h, R, S]``: exact attention of rows of the chunk (int64 ``[h, R]``, ascending), weighted
        by ``measured_rows.by_value``."""

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
    """``[h, chunk, D]``: all queries of the chunk."""
    sample: CalibrationRows
    weights: torch.Tensor
    """float32 or bf16 ``[h, R, S]``, see ``measured_rows.by_value``."""
    tile: torch.Tensor
    """int64 ``[h, R]``: the tile of each row."""

    @classmethod
    def of(cls, scores: LowRankOps, heads: Sequence[int], tiling: Tiling) -> Measured:
        queries = scores.queries_of(heads)
        # One head at a time: a float32 copy of all heads is too large for the allocator to reuse.
        unlike = torch.cat([unlikeness(head) for head in queries.split(1)])
        sample = calibration_rows(unlike, tiling.seq_len)
        tile = torch.searchsorted(tiling.starts, sample.rows + tiling.context_len, right=True) - 1
        return cls(queries, sample, scores.row_shares(sample.rows, heads), tile)


def fitted(
    queries: torch.Tensor, alone: torch.Tensor, keys: torch.Tensor, rank: int, error: float = 0.0
) -> Iterator[tuple[list[int], Projection]]:
    """Fit the dimensions in which a chunk is scored.

    Args:
        queries: ``[h, n, D]``, a sample of the chunk's queries.
        alone: ``[h, m, D]``, queries of the last and the outlier rows; together they weigh ``FIT_SHARE`` times as much
            as ``queries``.
        keys: ``[h, k, D]``, a sample of the sequence's keys.
        error: allowed error of scores, see ``projection.fit_within``. 0: every head has ``rank`` dimensions, without a
            host synchronisation.

    Yields:
        Groups of heads with the same number of dimensions: their indices in ``0 .. h - 1``, and their projection.
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
    """Stride of the sample of queries, or keys, that the fit uses."""
    return math.ceil(length / rows)


def single_looks(measured: Measured, tiling: Tiling) -> torch.Tensor:
    """float32 ``[h]``: the largest attention share of a single key, averaged over some measured rows. Keys of the row's
    own tile and the first ``PEAK_KEYS`` do not count. A sampled ``approx_lse`` can miss such a key."""
    own = tiling.first_own()[measured.tile[:, ::LOOK_STEP]].tolist()
    looks = torch.zeros(len(own), len(own[0]))
    # One row at a time: masking all rows at once would copy the weights.
    for head, rows in enumerate(own):
        for row, end in enumerate(rows):
            if end > score_bins.PEAK_KEYS:
                looks[head, row] = measured.weights[head, row * LOOK_STEP, score_bins.PEAK_KEYS : end].amax()
    return looks.mean(1)


def score_keys(
    scores: LowRankOps, measured: Measured, heads: Sequence[int], tiling: Tiling, pattern: LowRank
) -> ScoreBins:
    """Score bins of every key in at most ``pattern.rank`` dimensions, and the threshold per head that the measured rows
    need."""
    some_keys = scores.some_keys(heads, fit_step(tiling.seq_len))
    queries, sample, weights = measured.queries, measured.sample, measured.weights
    some_queries = queries[:, :: fit_step(queries.shape[1])]
    rank = gpu_rank(pattern) if queries.is_cuda else pattern.rank
    # Different ranks per head need a host synchronisation; ``gpu_rank`` excludes them on GPUs.
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
        # Attention of the measured rows in 16 bits, and torch's temporaries of it.
        return max(1, BATCH_BYTES // (tiling.seq_len * (tiling.num_tiles + 6 * CALIBRATION_ROWS)))

    def room(self, pattern: LowRank, block_size: int, adaptive: int) -> Room:
        return Room(adaptive, min(adaptive, MOST_COLUMNS))

    def selection_bytes(self, pattern: LowRank, tiles: int, seq_len: int, key_blocks: int, columns: int) -> int:
        # Bins [tiles, seq_len], codes of keys and queries, the queries' positions and partial sums, counts per page,
        # and 4 MiB for measured rows and moments, which do not depend on the length.
        queries, rank = tiles * DEFAULT_TILE, gpu_rank(pattern)
        scores = (tiles + rank) * seq_len + queries * (rank + 8 + 4 * seq_len // (1 << 16))
        return scores + 4 * tiles * key_blocks + (4 << 20)

    def scoring_cost(self, pattern: LowRank, head_size: int, chunk: int, device: torch.device) -> float:
        # Relative to the 2 * head_size products of dense attention. On CPUs int8 products take half the time.
        share = min(pattern.rank, head_size, USUAL_RANK) / (2 * head_size)
        cost = share / 2 + min(1.0, ROWS_FOR_KEYS / chunk) if device.type == "cpu" else share
        # Twice the representatives, since some tiles are scored by all their rows.
        return cost * min(1.0, 2 * pattern.queries / DEFAULT_TILE) if pattern.queries else cost

    def kernel_sizes(self, pattern: LowRank) -> tuple[int, ...]:
        return gpu_rank(pattern), pattern.queries, pattern.samples


FAMILY = LowRankFamily()
