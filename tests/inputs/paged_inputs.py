"""Batches of requests over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.patterns.kinds import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PeakThreshold,
    TriShape,
    VerticalSlash,
)

# With fewer heads than patterns only the first ones are used, so those that differ most come first.
PATTERNS: tuple[HeadPattern, ...] = (
    VerticalSlash(vertical=60, slash=120),
    BlockSparse(top_k=2),
    AShape(sink=16, local=100),
    VerticalSlash(vertical=300, slash=100),
    TriShape(sink=16, local=64, last=40),
    Dense(),
    VerticalSlash(vertical=33, slash=0),
    AShape(sink=0, local=1),
)
# The tests' attention is nearly flat: only a small gamma leaves keys out.
ADAPTIVE: tuple[HeadPattern, ...] = (
    Coverage(gamma=0.4, min_budget=0),
    Antidiagonal(stride=16, tau=0.4),
    PeakThreshold(alpha=0.9, sink=16, window=40),
    LowRank(gamma=0.3),
    Coverage(gamma=0.9, min_budget=0),
    LowRank(gamma=0.3, queries=16),
    PeakThreshold(alpha=0.3, sink=0, window=0),
    Antidiagonal(stride=2, tau=0.1),
    LowRank(rank=32, gamma=0.02),
)


@dataclass
class PagedBatch:
    """Requests whose keys and values lie in shuffled pages; pages without an owner are NaN."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    context_lens: list[int]

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """The leading arguments of ``sparse_prefill``."""
        return self.query, self.key_cache, self.value_cache, self.block_table, self.query_start_loc, self.seq_lens

    @property
    def scale(self) -> float:
        return float(self.query.shape[2]) ** -0.5

    @property
    def patterns(self) -> list[HeadPattern]:
        """One per head, of the kinds whose budgets are fixed."""
        return [PATTERNS[head % len(PATTERNS)] for head in range(self.query.shape[1])]

    @property
    def adaptive_patterns(self) -> list[HeadPattern]:
        """One per head, of the kinds whose budgets follow the attention."""
        return [ADAPTIVE[head % len(ADAPTIVE)] for head in range(self.query.shape[1])]

    @property
    def cache(self) -> PagedCache:
        return PagedCache(self.key_cache.transpose(1, 2), self.value_cache.transpose(1, 2), "rows")

    def inputs(self, request: int = 0, cache: PagedCache | None = None, page_means: PageMeans | None = None) -> Inputs:
        """Inputs of one request.

        Args:
            cache: the batch's cache in another layout.
        """
        rows = self.rows(request)
        chunk = Chunk(request, rows.start, self.context_lens[request], int(self.seq_lens[request]))
        table = self.block_table[request].long()
        return Inputs.of(self.query[rows], cache or self.cache, table, chunk, self.scale, page_means=page_means)

    def rows(self, request: int) -> slice:
        return slice(int(self.query_start_loc[request]), int(self.query_start_loc[request + 1]))

    def keys(self, request: int) -> torch.Tensor:
        """float64 ``[HK, S, D]``."""
        return reference.gather_sequence(self.key_cache, self.block_table[request], int(self.seq_lens[request]))

    def values(self, request: int) -> torch.Tensor:
        return reference.gather_sequence(self.value_cache, self.block_table[request], int(self.seq_lens[request]))


def make_batch(
    query_lens: Sequence[int] = (300,),
    context_lens: Sequence[int] = (0,),
    heads: int = 8,
    kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    behind: float = 100.0,
) -> PagedBatch:
    """Random requests.

    Args:
        behind: value of the slots past a request's last token; the default is large enough to show.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    lengths = [query + context for query, context in zip(query_lens, context_lens, strict=True)]
    blocks = [-(-length // block_size) for length in lengths]
    total = sum(blocks) + 3  # three pages without an owner
    shape = (total, block_size, kv_heads, head_size)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    here = torch.empty(0).device
    order = torch.randperm(total, generator=generator, device="cpu").to(here, torch.int32)
    table = torch.full((len(lengths), max(blocks) + 1), int(order[-1]), dtype=torch.int32)
    first = 0
    for request, (count, length) in enumerate(zip(blocks, lengths, strict=True)):
        pages = order[first : first + count]
        table[request, :count] = pages
        first += count
        for cache in caches:
            rows = torch.full((count * block_size, kv_heads, head_size), behind)
            rows[:length] = torch.randn(length, kv_heads, head_size, generator=generator, device="cpu")
            cache[pages.long()] = rows.view(count, block_size, kv_heads, head_size).to(dtype)
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    query = torch.randn(int(starts[-1]), heads, head_size, generator=generator, device="cpu").to(here, dtype)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return PagedBatch(query, caches[0], caches[1], table, starts, seq_lens, list(context_lens))
