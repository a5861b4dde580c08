"""An index's keys as offsets into the cache, so that attention reads one list and no page table.

Offsets count elements from a head's first key or value, in units that make them fit 32 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.sparse_index import CODES_PER_BIT, SparseIndex
from minference_vllm.triton_kernels.launch import launcher

BITS_PER_CODE = tl.constexpr(1 / CODES_PER_BIT)
BLOCK = 256
"""List entries that are written at once."""
WORK = 1024
"""Tiles are sorted by their number of keys divided by this, so that similar ones stay next to tiles that read the same
pages."""


@triton.jit
def split_keys(num_blocks, tile_start, tile_end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Number of pages in a tile's list before its own pages, and of their keys after the last full step of BLOCK_N.

    Every list of a causal index ends with all pages that hold the tile's rows. Other lists have none of them.
    """
    num_before = num_blocks
    if CAUSAL:
        num_before -= (tile_end - 1) // PAGE - tile_start // PAGE + 1
    return num_before, num_before * PAGE % BLOCK_N


@triton.jit
def place_of(i_item, num_tiles, LISTS: tl.constexpr):
    """KV head, list and tile of an item. The lists of a KV head, which read the same pages, are neighbours."""
    i_kv_head = i_item // (LISTS * num_tiles)
    return i_kv_head, i_kv_head * LISTS + i_item % LISTS, i_item // LISTS % num_tiles


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_items", "num_pages", "max_blocks", "max_columns", "max_singles", "page_units", "slot_units"
    ]
)  # fmt: skip
def physical_lists_kernel(
    p_pages,
    p_tile_starts,
    p_blocks,
    p_num_blocks,
    p_columns,
    p_num_columns,
    p_codes,
    p_table,
    p_listed,
    p_singles,
    p_counts,
    p_work,
    num_tiles,
    num_items,
    num_pages,
    max_blocks,
    max_columns,
    max_singles,
    page_units,
    slot_units,
    LISTS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    WORK: tl.constexpr,
    CAUSAL: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One program: the lists of one tile, or BLOCK entries of the whole table."""
    i_item = tl.program_id(0)
    o_entry = tl.arange(0, BLOCK)
    if i_item >= num_items:
        o_page = (i_item - num_items) * BLOCK + o_entry
        b_page = tl.load(p_pages + o_page, mask=o_page < num_pages, other=0).to(tl.int64)
        tl.store(p_table + o_page, (b_page * page_units).to(tl.int32), mask=o_page < num_pages)
    else:
        _, i_list, i_tile = place_of(i_item, num_tiles, LISTS)
        i_row = i_list * num_tiles + i_tile
        p_blocks += i_row.to(tl.int64) * max_blocks
        p_listed += i_row.to(tl.int64) * max_blocks
        p_columns += i_row.to(tl.int64) * max_columns
        p_singles += i_row.to(tl.int64) * max_singles
        p_codes += i_row.to(tl.int64) * max_columns
        p_counts += i_row.to(tl.int64) * max_singles
        num_blocks = tl.load(p_num_blocks + i_row)
        num_columns = tl.load(p_num_columns + i_row)
        tile_start = tl.load(p_tile_starts + i_tile).to(tl.int32)
        tile_end = tl.load(p_tile_starts + i_tile + 1).to(tl.int32)
        num_before, num_left = split_keys(num_blocks, tile_start, tile_end, PAGE, BLOCK_N, CAUSAL)
        tl.store(p_work + i_item, (num_blocks * PAGE + num_columns) // WORK)
        # A tile without a list reads the table.
        is_listed = tl.load(p_blocks) >= 0
        for first in range(0, tl.where(is_listed, num_before, 0), BLOCK):
            m_block = first + o_entry < num_before
            b_block = tl.load(p_blocks + first + o_entry, mask=m_block, other=0)
            b_page = tl.load(p_pages + b_block, mask=m_block, other=0).to(tl.int64)
            tl.store(p_listed + first + o_entry, (b_page * page_units).to(tl.int32), mask=m_block)
        for first in range(0, num_columns, BLOCK):
            m_column = first + o_entry < num_columns
            b_position = tl.load(p_columns + first + o_entry, mask=m_column, other=0)
            b_page = tl.load(p_pages + b_position // PAGE, mask=m_column, other=0).to(tl.int64)
            b_place = b_page * page_units + b_position % PAGE * slot_units
            tl.store(p_singles + first + o_entry, b_place.to(tl.int32), mask=m_column)
            if COUNTED:
                b_code = tl.load(p_codes + first + o_entry, mask=m_column, other=0)
                tl.store(p_counts + first + o_entry, tl.exp2(b_code.to(tl.float32) * BITS_PER_CODE), mask=m_column)
        if PAGE % BLOCK_N != 0:
            o_left = tl.arange(0, BLOCK_N)
            o_key = num_before * PAGE - num_left + o_left
            m_left = o_left < num_left
            b_left = tl.load(p_blocks + o_key // PAGE, mask=o_left < tl.where(is_listed, num_left, 0), other=0)
            b_left = tl.where(is_listed, b_left, o_key // PAGE)
            b_left_page = tl.load(p_pages + b_left, mask=m_left, other=0).to(tl.int64)
            b_left_place = b_left_page * page_units + o_key % PAGE * slot_units
            tl.store(p_singles + num_columns + o_left, b_left_place.to(tl.int32), mask=m_left)
            if COUNTED:
                tl.store(p_counts + num_columns + o_left, tl.full([BLOCK_N], 1.0, tl.float32), mask=m_left)
        # Padded with the tile's last key. If no row attends own keys, they are the padding of the last step.
        own = tile_start // PAGE * PAGE
        p_singles += num_columns + num_left
        p_counts += num_columns + num_left
        for first in range(0, tile_end - own + BLOCK_N, BLOCK):
            o_own = first + o_entry
            o_position = tl.minimum(own + o_own, tile_end - 1)
            b_own_page = tl.load(p_pages + o_position // PAGE).to(tl.int64)
            b_own_place = b_own_page * page_units + o_position % PAGE * slot_units
            m_own = o_own < tile_end - own + BLOCK_N
            tl.store(p_singles + o_own, b_own_place.to(tl.int32), mask=m_own)
            if COUNTED:
                tl.store(p_counts + o_own, tl.full([BLOCK], 1.0, tl.float32), mask=m_own)


@dataclass(frozen=True)
class PhysicalLists:
    """Offsets from a head's first key, the same for values, divided by ``unit``. Sizes as in ``SparseIndex``."""

    unit: int
    table: torch.Tensor
    """int32 ``[N + ...]``: of every page in order, for tiles without a list."""
    listed: torch.Tensor
    """int32 ``[L * T * max_blocks + ...]``: of the pages before each tile."""
    singles: torch.Tensor
    """int32 ``[L * T * max_singles + ...]``: of a tile's columns, then of its pages' keys after the last full step,
    then of its own pages' keys, padded."""
    counts: torch.Tensor | None
    """float32, of the same shape: how often each key counts; None: once."""
    max_singles: int
    order: torch.Tensor
    """int64 ``[L * T]``: items (see ``place_of``), those with most keys first."""


def physical_lists(inputs: Inputs, index: SparseIndex, block_n: int) -> PhysicalLists:
    """The lists of one chunk, without a host synchronisation.

    Args:
        inputs: with keys and values in pages of the same strides.
        block_n: keys that attention takes per step. It may read as many entries past a list's end.

    Raises:
        ValueError: keys and values have different strides, or the cache is too large for 32 bits.
    """
    cache, columns, device = inputs.cache, index.columns, index.blocks.device
    page_stride, _, slot_stride, _ = cache.key.stride()
    if any(cache.key.stride(d) != cache.value.stride(d) for d in range(4) if cache.key.shape[d] > 1):
        raise ValueError(
            f"keys and values must lie at the same strides, not {cache.key.stride()} and {cache.value.stride()}"
        )
    unit = math.gcd(16, page_stride, slot_stride)
    if len(cache.key) * page_stride > unit << 31:
        raise ValueError(
            f"a cache of {len(cache.key)} pages that lie {page_stride} elements apart is above {unit << 31} elements"
        )
    rows = index.num_lists * index.num_tiles
    num_pages, max_blocks = len(inputs.pages), index.blocks.shape[2]
    # Columns, keys after the last full step, own keys, and padding.
    max_singles = columns.shape[2] + index.tiling.tile + (2 if cache.block_size % block_n else 1) * block_n
    table, listed, singles = (
        torch.empty(entries + block_n, dtype=torch.int32, device=device)
        for entries in (num_pages, rows * max_blocks, rows * max_singles)
    )
    codes, counts = index.column_codes, None
    if codes is not None:
        counts = torch.empty(rows * max_singles + block_n, dtype=torch.float32, device=device)
    work = torch.empty(rows, dtype=torch.int32, device=device)
    launcher(physical_lists_kernel, (rows + triton.cdiv(num_pages, BLOCK),))(
        inputs.pages, index.tiling.starts, index.blocks, index.num_blocks, columns, index.num_columns,
        columns if codes is None else codes, table, listed, singles, singles if counts is None else counts, work,
        index.num_tiles, rows, num_pages, max_blocks, columns.shape[2], max_singles,
        page_stride // unit, slot_stride // unit,
        LISTS=inputs.group // index.heads_per_list,
        PAGE=cache.block_size,
        BLOCK_N=block_n,
        BLOCK=BLOCK,
        WORK=WORK,
        CAUSAL=index.causal,
        COUNTED=codes is not None,
        num_warps=4,
    )  # fmt: skip
    return PhysicalLists(
        unit, table, listed, singles, counts, max_singles, torch.argsort(work, descending=True, stable=True)
    )
