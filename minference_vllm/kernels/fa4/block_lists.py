"""A sparse index as FlashAttention 4's block lists, over a paged cache viewed as one sequence.

A page's place in that sequence is its block number. The order of keys matters only for causality, and that only in a
tile's own pages: they are *mask blocks*, which a function masks element by element. All pages before them are *full
blocks*, without a mask. Blocks that are not listed are not read.

FlashAttention 4 takes one list per 128 query rows, of blocks of 128 keys. Tiles begin at multiples of 128, so each such
*row block* has one own page, at the same position in the sequence: row ``i`` of the row block sees the keys up to ``i``
of the page. The mask needs no table from physical to logical pages, and a page may serve several blocks.

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

    ``row`` and ``key`` are indices in the sequences that FlashAttention 4 is given. The function is compiled for the
    GPU as it is, and also accepts torch's integers. With signed remainders instead of bit masks FlashAttention 4 spills
    registers on Blackwell.
    """
    return (key & (BLOCK - 1)) <= (row & (BLOCK - 1))


@dataclass(frozen=True)
class BlockLists:
    """The fields of FlashAttention 4's ``BlockSparseTensorsTorch``; int32, for a batch of one."""

    mask_block_cnt: torch.Tensor
    """``[1, H, R]``."""
    mask_block_idx: torch.Tensor
    """``[1, H, R, 1]``: the row block's own page."""
    full_block_cnt: torch.Tensor
    """``[1, H, R]``."""
    full_block_idx: torch.Tensor
    """``[1, H, R, max_blocks]``: pages before it; undefined past ``full_block_cnt``."""

    def by_row_block(self) -> BlockLists:
        """The lists for a batch of ``R`` sequences of one row block each: ``[R, H, 1, ...]``."""
        return BlockLists(**{name: part.transpose(0, 2).contiguous() for name, part in vars(self).items()})


def block_lists(index: SparseIndex, pages: torch.Tensor, page_step: int) -> BlockLists:
    """The blocks of an index, without its columns and without a host synchronisation. The last page is left out if it
    is not full: values behind the last token may be NaN, which stay NaN with a weight of zero.

    Args:
        index: with a list for every tile (``plan_capacity(list_everything=True)``), pages and tiles of whole ``BLOCK``.
        pages: int64 ``[N]``, physical page of each logical block.
        page_step: see ``CacheAsSequence``.
    """
    tiling, device = index.tiling, index.blocks.device
    own = torch.arange(tiling.context_len // BLOCK, -(-tiling.seq_len // BLOCK), device=device)  # [R], logical pages
    physical = pages.to(torch.int32) * page_step
    # A tile's list ascends and ends with its own pages, so a row block's full blocks are the entries before its own
    # page.
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
    """The index with only columns and own pages. Own pages need no list, see ``split_keys``."""
    starts, size = index.tiling.starts, index.tiling.block_size
    num_own = (starts[1:] - 1) // size - starts[:-1] // size + 1
    return replace(
        index,
        blocks=index.blocks.new_zeros(*index.blocks.shape[:2], 1),
        num_blocks=num_own.to(torch.int32).expand(index.num_lists, -1).contiguous(),
    )
