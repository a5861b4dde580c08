"""``TritonScores``: the scores of one chunk on a GPU, straight from the pages where kernels support it. There is no
host synchronisation, and the prefix's keys are never copied all at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import LowRank
from minference_vllm.selection.block_sparse import pooled_scores
from minference_vllm.selection.compaction import Capacity, Selection, WritesLists
from minference_vllm.selection.low_rank import gpu_rank
from minference_vllm.selection.measured_rows import drawn_rows
from minference_vllm.selection.peak_threshold import peak_scores
from minference_vllm.selection.score_bins import ScoreBins
from minference_vllm.selection.torch_scores import TorchScores, keys_at_once
from minference_vllm.triton_kernels import (
    antidiagonal,
    calibration,
    column_diagonal,
    low_rank,
    page_means,
)
from minference_vllm.triton_kernels.chunk_queries import measured_rows, query_codes
from minference_vllm.triton_kernels.fit import fitted
from minference_vllm.triton_kernels.key_codes import key_codes
from minference_vllm.triton_kernels.key_lists import BinLists
from minference_vllm.triton_kernels.representatives import representative_codes
from minference_vllm.triton_kernels.thresholds import thresholds


class TritonScores(TorchScores):
    """See ``selection.scores.Scores``."""

    def key_pieces(self, rows: int) -> Iterator[torch.Tensor]:
        missing = self.inputs.chunk.seq_len
        for pages in self._pages(rows):
            piece = self.stored_keys(pages)[:, :missing]
            missing -= piece.shape[1]
            yield piece

    def _pages(self, rows: int) -> tuple[torch.Tensor, ...]:
        """The pages, in pieces sized for the scores of this number of rows."""
        cache = self.inputs.cache
        at_once = keys_at_once(self.inputs.num_heads, rows, cache.num_kv_heads, cache.head_size)
        return self.inputs.pages.split(max(1, at_once // cache.block_size))

    def column_diagonal_scores(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.inputs
        return column_diagonal.column_diagonal_scores(
            self.query, inputs.cache, inputs.pages, inputs.chunk.seq_len, heads, self.scale
        )

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return pooled_scores(*self._means_of(heads), tiling, self.scale, self.softcap)

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        return peak_scores(*self._means_of(heads), tiling, self.scale, self.softcap)

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        return antidiagonal.antidiagonal_scores(
            self.query, self.inputs.cache, self.inputs.pages, heads, tiling, stride, self.scale
        )

    def low_rank(self, heads: Sequence[int], tiling: Tiling, pattern: LowRank) -> ScoreBins:
        """As the definition, but without tensors of size rows x keys."""
        inputs, query = self.inputs, self.query
        drawn = drawn_rows(len(query), tiling.seq_len, query.device)
        rows = measured_rows(query, heads, drawn)
        projection = fitted(inputs, query, heads, rows[:, drawn.sampled :], gpu_rank(pattern))
        codes, factor = key_codes(inputs, heads, projection), self.scale / math.log(2)
        if pattern.queries:
            scored = representative_codes(query, heads, projection, factor, codes, tiling, pattern.queries)
        else:
            scored = query_codes(query, heads, projection, factor, codes, tiling)
        bins = low_rank.tile_bins(scored, tiling, pattern.queries)
        levels = calibration.share_levels(
            inputs, query, heads, rows, tiling, bins, self._value_norms, squared=pattern.samples
        )
        return ScoreBins(bins, thresholds(levels, drawn, pattern), pattern.samples)

    @functools.cached_property
    def _value_norms(self) -> torch.Tensor:
        return calibration.value_norms(self.inputs)

    def select_bins(self, tiling: Tiling, found: ScoreBins, capacity: Capacity) -> Selection | WritesLists:
        if capacity.exact or tiling.column_multiple > 1:
            return super().select_bins(tiling, found, capacity)
        return BinLists(tiling, found.bins, found.threshold, found.sampled)

    def audited_pieces(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        missing = self.inputs.chunk.seq_len
        for pages in self._pages(rows):
            # The values are freed before the keys are copied.
            norms = self._norms(pages)[:, :missing]
            missing -= norms.shape[1]
            yield self.stored_keys(pages)[:, : norms.shape[1]], norms

    def _norms(self, pages: torch.Tensor) -> torch.Tensor:
        """float32 ``[HK, n * B]``."""
        values = self.inputs.cache.values_by_head(pages)
        values = values.bfloat16() if values.element_size() == 1 else values
        return torch.linalg.vector_norm(values, dim=2, dtype=torch.float32)

    def _kv_heads_of(self, heads: Sequence[int]) -> tuple[int, int]:
        """First and last + 1 of the KV heads that these query heads need."""
        return min(heads) // self.inputs.group, max(heads) // self.inputs.group + 1

    @property
    def mean_keys(self) -> torch.Tensor:  # type: ignore[override]
        return self._mean_keys(self.inputs.cache, 0, self.inputs.cache.num_kv_heads)

    def _mean_keys(self, cache: PagedCache, first: int, last: int) -> torch.Tensor:
        return page_means.mean_keys(cache, self.inputs.pages, self.inputs.chunk.seq_len, first, last)

    def _means_of(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Queries and mean keys of the KV heads that these heads need, and the heads' indices among the queries."""
        first, last = self._kv_heads_of(heads)
        group = self.inputs.group
        means = self._mean_keys(self.inputs.cache, first, last)
        return self.query[:, first * group : last * group], means, [head - first * group for head in heads]
