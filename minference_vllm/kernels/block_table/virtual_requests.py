"""A sparse index as a batch of short requests, for kernels that only support dense causal attention over pages.

Attention does not depend on the order of keys, so "query tile I of head h attends blocks {a, b, c}" is a request with
block table ``[a, b, c]`` whose last block is the causal one. There is one such *virtual request* per list and tile,
list by list: of one query head, or of all heads that share the list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minference_vllm.core.sparse_index import SparseIndex


@dataclass(frozen=True)
class VirtualRequests:
    """Sizes: ``R`` requests, lists times tiles."""

    kv_head: torch.Tensor
    """int64 ``[R]``."""
    blocks: torch.Tensor
    """int32 ``[R, max_blocks]``: logical blocks, -1 past ``num_blocks``."""
    num_blocks: torch.Tensor
    """int64 ``[R]``."""
    num_columns: torch.Tensor
    """int64 ``[R]``."""
    in_last_block: torch.Tensor
    """int64 ``[R]``: tokens of the last block up to the request's last row."""
    query_start_loc: torch.Tensor
    """int64 ``[R + 1]``: first row of each request in the queries, list by list, and the end."""

    @classmethod
    def of(cls, index: SparseIndex, num_kv_heads: int) -> VirtualRequests:
        lists, tiles, size = index.num_lists, index.num_tiles, index.tiling.block_size
        starts, ends = index.tiling.starts[:-1], index.tiling.starts[1:]
        device = index.blocks.device
        query_start_loc = torch.zeros(lists * tiles + 1, dtype=torch.int64, device=device)
        torch.cumsum((ends - starts).repeat(lists), 0, out=query_start_loc[1:])
        return cls(
            kv_head=torch.arange(lists * tiles, device=device) // (tiles * (lists // num_kv_heads)),
            blocks=index.blocks.view(lists * tiles, -1),
            num_blocks=index.num_blocks.view(-1).long(),
            num_columns=index.num_columns.view(-1).long(),
            in_last_block=(ends - (ends - 1) // size * size).repeat(lists),
            query_start_loc=query_start_loc,
        )

    def seq_lens(self, block_size: int, column_blocks: torch.Tensor | int = 0) -> torch.Tensor:
        """int32 ``[R]``, with ``column_blocks`` whole blocks of columns in front of the listed ones."""
        whole = self.num_blocks - 1 + column_blocks
        return (whole * block_size + self.in_last_block).to(torch.int32)

    def physical(self, pages: torch.Tensor, page_step: int) -> torch.Tensor:
        """int32 ``[R, max_blocks]``: pages of one head each, ``page * page_step + kv_head``."""
        table = pages[self.blocks.long().clamp(min=0)] * page_step + self.kv_head[:, None]
        return table.to(torch.int32)


def by_list(query: torch.Tensor, index: SparseIndex) -> torch.Tensor:
    """``[chunk, H, D]`` -> ``[L * chunk, heads_per_list, D]``, a copy: the queries of the virtual requests."""
    return query.unflatten(1, (index.num_lists, -1)).transpose(0, 1).flatten(0, 1)


def by_row(result: torch.Tensor, index: SparseIndex) -> torch.Tensor:
    """``[L * chunk, heads_per_list, D]`` -> ``[chunk, L, heads_per_list, D]``, a view: the inverse of ``by_list``."""
    return result.unflatten(0, (index.num_lists, -1)).transpose(0, 1)
