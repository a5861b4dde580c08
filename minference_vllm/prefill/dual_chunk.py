"""Dual chunk attention (arXiv 2402.17463), with which Qwen2.5-1M checkpoints read beyond the length of their training.

The sequence is cut at multiples of ``L = chunk_size - local_size``. Keys are rotated by their place in their own chunk,
``j % L``. A query attends three ranges of keys, each with a rotation of its own, and all of them in one softmax:

==========  =======================================  ===============================
part        keys, for a query in chunk ``c``         the query's position
==========  =======================================  ===============================
intra       ``[c * L, i]``                           ``i % L``
successive  ``[(c - 1) * L, c * L)``                 ``min(i % L + L, chunk_size)``
inter       ``[0, (c - 1) * L)``                     ``min(2 * L - 1, chunk_size)``
==========  =======================================  ===============================

So each part is ordinary attention over a range of pages, for which keys are selected as for any other chunk, and the
parts are merged by log-sum-exp. Within the first chunk it is plain attention.

Beyond ``original_max_position_embeddings`` (``N``) scores are multiplied by ``(0.1 * ln(n / N) + 1) ** 2`` (YaRN, arXiv
2309.00071), ``n`` being the tokens up to the row. vLLM's V0 took the whole prompt's length for ``n``, which chunked
prefill does not know, and cached prefixes must not depend on.
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
"""Rotations in which vLLM hands a query over, side by side. The last two (successive and inter without their upper
bounds) are for choosing keys over all parts at once, and are not used: every part chooses its own."""

MERGED_ROWS = 1024
"""Rows that are merged at once: they take float32 beside the output's own type."""


@dataclass(frozen=True)
class DualChunk:
    """The geometry, as a checkpoint's ``dual_chunk_attention_config`` has it."""

    chunk_size: int
    local_size: int
    original_len: int = 0
    """``original_max_position_embeddings``; 0: scores are left as they are."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DualChunk:
        """From ``dual_chunk_attention_config``.

        Raises:
            ValueError: sizes are missing, or no integers that leave a chunk.
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
        """Tokens of a sequence up to which all of it is plain attention with the first rotation."""
        return min(self.chunk_len, self.original_len or self.chunk_len)

    def sharpened(self, query: torch.Tensor, first: int) -> torch.Tensor:
        """Queries times what their scores are multiplied by.

        Args:
            query: ``[n, ...]``, of the positions from ``first`` on.
        """
        if not self.original_len or first + len(query) <= self.original_len:
            return query
        tokens = torch.arange(first + 1, first + len(query) + 1, dtype=torch.float64, device=query.device)
        factor = ((tokens / self.original_len).log() * 0.1 + 1).clamp_(min=1).square_().float()
        return (query * factor.view(-1, *[1] * (query.dim() - 1))).to(query.dtype)

    def pieces(self, chunk: Chunk) -> Iterator[tuple[int, int]]:
        """Positions ``[begin, end)`` of the rows of an engine step's chunk that lie in one of ours."""
        begin = chunk.context_len
        while begin < chunk.seq_len:
            end = min((begin // self.chunk_len + 1) * self.chunk_len, chunk.seq_len)
            yield begin, end
            begin = end

    def key_ranges(self, begin: int, end: int) -> tuple[tuple[int, int], ...]:
        """Keys ``[first, last)`` of the parts that a piece's rows have: intra, successive, inter."""
        own = begin // self.chunk_len * self.chunk_len
        before = max(0, own - self.chunk_len)
        ranges = ((own, end), (before, own), (0, before))
        return tuple(keys for keys in ranges if keys[0] < keys[1])


@dataclass(frozen=True)
class Part:
    """What was attended in one part of a piece."""

    rows: tuple[int, int]
    """Positions of the queries."""
    keys: tuple[int, int]
    """Positions of the range of keys; the index counts from its first, and may go on behind it."""
    index: SparseIndex
    inputs: Inputs
    """As an ordinary chunk."""


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
        inputs: the chunk's, with the first rotation as its query. Pages divide ``geometry.chunk_len``.
        patterns: one per query head, without a remainder.
        kernel: one that gives the log-sum-exp of rows and has single columns, ``native`` or ``triton``.
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
    """``attend_dual_chunk`` of a single row to all of its keys.

    Beyond the row's own page nothing is masked, and the query heads of a KV head are handed over as rows of one head:
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

    Rows behind their range of keys have no keys of their own in it, and whatever selects keys takes those for granted.
    Pages from the middle of the range stand in for them (neither the first keys nor the nearest ones, which have most
    of the attention), until the index is freed of them: their keys count twice while others are chosen.
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
    """Attention over two sets of keys together, in place of that over the first.

    Args:
        out: ``[n, H, D]``, attention over the first set, of which every row has keys.
        lse: float32 ``[H, n]``, log-sum-exp of its scores.
        more, more_lse: the same of the second set; -inf where a row has none of its keys, whatever stands in ``more``.
    """
    share = torch.sigmoid(more_lse - lse).T[..., None]
    pieces = (part.split(MERGED_ROWS) for part in (out, more, share))
    for own, other, weight in zip(*pieces, strict=True):
        before = own.float()
        own.copy_(torch.where(weight > 0, before.lerp(other.float(), weight), before))
    lse.copy_(torch.logaddexp(lse, more_lse))
