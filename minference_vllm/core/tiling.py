"""The query tiles of one chunk over the key blocks of its sequence.

Sizes: ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence. A block is a page of the KV cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

DEFAULT_TILE = 128
"""Query rows that share one selection of keys."""


def whole_tile(tile: int | None, block_size: int) -> int:
    """Rows per query tile: the wanted number (None: 128) rounded up to whole pages."""
    return -(-(DEFAULT_TILE if tile is None else tile) // block_size) * block_size


@dataclass(frozen=True)
class Tiling:
    """The query tiles of one chunk over key blocks."""

    context_len: int
    seq_len: int
    block_size: int
    tile: int
    starts: torch.Tensor
    """int64 ``[T + 1]``."""
    column_multiple: int = 1
    """Columns come in multiples of this number: the page size, for a kernel that takes whole pages only."""
    window: int = 0
    """Maximum number of keys that a row sees, itself included; 0: all before it."""

    @classmethod
    def of(
        cls,
        context_len: int,
        seq_len: int,
        block_size: int,
        tile: int,
        column_multiple: int = 1,
        device: torch.device | str = "cpu",
        window: int = 0,
    ) -> Tiling:
        if tile % block_size:
            raise ValueError(f"tile must be a multiple of the page size {block_size}, not {tile}")
        # Borders lie at multiples of ``tile`` regardless of the chunk's start: a prompt cut into other chunks has the
        # same tiles, except at a chunk's two ends. Made on the device, since a copy from the host would synchronise.
        first, last = context_len // tile, -(-seq_len // tile)
        starts = torch.arange(first, last + 1, device=device).mul_(tile).clamp_(context_len, seq_len)
        return cls(context_len, seq_len, block_size, tile, starts, column_multiple, window)

    @property
    def num_tiles(self) -> int:
        return len(self.starts) - 1

    @property
    def num_key_blocks(self) -> int:
        return -(-self.seq_len // self.block_size)

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        """float64 ``[T]``: query rows of each tile."""
        return self.starts.diff().double()

    @functools.cached_property
    def future_pairs(self) -> torch.Tensor:
        """float64 scalar: masked pairs of a row and a later key, or an empty slot, in the tiles' own blocks."""
        missing = -self.starts[1:] % self.block_size  # slots of the last block that come after the tile
        return (self.rows * (missing + (self.rows - 1) / 2)).sum()

    def key_blocks(self) -> torch.Tensor:
        """int64 ``[N]``: numbers of the key blocks."""
        return torch.arange(self.num_key_blocks, device=self.starts.device)

    def distance(self) -> torch.Tensor:
        """int64 ``[T, N]``: blocks from a tile's (aligned) first block back to each key block; <= 0 for its own."""
        first = self.starts[:-1] // self.tile * (self.tile // self.block_size)  # one operation fewer than first_own()
        return first[:, None] - self.key_blocks()

    def first_own(self) -> torch.Tensor:
        """int64 ``[T]``: the first key in the pages that hold each tile's rows."""
        return self.starts[:-1] // self.tile * self.tile

    def first_seen(self) -> torch.Tensor:
        """int64 ``[T]``: the first key that a row of each tile sees."""
        oldest = self.starts[:-1] - self.window + 1
        return oldest.clamp_(min=0) if self.window else torch.zeros_like(oldest)

    def reachable(self) -> torch.Tensor:
        """bool ``[T, N]``: blocks with a key up to the tile's last row and not before its first row's window."""
        blocks, last = self.key_blocks(), (self.starts[1:] - 1) // self.block_size
        reached = blocks <= last[:, None]
        return reached & (blocks >= (self.first_seen() // self.block_size)[:, None]) if self.window else reached

    def own(self) -> torch.Tensor:
        """bool ``[T, N]``: blocks at and after the tile's aligned start, up to its last row."""
        return (self.distance() <= 0) & self.reachable()

    def by_tile(self, query: torch.Tensor) -> torch.Tensor:
        """One head's queries ``[chunk, D]`` as ``[T, tile, D]``; zeros where a tile lies outside the chunk."""
        before = self.context_len % self.tile
        after = self.num_tiles * self.tile - before - query.shape[0]
        return torch.nn.functional.pad(query, (0, 0, before, after)).view(self.num_tiles, self.tile, -1)
