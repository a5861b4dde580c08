"""A sparse index as FlashAttention 4's block lists over a cache that is shown to it as one sequence.

A page's place in that sequence is its block number. Attention does not care about the order of keys; causality does,
and it concerns a tile's own pages alone: they are *mask blocks*, which a function masks element by element, and all
pages before them are *full blocks*, which nothing masks. Blocks that are not listed are not read.

FlashAttention 4 takes a list per 128 query rows and blocks of 128 keys. Tiles begin at multiples of 128, so each such
*row block* has one own page, of the same position in the sequence: row ``i`` of it sees the keys up to ``i`` there. The
mask needs no table from physical to logical pages, and pages may serve several blocks.

Sizes: ``R`` row blocks of a chunk, ``H`` query heads, ``L`` lists of an index.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.fa4.limits import BLOCK


def own_page(batch: Any, head: Any, row: Any, key: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
    """FlashAttention 4's ``mask_mod``: whether a row sees a key of its row block's own page.

    Both are numbers in the sequences that are shown to it. It is compiled for the GPU as it stands, and takes torch's
    integers as well. With signed remainders in place of the bits FlashAttention 4 spills registers on Blackwell.
    """
    return (key & (BLOCK - 1)) <= (row & (BLOCK - 1))


@dataclass(frozen=True)
class BlockLists:
    """By the names of FlashAttention 4's ``BlockSparseTensorsTorch``; int32, of one batch."""

    mask_block_cnt: torch.Tensor
    """``[1, H, R]``."""
    mask_block_idx: torch.Tensor
    """``[1, H, R, 1]``: the row block's own page."""
    full_block_cnt: torch.Tensor
    """``[1, H, R]``."""
    full_block_idx: torch.Tensor
    """``[1, H, R, max_blocks]``: pages before it; meaningless past ``full_block_cnt``."""

    def by_row_block(self) -> BlockLists:
        """The same for a batch of ``R`` sequences of one row block each: ``[R, H, 1, ...]``."""
        return BlockLists(**{name: part.transpose(0, 2).contiguous() for name, part in vars(self).items()})


def block_lists(index: SparseIndex, pages: torch.Tensor, page_step: int) -> BlockLists:
    """What an index's tiles attend, their columns apart. The last page is left out where it is not full: values behind
    the last token may be NaN, which a weight of zero does not hide. Nothing waits for a GPU.

    Args:
        index: with a list for every tile (``plan_capacity(list_everything=True)``), pages and tiles of whole ``BLOCK``.
        pages: int64 ``[N]``, physical page of each logical block.
        page_step: see ``CacheAsSequence``.
    """
    tiling, device = index.tiling, index.blocks.device
    own = torch.arange(tiling.context_len // BLOCK, -(-tiling.seq_len // BLOCK), device=device)  # [R], logical pages
    physical = pages.to(torch.int32) * page_step
    # A tile's list ascends and ends with its own pages, so a row block's full blocks are its first ones: all but the
    # own page, and those that follow it up to the tile's last.
    last_own = (tiling.starts[1:] - 1) // BLOCK
    before = index.num_blocks - last_own - 1  # [L, T]
    blocks = index.blocks
    if tiling.tile > BLOCK:
        tile = own * BLOCK // tiling.tile - tiling.context_len // tiling.tile
        before, blocks = before[:, tile], blocks[:, tile]
    full_cnt = (before + own).to(torch.int32)
    full_idx = physical.index_select(0, blocks.flatten().clamp(min=0)).view_as(blocks)
    mask_idx = physical[own].expand(index.num_lists, -1)
    mask_cnt = torch.ones_like(full_cnt)
    if tiling.seq_len % BLOCK:
        mask_cnt[:, -1] = 0

    def of_heads(lists: torch.Tensor) -> torch.Tensor:
        return lists.repeat_interleave(index.heads_per_list, 0)[None].contiguous()

    return BlockLists(of_heads(mask_cnt), of_heads(mask_idx)[..., None], of_heads(full_cnt), of_heads(full_idx))


def without_blocks(index: SparseIndex) -> SparseIndex:
    """The same with nothing but columns and own pages. Which pages those are stands in no list: see ``split_keys``."""
    starts, size = index.tiling.starts, index.tiling.block_size
    num_own = (starts[1:] - 1) // size - starts[:-1] // size + 1
    return replace(
        index,
        blocks=index.blocks.new_zeros(*index.blocks.shape[:2], 1),
        num_blocks=num_own.to(torch.int32).expand(index.num_lists, -1).contiguous(),
    )
