"""``sparse_prefill``: estimate, index and attend for every chunk of a batch; the public functional entry."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from minference_vllm import mean_correction
from minference_vllm.capacity import plan_capacity
from minference_vllm.engines import block_table as block_table_engine
from minference_vllm.engines import flash, native
from minference_vllm.index import SparseIndex, build_index
from minference_vllm.paged_cache import PagedCache
from minference_vllm.paged_estimates import PagedEstimates, Timing
from minference_vllm.patterns import HeadPattern
from minference_vllm.plan import Chunk
from minference_vllm.prefill_checks import check_arguments
from minference_vllm.recall import Audit
from minference_vllm.summaries import PageMeans
from minference_vllm.tiling import Tiling

DEFAULT_TILE = 128
"""Query rows that share one selection of keys."""
MAX_TRITON_HEAD_SIZE = 256
NO_LSE = "mean correction needs every row's log-sum-exp, which vLLM's CPU kernel does not give and engine 'native' does"


def choose_engine(engine: str, dtype: torch.dtype, cache: PagedCache, with_lse: bool = False) -> str:
    """The engine that runs: the named one, or for ``auto`` the fastest that can serve this cache.

    On processors with AMX vLLM's own kernel is faster than ours, which has no AMX path. ``triton`` runs on GPUs, and on
    CPUs in Triton's interpreter, for tests.

    Args:
        with_lse: whether the engine must say the log-sum-exp of every row, for mean correction.

    Raises:
        ValueError: the named engine cannot run; the message says why.
    """
    on_gpu = cache.key.is_cuda
    if on_gpu or engine == "triton":
        engine = "triton" if engine == "auto" else engine
        reason = flash.unsupported_cache_reason(dtype, cache) if engine == "block_table" else triton_reason(cache)
        if engine == "native":
            reason = f"it runs on CPUs; tensors on {cache.key.device} need 'triton'"
        if reason:
            raise ValueError(f"engine {engine!r} cannot run: {reason}")
        return engine
    reason = native.unsupported_cache_reason(dtype, cache)
    if engine == "native" and reason:
        raise ValueError(f"engine 'native' cannot run: {reason}")
    if engine == "auto":
        engine = "block_table" if reason or (cache.layout == "amx" and not with_lse) else "native"
    if engine == "block_table" and with_lse:
        raise ValueError(f"engine 'block_table' cannot run: {no_lse_reason(reason)}")
    return engine


def no_lse_reason(native_reason: str | None) -> str:
    """Why vLLM's CPU kernel cannot serve mean correction, and why ``native`` cannot either, if so."""
    return f"{NO_LSE}, but {native_reason}" if native_reason else NO_LSE


def triton_reason(cache: PagedCache) -> str | None:
    """Why the Triton kernels cannot serve this cache, or None when they can."""
    if not cache.key.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs tensors on a GPU, or TRITON_INTERPRET=1 for its interpreter"
    if cache.head_size > MAX_TRITON_HEAD_SIZE:
        return f"heads of size {cache.head_size} are above {MAX_TRITON_HEAD_SIZE}"
    if cache.key.stride(3) != 1 or cache.value.stride(3) != 1:
        return "a head's elements do not lie side by side"
    return None


def choose_tile(tile: int | None, block_size: int) -> int:
    """Rows per query tile: the wanted number (default 128) rounded up to whole pages."""
    wanted = DEFAULT_TILE if tile is None else tile
    if wanted < 1:
        raise ValueError(f"tile must be at least 1 row, not {tile}")
    return -(-wanted // block_size) * block_size


def tiling_for(query: torch.Tensor, cache: PagedCache, chunk: Chunk, engine: str, tile: int | None) -> Tiling:
    """The chunk's query tiles, and the columns as the engine takes them."""
    size = cache.block_size
    # Of all engines only vLLM's CPU kernel must see whole pages of columns.
    on_pages_alone = choose_engine(engine, query.dtype, cache) == "block_table" and not query.is_cuda
    column_multiple = size if on_pages_alone else 1
    return _tiling(chunk.context_len, chunk.seq_len, size, choose_tile(tile, size), column_multiple, query.device)


# All layers of a batch ask for the same.
_tiling = functools.lru_cache(maxsize=64)(Tiling.of)
_capacity = functools.lru_cache(maxsize=256)(plan_capacity)


def attend_chunk(
    query: torch.Tensor,
    cache: PagedCache,
    pages: torch.Tensor,
    chunk: Chunk,
    patterns: Sequence[HeadPattern],
    scale: float,
    out: torch.Tensor,
    engine: str = "auto",
    tile: int | None = None,
    timing: Timing | None = None,
    audit: Audit | None = None,
    page_means: PageMeans | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> SparseIndex:
    """Sparse attention of one request's chunk, written to ``out``; returns the index that was used.

    Args:
        query: ``[chunk, H, D]``; out: alike.
        cache: the layer's cache; the chunk's own keys and values are already in it.
        pages: int64, physical page of each logical block; at least ``ceil(seq_len / block_size)``.
        patterns: one per query head.
        engine, tile: see ``Settings``.
        timing: is added to, when given.
        audit: rows to check, and the floor to hold, before attention runs; what was found is left in it.
        page_means: the layer's page summaries, when they are kept; else pages are pooled anew for every chunk.
        softcap, sinks: see ``triton_kernels.sparse_attention``, the one engine that knows them. The estimates leave
            them out: a cap keeps a row's order of keys, and a sink's share is the same for all.
    """
    timing = timing or Timing()
    corrected = mean_correction.heads_with(patterns)
    engine = choose_engine(engine, query.dtype, cache, with_lse=bool(corrected))
    if engine != "triton" and (softcap or sinks is not None or cache.key.element_size() == 1):
        raise ValueError(f"engine {engine!r} knows no soft cap, no sinks and no FP8 caches; 'triton' does")
    tiling = tiling_for(query, cache, chunk, engine, tile)
    planned = engine == "triton" or query.is_cuda
    # What plans sizes also knows lists that the heads of a group share.
    group = query.shape[1] // cache.num_kv_heads if planned else 1
    # Kernels read the pages by address.
    pages = pages[: tiling.num_key_blocks].contiguous()
    if page_means is None and not planned and corrected:
        page_means = PageMeans()
    scores = PagedEstimates(query, cache, pages, chunk.seq_len, scale, page_means, planned, timing)
    estimated, audited, begin = timing.estimate, timing.audit, timing.now(query.device)

    def build(patterns: Sequence[HeadPattern]) -> SparseIndex:
        sizes = tiling.context_len, tiling.seq_len, tiling.block_size, tiling.tile, tiling.column_multiple
        capacity = _capacity(tuple(patterns), *sizes, engine == "block_table") if planned else None
        return build_index(tiling, patterns, scores, capacity, group)

    index = build(patterns) if audit is None else audit.run(patterns, build, scores.recall)
    end = timing.now(query.device)
    timing.index += end - begin - (timing.estimate - estimated) - (timing.audit - audited)
    options: dict[str, Any] = {"softcap": softcap, "sinks": sinks} if engine == "triton" else {}
    if audit is not None:
        # A head that was given more keys has another pattern.
        corrected = [head for head in corrected if not audit.levels[head]]
    if corrected:
        options["lse"] = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    _runner(engine, query)(query, cache, pages, index, scale, out, **options)
    if corrected:
        means = mean_correction.page_means(cache, pages, chunk.seq_len, None if planned else page_means)
        mean_correction.add(scores.query, *means, index, corrected, scale, out, options["lse"], softcap)
    timing.attend += timing.now(query.device) - end
    return index


def _runner(engine: str, query: torch.Tensor) -> Callable[..., None]:
    if engine == "triton":
        # Imported on first use: it takes a second, and CPU installations may have no triton.
        from minference_vllm.triton_kernels import sparse_attention

        return sparse_attention.run
    if engine == "native":
        return native.run
    return flash.run if query.is_cuda else block_table_engine.run


def sparse_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    patterns: HeadPattern | Sequence[HeadPattern],
    scale: float | None = None,
    engine: str = "auto",
    tile: int | None = None,
    out: torch.Tensor | None = None,
    return_index: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, list[SparseIndex]]:
    """Sparse causal prefill attention of several requests over a paged KV cache, without gradients.

    All tensors are on one device, but ``query_start_loc`` and ``seq_lens`` may be on the CPU.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, bf16, fp16 or fp32: the new tokens of all requests, concatenated.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_size]``, plain rows, any strides, same dtype; the new
            tokens' keys are already in it. ``value_cache`` alike.
        block_table: int32 or int64 ``[num_requests, max_blocks]``, physical block of each logical block.
        query_start_loc: int32 or int64 ``[num_requests + 1]``, first query row of each request, and the end.
        seq_lens: int32 or int64 ``[num_requests]``, context plus new tokens.
        patterns: one per query head, or one for all.
        scale: softmax scale, above 0; default ``head_size ** -0.5``.
        engine: ``auto``; ``block_table`` or ``native`` on CPUs, ``triton`` or ``block_table`` on GPUs.
        tile: query rows per selection of keys; default 128, rounded up to whole blocks.
        out: where to write, apart from the other arguments' memory; default: a new tensor like ``query``.
        return_index: also return the index of each request.

    Returns:
        ``out``, or ``(out, [SparseIndex per request])``.

    Raises:
        ValueError: an argument's type, shape, dtype, device or value does not fit, or the engine cannot run; the
            message says which and what is allowed.
    """
    check_arguments(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens, patterns, scale, engine, tile, out,
        return_index,
    )  # fmt: skip
    per_head = list(patterns) if isinstance(patterns, Sequence) else [patterns] * query.shape[1]
    out = torch.empty_like(query) if out is None else out
    scale = query.shape[2] ** -0.5 if scale is None else float(scale)
    cache = PagedCache(key_cache.transpose(1, 2), value_cache.transpose(1, 2), "rows")
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    # Kernels want a head's elements side by side.
    query = query if query.stride(2) == 1 else query.contiguous()
    written = out if out.stride(2) == 1 else torch.empty_like(query)
    indices = []
    for request, seq_len in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        chunk = Chunk(request, rows.start, seq_len - (rows.stop - rows.start), seq_len)
        pages = block_table[request].long()
        # A larger tile is the same one, and takes more memory.
        wanted = None if tile is None else min(int(tile), seq_len)
        indices.append(attend_chunk(query[rows], cache, pages, chunk, per_head, scale, written[rows], engine, wanted))
    if written is not out:
        out.copy_(written)
    return (out, indices) if return_index else out
