"""Attention under a ``SparseIndex``: whole pages by FlashAttention 4, single keys by our Triton kernel.

FlashAttention 4 runs first. Our kernel then continues each row's softmax from its output and log-sum-exp, over the
tile's columns, its remainder, and the last page if that is not full. If there is none of these, it is not called.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import Remainder
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.fa4.block_lists import BlockLists, block_lists, own_page, without_blocks
from minference_vllm.kernels.fa4.cache_as_sequence import CacheAsSequence
from minference_vllm.kernels.fa4.limits import BLOCK
from minference_vllm.triton_kernels import attention as triton_attention
from minference_vllm.triton_kernels.launch import major_capability


class Attend(Protocol):
    """FlashAttention 4's block-sparse forward pass, for ``batch`` sequences of queries."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        lists: BlockLists,
        scale: float,
    ) -> None:
        """Write ``out`` (``[batch, rows, H, D]``, as ``query``) and ``lse`` (float32 ``[batch, H, rows]``, natural
        logarithm; -inf for rows without keys), with ``key`` and ``value`` ``[batch, tokens, heads, D]``."""


@functools.cache
def flash_attention_4() -> Attend:
    """vLLM's FlashAttention 4. ``tests/contract`` reads its signature in the oldest and the newest supported release.

    Raises:
        ImportError: this vLLM does not have it, or the packages that compile it (``nvidia-cutlass-dsl``,
            ``quack-kernels``) are missing.
    """
    import cutlass.cute as cute
    from vllm.vllm_flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from vllm.vllm_flash_attn.cute.interface import _flash_attn_fwd

    mask_mod = cute.jit(own_page)

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        lists: BlockLists,
        scale: float,
    ) -> None:
        # On Blackwell two row blocks share a list, unless there are this few rows. vLLM 0.26 multiplies them by the
        # group size.
        fewest = max(1, BLOCK * key.shape[2] // query.shape[2]) if query.shape[1] == BLOCK else None
        _flash_attn_fwd(
            query,
            key,
            value,
            max_seqlen_q=fewest,
            softmax_scale=scale,
            pack_gqa=False,
            mask_mod=mask_mod,
            block_sparse_tensors=BlockSparseTensorsTorch(**vars(lists), block_size=(BLOCK, BLOCK)),
            return_lse=True,
            out=out,
            lse=lse,
        )

    return attend


def run(
    inputs: Inputs,
    index: SparseIndex,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    remainder: Remainder | None = None,
    attend: Attend | None = None,
    apart: bool | None = None,
) -> None:
    """See ``kernels.kernel.Run``; bf16 or fp16. The log-sum-exp includes the remainder's share.

    Args:
        inputs: without soft cap, sinks, window or FP8 cache; see ``limits`` for the cache.
        index: with a list for every tile (``plan_capacity(list_everything=True)``); causal.
        attend: replaces vLLM's FlashAttention 4.
        apart: whether each row block is a sequence of its own; None: depends on the GPU.
    """
    assert index.causal, "parts of dual chunk attention have no own pages"
    query, tiling = inputs.query, index.tiling
    if lse is None:
        lse = query.new_empty(inputs.num_heads, len(query), dtype=torch.float32)
    if apart is None:
        apart = major_capability(query) > 9
    _attend_blocks(inputs, index, out, lse, attend or flash_attention_4(), apart)
    whole = tiling.seq_len // BLOCK * BLOCK
    if index.columns.shape[2] > 1 or remainder is not None or whole < tiling.seq_len:
        triton_attention.run(inputs, without_blocks(index), out, lse, remainder, own_from=whole)


def _attend_blocks(
    inputs: Inputs, index: SparseIndex, out: torch.Tensor, lse: torch.Tensor, attend: Attend, apart: bool
) -> None:
    """Attend the pages of the index, without the last one if it is not full."""
    query, tiling, scale = inputs.query, index.tiling, inputs.scale
    sequence = CacheAsSequence.of(inputs.cache)
    lists = block_lists(index, inputs.pages, sequence.page_step)
    before, after = tiling.context_len % BLOCK, -tiling.seq_len % BLOCK
    if not apart and not before:
        attend(query[None], sequence.key, sequence.value, out[None], lse[None], lists, scale)
        return
    # Row blocks begin at multiples of 128 positions. Rows outside the chunk are padding, and dropped afterwards.
    if before or after:
        rows = query.new_zeros(before + len(query) + after, *query.shape[1:])
        rows[before : before + len(query)] = query
        found = torch.empty_like(rows)
    else:
        rows, found = query, out
    count = len(rows) // BLOCK if apart else 1
    rows_lse = lse.new_empty(count, inputs.num_heads, len(rows) // count)
    key, value = (part.expand(count, -1, -1, -1) for part in (sequence.key, sequence.value))
    queries, results = (part.unflatten(0, (count, -1)) for part in (rows, found))
    attend(queries, key, value, results, rows_lse, lists.by_row_block() if apart else lists, scale)
    if found is not out:
        out.copy_(found[before : before + len(query)])
    lse.copy_(rows_lse.transpose(0, 1).flatten(1)[:, before : before + len(query)])
