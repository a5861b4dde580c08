"""``NativeScores``: the scores of one chunk on CPUs, computed by our kernels where they support it."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.native import interface
from minference_vllm.kernels.native.library import describe_cache, library
from minference_vllm.selection import score_bins, tile_queries
from minference_vllm.selection.compaction import Capacity, KeyLists, Selection, WritesLists
from minference_vllm.selection.measured_rows import CalibrationRows, bounded, least_of_a_row
from minference_vllm.selection.probe_queries import probe_groups
from minference_vllm.selection.projection import BINS_PER_BIT, MAX_KEY, MAX_KEY_NORM, Projection, QuantizedQK
from minference_vllm.selection.score_bins import ScoreBins, whole_pages
from minference_vllm.selection.tile_queries import TileQueries
from minference_vllm.selection.torch_scores import TorchScores

MAX_ROWS = 64
"""Maximum number of rows per call."""


def tile_bins(quantized: QuantizedQK, tiling: Tiling, all_groups: torch.Tensor) -> torch.Tensor:
    """``score_bins.tile_bins``."""
    heads, length, rank = quantized.keys.shape
    assert rank % 16 == 0 and all(part.is_contiguous() for part in quantized)
    bins = torch.empty(heads, tiling.num_tiles, length, dtype=torch.uint8)
    described = interface.QuantizedQK(
        *(part.data_ptr() for part in quantized),
        length,
        heads,
        tiling.num_tiles,
        quantized.per_tile,
        rank,
        BINS_PER_BIT,
        torch.get_num_threads(),
    )
    call = interface.TileScoreBinArguments(
        described, all_groups.data_ptr(), bins.data_ptr(), tiling.starts.data_ptr(), tiling.tile
    )
    library().minference_tile_score_bins(ctypes.byref(call))
    return bins


def representatives(low: torch.Tensor, key_size: torch.Tensor, tiling: Tiling, count: int) -> TileQueries:
    """``tile_queries.representatives``, but squares are summed in another order."""
    heads, chunk, rank = low.shape
    low, key_size = low.contiguous(), key_size.contiguous()
    shape = heads, tiling.num_tiles * tile_queries.num_candidates(tiling.tile)
    found = TileQueries(
        torch.empty(*shape, rank),
        torch.empty(shape, dtype=torch.int32),
        torch.empty(heads, tiling.num_tiles, dtype=torch.int32),
    )
    call = interface.RepresentativeArguments(
        low.data_ptr(),
        key_size.data_ptr(),
        tiling.starts.data_ptr(),
        *(part.data_ptr() for part in found),
        tiling.context_len,
        chunk,
        heads,
        tiling.num_tiles,
        rank,
        tile_queries.candidate_step(tiling.tile),
        shape[1] // tiling.num_tiles,
        count,
        tile_queries.LEAST_SIZE,
        tile_queries.LEAST_APART,
        tile_queries.ALIKE,
        torch.get_num_threads(),
    )
    library().minference_representatives(ctypes.byref(call))
    return found


def mass_by_bin(
    bins: torch.Tensor, bin_row: torch.Tensor, weights: torch.Tensor, squared: bool = False
) -> torch.Tensor:
    """``score_bins.mass_by_bin``."""
    bins, bin_row, weights = (part.contiguous() for part in (bins, bin_row, weights.bfloat16()))
    _, rows, length = weights.shape
    mass = torch.empty(*weights.shape[:2], 256)
    for of_head, own, weight, found in zip(bins, bin_row, weights, mass, strict=True):
        call = interface.BinMassArguments(
            of_head.data_ptr(),
            own.data_ptr(),
            weight.data_ptr(),
            found.data_ptr(),
            length,
            1,
            rows,
            bins.shape[1],
            squared,
            torch.get_num_threads(),
        )
        library().minference_mass_by_bin(ctypes.byref(call))
    return mass


def threshold(sample: CalibrationRows, mass: torch.Tensor, gamma: float) -> torch.Tensor:
    """``CalibrationRows.threshold``."""
    places, mass = torch.cat([sample.spread, *sample.others], 1), mass.contiguous()
    found = torch.empty(len(mass), dtype=torch.int32)
    call = interface.ThresholdArguments(
        mass.data_ptr(),
        places.data_ptr(),
        found.data_ptr(),
        len(mass),
        mass.shape[1],
        places.shape[1],
        sample.spread.shape[1],
        sample.others[0].shape[1] if sample.others else 0,
        gamma,
        least_of_a_row(gamma),
        sample.errors,
        torch.get_num_threads(),
    )
    library().minference_threshold(ctypes.byref(call))
    return found


def page_counts(bins: torch.Tensor, threshold: torch.Tensor, block_size: int) -> torch.Tensor:
    """``score_bins.page_counts``."""
    heads, tiles, length = bins.shape
    counts = torch.empty(heads, tiles, -(-length // block_size), dtype=torch.int32)
    call = _key_arguments(bins, threshold, block_size, counts)
    library().minference_page_counts(ctypes.byref(call))
    return counts


def sampled_keys(tiling: Tiling, bins: torch.Tensor, threshold: torch.Tensor) -> Selection:
    """``score_bins.sampled_keys``."""
    blocks, dense = whole_pages(tiling, page_counts(bins, threshold, tiling.block_size), threshold)
    first, own, increments = tiling.first_seen(), tiling.first_own(), score_bins.increments(bins.device)
    count = torch.empty(bins.shape[:2], dtype=torch.int32)

    def listed(columns: torch.Tensor | None, codes: torch.Tensor | None) -> None:
        pages = ~(blocks | dense[..., None])
        call = interface.SampleArguments(
            bins.data_ptr(),
            threshold.data_ptr(),
            first.data_ptr(),
            own.data_ptr(),
            pages.data_ptr(),
            increments.data_ptr(),
            count.data_ptr(),
            None if columns is None else columns.data_ptr(),
            None if codes is None else codes.data_ptr(),
            bins.shape[2],
            len(bins),
            bins.shape[1],
            tiling.block_size,
            0 if columns is None else columns.shape[2],
            score_bins.MAX_CODE,
            torch.get_num_threads(),
        )
        library().minference_sampled_keys(ctypes.byref(call))

    listed(None, None)
    columns = torch.empty(*count.shape, max(1, int(count.max())), dtype=torch.int32)
    codes = torch.zeros(columns.shape, dtype=torch.uint8)
    listed(columns, codes)
    return Selection(blocks, KeyLists(columns, count, codes))


def _key_arguments(
    bins: torch.Tensor,
    threshold: torch.Tensor,
    block_size: int,
    counts: torch.Tensor,
    listed_pages: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> interface.KeyArguments:
    heads, tiles, length = bins.shape
    return interface.KeyArguments(
        bins.data_ptr(),
        threshold.data_ptr(),
        counts.data_ptr(),
        None if listed_pages is None else listed_pages.data_ptr(),
        None if columns is None else columns.data_ptr(),
        length,
        heads,
        tiles,
        block_size,
        0 if columns is None else columns.shape[2],
        torch.get_num_threads(),
    )


class NativeScores(TorchScores):
    """See ``selection.scores.Scores``.

    Args:
        from_pages: whether the kernels can read this cache (``library.unsupported_cache_reason``). They compute
            products of quantized keys for any cache.
    """

    representatives = staticmethod(representatives)
    tile_bins = staticmethod(tile_bins)
    mass_by_bin = staticmethod(mass_by_bin)
    threshold = staticmethod(threshold)

    def __init__(self, inputs: Inputs, from_pages: bool = True) -> None:
        super().__init__(inputs)
        self.from_pages = from_pages
        self._some_keys: dict[tuple[int, int], torch.Tensor] = {}

    def column_diagonal_scores(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """``probe_queries.column_diagonal_scores`` straight from the pages; heads ascending."""
        if not self.from_pages:
            return super().column_diagonal_scores(heads)
        groups = probe_groups(len(self.query))
        rows = torch.cat([torch.arange(begin, end) for begin, end in groups])
        starts = torch.tensor([0, *itertools.accumulate(end - begin for begin, end in groups)], dtype=torch.int32)
        wanted = torch.tensor(list(heads), dtype=torch.int32)
        columns, diagonals = (torch.empty(len(heads), self.inputs.chunk.seq_len) for _ in range(2))
        call = interface.ColumnDiagonalArguments(
            self._rows(rows, wanted), starts.data_ptr(), columns.data_ptr(), diagonals.data_ptr(), len(groups)
        )
        library(self.inputs.cache.key.dtype).minference_column_diagonal_scores(ctypes.byref(call))
        return columns, diagonals

    def row_shares(self, rows: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        """``measured_rows.by_value`` of the rows' attention straight from the pages, in bf16 to halve the memory. It is
        a softmax of scores plus the logarithms of the values' norms."""
        if not self.from_pages:
            return super().row_shares(rows, heads)
        shares = torch.empty(*rows.shape, self.inputs.chunk.seq_len, dtype=torch.bfloat16)
        for own, head, found in zip(rows.contiguous(), heads, shares, strict=True):
            wanted, norms = torch.tensor([head], dtype=torch.int32), self._log_norms[head // self.inputs.group]
            for some, part in zip(own.split(MAX_ROWS), found.split(MAX_ROWS), strict=True):
                call = interface.RowShareArguments(self._rows(some, wanted), norms.data_ptr(), part.data_ptr())
                library(self.inputs.cache.key.dtype).minference_row_shares(ctypes.byref(call))
        return shares

    @functools.cached_property
    def _log_norms(self) -> torch.Tensor:
        """float32 ``[HK, S]``: base-2 logarithms of the values' norms."""
        return bounded(self.kv_value_norms).log2()

    def some_keys(self, heads: Sequence[int], step: int) -> torch.Tensor:
        """Every ``step``-th key. Cached, since the heads of a KV head ask for the same keys one after the other."""
        found = []
        for head in heads:
            place = head // self.inputs.group, step
            if place not in self._some_keys:
                self._some_keys[place] = super().some_keys([head], step)[0]
            found.append(self._some_keys[place])
        return torch.stack(found)

    def key_codes(self, heads: Sequence[int], projection: Projection) -> torch.Tensor:
        """``projection.quantize_keys`` of all keys, straight from the pages. Rounding may differ by one."""
        if not self.from_pages:
            return super().key_codes(heads, projection)
        inputs, rank = self.inputs, projection.to_key.shape[2]
        wanted, to_key = torch.tensor(list(heads), dtype=torch.int32), projection.to_key.contiguous()
        center = torch.matmul(projection.mean, to_key)
        codes = torch.empty(len(wanted), inputs.chunk.seq_len, rank, dtype=torch.int8)
        call = interface.KeyCodeArguments(
            describe_cache(inputs.cache),
            inputs.pages.data_ptr(),
            wanted.data_ptr(),
            to_key.data_ptr(),
            center.data_ptr(),
            codes.data_ptr(),
            inputs.chunk.seq_len,
            inputs.num_heads,
            len(wanted),
            rank,
            MAX_KEY,
            MAX_KEY_NORM,
            torch.get_num_threads(),
        )
        library(inputs.cache.key.dtype).minference_key_codes(ctypes.byref(call))
        return codes

    def _rows(self, rows: torch.Tensor, heads: torch.Tensor) -> interface.RowArguments:
        """``heads`` is int32, ascending, and ``rows`` int64. Both must outlive the result."""
        inputs = self.inputs
        return interface.RowArguments(
            describe_cache(inputs.cache),
            inputs.query.data_ptr(),
            inputs.query.stride(0),
            inputs.query.stride(1),
            inputs.pages.data_ptr(),
            rows.data_ptr(),
            heads.data_ptr(),
            inputs.chunk.context_len,
            inputs.chunk.seq_len,
            inputs.window,
            inputs.num_heads,
            len(heads),
            len(rows),
            inputs.scale,
            inputs.softcap,
            torch.get_num_threads(),
        )

    def select_bins(self, tiling: Tiling, found: ScoreBins, capacity: Capacity) -> Selection | WritesLists:
        if not capacity.exact or tiling.column_multiple > 1:
            return super().select_bins(tiling, found, capacity)
        if found.sampled:
            return sampled_keys(tiling, found.bins, found.threshold)
        bins, threshold = found.bins, found.threshold
        counts = page_counts(bins, threshold, tiling.block_size)
        blocks, dense = whole_pages(tiling, counts, threshold)
        listed_pages = ~(blocks | dense[..., None])
        count = (counts * listed_pages).sum(2, dtype=torch.int32)
        columns = torch.empty(*count.shape, max(1, int(count.max())), dtype=torch.int32)
        call = _key_arguments(bins, threshold, tiling.block_size, counts, listed_pages, columns)
        library().minference_keys_above(ctypes.byref(call))
        return Selection(blocks, KeyLists(columns, count))
