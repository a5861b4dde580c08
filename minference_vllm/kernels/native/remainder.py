"""The remainder of ``prefill.remainder`` on our CPU kernels, straight from the pages of any layout."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import Remainder, sample_step, sampled_positions
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.native import interface
from minference_vllm.kernels.native.library import describe_cache, library


def of_heads(inputs: Inputs, index: SparseIndex, heads: Sequence[int]) -> Remainder:
    """``prefill.remainder.of_heads``.

    Args:
        inputs: the query has the cache's type, see ``library.unsupported_cache_reason``.
        index: causal.
        heads: query heads wanted, ascending.
    """
    assert index.causal
    query, cache, tiling = inputs.query, inputs.cache, index.tiling
    sampled, wanted = sampled_positions(tiling.seq_len), torch.tensor(list(heads), dtype=torch.int32)
    key, value = torch.zeros(2, inputs.num_heads, index.num_tiles, cache.head_size, dtype=torch.float32)
    bias = torch.full(key.shape[:2], -torch.inf, dtype=torch.float32)
    call = interface.RemainderArguments(
        describe_cache(cache),
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        inputs.pages.data_ptr(),
        tiling.starts.data_ptr(),
        index.blocks.data_ptr(),
        index.num_blocks.data_ptr(),
        index.columns.data_ptr(),
        index.num_columns.data_ptr(),
        sampled.data_ptr(),
        wanted.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        bias.data_ptr(),
        tiling.seq_len,
        tiling.window,
        inputs.num_heads,
        len(wanted),
        index.heads_per_list,
        index.num_tiles,
        index.blocks.shape[2],
        index.columns.shape[2],
        len(sampled),
        inputs.scale,
        inputs.softcap,
        math.log(sample_step(tiling.seq_len)),
        torch.get_num_threads(),
    )
    library(cache.key.dtype).minference_remainder(ctypes.byref(call))
    return Remainder(key, value, bias)
