"""The single columns of an index, read from the cache once per chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.sparse_index import SparseIndex

WHOLE_FROM = 1 / 12
"""Share of a sequence's keys from which on all keys are copied, since copying page by page is faster than key by key. A
key counts once for each query head that needs it."""


@dataclass(frozen=True)
class GatheredColumns:
    """Keys and values of every column that some tile of a head attends."""

    keys: torch.Tensor
    """``[n, D]``."""
    values: torch.Tensor
    """``[n, D]``."""
    row_of: torch.Tensor
    """int64 ``[H, S]``: row of a head's column in ``keys``; undefined if the head has no such column."""


def gather_columns(index: SparseIndex, cache: PagedCache, pages: torch.Tensor) -> GatheredColumns:
    """Gather the columns of all tiles.

    Args:
        pages: int64 ``[N]``, physical page of each logical block.
    """
    heads, length = index.num_heads, index.tiling.seq_len
    columns = index.columns.view(heads, -1)
    # Padding is marked at position ``length``, which is cut off.
    used = torch.zeros(heads, length + 1, dtype=torch.bool)
    used.scatter_(1, torch.where(columns < 0, length, columns).long(), True)
    used = used[:, :length].contiguous()
    kv_head = torch.arange(heads) // (heads // cache.num_kv_heads)
    if int(used.sum()) >= WHOLE_FROM * cache.num_kv_heads * length:
        keys, values = (rows.flatten(0, 1) for rows in cache.rows_by_head(pages))
        row_of = kv_head[:, None] * (len(pages) * cache.block_size) + torch.arange(length)
        return GatheredColumns(keys, values, row_of)
    row_of = (used.view(-1).cumsum(0) - 1).view(heads, length)
    head, position = torch.nonzero(used, as_tuple=True)
    size = cache.block_size
    keys, values = cache.gather_rows(pages[position // size], position % size, kv_head[head])
    return GatheredColumns(keys, values, row_of)
