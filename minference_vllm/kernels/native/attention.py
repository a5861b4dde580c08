"""Attention under an index on our CPU kernels, straight from the pages of any layout."""

from __future__ import annotations

import ctypes

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import Remainder
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.native import interface
from minference_vllm.kernels.native.library import describe_cache, library


def run(
    inputs: Inputs,
    index: SparseIndex,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    remainder: Remainder | None = None,
) -> None:
    """See ``kernels.kernel.Run``. The log-sum-exp includes the shares of sink and remainder.

    Args:
        inputs: the query has the cache's type, see ``library.unsupported_cache_reason``; ``sinks`` of any type.
    """
    query, cache, pages = inputs.query, inputs.cache, inputs.pages
    assert remainder is None or all(part.is_contiguous() for part in remainder)
    sinks = None if inputs.sinks is None else inputs.sinks.float().contiguous()
    call = interface.AttendArguments(
        describe_cache(cache),
        query.data_ptr(),
        out.data_ptr(),
        lse.data_ptr() if lse is not None else None,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        pages.data_ptr(),
        index.tiling.starts.data_ptr(),
        index.blocks.data_ptr(),
        index.num_blocks.data_ptr(),
        index.columns.data_ptr(),
        index.num_columns.data_ptr(),
        None if index.column_codes is None else index.column_codes.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        *((part.data_ptr() for part in remainder) if remainder is not None else (None, None, None)),
        index.tiling.seq_len,
        inputs.window,
        index.num_heads,
        index.num_tiles,
        index.blocks.shape[2],
        index.columns.shape[2],
        inputs.scale,
        inputs.softcap,
        torch.get_num_threads(),
    )
    library(cache.key.dtype).minference_attend(ctypes.byref(call))
