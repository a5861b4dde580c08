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

MAX_CODE, TILE_FRACTION = tl.constexpr(score_bins.MAX_CODE), tl.constexpr(score_bins.TILE_FRACTION)


@triton.jit
def _bins(p_bins, o_page, seq_len, PAGE: tl.constexpr, SLOTS: tl.constexpr):
    """One tile's bins of the keys of some pages, 0 where there is none, and their positions: ``[PAGES, SLOTS]``."""
    o_slot = tl.arange(0, SLOTS)
    o_position = o_page[:, None] * PAGE + o_slot[None, :]
    num_whole = seq_len // PAGE
    if PAGE == SLOTS and tl.max(o_page, 0) < num_whole:
        # Without a mask many bytes are read at once.
        b_bin = tl.load(p_bins + o_position)
    else:
        b_bin = tl.load(p_bins + o_position, mask=(o_slot < PAGE)[None, :] & (o_position < seq_len), other=0)
    return b_bin.to(tl.int32), o_position


@triton.jit
def _chances(
    p_chances, b_bin, threshold, o_page, o_position, oldest, own, PAGE: tl.constexpr, WINDOWED: tl.constexpr
):  # fmt: skip
    """Codes of keys (``score_bins.sampled_keys``) and how likely each is drawn, in 65536ths; 0 of those that are no
    page's, not before the tile, or before its window."""
    SLOTS: tl.constexpr = b_bin.shape[1]
    b_code = tl.minimum(tl.maximum(threshold - b_bin, 0), MAX_CODE)
    b_chance = tl.where((o_page < own)[:, None], tl.load(p_chances + b_code), 0)
    if PAGE != SLOTS:
        b_chance = tl.where((tl.arange(0, SLOTS) < PAGE)[None, :], b_chance, 0)
    if WINDOWED:
        b_chance = tl.where(o_position >= oldest, b_chance, 0)
    return b_code, b_chance


@triton.jit
def _reach(i_tile, context_len, seq_len, window, TILE: tl.constexpr, PAGE: tl.constexpr):
    """The first key that a row of a tile sees; its pages: the first of its own, and one past the last."""
    aligned = (context_len // TILE + i_tile) * TILE
    start, end = tl.maximum(aligned, context_len), tl.minimum(aligned + TILE, seq_len)
    oldest = tl.where(window > 0, tl.maximum(start - window + 1, 0), 0)
    return oldest, aligned // PAGE, (end - 1) // PAGE + 1


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["num_tiles", "num_pages", "context_len", "seq_len", "window"])
def page_counts_kernel(
    p_bins, stride_bins, p_threshold, p_chances, p_counts, p_sums, p_cost, num_tiles, num_pages, context_len, seq_len,
    window, TILE: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr, PAGES: tl.constexpr, SAMPLED: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """One program: how many keys of PAGES pages reach the threshold, for one tile; and what they cost the head.

    ``p_counts`` is int32 ``[h, T, N]``: ``PAGE`` where the whole page is attended, see ``score_bins.whole_pages``.
    ``p_cost`` is int32 ``[h]``: their sum is added. Where SAMPLED ``p_sums``, int32 ``[h, T, N]``, are the pages' sums
    of ``p_chances``, ``score_bins.increments``, over the keys before the tile.
    """
    i_strip, i_row = tl.program_id(0), tl.program_id(1)
    i_slot = i_row // num_tiles
    o_page = i_strip * PAGES + tl.arange(0, PAGES)
    p_bins += i_row.to(tl.int64) * stride_bins
    threshold = tl.load(p_threshold + i_slot)
    b_bin, o_position = _bins(p_bins, o_page, seq_len, PAGE, SLOTS)
    oldest, own, end = _reach(i_row % num_tiles, context_len, seq_len, window, TILE, PAGE)
    m_page = o_page < num_pages
    if SAMPLED:
        _, b_chance = _chances(p_chances, b_bin, threshold, o_page, o_position, oldest, own, PAGE, WINDOWED)
        tl.store(p_sums + i_row.to(tl.int64) * num_pages + o_page, tl.sum(b_chance, 1), mask=m_page)
    # Where the threshold is 0 all pages are attended, whatever is counted.
    b_count = tl.sum((b_bin >= threshold).to(tl.int32), 1)
    b_count = tl.where((2 * b_count >= PAGE) | (o_page >= own) & (o_page < end), PAGE, b_count)
    tl.store(p_counts + i_row.to(tl.int64) * num_pages + o_page, b_count, mask=m_page)
    # Whole numbers: their order does not matter.
    tl.atomic_add(p_cost + i_slot, tl.sum(tl.where(m_page, b_count, 0), 0), sem="relaxed")


@triton.jit
def _first_fraction(i_tile):
    """Where a tile's sum of chances begins, in 65536ths."""
    return i_tile * TILE_FRACTION & 65535


@triton.jit
def _drawn(p_sums, o_page, m_page, fraction):
    """How often the sum of chances passes a whole number in each of some pages, its fraction before each, and after
    the last; ``fraction``: before the first."""
    b_sum = tl.load(p_sums + o_page, mask=m_page, other=0)
    # Sums over many pages overflow, but for the last bits.
    b_fraction = (tl.cumsum(b_sum, 0) - b_sum + fraction) & 65535
    return (b_fraction + b_sum) >> 16, b_fraction, (tl.sum(b_sum, 0) + fraction) & 65535


@triton.jit(do_not_specialize=[
    "num_tiles", "num_pages", "context_len", "seq_len", "window", "max_blocks", "max_columns", "most",
])  # fmt: skip
def block_lists_kernel(
    p_counts, p_sums, p_threshold, p_cost, p_lists, p_blocks, p_num_blocks, p_num_columns, p_overflowed, num_tiles,
    num_pages, context_len, seq_len, window, max_blocks, max_columns, most, TILE: tl.constexpr, PAGE: tl.constexpr,
    STEP: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """One program: the whole pages of one tile, and where the single keys of each of the others begin in their list.

    Lists are the index's own, ``p_blocks`` int32 ``[L, T, max_blocks]`` filled with -1; ``p_lists`` int32 ``[h]`` says
    which of them each head has. ``p_counts`` becomes that beginning, -1 where a page lists no single key. A head whose
    cost is above ``most``, or whose threshold is 0, has every page, and a tile without room, too, without a list.
    Where SAMPLED a page's single keys are those at which the sum of chances passes a whole number, and ``p_sums``
    becomes the sum's fraction before each page.
    """
    i_tile, i_slot = tl.program_id(0), tl.program_id(1)
    i_list = (tl.load(p_lists + i_slot) * num_tiles + i_tile).to(tl.int64)
    p_counts += (i_slot * num_tiles + i_tile).to(tl.int64) * num_pages
    p_sums += (i_slot * num_tiles + i_tile).to(tl.int64) * num_pages
    oldest, _, end = _reach(i_tile, context_len, seq_len, window, TILE, PAGE)
    first = oldest // PAGE
    # Pages from ``full`` on are attended whatever they hold.
    full = tl.where((tl.load(p_threshold + i_slot) == 0) | (tl.load(p_cost + i_slot) > most), first, end)
    blocks, columns, fraction = 0, 0, _first_fraction(i_tile)
    for i_page in range(0, num_pages, STEP):
        o_page = i_page + tl.arange(0, STEP)
        m_page = o_page < num_pages
        m_seen = (o_page >= first) & (o_page < end)
        b_count = tl.load(p_counts + o_page, mask=m_seen, other=0)
        m_whole = m_seen & ((o_page >= full) | (b_count == PAGE))
        if SAMPLED:
            b_count, b_fraction, fraction = _drawn(p_sums, o_page, m_page, fraction)
        blocks += tl.sum(m_whole.to(tl.int32), 0)
        columns += tl.sum(tl.where(m_whole, 0, b_count), 0)
    over = (blocks > max_blocks) | (columns > max_columns)
    tl.store(p_num_blocks + i_list, tl.where(over, end, blocks))
    tl.store(p_num_columns + i_list, tl.where(over, 0, columns))
    tl.store(p_overflowed + i_list, (over & (blocks < end)).to(tl.uint8))
    room = tl.where(over, 0, max_blocks)
    blocks, columns, fraction = 0, 0, _first_fraction(i_tile)
    for i_page in range(0, num_pages, STEP):
        o_page = i_page + tl.arange(0, STEP)
        m_page = o_page < num_pages
        m_seen = (o_page >= first) & (o_page < end)
        b_count = tl.load(p_counts + o_page, mask=m_seen, other=0)
        m_whole = m_seen & ((o_page >= full) | (b_count == PAGE))
        if SAMPLED:
            b_count, b_fraction, fraction = _drawn(p_sums, o_page, m_page, fraction)
        o_block = blocks + tl.cumsum(m_whole.to(tl.int32), 0) - 1
        tl.store(p_blocks + i_list * max_blocks + o_block, o_page, mask=m_whole & (o_block < room))
        b_single = tl.where(over | m_whole, 0, b_count)
        b_begin = columns + tl.cumsum(b_single, 0) - b_single
        tl.debug_barrier()
        tl.store(p_counts + o_page, tl.where(b_single > 0, b_begin, -1), mask=m_page)
        if SAMPLED:
            tl.store(p_sums + o_page, b_fraction, mask=m_page)
        blocks += tl.sum(m_whole.to(tl.int32), 0)
        columns += tl.sum(b_single, 0)


@triton.jit(do_not_specialize=["num_tiles", "num_pages", "context_len", "seq_len", "window", "max_columns"])
def key_lists_kernel(
    p_bins, stride_bins, p_threshold, p_chances, p_begin, p_fraction, p_lists, p_columns, p_codes, num_tiles, num_pages,
    context_len, seq_len, window, max_columns, TILE: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr,
    PAGES: tl.constexpr, SAMPLED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One program: the single keys of PAGES pages of one tile.

    ``p_begin``: int32 ``[h, T, N]``, where each page's keys begin, -1 where none is listed; ``p_fraction``: likewise,
    the fraction of the sum of chances, where SAMPLED. ``p_columns``: int32 ``[L, T, max_columns]``, filled with -1;
    ``p_codes``: uint8, likewise, where SAMPLED. ``p_lists``: see ``block_lists_kernel``.
    """
    i_strip, i_row = tl.program_id(0), tl.program_id(1)
    i_slot, i_tile = i_row // num_tiles, i_row % num_tiles
    o_page = i_strip * PAGES + tl.arange(0, PAGES)
    o_count = i_row.to(tl.int64) * num_pages + o_page
    b_begin = tl.load(p_begin + o_count, mask=o_page < num_pages, other=-1)
    if tl.max(b_begin, 0) >= 0:
        i_list = (tl.load(p_lists + i_slot) * num_tiles + i_tile).to(tl.int64)
        threshold = tl.load(p_threshold + i_slot)
        b_bin, o_position = _bins(p_bins + i_row.to(tl.int64) * stride_bins, o_page, seq_len, PAGE, SLOTS)
        if SAMPLED:
            oldest, own, _ = _reach(i_tile, context_len, seq_len, window, TILE, PAGE)
            b_code, b_chance = _chances(
                p_chances, b_bin, threshold, o_page, o_position, oldest, own, PAGE, WINDOWED
            )  # fmt: skip
            # A key from the threshold up has a whole chance: it is drawn, and leaves the fraction as it is.
            b_fraction = tl.load(p_fraction + o_count, mask=o_page < num_pages, other=0)
            b_sum = tl.cumsum(b_chance, 1) + b_fraction[:, None]
            # What was left is less than the chance where the sum has passed a whole number.
            m_key = (b_sum & 65535) < b_chance
            o_key = (b_sum >> 16) - 1
        else:
            m_key = b_bin >= threshold
            o_key = tl.cumsum(m_key.to(tl.int32), 1) - 1
        m_key = m_key & (b_begin >= 0)[:, None]
        o_key += b_begin[:, None]
        if SAMPLED:
            tl.store(p_codes + i_list * max_columns + o_key, b_code.to(tl.uint8), mask=m_key)
        tl.store(p_columns + i_list * max_columns + o_key, o_position, mask=m_key)


KEYS, STEP, NUM_WARPS = 2048, 512, 4
"""Keys of one program, about; pages of one step."""


def constants(block_size: int, sampled: bool = False, windowed: bool = False) -> dict[str, int]:
    """Of the kernels that read bins, but for their tile."""
    slots = triton.next_power_of_2(block_size)
    shape = {"PAGE": block_size, "SLOTS": slots, "PAGES": max(1, KEYS // slots), "num_warps": NUM_WARPS}
    return shape | {"SAMPLED": sampled, "WINDOWED": sampled and windowed}


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
    """The keys from one bin up, of some heads, and a sample of the others, to be written into the lists of an index."""

    tiling: Tiling
    """With a ``column_multiple`` of 1."""
    bins: torch.Tensor
    """uint8 ``[h, T, S]``, see ``score_bins.tile_bins``; a tile's one behind the other."""
    threshold: torch.Tensor
    """int32 ``[h]``."""
    sampled: bool = False
    """See ``ScoreBins``."""

    def write(self, lists: Lists, heads: Sequence[int]) -> None:
        """The lists that ``score_bins.keys_above``, or ``sampled_keys``, and ``build_index`` make of them.

        Args:
            lists: of all heads, every one with its own; filled with -1 and zeros.
            heads: whose lists these are.
        """
        tiling, bins, threshold = self.tiling, self.bins, self.threshold
        shape = constants(tiling.block_size, self.sampled, tiling.window > 0) | {"TILE": tiling.tile}
        lengths = tiling.context_len, tiling.seq_len, tiling.window
        count, tiles, pages = len(heads), tiling.num_tiles, tiling.num_key_blocks
        counts = torch.empty(count, tiles, pages, dtype=torch.int32, device=bins.device)
        chances, sums, codes = threshold, counts, lists.columns  # which nothing reads, if none is drawn
        if self.sampled:
            assert lists.codes is not None
            chances, sums, codes = score_bins.increments(bins.device), torch.empty_like(counts), lists.codes
        grid, numbers = (triton.cdiv(pages, shape["PAGES"]), count * tiles), on_device(heads, bins)
        cost = torch.zeros(count, dtype=torch.int32, device=bins.device)
        launcher(page_counts_kernel, grid)(
            bins, bins.stride(1), threshold, chances, counts, sums, cost, tiles, pages, *lengths, **shape
        )
        most = _most(*lengths, tiling.tile, tiling.block_size)
        launcher(block_lists_kernel, (tiles, count))(
            counts, sums, threshold, cost, numbers, lists.blocks, lists.num_blocks, lists.num_columns,
            lists.overflowed.view(torch.uint8), tiles, pages, *lengths, lists.blocks.shape[2],
            lists.columns.shape[2], most, TILE=tiling.tile, PAGE=tiling.block_size, STEP=STEP, SAMPLED=self.sampled,
            num_warps=NUM_WARPS,
        )  # fmt: skip
        launcher(key_lists_kernel, grid)(
            bins, bins.stride(1), threshold, chances, counts, sums, numbers, lists.columns, codes, tiles, pages,
            *lengths, lists.columns.shape[2], **shape,
        )  # fmt: skip
