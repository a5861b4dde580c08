"""From marks of what query tiles want, key blocks and single keys, to the padded lists that an index holds.

Sizes: ``H`` query heads, ``T`` query tiles, ``N`` key blocks of ``B`` tokens in the sequence, ``S`` its tokens.
"""

from __future__ import annotations

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.vertical_slash import Columns


def compact(mask: torch.Tensor, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of True along the last dimension, ascending and padded with -1, and how many there are.

    Args:
        width: room for positions; the ones after it are dropped, but counted. None: as many as there are, which waits
            for a GPU.
    """
    if width is None:
        count = mask.sum(-1, dtype=torch.int32)
        width = max(1, int(count.max())) if count.numel() else 1
        positions = torch.full((*mask.shape[:-1], width), -1, dtype=torch.int32, device=mask.device)
        row, position = torch.nonzero(mask.reshape(count.numel(), -1), as_tuple=True)
        ends = count.flatten().cumsum(0)
        slots = torch.arange(len(row), device=mask.device) - (ends - count.flatten())[row]
        positions.view(-1, width)[row, slots] = position.to(torch.int32)
        return positions, count
    # The k-th position is where the running count reaches k.
    order = mask.cumsum(-1, dtype=torch.int32)
    count = order[..., -1].contiguous()
    slots = torch.arange(1, width + 1, dtype=torch.int32, device=mask.device).repeat(*mask.shape[:-1], 1)
    positions = torch.searchsorted(order, slots, out_int32=True)
    return positions.masked_fill_(slots > count[..., None], -1), count


def columns_outside_blocks(
    tiling: Tiling, blocks: torch.Tensor, columns: Columns, wait: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The columns of each tile that its blocks do not hold already, in multiples of ``tiling.column_multiple``.

    A kernel without a mask for single keys needs columns that fill pages exactly. The last page is then filled up with
    other keys, from a block that the tile does not have; where that is not enough, the blocks of the columns that did
    not fill a page are taken whole. Either way the tile attends at least what was asked for.

    Args:
        blocks: bool ``[H, T, N]``.
        columns: those asked for.
        wait: whether a GPU may be waited for; without, the list is as wide as the columns that there could be.

    Returns:
        blocks (bool ``[H, T, N]``, perhaps with more set), columns (int32 ``[H, T, C]``, -1 padded), their number
        (int32 ``[H, T]``).
    """
    heads, tiles, _ = blocks.shape
    multiple = tiling.column_multiple
    free = ~blocks & (tiling.distance() > 0)
    candidates = columns.ranked[:, None, :].expand(heads, tiles, -1)
    outside = free.gather(2, candidates // tiling.block_size) & columns.wanted[:, None, :]
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
    if multiple > 1 and (not wait or short.any()):
        # A block taken whole may hold columns that were kept, and then those no longer fill pages: such a (rare) tile
        # takes the blocks of all its columns.
        whole = outside & (order <= wanted[..., None]) & short
        # One block more than there are, for the candidates that take none.
        target = torch.where(whole, candidates // tiling.block_size, tiling.num_key_blocks)
        blocks = torch.nn.functional.pad(blocks, (0, 1)).scatter_(2, target, True)[..., :-1]
        keep &= ~short
    slots, count = compact(keep, None if wait else keep.shape[-1])
    found = candidates.to(torch.int32).gather(2, slots.long().clamp(min=0))
    return blocks, found.masked_fill_(slots < 0, -1), count


MAX_PIECE = 1 << 22
"""Heads times tiles times columns that are sorted out at once: what the caches of a processor hold."""
PLANNED_PIECE = 1 << 23
"""Heads times tiles times keys whose marks are counted at once, where sizes are planned."""


def columns_in_pieces(
    tiling: Tiling, blocks: torch.Tensor, columns: Columns, wait: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``columns_outside_blocks``; where sizes may be read, some heads at a time, and no wider than those need."""
    heads, widest = columns.ranked.shape
    at_once = max(1, MAX_PIECE // (tiling.num_tiles * max(1, widest)))
    if not wait or at_once >= heads:
        return columns_outside_blocks(tiling, blocks, columns, wait=wait)
    pieces = []
    for first in range(0, heads, at_once):
        piece = slice(first, first + at_once)
        # The wanted ones stand in front.
        width = int(columns.wanted[piece].sum(1).max())
        narrow = Columns(columns.ranked[piece, :width], columns.wanted[piece, :width])
        pieces.append(columns_outside_blocks(tiling, blocks[piece], narrow))
    width = max(found.shape[-1] for _, found, _ in pieces)
    padded = [torch.nn.functional.pad(found, (0, width - found.shape[-1]), value=-1) for _, found, _ in pieces]
    return torch.cat([piece[0] for piece in pieces]), torch.cat(padded), torch.cat([piece[2] for piece in pieces])


def single_keys(
    tiling: Tiling, blocks: torch.Tensor, wanted: torch.Tensor, width: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys that each tile wants for itself as its columns, in multiples of ``tiling.column_multiple``.

    The last page is filled up with the first other keys that the tile does not have; a tile with too few of them takes
    everything.

    Args:
        blocks: bool ``[H, T, N]``.
        wanted: bool ``[H, T, S]``, none in a block of the tile.
        width: see ``compact``.

    Returns:
        as ``columns_outside_blocks``.
    """
    if tiling.column_multiple > 1:
        taken = (blocks | (tiling.distance() <= 0)).repeat_interleave(tiling.block_size, dim=2)[..., : wanted.shape[2]]
        free = ~(taken | wanted)
        missing = (-wanted.sum(-1) % tiling.column_multiple)[..., None]
        order = free.cumsum(-1, dtype=torch.int32)
        short = order[..., -1:] < missing
        wanted = (wanted | (free & (order <= missing))) & ~short
        blocks = torch.where(short, tiling.reachable(), blocks)
    if width is None:
        return blocks, *compact(wanted)
    # Tiles at a time: keys that are counted take four times the room of their marks.
    at_once = max(1, PLANNED_PIECE // wanted[:, 0].numel())
    parts = [compact(part, width) for part in wanted.split(at_once, dim=1)]
    return blocks, torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


def _fillers(tiling: Tiling, free: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of each tile's free block with the fewest wanted ones (int64 ``[H, T, B]``), and which may be used."""
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
