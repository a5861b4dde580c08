"""From the score bins of tiles to the lists of an index, without a mark for every key, or a wait for the GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection import score_bins
from minference_vllm.selection.compaction import Lists
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.launch import launcher


@triton.jit
def _reaching(p_bins, threshold, o_page, seq_len, PAGE: tl.constexpr, SLOTS: tl.constexpr):
    """Which keys of some pages reach the threshold by one tile's bins, ``[PAGES, SLOTS]``, and their positions."""
    o_slot = tl.arange(0, SLOTS)
    o_position = o_page[:, None] * PAGE + o_slot[None, :]
    m_key = (o_slot < PAGE)[None, :] & (o_position < seq_len)
    b_bin = tl.load(p_bins + o_position, mask=m_key, other=0).to(tl.int32)
    return m_key & (b_bin >= threshold), o_position


@triton.jit
def _reach(i_tile, context_len, seq_len, window, TILE: tl.constexpr, PAGE: tl.constexpr):
    """A tile's pages: the first that a row of it sees, the first of its own, and one past the last."""
    aligned = (context_len // TILE + i_tile) * TILE
    start, end = tl.maximum(aligned, context_len), tl.minimum(aligned + TILE, seq_len)
    oldest = tl.where(window > 0, tl.maximum(start - window + 1, 0), 0)
    return oldest // PAGE, aligned // PAGE, (end - 1) // PAGE + 1


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["num_tiles", "num_pages", "context_len", "seq_len", "window"])
def page_counts_kernel(
    p_bins, stride_bins, p_threshold, p_counts, p_cost, num_tiles, num_pages, context_len, seq_len, window,
    TILE: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """One program: how many keys of PAGES pages reach the threshold, for one tile; and what they cost the head.

    ``p_counts`` is int32 ``[h, T, N]``: ``PAGE`` where the whole page is attended, see ``score_bins.whole_pages``.
    ``p_cost`` is int32 ``[h]``: their sum is added.
    """
    i_strip, i_row = tl.program_id(0), tl.program_id(1)
    i_slot = i_row // num_tiles
    o_page = i_strip * PAGES + tl.arange(0, PAGES)
    p_bins += i_row.to(tl.int64) * stride_bins
    m_reaching, _ = _reaching(p_bins, tl.load(p_threshold + i_slot), o_page, seq_len, PAGE, SLOTS)
    _, own, end = _reach(i_row % num_tiles, context_len, seq_len, window, TILE, PAGE)
    b_count = tl.sum(m_reaching.to(tl.int32), 1)
    b_count = tl.where((2 * b_count >= PAGE) | (o_page >= own) & (o_page < end), PAGE, b_count)
    m_page = o_page < num_pages
    tl.store(p_counts + i_row.to(tl.int64) * num_pages + o_page, b_count, mask=m_page)
    # Whole numbers: their order does not matter.
    tl.atomic_add(p_cost + i_slot, tl.sum(tl.where(m_page, b_count, 0), 0), sem="relaxed")


@triton.jit(do_not_specialize=[
    "num_tiles", "num_pages", "context_len", "seq_len", "window", "max_blocks", "max_columns", "most",
])  # fmt: skip
def block_lists_kernel(
    p_counts, p_threshold, p_cost, p_lists, p_blocks, p_num_blocks, p_num_columns, p_overflowed, num_tiles, num_pages,
    context_len, seq_len, window, max_blocks, max_columns, most, TILE: tl.constexpr, PAGE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """One program: the whole pages of one tile, and where the single keys of each of the others begin in their list.

    Lists are the index's own, ``p_blocks`` int32 ``[L, T, max_blocks]`` filled with -1; ``p_lists`` int32 ``[h]`` says
    which of them each head has. ``p_counts`` becomes that beginning, -1 where a page lists no single key. A head whose
    cost is above ``most``, or whose threshold is 0, has every page, and a tile without room, too, without a list.
    """
    i_tile, i_slot = tl.program_id(0), tl.program_id(1)
    i_list = (tl.load(p_lists + i_slot) * num_tiles + i_tile).to(tl.int64)
    p_counts += (i_slot * num_tiles + i_tile).to(tl.int64) * num_pages
    first, _, end = _reach(i_tile, context_len, seq_len, window, TILE, PAGE)
    # Pages from ``full`` on are attended whatever they hold.
    full = tl.where((tl.load(p_threshold + i_slot) == 0) | (tl.load(p_cost + i_slot) > most), first, end)
    blocks, columns = 0, 0
    for i_page in range(0, num_pages, STEP):
        o_page = i_page + tl.arange(0, STEP)
        m_seen = (o_page >= first) & (o_page < end)
        b_count = tl.load(p_counts + o_page, mask=m_seen, other=0)
        m_whole = m_seen & ((o_page >= full) | (b_count == PAGE))
        blocks += tl.sum(m_whole.to(tl.int32), 0)
        columns += tl.sum(tl.where(m_whole, 0, b_count), 0)
    over = (blocks > max_blocks) | (columns > max_columns)
    tl.store(p_num_blocks + i_list, tl.where(over, end, blocks))
    tl.store(p_num_columns + i_list, tl.where(over, 0, columns))
    tl.store(p_overflowed + i_list, (over & (blocks < end)).to(tl.uint8))
    room = tl.where(over, 0, max_blocks)
    blocks, columns = 0, 0
    for i_page in range(0, num_pages, STEP):
        o_page = i_page + tl.arange(0, STEP)
        m_page = o_page < num_pages
        m_seen = (o_page >= first) & (o_page < end)
        b_count = tl.load(p_counts + o_page, mask=m_seen, other=0)
        m_whole = m_seen & ((o_page >= full) | (b_count == PAGE))
        o_block = blocks + tl.cumsum(m_whole.to(tl.int32), 0) - 1
        tl.store(p_blocks + i_list * max_blocks + o_block, o_page, mask=m_whole & (o_block < room))
        b_single = tl.where(over | m_whole, 0, b_count)
        b_begin = columns + tl.cumsum(b_single, 0) - b_single
        tl.debug_barrier()
        tl.store(p_counts + o_page, tl.where(b_single > 0, b_begin, -1), mask=m_page)
        blocks += tl.sum(m_whole.to(tl.int32), 0)
        columns += tl.sum(b_single, 0)


@triton.jit(do_not_specialize=["num_tiles", "num_pages", "seq_len", "max_columns"])
def key_lists_kernel(
    p_bins, stride_bins, p_threshold, p_begin, p_lists, p_columns, num_tiles, num_pages, seq_len, max_columns,
    PAGE: tl.constexpr, SLOTS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """One program: the single keys of PAGES pages of one tile.

    ``p_begin``: int32 ``[h, T, N]``, where each page's keys begin, -1 where none is listed. ``p_columns``: int32
    ``[L, T, max_columns]``, filled with -1; ``p_lists``: see ``block_lists_kernel``.
    """
    i_strip, i_row = tl.program_id(0), tl.program_id(1)
    i_slot = i_row // num_tiles
    o_page = i_strip * PAGES + tl.arange(0, PAGES)
    b_begin = tl.load(p_begin + i_row.to(tl.int64) * num_pages + o_page, mask=o_page < num_pages, other=-1)
    if tl.max(b_begin, 0) >= 0:
        i_list = (tl.load(p_lists + i_slot) * num_tiles + i_row % num_tiles).to(tl.int64)
        p_bins += i_row.to(tl.int64) * stride_bins
        m_reaching, o_position = _reaching(p_bins, tl.load(p_threshold + i_slot), o_page, seq_len, PAGE, SLOTS)
        o_key = b_begin[:, None] + tl.cumsum(m_reaching.to(tl.int32), 1) - 1
        tl.store(p_columns + i_list * max_columns + o_key, o_position, mask=m_reaching & (b_begin >= 0)[:, None])


KEYS, STEP, NUM_WARPS = 2048, 1024, 4
"""Keys of one program, about; pages of one step."""


def constants(block_size: int) -> dict[str, int]:
    slots = triton.next_power_of_2(block_size)
    return {"PAGE": block_size, "SLOTS": slots, "PAGES": max(1, KEYS // slots), "num_warps": NUM_WARPS}


@functools.lru_cache(maxsize=256)
def _most(context_len: int, seq_len: int, window: int, tile: int, block_size: int) -> int:
    """Keys, all tiles together, up to which a head is not dense: ``score_bins.DENSE_FROM`` of its reachable pages."""
    pages = 0
    for aligned in range(context_len // tile * tile, seq_len, tile):
        oldest = max(0, max(aligned, context_len) - window + 1) if window else 0
        pages += (min(aligned + tile, seq_len) - 1) // block_size + 1 - oldest // block_size
    return int(score_bins.DENSE_FROM * block_size * pages)


@dataclass(frozen=True)
class BinLists:
    """The keys from one bin up, of some heads, to be written into the lists of an index."""

    tiling: Tiling
    """With a ``column_multiple`` of 1."""
    bins: torch.Tensor
    """uint8 ``[h, T, S]``, see ``score_bins.tile_bins``; a tile's one behind the other."""
    threshold: torch.Tensor
    """int32 ``[h]``."""

    def write(self, lists: Lists, heads: Sequence[int]) -> None:
        """The lists that ``score_bins.keys_above`` and ``build_index`` make of them.

        Args:
            lists: of all heads, every one with its own; filled with -1 and zeros.
            heads: whose lists these are.
        """
        tiling, shape = self.tiling, constants(self.tiling.block_size)
        lengths, bins = (tiling.context_len, tiling.seq_len, tiling.window), (self.bins, self.bins.stride(1))
        count, tiles, pages = len(heads), tiling.num_tiles, tiling.num_key_blocks
        counts = torch.empty(count, tiles, pages, dtype=torch.int32, device=self.bins.device)
        grid, numbers = (triton.cdiv(pages, shape["PAGES"]), count * tiles), on_device(heads, self.bins)
        cost = torch.zeros(count, dtype=torch.int32, device=self.bins.device)
        launcher(page_counts_kernel, grid)(
            self.bins,
            self.bins.stride(1),
            self.threshold,
            counts,
            cost,
            tiles,
            pages,
            *lengths,
            TILE=tiling.tile,
            **shape,
        )
        most = _most(*lengths, tiling.tile, tiling.block_size)
        launcher(block_lists_kernel, (tiles, count))(
            counts, self.threshold, cost, numbers, lists.blocks, lists.num_blocks, lists.num_columns,
            lists.overflowed.view(torch.uint8), tiles, pages, *lengths, lists.blocks.shape[2],
            lists.columns.shape[2], most, TILE=tiling.tile, PAGE=tiling.block_size, STEP=STEP, num_warps=NUM_WARPS,
        )  # fmt: skip
        launcher(key_lists_kernel, grid)(
            *bins, self.threshold, counts, numbers, lists.columns, tiles, pages, tiling.seq_len,
            lists.columns.shape[2], **shape,
        )  # fmt: skip
