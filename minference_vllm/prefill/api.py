"""``sparse_prefill``: the public function, for every request of a batch over plain paged caches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.choose import DTYPES, KERNELS, choose
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.selection.families import mean_corrected_heads


def sparse_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    patterns: HeadPattern | Sequence[HeadPattern],
    scale: float | None = None,
    kernel: str = "auto",
    tile: int | None = None,
    out: torch.Tensor | None = None,
    return_index: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, list[SparseIndex]]:
    """Sparse causal prefill attention of several requests over a paged KV cache.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, bf16, fp16 or fp32: the new tokens of all requests, concatenated.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_size]``, plain rows, any strides, same dtype; the new
            tokens' keys are already in it. ``value_cache`` alike.
        block_table: int ``[num_requests, max_blocks]``, physical block of each logical block.
        query_start_loc: int ``[num_requests + 1]``, first query row of each request, and the end.
        seq_lens: int ``[num_requests]``, context plus new tokens.
        patterns: one per query head, or one for all.
        scale: softmax scale; default ``head_size ** -0.5``.
        kernel: ``auto``; ``block_table`` or ``native`` on CPUs, ``triton`` or ``block_table`` on GPUs.
        tile: query rows per selection of keys; default 128, rounded up to whole blocks.
        out: where to write; default: a new tensor like ``query``.
        return_index: also return the index of each request.

    Returns:
        ``out``, or ``(out, [SparseIndex per request])``.

    Raises:
        ValueError: an argument's shape, dtype or value does not fit; the message names it.
    """
    num_heads = query.shape[1] if query.dim() == 3 else 0
    per_head = list(patterns) if isinstance(patterns, Sequence) else [patterns] * num_heads
    _validate(query, key_cache, value_cache, block_table, query_start_loc, seq_lens, per_head, kernel, out)
    out = torch.empty_like(query) if out is None else out
    scale = query.shape[2] ** -0.5 if scale is None else scale
    cache = PagedCache(key_cache.transpose(1, 2), value_cache.transpose(1, 2), "rows")
    chosen = choose(kernel, query.dtype, cache, with_lse=bool(mean_corrected_heads(per_head)))
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    # Kernels want a head's elements side by side.
    query = query if query.stride(2) == 1 else query.contiguous()
    written = out if out.stride(2) == 1 else torch.empty_like(query)
    indices = []
    for request, seq_len in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        chunk = Chunk(request, rows.start, seq_len - (rows.stop - rows.start), seq_len)
        inputs = Inputs.of(query[rows], cache, block_table[request].long(), chunk, scale)
        indices.append(attend_chunk(inputs, per_head, chosen, written[rows], tile))
    if written is not out:
        out.copy_(written)
    return (out, indices) if return_index else out


def _validate(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    patterns: Sequence[HeadPattern],
    kernel: str,
    out: torch.Tensor | None,
) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, not {kernel!r}")
    if query.dim() != 3:
        raise ValueError(f"query must be [num_tokens, num_heads, head_size], not {tuple(query.shape)}")
    if key_cache.dim() != 4 or key_cache.shape != value_cache.shape:
        raise ValueError(
            "key_cache and value_cache must both be [num_blocks, block_size, num_kv_heads, head_size], not "
            f"{tuple(key_cache.shape)} and {tuple(value_cache.shape)}"
        )
    tokens, heads, dim = query.shape
    blocks, block_size, kv_heads, cache_dim = key_cache.shape
    if query.dtype not in DTYPES or key_cache.dtype != query.dtype or value_cache.dtype != query.dtype:
        raise ValueError(
            f"query and caches must share one of {', '.join(map(str, DTYPES))}, not "
            f"{query.dtype}, {key_cache.dtype}, {value_cache.dtype}"
        )
    if dim != cache_dim or heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads of size {dim}, the cache {kv_heads} of size {cache_dim}: sizes must agree and "
            "query heads be a multiple of KV heads"
        )
    if len(patterns) != heads:
        raise ValueError(f"{len(patterns)} patterns for {heads} query heads; give one per head, or one for all")
    if out is not None and (out.shape != query.shape or out.dtype != query.dtype):
        raise ValueError(f"out must be like query, {tuple(query.shape)} {query.dtype}")
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    if len(starts) != len(lengths) + 1 or block_table.dim() != 2 or block_table.shape[0] != len(lengths):
        raise ValueError(
            f"{len(lengths)} seq_lens need {len(lengths) + 1} query_start_loc entries and as many block_table rows as "
            f"requests; found {len(starts)} and {tuple(block_table.shape)}"
        )
    if starts[0] != 0 or starts[-1] != tokens or any(b < a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"query_start_loc must rise from 0 to {tokens} (the query rows), not {starts}")
    for request, length in enumerate(lengths):
        if starts[request] == starts[request + 1]:
            raise ValueError(f"request {request} has no new tokens")
        if length < starts[request + 1] - starts[request]:
            raise ValueError(f"seq_lens[{request}] = {length} is less than the request's new tokens")
        needed = -(-length // block_size)
        if needed > block_table.shape[1]:
            raise ValueError(f"request {request} needs {needed} blocks, block_table has {block_table.shape[1]} columns")
        used = block_table[request, :needed]
        if int(used.min()) < 0 or int(used.max()) >= blocks:
            raise ValueError(f"block_table[{request}] names blocks outside the cache's {blocks}")
