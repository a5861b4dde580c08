"""From the score bins of tiles to the lists of their keys, without a mark for every key, or a wait for the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.compaction import KeyLists, Selection
from minference_vllm.selection.score_bins import ScoreBins, whole_pages
from minference_vllm.triton_kernels.launch import launcher


@triton.jit
def _reaching(p_bins, p_threshold, i_row, i_head, o_page, seq_len, PAGE: tl.constexpr, SLOTS: tl.constexpr):
    """Which keys of some pages reach the head's threshold, ``[PAGES, SLOTS]``, and their positions."""
    o_slot = tl.arange(0, SLOTS)
    o_position = o_page[:, None] * PAGE + o_slot[None, :]
    m_key = (o_slot < PAGE)[None, :] & (o_position < seq_len)
    b_bin = tl.load(p_bins + i_row.to(tl.int64) * seq_len + o_position, mask=m_key, other=0).to(tl.int32)
    return m_key & (b_bin >= tl.load(p_threshold + i_head)), o_position


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["num_tiles", "num_pages", "seq_len"])
def page_counts_kernel(
    p_bins, p_threshold, p_counts, num_tiles, num_pages, seq_len, PAGE: tl.constexpr, SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
):  # fmt: skip
    """One program: how many keys of PAGES pages reach the threshold, for one tile. ``p_counts`` int32 ``[h, T, N]``."""
    i_strip, i_row = tl.program_id(0), tl.program_id(1)
    o_page = i_strip * PAGES + tl.arange(0, PAGES)
    m_reaching, _ = _reaching(p_bins, p_threshold, i_row, i_row // num_tiles, o_page, seq_len, PAGE, SLOTS)
    o_count = i_row.to(tl.int64) * num_pages + o_page
    tl.store(p_counts + o_count, tl.sum(m_reaching.to(tl.int32), 1), mask=o_page < num_pages)


@triton.jit(do_not_specialize=["num_tiles", "num_pages", "seq_len", "width"])
def key_lists_kernel(
    p_bins, p_threshold, p_listed, p_ends, p_keys, num_tiles, num_pages, seq_len, width, PAGE: tl.constexpr,
    SLOTS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """One program: the keys of PAGES pages of one tile, as far as there is room.

    ``p_listed``: int32 ``[h, T, N]``, how many keys of each page are listed; ``p_ends``: of all pages up to it.
    ``p_keys``: int32 ``[h, T, width]``.
    """
    i_strip, i_row = tl.program_id(0), tl.program_id(1)
    o_page = i_strip * PAGES + tl.arange(0, PAGES)
    o_count = i_row.to(tl.int64) * num_pages + o_page
    b_listed = tl.load(p_listed + o_count, mask=o_page < num_pages, other=0)
    b_end = tl.load(p_ends + o_count, mask=o_page < num_pages, other=0)
    m_reaching, o_position = _reaching(p_bins, p_threshold, i_row, i_row // num_tiles, o_page, seq_len, PAGE, SLOTS)
    o_key = (b_end - b_listed - 1)[:, None] + tl.cumsum(m_reaching.to(tl.int32), 1)
    m_listed = m_reaching & (b_listed > 0)[:, None] & (o_key < width)
    tl.store(p_keys + i_row.to(tl.int64) * width + o_key, o_position, mask=m_listed)


KEYS, NUM_WARPS = 2048, 4
"""Keys of one program, about."""


def constants(block_size: int) -> dict[str, int]:
    slots = triton.next_power_of_2(block_size)
    return {"PAGE": block_size, "SLOTS": slots, "PAGES": max(1, KEYS // slots), "num_warps": NUM_WARPS}


def select(tiling: Tiling, found: ScoreBins, width: int) -> Selection:
    """``TorchScores.select_bins``, with room for ``width`` keys of each tile.

    Args:
        tiling: with a ``column_multiple`` of 1.
    """
    bins, threshold = found.bins, found.threshold
    heads, tiles, seq_len = bins.shape
    shape, pages = constants(tiling.block_size), tiling.num_key_blocks
    grid = triton.cdiv(pages, shape["PAGES"]), heads * tiles
    counts = torch.empty(heads, tiles, pages, dtype=torch.int32, device=bins.device)
    launcher(page_counts_kernel, grid)(bins, threshold, counts, tiles, pages, seq_len, **shape)
    blocks, dense = whole_pages(tiling, counts, threshold)
    listed = counts.masked_fill_(blocks | dense[:, None, None], 0)
    ends = listed.cumsum(2, dtype=torch.int32)
    keys = torch.full((heads, tiles, width), -1, dtype=torch.int32, device=bins.device)
    launcher(key_lists_kernel, grid)(bins, threshold, listed, ends, keys, tiles, pages, seq_len, width, **shape)
    return Selection(blocks, KeyLists(keys, ends[..., -1].contiguous()))
