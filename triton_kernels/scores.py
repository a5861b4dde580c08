"""``TritonScores``: the scores of one chunk on a GPU, straight from the pages wherever a kernel can; nothing waits for
the GPU, and the prefix's keys are never copied all at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.block_sparse import pooled_scores
from minference_vllm.selection.low_rank import CALIBRATION_ROWS
from minference_vllm.selection.peak_threshold import peak_scores
from minference_vllm.selection.score_bins import ScoreBins
from minference_vllm.selection.torch_scores import TorchScores, keys_at_once
from minference_vllm.triton_kernels import antidiagonal, column_diagonal, low_rank, page_means


class TritonScores(TorchScores):
    """See ``selection.scores.Scores``."""

    columns_first = False
    tile_bins = staticmethod(low_rank.tile_bins)
    row_mass = staticmethod(low_rank.row_mass)
    mass_by_bin = staticmethod(low_rank.mass_by_bin)

    def key_pieces(self, rows: int) -> Iterator[torch.Tensor]:
        missing = self.inputs.chunk.seq_len
        for pages in self._pages(rows):
            piece = self.stored_keys(pages)[:, :missing]
            missing -= piece.shape[1]
            yield piece

    def _pages(self, rows: int) -> tuple[torch.Tensor, ...]:
        """The pages, in pieces that suit the scores of so many rows."""
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

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> ScoreBins:
        # Keys are copied piece by piece: of the KV heads that these heads need.
        first, last = self._kv_heads_of(heads)
        cache, group = self.inputs.cache, self.inputs.group
        narrow = dataclasses.replace(cache, key=cache.key[:, first:last], value=cache.value[:, first:last])
        query = self.inputs.query[:, first * group : last * group]
        part = TritonScores(dataclasses.replace(self.inputs, query=query, cache=narrow))
        return super(TritonScores, part).low_rank([head - first * group for head in heads], tiling, rank, gamma)

    def audited_pieces(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        missing = self.inputs.chunk.seq_len
        for pages in self._pages(rows):
            # Values are gone before the keys are copied.
            norms = self._norms(pages)[:, :missing]
            missing -= norms.shape[1]
            yield self.stored_keys(pages)[:, : norms.shape[1]], norms

    @functools.cached_property
    def kv_value_norms(self) -> torch.Tensor:
        norms = [self._norms(pages) for pages in self._pages(CALIBRATION_ROWS)]
        return torch.cat(norms, 1)[:, : self.inputs.chunk.seq_len]

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

    @property
    def mean_values(self) -> torch.Tensor:  # type: ignore[override]
        cache = self.inputs.cache
        values = dataclasses.replace(cache, key=cache.value, key_scale=cache.value_scale)
        return self._mean_keys(values, 0, cache.num_kv_heads)

    def _mean_keys(self, cache: PagedCache, first: int, last: int) -> torch.Tensor:
        return page_means.mean_keys(cache, self.inputs.pages, self.inputs.chunk.seq_len, first, last)

    def _means_of(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Queries, mean keys and the wanted heads' numbers, all of the KV heads that those heads need."""
        first, last = self._kv_heads_of(heads)
        group = self.inputs.group
        means = self._mean_keys(self.inputs.cache, first, last)
        return self.query[:, first * group : last * group], means, [head - first * group for head in heads]
