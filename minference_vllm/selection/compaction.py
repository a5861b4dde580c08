"""From masks of selected key blocks and single keys to the padded lists of a ``SparseIndex``.

Sizes: ``h`` query heads, ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence, ``S`` its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from minference_vllm.core.tiling import Tiling

MAX_PIECE = 1 << 22
"""Maximum heads * tiles * columns processed at once on CPUs, so that they fit into the caches."""
PLANNED_PIECE = 1 << 23
"""Maximum heads * tiles * keys whose masks are counted at once, where sizes are planned."""


@dataclass(frozen=True)
class Capacity:
    """Widths of the lists of an index, see ``capacity.plan_capacity``."""

    blocks: int
    """Key blocks listed per head and tile."""
    columns: int
    """Single columns per head and tile."""
    heads_at_once: int
    """Heads that are scored and selected together, limited by the memory for their scores."""
    exact: bool = False
    """Make lists as wide as the longest selection and ignore ``blocks`` and ``columns``. Synchronises with a GPU."""


EXACT_WIDTH = Capacity(0, 0, 1 << 30, exact=True)
"""For CPUs, where reading a size costs nothing."""


class KeyLists(NamedTuple):
    """Single keys of every tile."""

    positions: torch.Tensor
    """int32 ``[h, T, C]``: absolute positions, -1 past ``count``."""
    count: torch.Tensor
    """int32 ``[h, T]``; larger than ``C`` if the planned width was too small."""
    codes: torch.Tensor | None = None
    """uint8 ``[h, T, C]`` for heads that sample keys, see ``SparseIndex.column_codes``."""


class Lists(NamedTuple):
    """The lists of a ``SparseIndex`` with planned widths, see there. They are filled with -1 and 0 first."""

    blocks: torch.Tensor
    num_blocks: torch.Tensor
    columns: torch.Tensor
    num_columns: torch.Tensor
    overflowed: torch.Tensor
    codes: torch.Tensor | None = None
    """The index's ``column_codes``."""

    @classmethod
    def empty(cls, shape: tuple[int, int], blocks: int, columns: int, device: torch.device, sampled: int = 0) -> Lists:
        """
        Args:
            shape: number of lists and of tiles.
            sampled: number of lists that have column codes; the codes of the others stay 0.
        """
        of_blocks, of_columns = (
            torch.full((*shape, width), -1, dtype=torch.int32, device=device) for width in (blocks, columns)
        )
        # Separate allocations, since kernels are specialised on alignment.
        num_blocks, num_columns, overflowed = (
            torch.zeros(shape, dtype=dtype, device=device) for dtype in (torch.int32, torch.int32, torch.bool)
        )
        codes = None
        if sampled:
            make = torch.empty if sampled == shape[0] else torch.zeros
            codes = make(of_columns.shape, dtype=torch.uint8, device=device)
        return cls(of_blocks, num_blocks, of_columns, num_columns, overflowed, codes)


class WritesLists(Protocol):
    """A selection that writes its lists into the index itself."""

    @property
    def sampled(self) -> bool:
        """See ``ScoreBins``."""

    def write(self, lists: Lists, heads: Sequence[int]) -> None:
        """Write the lists of these heads."""


class Selection(NamedTuple):
    """The selection of a pattern for all tiles of some heads."""

    blocks: torch.Tensor
    """bool ``[h, T, N]``, or ``[T, N]`` if it is the same for all heads."""
    keys: KeyLists | None = None
    """Single keys outside of the tile's blocks; None: blocks only."""
    crowded: torch.Tensor | None = None
    """bool ``[h]``: heads that need more columns than planned and therefore have every block."""


@dataclass(frozen=True)
class Columns:
    """Single keys that every later tile of a head attends."""

    ranked: torch.Tensor
    """int64 ``[h, V]``: positions, the most important first."""
    wanted: torch.Tensor
    """bool ``[h, V]``: False marks padding."""
    crowded: torch.Tensor | None = None
    """See ``Selection``."""


def compact(mask: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of True along the last dimension, ascending and padded with -1, and their number.

    Args:
        width: of the result. Positions beyond it are dropped, but counted. No host synchronisation.

    Returns:
        int32 ``[..., width]`` and int32 ``[...]``.
    """
    # The k-th position is where the running count reaches k.
    order = mask.cumsum(-1, dtype=torch.int32)
    count = order[..., -1].contiguous()
    slots = torch.arange(1, width + 1, dtype=torch.int32, device=mask.device).repeat(*mask.shape[:-1], 1)
    positions = torch.searchsorted(order, slots, out_int32=True)
    return positions.masked_fill_(slots > count[..., None], -1), count


def compact_exact(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``compact`` with the width of the longest list, at least 1. Synchronises with a GPU."""
    count = mask.sum(-1, dtype=torch.int32)
    width = max(1, int(count.max())) if count.numel() else 1
    positions = torch.full((*mask.shape[:-1], width), -1, dtype=torch.int32, device=mask.device)
    row, position = torch.nonzero(mask.reshape(count.numel(), -1), as_tuple=True)
    ends = count.flatten().cumsum(0)
    slots = torch.arange(len(row), device=mask.device) - (ends - count.flatten())[row]
    positions.view(-1, width)[row, slots] = position.to(torch.int32)
    return positions, count


def compact_blocks(mask: torch.Tensor, capacity: Capacity) -> tuple[torch.Tensor, torch.Tensor]:
    """``compact`` or ``compact_exact``, depending on the capacity."""
    return compact_exact(mask) if capacity.exact else compact(mask, capacity.blocks)


def compact_columns(tiling: Tiling, blocks: torch.Tensor, columns: Columns, capacity: Capacity) -> Selection:
    """Blocks, and the columns of every tile that are not in its blocks.

    Args:
        blocks: bool ``[h, T, N]``.
    """
    heads, widest = columns.ranked.shape
    at_once = max(1, MAX_PIECE // (tiling.num_tiles * max(1, widest)))
    if not capacity.exact or at_once >= heads:
        blocks, keys = columns_outside_blocks(tiling, blocks, columns, exact=capacity.exact)
        return Selection(blocks, keys, columns.crowded)
    # Some heads at a time, each piece as narrow as possible.
    pieces = []
    for first in range(0, heads, at_once):
        piece = slice(first, first + at_once)
        # The wanted ones stand in front.
        width = int(columns.wanted[piece].sum(1).max())
        narrow = Columns(columns.ranked[piece, :width], columns.wanted[piece, :width])
        pieces.append(columns_outside_blocks(tiling, blocks[piece], narrow))
    width = max(keys.positions.shape[-1] for _, keys in pieces)
    positions = [
        torch.nn.functional.pad(keys.positions, (0, width - keys.positions.shape[-1]), value=-1) for _, keys in pieces
    ]
    keys = KeyLists(torch.cat(positions), torch.cat([keys.count for _, keys in pieces]))
    return Selection(torch.cat([found for found, _ in pieces]), keys, columns.crowded)


def columns_outside_blocks(
    tiling: Tiling, blocks: torch.Tensor, columns: Columns, exact: bool = True
) -> tuple[torch.Tensor, KeyLists]:
    """The columns of each tile that are not in its blocks, in multiples of ``tiling.column_multiple``.

    A kernel without a mask for single keys needs columns that fill pages exactly. The last page is padded with other
    keys from a block that the tile does not have. If there are too few, the blocks of the columns that do not fill a
    page are taken whole. Either way the tile attends at least the requested columns.

    Args:
        blocks: bool ``[h, T, N]``.
        columns: those asked for.
        exact: whether sizes may be read; else the list is as wide as the columns that there could be.

    Returns:
        blocks (bool ``[h, T, N]``, perhaps with more set), and the columns.
    """
    heads, tiles, _ = blocks.shape
    multiple = tiling.column_multiple
    free = ~blocks & (tiling.distance() > 0) & tiling.reachable()
    candidates = columns.ranked[:, None, :].expand(heads, tiles, -1)
    outside = free.gather(2, candidates // tiling.block_size) & columns.wanted[:, None, :]
    if tiling.window:
        outside &= candidates >= tiling.first_seen()[:, None]
    wanted = outside.sum(-1)
    if multiple > 1:
        fillers, usable = _fillers(tiling, free, columns)
        candidates = torch.cat([candidates, fillers], -1)
        outside = torch.cat([outside, usable], -1)
    order = outside.cumsum(-1)
    fill = -(-wanted // multiple) * multiple
    filled = torch.where(fill <= order[..., -1], fill, wanted // multiple * multiple)
    keep = outside & (order <= filled[..., None])
    short = (filled < wanted)[..., None]
    if multiple > 1 and (not exact or short.any()):
        # A block taken whole may hold columns that were kept, and then those no longer fill pages: such a (rare) tile
        # takes the blocks of all its columns.
        whole = outside & (order <= wanted[..., None]) & short
        # One block more than there are, for the candidates that take none.
        target = torch.where(whole, candidates // tiling.block_size, tiling.num_key_blocks)
        blocks = torch.nn.functional.pad(blocks, (0, 1)).scatter_(2, target, True)[..., :-1]
        keep &= ~short
    slots, count = compact_exact(keep) if exact else compact(keep, keep.shape[-1])
    found = candidates.to(torch.int32).gather(2, slots.long().clamp(min=0))
    return blocks, KeyLists(found.masked_fill_(slots < 0, -1), count)


def compact_keys(tiling: Tiling, blocks: torch.Tensor, wanted: torch.Tensor, capacity: Capacity) -> Selection:
    """Blocks, and the single keys of each tile, in multiples of ``tiling.column_multiple``.

    The last page is padded with the first keys that the tile does not have. A tile with too few of them is dense.

    Args:
        blocks: bool ``[h, T, N]``.
        wanted: bool ``[h, T, S]``, none in a block of the tile.
    """
    if tiling.column_multiple > 1:
        taken = (blocks | (tiling.distance() <= 0)).repeat_interleave(tiling.block_size, dim=2)[..., : wanted.shape[2]]
        free = ~(taken | wanted)
        missing = (-wanted.sum(-1) % tiling.column_multiple)[..., None]
        order = free.cumsum(-1, dtype=torch.int32)
        short = order[..., -1:] < missing
        wanted = (wanted | (free & (order <= missing))) & ~short
        blocks = torch.where(short, tiling.reachable(), blocks)
    if capacity.exact:
        return Selection(blocks, KeyLists(*compact_exact(wanted)))
    # Tiles at a time: keys that are counted take four times the room of their marks.
    at_once = max(1, PLANNED_PIECE // wanted[:, 0].numel())
    parts = [compact(part, capacity.columns) for part in wanted.split(at_once, dim=1)]
    return Selection(blocks, KeyLists(*(torch.cat(part, 1) for part in zip(*parts, strict=True))))


def _fillers(tiling: Tiling, free: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of each tile's free block with the fewest selected keys (int64 ``[h, T, B]``), and which may be used."""
    ranked = columns.ranked
    heads = ranked.shape[0]
    taken = torch.zeros(
        heads, tiling.num_key_blocks * tiling.block_size, dtype=torch.bool, device=ranked.device
    ).scatter_(1, ranked, columns.wanted)
    taken_in_block = taken.view(heads, 1, tiling.num_key_blocks, -1).sum(-1)
    emptiest = torch.where(free, taken_in_block, tiling.block_size + 1).argmin(-1)
    keys = emptiest[..., None] * tiling.block_size + torch.arange(tiling.block_size, device=ranked.device)
    usable = free.any(-1, keepdim=True) & ~taken.gather(1, keys.view(heads, -1)).view_as(keys)
    return keys, usable
