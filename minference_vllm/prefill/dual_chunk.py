"""Dual chunk attention (arXiv 2402.17463), by which Qwen2.5-1M checkpoints read beyond their training length.

The sequence is cut at multiples of ``L = chunk_size - local_size``. Keys are rotated by their position in their own
chunk, ``j % L``. A query attends three ranges of keys in one softmax, with a different rotation for each:

==========  =======================================  ===============================
part        keys, for a query in chunk ``c``         the query's position
==========  =======================================  ===============================
intra       ``[c * L, i]``                           ``i % L``
successive  ``[(c - 1) * L, c * L)``                 ``min(i % L + L, chunk_size)``
inter       ``[0, (c - 1) * L)``                     ``min(2 * L - 1, chunk_size)``
==========  =======================================  ===============================

So each part is ordinary attention over a range of pages, with keys selected as for any other chunk. The parts are
merged by log-sum-exp. Within the first chunk it is plain attention.

Beyond ``original_max_position_embeddings`` (``N``) scores are multiplied by ``(0.1 * ln(n / N) + 1) ** 2`` (YaRN, arXiv
2309.00071), ``n`` being the tokens up to the row. vLLM's V0 used the length of the whole prompt as ``n``. Chunked
prefill does not know it, and cached prefixes must not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.plan import Chunk
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.kernel import Kernel
from minference_vllm.patterns.kinds import Dense, HeadPattern
from minference_vllm.prefill.attend import select
from minference_vllm.prefill.timing import Timing

ROTATIONS = 5
"""Rotations of a query that vLLM passes, concatenated. The last two (successive and inter without their upper bounds)
are for selecting keys over all parts at once. They are not used here: every part selects its own keys."""

MERGED_ROWS = 1024
"""Rows merged at once, to bound the memory for their float32 copies."""


@dataclass(frozen=True)
class DualChunk:
    """The geometry, from a checkpoint's ``dual_chunk_attention_config``."""

    chunk_size: int
    local_size: int
    original_len: int = 0
    """``original_max_position_embeddings``; 0: scores are not scaled."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DualChunk:
        """From ``dual_chunk_attention_config``.

        Raises:
            ValueError: sizes are missing, not integers, or leave no chunk.
        """
        original = config.get("original_max_position_embeddings") or 0
        sizes: list[Any] = [config.get("chunk_size"), config.get("local_size"), original]
        if not all(type(size) is int for size in sizes) or not (0 <= sizes[1] < sizes[0] and original >= 0):
            raise ValueError(
                "dual_chunk_attention_config needs integers chunk_size > local_size >= 0 and "
                f"original_max_position_embeddings >= 0, not {', '.join(map(repr, sizes))}"
            )
        return cls(*sizes)

    @property
    def chunk_len(self) -> int:
        """Tokens per chunk, ``L``."""
        return self.chunk_size - self.local_size

    @property
    def plain_len(self) -> int:
        """Maximum length of a sequence that is plain attention with the first rotation."""
        return min(self.chunk_len, self.original_len or self.chunk_len)

    def sharpened(self, query: torch.Tensor, first: int) -> torch.Tensor:
        """Queries multiplied by the factor of their scores.

        Args:
            query: ``[n, ...]``, at positions from ``first`` on.
        """
        if not self.original_len or first + len(query) <= self.original_len:
            return query
        tokens = torch.arange(first + 1, first + len(query) + 1, dtype=torch.float64, device=query.device)
        factor = ((tokens / self.original_len).log() * 0.1 + 1).clamp_(min=1).square_().float()
        return (query * factor.view(-1, *[1] * (query.dim() - 1))).to(query.dtype)

    def pieces(self, chunk: Chunk) -> Iterator[tuple[int, int]]:
        """Split an engine step's chunk at the borders of dual chunks, into positions ``[begin, end)``."""
        begin = chunk.context_len
        while begin < chunk.seq_len:
            end = min((begin // self.chunk_len + 1) * self.chunk_len, chunk.seq_len)
            yield begin, end
            begin = end

    def key_ranges(self, begin: int, end: int) -> tuple[tuple[int, int], ...]:
        """Keys ``[first, last)`` of the parts of a piece that are not empty: intra, successive, inter."""
        own = begin // self.chunk_len * self.chunk_len
        before = max(0, own - self.chunk_len)
        ranges = ((own, end), (before, own), (0, before))
        return tuple(keys for keys in ranges if keys[0] < keys[1])


@dataclass(frozen=True)
class Part:
    """One part of a piece, as it was attended."""

    rows: tuple[int, int]
    """Positions of the queries."""
    keys: tuple[int, int]
    """Range of key positions. The index counts from its first key and may extend beyond its end."""
    index: SparseIndex
    inputs: Inputs
    """The part as an ordinary chunk, see ``_part``."""


def attend_dual_chunk(
    rotated: torch.Tensor,
    inputs: Inputs,
    geometry: DualChunk,
    patterns: Sequence[HeadPattern],
    kernel: Kernel,
    out: torch.Tensor,
    tile: int | None = None,
    timing: Timing | None = None,
) -> list[Part]:
    """Dual chunk attention of one request's chunk, written to ``out``. Each part selects by its own scores, with the
    whole budget.

    Args:
        rotated: ``[chunk, ROTATIONS, H, D]``.
        inputs: the chunk's, with the first rotation as its query. The page size divides ``geometry.chunk_len``.
        patterns: one per query head, without a remainder.
        kernel: one that returns log-sum-exps and supports single columns: ``native`` or ``triton``.
        out: ``[chunk, H, D]``.
        tile, timing: see ``attend_chunk``.
    """
    timing = timing or Timing()
    parts = []
    start = inputs.chunk.context_len
    for begin, end in geometry.pieces(inputs.chunk):
        rows = slice(begin - start, end - start)
        query = geometry.sharpened(rotated[rows], begin)
        lse = _lse(out[rows])
        for which, keys in enumerate(geometry.key_ranges(begin, end)):
            part = _part(inputs, query[:, which], (begin, end), keys)
            index = select(part, patterns, kernel, kernel.scores(part), tile, timing)
            if which:
                index = index.without_own_keys()
            with timing.stage("attend"):
                if which:
                    more = torch.empty_like(out[rows])
                    more_lse = _lse(more)
                    kernel.run(part, index, more, more_lse)
                    merge(out[rows], lse, more, more_lse)
                else:
                    kernel.run(part, index, out[rows], lse)
            parts.append(Part((begin, end), keys, index, part))
    return parts


def decode_dual_chunk(
    rotated: torch.Tensor, inputs: Inputs, geometry: DualChunk, kernel: Kernel, out: torch.Tensor
) -> None:
    """Dense ``attend_dual_chunk`` of a single row.

    Outside of the row's own page nothing is masked, so the query heads of a KV head are passed as rows of one head:
    the kernel then reads keys once for all of them.
    """
    position, size, kv_heads = inputs.chunk.context_len, inputs.cache.block_size, inputs.cache.num_kv_heads
    query, page = geometry.sharpened(rotated, position), position // size * size
    own = _part(inputs, query[:, 0], (position, position + 1), (page, position + 1))
    lse = _lse(out)
    kernel.run(own, _everything(own, kernel), out, lse)
    (intra, *others) = geometry.key_ranges(position, position + 1)
    for which, keys in enumerate([(intra[0], page), *others]):
        if keys[0] == keys[1]:
            continue
        rows = query[0, which].unflatten(0, (kv_heads, -1)).transpose(0, 1)  # [H / HK, HK, D]
        part = _part(inputs, rows, (position, position + len(rows)), keys)
        more = torch.empty(rows.shape, dtype=out.dtype, device=out.device)
        more_lse = _lse(more)
        kernel.run(part, _everything(part, kernel).without_own_keys(), more, more_lse)
        merge(out, lse, more.transpose(0, 1).reshape(out.shape), more_lse.view(lse.shape))


def _everything(inputs: Inputs, kernel: Kernel) -> SparseIndex:
    return select(inputs, [Dense()] * inputs.num_heads, kernel, kernel.scores(inputs))


def _lse(out: torch.Tensor) -> torch.Tensor:
    """float32 ``[H, n]`` for attention ``[n, H, D]``, not initialised."""
    return torch.empty(out.shape[1], out.shape[0], dtype=torch.float32, device=out.device)


def _part(inputs: Inputs, query: torch.Tensor, rows: tuple[int, int], keys: tuple[int, int]) -> Inputs:
    """A part as an ordinary chunk, whose last row is the last token of its sequence.

    Selection expects the rows' own keys at the end of the sequence, but rows after their key range have none in it.
    Pages from the middle of the range stand in for them (not the first or the nearest keys, which have most of the
    attention) until ``without_own_keys`` removes them. During selection, these keys therefore count twice.
    """
    size, (begin, end), (first, last) = inputs.cache.block_size, rows, keys
    pages = inputs.pages[first // size : -(-last // size)]
    if last == end:
        chunk = Chunk(inputs.chunk.request, 0, begin - first, end - first)
    else:
        chunk = Chunk(inputs.chunk.request, 0, last - first, last - first + end - begin)
        spare = -(-(end - begin) // size)
        middle = (len(pages) - spare) // 2
        pages = torch.cat([pages, pages[middle : middle + spare]])
    return replace(inputs, query=query, pages=pages, chunk=chunk)


def merge(out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor) -> None:
    """Merge attention over a second set of keys into that over the first, in place.

    Args:
        out: ``[n, H, D]``, attention over the first set, in which every row has keys.
        lse: float32 ``[H, n]``, log-sum-exp of its scores.
        more, more_lse: the same for the second set. A row without keys in it has -inf; its ``more`` is ignored.
    """
    share = torch.sigmoid(more_lse - lse).T[..., None]
    pieces = (part.split(MERGED_ROWS) for part in (out, more, share))
    for own, other, weight in zip(*pieces, strict=True):
        before = own.float()
        own.copy_(torch.where(weight > 0, before.lerp(other.float(), weight), before))
    lse.copy_(torch.logaddexp(lse, more_lse))
