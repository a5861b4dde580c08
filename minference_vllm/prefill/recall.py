"""Attention recall while serving: how much of the dense softmax mass the selected keys hold, on a few sampled rows.

Recall of a row is ``exp(lse_sparse - lse_dense)`` (Qwen2.5-1M, arXiv 2501.15383, section 4.2), here as the sum of the
dense weights on the selected keys, which is the same number. It is taken from the index before attention runs, so that
a head that falls short can be given more keys in the same chunk.

Sizes: ``H`` query heads over ``HK`` KV heads, ``R`` sampled rows, ``S`` tokens in the sequence, ``D`` head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from minference_vllm.patterns.kinds import MAX_LEVEL, HeadPattern, at_level
from minference_vllm.selection.build import SparseIndex
from minference_vllm.selection.probe_queries import logits

PIECE_BYTES = 64 << 20
"""Keys and scores that an audit holds at once: a million tokens take no more memory than some thousands."""
ROWS_AT_ONCE = 16
"""Rows of a large audit that are sampled together: the lists of their tiles take memory, too."""


def keys_at_once(heads: int, rows: int, kv_heads: int, head_size: int) -> int:
    """Tokens whose keys ``sampled_recall`` should get in one piece."""
    # Two bytes per element, copied twice on their way; logits in both precisions, masks.
    return max(1, PIECE_BYTES // (2 * 2 * kv_heads * head_size + 10 * heads * rows))


def sampled_recall(
    query: torch.Tensor, keys: Iterable[torch.Tensor], index: SparseIndex, rows: torch.Tensor, scale: float
) -> torch.Tensor:
    """Recall of sampled rows of a chunk. Nothing waits for a GPU.

    Args:
        query: ``[chunk, H, D]``.
        keys: ``[HK, n, D]`` each, pieces that together are the sequence.
        rows: int64 ``[R]``, rows of the chunk, on the query's device.

    Returns:
        float32 ``[H, R]``.
    """
    positions = rows + index.context_len
    tiles = torch.searchsorted(index.tile_starts, positions, right=True) - 1
    sampled = query[rows].transpose(0, 1)  # [H, R, D]
    heads, count, dim = sampled.shape
    # An online softmax, of all weights and of those that were kept.
    largest = torch.full((heads, count, 1), -torch.inf, device=rows.device)
    total, kept = torch.zeros_like(largest), torch.zeros_like(largest)
    first = 0
    for piece in keys:
        # Heads that share keys stand in one matrix: [HK, H / HK * R, ...].
        by_kv_head = sampled.reshape(piece.shape[0], -1, dim)
        scores = logits(by_kv_head, piece, scale).view(heads, count, -1)
        last = first + piece.shape[1]
        scores.masked_fill_(torch.arange(first, last, device=rows.device) > positions[:, None], -torch.inf)
        # Every row sees the first key of the sequence, so this is never -inf.
        new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
        decay = (largest - new_largest).exp_()
        weights = scores.sub_(new_largest).exp_()
        total = total * decay + weights.sum(-1, keepdim=True)
        kept = kept * decay + weights.mul_(index.tile_mask(tiles, first=first, last=last)).sum(-1, keepdim=True)
        largest, first = new_largest, last
    return (kept / total)[..., 0]


def sample_rows(rows: int, samples: int, seed: int) -> torch.Tensor:
    """int64 ``[min(samples, rows)]``, ascending: one random row of each of as many equal parts of the chunk; of the
    last of several parts its last row, where a question ends. ``seed`` decides."""
    count = min(samples, rows)
    borders = torch.arange(count + 1) * rows // count
    place = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    place[1:][-1:] = 1.0
    sizes = borders[1:] - borders[:-1]
    return borders[:-1] + (place * sizes).long().clamp(max=sizes - 1)


@dataclass
class Audit:
    """What to check of one chunk in one layer, and what was found."""

    rows: torch.Tensor
    """int64 ``[R]``: rows of the chunk that are sampled."""
    floor: float | None = None
    """Mean recall of the sampled rows below which a head gets more keys."""
    levels: tuple[int, ...] = ()
    """Per head, how far its pattern is strengthened from the start; empty: not at all. Afterwards: how far it was."""
    recall: torch.Tensor | None = None
    """float32 ``[H]``, afterwards: mean recall of the sampled rows, of the index that runs."""

    def run(
        self,
        patterns: Sequence[HeadPattern],
        build: Callable[[Sequence[HeadPattern]], SparseIndex],
        recall_of: Callable[[SparseIndex, torch.Tensor], torch.Tensor],
    ) -> SparseIndex:
        """The index of the patterns, strengthened until every head reaches the floor on the sampled rows, or is dense.

        Args:
            build: patterns -> index.
            recall_of: index and rows -> recall ``[H, R]``.
        """
        levels = list(self.levels or [0] * len(patterns))
        while True:
            index = build([at_level(pattern, level) for pattern, level in zip(patterns, levels, strict=True)])
            self.recall = recall_of(index, self.rows).mean(1)
            # Without a floor nobody needs to know at once, and a GPU is not waited for.
            found = [] if self.floor is None else self.recall.tolist()
            short = [head for head, share in enumerate(found) if share < self.floor and levels[head] < MAX_LEVEL]
            if not short:
                self.levels = tuple(levels)
                return index
            for head in short:
                levels[head] += 1


class RaisedLevels:
    """Levels that the floor has raised, kept from one chunk of a request to its next.

    Requests have no name on the layer path. A chunk's successor is known by where it begins: at the position, and in
    the physical page, in which the chunk ended. A page that another request takes over later can at worst lend it
    budgets that are larger than it needs.
    """

    CAPACITY = 8192

    def __init__(self) -> None:
        self._by_end: OrderedDict[tuple[int, int, int], tuple[int, ...]] = OrderedDict()

    def at(self, layer: int, position: int, pages: torch.Tensor, block_size: int) -> tuple[int, ...]:
        """Levels of a layer's heads for the chunk that begins at ``position``; empty: none was raised."""
        if not position or not self._by_end:
            return ()
        return self._by_end.get((layer, position, int(pages[(position - 1) // block_size])), ())

    def keep(self, layer: int, position: int, pages: torch.Tensor, block_size: int, levels: tuple[int, ...]) -> None:
        """Remember the levels of the chunk that ended at ``position``."""
        if not any(levels):
            return
        self._by_end[layer, position, int(pages[(position - 1) // block_size])] = levels
        if len(self._by_end) > self.CAPACITY:
            self._by_end.popitem(last=False)
