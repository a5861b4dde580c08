"""``Family``: everything that one kind of pattern says of itself. Each kind's object stands in the kind's own file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection.compaction import Capacity, Selection, WritesLists
from minference_vllm.selection.scores import Scores

P = TypeVar("P", bound=HeadPattern)

ADAPTIVE_TOKENS = 3072
"""Keys per row that a head whose budget the data decide is taken to compute, where work is planned."""
ADAPTIVE_COLUMNS = 4096
"""The most single columns that such a head has planned room for."""


class Room(NamedTuple):
    """Planned sizes of one head and tile, beside the tile's own blocks."""

    blocks: int
    columns: int


class Family(ABC, Generic[P]):
    """One kind of pattern."""

    pattern: type[P]
    """Its model, with budgets and their ranges."""
    colour: str
    """Of its cells in the pattern map, ``#RRGGBB``."""
    reads_scores = True
    """False: heads with equal patterns select the same, so that those of a KV head can share their lists."""
    may_be_dense = True
    """Whether a tile may attend everything; False: a budget bounds it."""
    reads_page_means = False
    """Whether its scores read what ``PageMeans`` keeps of the pages from chunk to chunk."""
    writes_lists = False
    """Whether its lists are written where they stay; else those of some heads are made and copied."""

    @property
    def kind(self) -> str:
        return str(self.pattern.model_fields["kind"].default)

    @abstractmethod
    def select(
        self, pattern: P, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection | WritesLists:
        """What all tiles of the named heads attend. Every tile has at least its own blocks."""

    def heads_at_once(self, pattern: P, tiling: Tiling) -> int:
        """Heads that are selected together where sizes are exact."""
        return 1 << 30

    def room(self, pattern: P, block_size: int, adaptive: int) -> Room:
        """Planned sizes, from budgets alone.

        Args:
            adaptive: the share of a head whose budget the data decide.
        """
        return Room(adaptive, min(adaptive, ADAPTIVE_COLUMNS))

    def tokens(self, pattern: P) -> float:
        """Keys per row: the budget, or an estimate where the data decide it. For plans of work, not for selection."""
        return ADAPTIVE_TOKENS

    def selection_bytes(self, pattern: P, tiles: int, seq_len: int, key_blocks: int, columns: int) -> int:
        """Bytes that one head takes on a GPU while it is scored and selected.

        Args:
            columns: room for single columns of a tile.
        """
        # Float64 sums over the sequence, masks and places over tiles and blocks or columns.
        return 40 * seq_len + tiles * (24 * key_blocks + 40 * columns)

    def scoring_cost(self, pattern: P, head_size: int, chunk: int, device: torch.device) -> float:
        """What scoring a head costs, as a share of dense attention, where ``calibrate`` counts it."""
        return 0.0

    def kernel_sizes(self, pattern: P) -> tuple[int, ...]:
        """The fields that decide which kernels run, for warm-up; budgets change no kernel."""
        return ()

    def page_size_problem(self, pattern: P, block_size: int) -> str | None:
        """Why the pattern cannot run on pages of this size, or None."""
        return None
