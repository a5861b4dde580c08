"""``sparse_prefill``: the public function, for all requests of a batch over plain paged caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.choose import choose_for
from minference_vllm.patterns.discovery import default_pattern
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.prefill.arguments import check_arguments
from minference_vllm.prefill.attend import attend_chunk


def sparse_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    patterns: HeadPattern | Sequence[HeadPattern] | None = None,
    scale: float | None = None,
    kernel: str = "auto",
    tile: int | None = None,
    out: torch.Tensor | None = None,
    return_index: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, list[SparseIndex]]:
    """Sparse causal prefill attention of several requests over a paged KV cache, without gradients.

    All tensors are on one device; ``query_start_loc`` and ``seq_lens`` may also be on the CPU.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, bf16, fp16 or fp32: the new tokens of all requests, concatenated.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_size]``, plain rows, any strides, same dtype; the new
            tokens' keys are already in it. ``value_cache`` likewise; for ``triton`` with the same strides.
        block_table: int32 or int64 ``[num_requests, max_blocks]``, physical block of each logical block.
        query_start_loc: int32 or int64 ``[num_requests + 1]``, first query row of each request, and the end.
        seq_lens: int32 or int64 ``[num_requests]``, context plus new tokens.
        patterns: one per query head, or one for all; default: ``default_pattern`` of the device, without its remainder
            if the kernel cannot add it.
        scale: softmax scale, above 0; default ``head_size ** -0.5``.
        kernel: ``auto``; ``block_table`` or ``native`` on CPUs; ``triton``, ``block_table`` or ``fa4`` on GPUs, where
            ``auto`` is ``triton`` and no kernel is timed.
        tile: query rows per selection of keys; default 128, rounded up to whole blocks.
        out: output tensor, not sharing memory with other arguments; default: a new tensor like ``query``.
        return_index: also return the index of each request.

    Returns:
        ``out``, or ``(out, [SparseIndex per request])``.

    Raises:
        ValueError: an argument's type, shape, dtype, device or value is invalid, or the kernel cannot run; the message
            says which and what is allowed.
    """
    check_arguments(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens, patterns, scale, kernel, tile, out,
        return_index,
    )  # fmt: skip
    out = torch.empty_like(query) if out is None else out
    scale = query.shape[2] ** -0.5 if scale is None else float(scale)
    cache = PagedCache(key_cache.transpose(1, 2), value_cache.transpose(1, 2), "rows")
    wanted_patterns = default_pattern("cuda" if query.is_cuda else "cpu") if patterns is None else patterns
    per_head = tuple(wanted_patterns) if isinstance(wanted_patterns, Sequence) else (wanted_patterns,) * query.shape[1]
    chosen, per_head, without = choose_for(per_head, kernel, query.dtype, cache)
    if without and patterns is not None:
        raise ValueError(without)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    # Kernels need contiguous elements in a head.
    query = query if query.stride(2) == 1 else query.contiguous()
    written = out if out.stride(2) == 1 else torch.empty_like(query)
    indices = []
    for request, seq_len in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        chunk = Chunk(request, rows.start, seq_len - (rows.stop - rows.start), seq_len)
        inputs = Inputs.of(query[rows], cache, block_table[request].long(), chunk, scale)
        # A larger tile would select the same keys and take more memory.
        wanted = None if tile is None else min(int(tile), seq_len)
        indices.append(attend_chunk(inputs, per_head, chosen, written[rows], wanted))
    if written is not out:
        out.copy_(written)
    return (out, indices) if return_index else out
