"""The estimates of one chunk over a paged cache, from whatever kernels can give them, and the time they take."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.native import attention as native
from minference_vllm.prefill.recall import ROWS_AT_ONCE, keys_at_once, sampled_recall
from minference_vllm.selection import low_rank
from minference_vllm.selection import probe_queries as estimate
from minference_vllm.selection.build import SparseIndex
from minference_vllm.selection.score_bins import Levels


@dataclass
class Timing:
    """Seconds spent on each stage, summed over chunks."""

    estimate: float = 0.0
    index: float = 0.0
    audit: float = 0.0
    attend: float = 0.0
    wait: bool = False
    """Whether the clock waits for a GPU to finish; without, it is the host's own time that is measured."""

    def now(self, device: torch.device) -> float:
        if self.wait and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


class PagedEstimates(estimate.Estimates):
    """Estimates over a paged cache, timed. What no kernel reads from the pages copies the prefix out of them, once."""

    def __init__(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        pages: torch.Tensor,
        seq_len: int,
        scale: float,
        page_means: PageMeans | None = None,
        triton: bool = False,
        timing: Timing | None = None,
    ) -> None:
        # An FP8 query serves the attention kernel alone; estimates take it as it is meant, but for its scale.
        self.query = query.bfloat16() if query.element_size() == 1 else query
        self.cache, self.pages, self.seq_len, self.scale = cache, pages, seq_len, scale
        self.page_means, self.triton, self.timing = page_means, triton, timing or Timing()
        self.kernels = low_rank.Kernels() if query.is_cuda else native.low_rank_kernels()
        self.native = native.unsupported_cache_reason(self.query.dtype, cache) is None

    @functools.cached_property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        return self._keys_of(self.pages)[:, : self.seq_len]

    def _keys_of(self, pages: torch.Tensor) -> torch.Tensor:
        """``[HK, n * B, D]``: keys of some pages, a copy, in the type of the queries."""
        keys = self.cache.keys_by_head(pages)
        return keys if keys.dtype == self.query.dtype else keys.to(self.query.dtype).mul_(self.cache.key_scale)

    def _key_pieces(self, rows: int) -> Iterator[torch.Tensor]:
        """``[HK, n, D]`` each: the keys, for the recall of as many rows; on a GPU never all of them are copied."""
        cache = self.cache
        at_once = keys_at_once(self.query.shape[1], rows, cache.num_kv_heads, cache.head_size)
        if not self.triton:
            yield from self.keys.split(at_once, dim=1)
            return
        missing = self.seq_len
        for pages in self.pages.split(max(1, at_once // cache.block_size)):
            piece = self._keys_of(pages)[:, :missing]
            missing -= piece.shape[1]
            yield piece

    def means(self, tiling: Tiling) -> torch.Tensor:
        if self.page_means is None:
            return super().means(tiling)
        return self.page_means.of(self.cache, self.pages, self.seq_len)

    def last_query(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with self._timed():
            return super().last_query(heads)

    def last_query_scores(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        paged = self.query, self.cache, self.pages, self.seq_len, heads, self.scale
        if self.triton:
            from minference_vllm.triton_kernels import estimate as kernels

            return kernels.last_query_scores(*paged)
        return native.last_query_scores(*paged) if self.native else super().last_query_scores(heads)

    def _row_weights(self, rows: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        return native.row_weights(self.query, self.cache, self.pages, self.seq_len, rows, heads, self.scale)

    def pooled(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        with self._timed():
            return estimate.pooled_scores(*self._means(heads, tiling), tiling, self.scale)

    def peaks(self, heads: Sequence[int], tiling: Tiling) -> torch.Tensor:
        with self._timed():
            return estimate.peak_scores(*self._means(heads, tiling), tiling, self.scale)

    def antidiagonal(self, heads: Sequence[int], tiling: Tiling, stride: int) -> torch.Tensor:
        with self._timed():
            if self.triton:
                from minference_vllm.triton_kernels import antidiagonal as kernels

                paged = self.query, self.cache, self.pages
                return kernels.antidiagonal_scores(*paged, heads, tiling, stride, self.scale)
            return super().antidiagonal(heads, tiling, stride)

    def low_rank(self, heads: Sequence[int], tiling: Tiling, rank: int, gamma: float) -> Levels:
        of, kernels, lines = self, self.kernels, None
        if self.triton:
            from minference_vllm.triton_kernels import low_rank as ours

            of, heads = self._kv_heads_of(heads)
            kernels = ours.KERNELS
        else:
            lines = self.last_query(heads)
            if self.native:
                kernels = kernels._replace(row_weights=self._row_weights)

        def pieces() -> Iterator[torch.Tensor]:
            return of._key_pieces(low_rank.CALIBRATION_ROWS)

        with self._timed():
            return low_rank.estimate(of.query, pieces, heads, tiling, rank, gamma, self.scale, kernels, lines)

    def _kv_heads_of(self, heads: Sequence[int]) -> tuple[PagedEstimates, list[int]]:
        """What these heads need of the query and the cache, and their numbers in it."""
        group = self.query.shape[1] // self.cache.num_kv_heads
        first, last = min(heads) // group, max(heads) // group + 1
        key, value = (stored[:, first:last] for stored in (self.cache.key, self.cache.value))
        cache = dataclasses.replace(self.cache, key=key, value=value)
        query = self.query[:, first * group : last * group]
        part = PagedEstimates(query, cache, self.pages, self.seq_len, self.scale, triton=self.triton)
        return part, [head - first * group for head in heads]

    def _means(self, heads: Sequence[int], tiling: Tiling) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Queries, mean keys and the wanted heads' numbers, all of the KV heads that those heads need."""
        if not self.triton:
            return self.query, self.means(tiling), list(heads)
        from minference_vllm.triton_kernels import estimate as kernels

        group = self.query.shape[1] // self.cache.num_kv_heads
        first, last = min(heads) // group, max(heads) // group + 1
        means = kernels.mean_keys(self.cache, self.pages, self.seq_len, first, last)
        return self.query[:, first * group : last * group], means, [head - first * group for head in heads]

    def recall(self, index: SparseIndex, rows: torch.Tensor) -> torch.Tensor:
        """See ``recall.sampled_recall``."""
        begin = self.timing.now(self.query.device)
        if self.query.is_cuda:
            # From ordinary memory the copy would wait for the GPU.
            rows = rows.pin_memory().to(self.query.device, non_blocking=True)
        parts = [
            sampled_recall(self.query, self._key_pieces(len(part)), index, part, self.scale)
            for part in rows.split(ROWS_AT_ONCE)
        ]
        self.timing.audit += self.timing.now(self.query.device) - begin
        return torch.cat(parts, 1)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        begin = self.timing.now(self.query.device)
        yield
        self.timing.estimate += self.timing.now(self.query.device) - begin
