"""``Family``: the interface of a kind of pattern. Each kind implements it in a file of its own."""

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
"""Keys per row that planning assumes for heads with an adaptive budget."""
ADAPTIVE_COLUMNS = 4096
"""Planned maximum of single columns of such a head."""


class Room(NamedTuple):
    """Planned list widths of one head and tile, not counting the tile's own blocks."""

    blocks: int
    columns: int


class Family(ABC, Generic[P]):
    """One kind of pattern."""

    pattern: type[P]
    """The pydantic model with the budgets and their ranges."""
    colour: str
    """Colour in the pattern map, ``#RRGGBB``."""
    reads_scores = True
    """Whether the selection depends on queries and keys. If not, heads with equal patterns can share their lists."""
    may_be_dense = True
    """Whether a tile may attend everything, or is bounded by a budget."""
    reads_page_means = False
    """Whether its scores use the ``PageMeans`` that are kept from chunk to chunk."""
    writes_lists = False
    """Whether its kernels write the lists in place. Otherwise lists are made for some heads at a time and copied."""

    @property
    def kind(self) -> str:
        return str(self.pattern.model_fields["kind"].default)

    @abstractmethod
    def select(
        self, pattern: P, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection | WritesLists:
        """The selection for all tiles of these heads. Every tile has at least its own blocks."""

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
