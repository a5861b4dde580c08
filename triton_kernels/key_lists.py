"""From the score bins of tiles to the lists of an index, in one pass over the bins, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection import projection, score_bins
from minference_vllm.selection.compaction import Lists
from minference_vllm.triton_kernels.column_diagonal import on_device
from minference_vllm.triton_kernels.launch import launcher

MAX_CODE, TILE_FRACTION = tl.constexpr(score_bins.MAX_CODE), tl.constexpr(score_bins.TILE_FRACTION)
DENSE_FROM, BITS_PER_BIN = tl.constexpr(score_bins.DENSE_FROM), tl.constexpr(1 / projection.BINS_PER_BIT)


@triton.jit
def _bins(p_bins, o_page, seq_len, PAGE: tl.constexpr, SLOTS: tl.constexpr):
    """One tile's bins of the keys of some pages, 0 where there is no key, and their positions: ``[PAGES, SLOTS]``."""
    o_slot = tl.arange(0, SLOTS)
    o_position = o_page[:, None] * PAGE + o_slot[None, :]
    num_whole = seq_len // PAGE
    if PAGE == SLOTS and tl.max(o_page, 0) < num_whole:
        # Loads without a mask are vectorised.
        b_bin = tl.load(p_bins + o_position)
    else:
        b_bin = tl.load(p_bins + o_position, mask=(o_slot < PAGE)[None, :] & (o_position < seq_len), other=0)
    return b_bin.to(tl.int32), o_position


@triton.jit
def _chances(
    b_bin, threshold, o_page, o_position, oldest, own, PAGE: tl.constexpr, WINDOWED: tl.constexpr
):  # fmt: skip
    """Codes of keys (``score_bins.sampled_keys``), and their sampling probabilities in 65536ths: 0 for padding, for the
    tile's own pages and later ones, and for keys before its window."""
    SLOTS: tl.constexpr = b_bin.shape[1]
    b_code = tl.minimum(tl.maximum(threshold - b_bin, 0), MAX_CODE)
    # Rounded to nearest. No probability is so close to a tie that the approximate exponential would matter.
    b_chance = (tl.exp2(16.0 - b_code.to(tl.float32) * BITS_PER_BIN) + 0.5).to(tl.int32)
    b_chance = tl.where((o_page < own)[:, None], b_chance, 0)
    if PAGE != SLOTS:
        b_chance = tl.where((tl.arange(0, SLOTS) < PAGE)[None, :], b_chance, 0)
    if WINDOWED:
        b_chance = tl.where(o_position >= oldest, b_chance, 0)
    return b_code, b_chance


@triton.jit
def _reach(i_tile, context_len, seq_len, window, TILE: tl.constexpr, PAGE: tl.constexpr):
    """The first key that any row of a tile sees, the tile's first own page, and one past its last page."""
    aligned = (context_len // TILE + i_tile) * TILE
    start, end = tl.maximum(aligned, context_len), tl.minimum(aligned + TILE, seq_len)
    oldest = tl.where(window > 0, tl.maximum(start - window + 1, 0), 0)
    return oldest, aligned // PAGE, (end - 1) // PAGE + 1


@triton.jit
def _fill(p_list, first, end, number, rise, STEP: tl.constexpr):
    """Write ``number``, ``number + rise``, ... to the places from ``first`` to ``end``."""
    for i in range(first, end, STEP):
        o_place = i + tl.arange(0, STEP)
        b_number = number + (o_place - first) * rise
        tl.store(p_list + o_place, b_number.to(p_list.dtype.element_ty), mask=o_place < end)


# Lengths differ from chunk to chunk. Specialising on them would recompile kernels while serving.
@triton.jit(do_not_specialize=[
    "num_tiles", "context_len", "seq_len", "window", "max_blocks", "max_columns",
])  # fmt: skip
def key_lists_kernel(
    p_bins, stride_bins, p_threshold, p_lists, p_blocks, p_num_blocks, p_columns, p_codes, p_num_columns,
    p_overflowed, num_tiles, context_len, seq_len, window, max_blocks, max_columns, TILE: tl.constexpr,
    PAGE: tl.constexpr, SLOTS: tl.constexpr, PAGES: tl.constexpr, STEP: tl.constexpr, SAMPLED: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """One program: the whole pages and the single keys of one tile, PAGES pages at a time.

    The lists are those of the index: ``p_blocks`` int32 ``[L, T, max_blocks]``, ``p_columns`` int32
    ``[L, T, max_columns]`` and, if SAMPLED, ``p_codes`` uint8 of the same shape; filled with -1 and zeros. ``p_lists``
    int32 ``[h]`` has the list of each head. A tile that needs more than DENSE_FROM of its keys has every page. A tile
    that needs longer lists has every page, too, without a list.
    """
    # The last tiles have the most keys, so they start first.
    i_tile, i_slot = num_tiles - 1 - tl.program_id(0), tl.program_id(1)
    i_list = (tl.load(p_lists + i_slot) * num_tiles + i_tile).to(tl.int64)
    p_bins += (i_slot * num_tiles + i_tile).to(tl.int64) * stride_bins
    p_blocks, p_columns = p_blocks + i_list * max_blocks, p_columns + i_list * max_columns
    p_codes += i_list * max_columns
    threshold = tl.load(p_threshold + i_slot)
    oldest, own, end = _reach(i_tile, context_len, seq_len, window, TILE, PAGE)
    first = oldest // PAGE
    # ``fraction``: sum of probabilities modulo 65536. It starts at a different value for every tile.
    blocks, columns, cost, fraction = 0, 0, 0, i_tile * TILE_FRACTION & 65535
    for i_page in range(first, end, PAGES):
        o_page = i_page + tl.arange(0, PAGES)
        b_bin, o_position = _bins(p_bins, o_page, seq_len, PAGE, SLOTS)
        b_count = tl.sum((b_bin >= threshold).to(tl.int32), 1)
        m_page = o_page < end
        m_whole = m_page & ((2 * b_count >= PAGE) | (o_page >= own))
        cost += tl.sum(tl.where(m_page, tl.where(m_whole, PAGE, b_count), 0), 0)
        if SAMPLED:
            b_code, b_chance = _chances(
                b_bin, threshold, o_page, o_position, oldest, own, PAGE, WINDOWED
            )  # fmt: skip
            b_sum = tl.sum(b_chance, 1)
            b_fraction = (fraction + tl.cumsum(b_sum, 0) - b_sum) & 65535
            fraction = (fraction + tl.sum(b_sum, 0)) & 65535
            # A key at or above the threshold has probability 1: it is drawn, and leaves the fraction as it is. Where
            # the sum has passed an integer, the new fraction is less than the key's probability.
            b_through = tl.cumsum(b_chance, 1) + b_fraction[:, None]
            m_key, o_key = (b_through & 65535) < b_chance, (b_through >> 16) - 1
            b_count = (b_fraction + b_sum) >> 16
        else:
            m_key = b_bin >= threshold
            o_key = tl.cumsum(m_key.to(tl.int32), 1) - 1
        m_single = m_page & (m_whole == 0)
        b_single = tl.where(m_single, b_count, 0)
        o_key += (columns + tl.cumsum(b_single, 0) - b_single)[:, None]
        m_key = m_key & m_single[:, None] & (o_key < max_columns)
        tl.store(p_columns + o_key, o_position, mask=m_key)
        if SAMPLED:
            tl.store(p_codes + o_key, b_code.to(tl.uint8), mask=m_key)
        o_block = blocks + tl.cumsum(m_whole.to(tl.int32), 0) - 1
        tl.store(p_blocks + o_block, o_page, mask=m_whole & (o_block < max_blocks))
        blocks += tl.sum(m_whole.to(tl.int32), 0)
        columns += tl.sum(b_single, 0)
    pages = end - first
    dense = (threshold == 0) | (cost > DENSE_FROM * PAGE * pages)
    over = tl.where(dense, pages > max_blocks, (blocks > max_blocks) | (columns > max_columns))
    if dense | over:
        # Undo what was written.
        tl.debug_barrier()
        listed = tl.where(over, 0, pages)
        _fill(p_blocks, 0, listed, first, 1, STEP)
        _fill(p_blocks, listed, tl.minimum(blocks, max_blocks), -1, 0, STEP)
        _fill(p_columns, 0, tl.minimum(columns, max_columns), -1, 0, STEP)
        if SAMPLED:
            _fill(p_codes, 0, tl.minimum(columns, max_columns), 0, 0, STEP)
    tl.store(p_overflowed + i_list, (over & (tl.where(dense, pages, blocks) < end)).to(tl.uint8))
    tl.store(p_num_blocks + i_list, tl.where(over, end, tl.where(dense, pages, blocks)))
    tl.store(p_num_columns + i_list, tl.where(dense | over, 0, columns))


KEYS, STEP, NUM_WARPS = 2048, 128, 4
"""Keys per step (approximately), list entries that are reset at once, and warps."""


def constants(block_size: int, sampled: bool = False, windowed: bool = False) -> dict[str, int]:
    """Constants of the kernel, except TILE."""
    slots = triton.next_power_of_2(block_size)
    shape = {"PAGE": block_size, "SLOTS": slots, "PAGES": max(1, KEYS // slots), "STEP": STEP, "num_warps": NUM_WARPS}
    return shape | {"SAMPLED": sampled, "WINDOWED": sampled and windowed}


@dataclass(frozen=True)
class BinLists:
    """Keys of some heads at or above a bin, and a sample of the others, to be written into the lists of an index."""

    tiling: Tiling
    """With a ``column_multiple`` of 1."""
    bins: torch.Tensor
    """uint8 ``[h, T, S]``, see ``score_bins.tile_bins``; contiguous along ``S``."""
    threshold: torch.Tensor
    """int32 ``[h]``."""
    sampled: bool = False
    """See ``ScoreBins``."""

    def write(self, lists: Lists, heads: Sequence[int]) -> None:
        """Write the lists that ``score_bins.keys_above``, or ``sampled_keys``, and ``build_index`` would make.

        Args:
            lists: of all heads, one list per head; filled with -1 and zeros.
            heads: the heads of ``bins``.
        """
        tiling, bins, threshold = self.tiling, self.bins, self.threshold
        codes = lists.codes if self.sampled else lists.columns  # not written if nothing is sampled
        launcher(key_lists_kernel, (tiling.num_tiles, len(heads)))(
            bins, bins.stride(1), threshold, on_device(heads, bins), lists.blocks, lists.num_blocks,
            lists.columns, codes, lists.num_columns, lists.overflowed.view(torch.uint8), tiling.num_tiles,
            tiling.context_len, tiling.seq_len, tiling.window, lists.blocks.shape[2], lists.columns.shape[2],
            TILE=tiling.tile, **constants(tiling.block_size, self.sampled, tiling.window > 0),
        )  # fmt: skip
