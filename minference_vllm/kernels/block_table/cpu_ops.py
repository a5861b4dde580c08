"""vLLM's CPU attention kernel: the calls into it that we need, and the page layout that it uses here.

Importing this module imports vLLM.
"""

from __future__ import annotations

import functools
import importlib

import torch

from minference_vllm.core.paged_cache import Layout, PagedCache, unpack_keys, unpack_values


@functools.cache
def _ops() -> object:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if torch.cpu._is_amx_tile_supported():
        # Outside vLLM's worker AMX instructions trap until the process has requested them.
        torch.cpu._init_amx()
    return importlib.import_module("vllm._custom_ops")


@functools.cache
def isa_for(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """The kernel variant, and with it the page layout, that vLLM picks on this machine."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(_get_attn_isa(dtype, block_size, head_size))


def write_pages(
    keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, isa: str
) -> None:
    """Write rows into a cache of the kernel's layout.

    Args:
        keys, values: ``[tokens, HK, D]``.
        cache: ``[num_blocks, HK, 2 * block_size, D]``.
        slot_mapping: int64 ``[tokens]``.
    """
    key_cache, value_cache = cache.chunk(2, dim=2)
    _ops().cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slot_mapping, isa)  # type: ignore[attr-defined]


@functools.cache
def layout_for(dtype: torch.dtype, block_size: int, head_size: int) -> Layout | None:
    """The page layout of the kernel variant, found by writing a page and reading it back; None when it is unknown."""
    if block_size % 16:
        return None
    isa = isa_for(dtype, block_size, head_size)
    # A separate generator, so that the global random state does not change.
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(block_size, 1, head_size, generator=generator).to(dtype) for _ in range(2))
    cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    try:
        write_pages(keys, values, cache, torch.arange(block_size), isa)
    except RuntimeError:
        # Not one of the head sizes that the kernel was compiled for.
        return None
    key_page, value_page = cache[0, 0].chunk(2)
    layouts: tuple[Layout, ...] = ("transposed", "amx", "rows")
    for layout in layouts:
        if layout == "amx" and head_size % 16:
            continue
        if torch.equal(unpack_keys(key_page, layout), keys[:, 0]) and torch.equal(
            unpack_values(value_page, layout), values[:, 0]
        ):
            return layout
    return None


def pack(cache: PagedCache, into: torch.Tensor) -> None:
    """Copy a cache of any layout into the kernel's own.

    Args:
        into: ``[num_blocks, HK, 2 * block_size, D]``.

    Raises:
        ValueError: the kernel serves no pages of this size and dtype.
    """
    blocks, heads, size, dim = cache.key.shape
    dtype = cache.key.dtype
    if layout_for(dtype, size, dim) is None:
        raise ValueError(f"vLLM's CPU kernel serves no pages of {size} tokens with heads of size {dim} in {dtype}")
    isa = isa_for(dtype, size, dim)
    rows = (blocks * size, heads, dim)
    keys = unpack_keys(cache.key, cache.layout).transpose(1, 2).reshape(rows)
    values = unpack_values(cache.value, cache.layout).transpose(1, 2).reshape(rows)
    write_pages(keys, values, into, torch.arange(blocks * size), isa)


def attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Dense causal attention of several requests over pages, with new scheduler metadata.

    Args:
        query, out: ``[tokens, H, D]``.
        key_cache, value_cache: ``[num_blocks, HK, block_size, D]`` in the kernel's layout.
        block_table: int32 ``[requests, max_blocks]``.
        query_start_loc: int32 ``[requests + 1]``. seq_lens: int32 ``[requests]``.
    """
    isa = isa_for(query.dtype, key_cache.shape[2], key_cache.shape[3])
    ops = _ops()
    metadata = ops.cpu_attn_get_scheduler_metadata(  # type: ignore[attr-defined]
        num_reqs=seq_lens.shape[0],
        num_heads=query.shape[1],
        num_kv_heads=key_cache.shape[1],
        head_dim=query.shape[2],
        seq_lens=seq_lens,
        dtype=query.dtype,
        query_start_loc=query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=False,
    )
    ops.cpu_attention_with_kv_cache(  # type: ignore[attr-defined]
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=block_table,
        softcap=0.0,
        scheduler_metadata=metadata,
        s_aux=None,
    )
