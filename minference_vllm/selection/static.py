"""Patterns that read no scores: ``dense``, ``a_shape`` (StreamingLLM, arXiv 2309.17453) and ``tri_shape`` (SCBench,
arXiv 2412.10319).

Sizes: ``T`` query tiles, ``N`` key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import AShape, Dense, TriShape
from minference_vllm.selection.compaction import Capacity, Selection
from minference_vllm.selection.family import Family, Room
from minference_vllm.selection.scores import Scores


def sink_and_local_blocks(tiling: Tiling, sink: int, local: int) -> torch.Tensor:
    """bool ``[T, N]``: blocks that the first ``sink`` tokens, or any row's last ``local`` tokens, touch."""
    block = tiling.key_blocks()
    in_sink = block < -(-sink // tiling.block_size)
    oldest_local = (tiling.starts[:-1] - local + 1).clamp(min=0) // tiling.block_size
    in_local = block >= oldest_local[:, None]
    return ((in_sink | in_local) & tiling.reachable()) | tiling.own()


def sink_and_local_room(sink: int, local: int, block_size: int) -> Room:
    return Room(-(-sink // block_size) + -(-local // block_size) + 1, 0)


class DenseFamily(Family[Dense]):
    pattern = Dense
    colour = "#999999"
    reads_scores = False

    def select(
        self, pattern: Dense, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection:
        return Selection(tiling.reachable())

    def room(self, pattern: Dense, block_size: int, adaptive: int) -> Room:
        return Room(0, 0)

    def tokens(self, pattern: Dense) -> float:
        return float("inf")


class AShapeFamily(Family[AShape]):
    pattern = AShape
    colour = "#E69F00"
    reads_scores = False
    may_be_dense = False

    def select(
        self, pattern: AShape, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection:
        return Selection(sink_and_local_blocks(tiling, pattern.sink, pattern.local))

    def room(self, pattern: AShape, block_size: int, adaptive: int) -> Room:
        return sink_and_local_room(pattern.sink, pattern.local, block_size)

    def tokens(self, pattern: AShape) -> float:
        return pattern.sink + pattern.local


class TriShapeFamily(Family[TriShape]):
    pattern = TriShape
    colour = "#F0E442"
    reads_scores = False

    def select(
        self, pattern: TriShape, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection:
        # Everything for tiles that hold one of the chunk's last ``last`` rows.
        tail = tiling.starts[1:] > tiling.seq_len - pattern.last
        a_shape = sink_and_local_blocks(tiling, pattern.sink, pattern.local)
        return Selection(torch.where(tail[:, None], tiling.reachable(), a_shape))

    def room(self, pattern: TriShape, block_size: int, adaptive: int) -> Room:
        return sink_and_local_room(pattern.sink, pattern.local, block_size)

    def tokens(self, pattern: TriShape) -> float:
        return pattern.sink + pattern.local


FAMILIES = (DenseFamily(), AShapeFamily(), TriShapeFamily())
