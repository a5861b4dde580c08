"""``TorchScores``: the scores of one chunk in plain torch, over a paged cache; the definition of the other classes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import LowRank
from minference_vllm.selection import low_rank, measured_rows, score_bins, tile_queries
from minference_vllm.selection.antidiagonal import antidiagonal_scores
from minference_vllm.selection.block_sparse import pooled_scores
from minference_vllm.selection.compaction import (
    Capacity,
    KeyLists,
    Selection,
    WritesLists,
    compact_exact,
    compact_keys,
)
from minference_vllm.selection.peak_threshold import peak_scores
from minference_vllm.selection.probe_queries import beyond_diagonals, column_diagonal_scores, probe_groups
from minference_vllm.selection.projection import Projection, quantize_keys
from minference_vllm.selection.score_bins import ScoreBins

PIECE_BYTES = 64 << 20
"""Keys and scores of some rows that are held at once: a million tokens take no more memory than some thousands."""


def keys_at_once(heads: int, rows: int, kv_heads: int, head_size: int) -> int:
    """Tokens whose keys fit into ``PIECE_BYTES`` with the scores of so many rows."""
    # Two bytes per element, copied twice on their way; logits in both precisions, masks.
    return max(1, PIECE_BYTES // (2 * 2 * kv_heads * head_size + 10 * heads * rows))


class TorchScores:
    """See ``Scores``; copies the prefix's keys out of the pages, once, when they are first asked for."""

    def __init__(self, inputs: Inputs) -> None:
        # An FP8 query serves the attention kernel alone; scores take it as it is meant, but for its scale.
        self.query = inputs.query.bfloat16() if inputs.query.element_size() == 1 else inputs.query
        self.inputs, self.scale, self.softcap = inputs, inputs.scale, inputs.softcap

    @functools.cached_property
    def keys(self) -> torch.Tensor:
        """``[HK, S, D]``, in the type of the queries."""
        return self.stored_keys(self.inputs.pages)[:, : self.inputs.chunk.seq_len]

    def stored_keys(self, pages: torch.Tensor) -> torch.Tensor:
        """``[HK, n * B, D]``: keys of some pages, a copy, in the type of the queries."""
        return self._as_queries(self.inputs.cache.keys_by_head(pages))

    def _as_queries(self, keys: torch.Tensor) -> torch.Tensor:
        """Stored keys in the type of the queries."""
        return keys if keys.dtype == self.query.dtype else keys.to(self.query.dtype).mul_(self.inputs.cache.key_scale)

    def key_pieces(self, rows: int) -> Iterator[torch.Tensor]:
        """``[HK, n, D]`` each: all keys, in pieces that suit the scores of so many rows."""
        cache = self.inputs.cache
        yield from self.keys.split(keys_at_once(self.inputs.num_heads, rows, cache.num_kv_heads, cache.head_size), 1)

    @functools.cached_property
    def mean_keys(self) -> torch.Tensor:
        """float32 ``[HK, N, D]``: mean key of every page; of the last, over the sequence's tokens only."""
        means = self._page_means.of(self.inputs.cache, self.inputs.pages, self.inputs.chunk.seq_len)
        return means if self.inputs.cache.key_scale == 1.0 else means * self.inputs.cache.key_scale

    @functools.cached_property
    def kv_value_norms(self) -> torch.Tensor:
        """float32 ``[HK, S]``: norm of every value, up to one factor for all."""
        return self._page_means.value_norms_of(self.inputs.cache, self.inputs.pages, self.inputs.chunk.seq_len)

    def audited_pieces(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The pieces of ``key_pieces``, each with the norms of its values, float32 ``[HK, n]``."""
        first = 0
        for piece in self.key_pieces(rows):
            yield piece, self.kv_value_norms[:, first : first + piece.shape[1]]
            first += piece.shape[1]

    def value_norms(self, heads: Sequence[int]) -> torch.Tensor:
        norms = self.kv_value_norms
        return torch.stack([norms[head // self.inputs.group] for head in heads])

    @functools.cached_property
    def _page_means(self) -> PageMeans:
        return self.inputs.page_means or PageMeans()

    def column_diagonal(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        columns, diagonals = self.column_diagonal_scores(heads)
        groups = probe_groups(len(self.query))
        if len(groups) == 1:
            # One row cannot tell a column from a diagonal, and needs no other row's keys.
            return columns, diagonals.zero_()
        return beyond_diagonals(columns, diagonals, groups, self.inputs.chunk.context_len), diagonals

    def column_diagonal_scores(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``probe_queries.column_diagonal_scores``."""
        return column_diagonal_scores(self.query, self.keys, heads, self.scale, self.softcap, self.inputs.window)

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return pooled_scores(self.query, self.mean_keys, heads, tiling, self.scale, self.softcap)

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return peak_scores(self.query, self.mean_keys, heads, tiling, self.scale, self.softcap)

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return antidiagonal_scores(self.query, self.keys, heads, tiling, stride, self.scale, self.softcap)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
        return low_rank.score_keys(self, low_rank.Measured.of(self, heads, tiling), heads, tiling, pattern)

    def select_bins(self, tiling: Tiling, found: ScoreBins, capacity: Capacity) -> Selection | WritesLists:
        if found.sampled:
            blocks, single, codes = score_bins.sampled_keys(tiling, found.bins, found.threshold)
            positions, count = compact_exact(single)
            drawn = codes.gather(2, positions.long().clamp(min=0)).masked_fill_(positions < 0, 0)
            return Selection(blocks, KeyLists(positions, count, drawn))
        blocks, single = score_bins.keys_above(tiling, found.bins, found.threshold)
        del found  # its bins are as large as what comes now
        return compact_keys(tiling, blocks, single, capacity)

    def queries_of(self, heads: Sequence[int]) -> torch.Tensor:
        # A list as an index would be copied to a GPU, and waited for.
        return torch.stack([self.query[:, head] for head in heads])

    def keys_of(self, heads: Sequence[int]) -> Iterator[torch.Tensor]:
        """``[h, n, D]`` each: pieces that together are the sequence."""
        group = self.inputs.group
        runs = [(kv_head, len(list(run))) for kv_head, run in itertools.groupby(head // group for head in heads)]
        for piece in self.key_pieces(measured_rows.CALIBRATION_ROWS):
            parts = [piece[kv_head : kv_head + 1].expand(run, -1, -1) for kv_head, run in runs]
            yield measured_rows.joined(parts, 0)

    def some_keys(self, heads: Sequence[int], step: int) -> torch.Tensor:
        cache, pages = self.inputs.cache, self.inputs.pages
        positions = torch.arange(0, self.inputs.chunk.seq_len, step, device=pages.device)
        shape = len(heads), len(positions)
        kv_heads = torch.tensor([head // self.inputs.group for head in heads], device=pages.device)
        keys = cache.gather_keys(
            pages[positions // cache.block_size].expand(shape),
            (positions % cache.block_size).expand(shape),
            kv_heads[:, None].expand(shape),
        )
        return self._as_queries(keys)

    def key_codes(self, heads: Sequence[int], projection: Projection) -> torch.Tensor:
        return measured_rows.joined([quantize_keys(piece, projection) for piece in self.keys_of(heads)], 1)

    def row_shares(self, rows: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        query = torch.stack([self.query[of_head, head] for of_head, head in zip(rows, heads, strict=True)])
        positions = rows + self.inputs.chunk.context_len
        window = self.inputs.window
        keys = self.keys_of(heads)
        weights = measured_rows.row_weights(query, keys, positions, self.scale, self.softcap, window)
        return measured_rows.by_value(weights, self.value_norms(heads))

    @staticmethod
    def threshold(sample: measured_rows.CalibrationRows, mass: torch.Tensor, gamma: float) -> torch.Tensor:
        return sample.threshold(mass, gamma)

    representatives = staticmethod(tile_queries.representatives)
    tile_bins = staticmethod(score_bins.tile_bins)
    mass_by_bin = staticmethod(score_bins.mass_by_bin)
