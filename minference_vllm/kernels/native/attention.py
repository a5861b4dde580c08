"""Our own CPU kernels (``csrc/cpu``): bf16 and float32 on x86 processors from AVX2 on, with or without vLLM.

Their libraries, one for AVX512-BF16 and one for AVX2, are built by ``pip install`` where a compiler is there; without
them everything runs through vLLM's kernel. float32 is served by the one for AVX2, on newer processors too: the
instructions that the other one is for multiply bf16.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.gathered_columns import gather_columns
from minference_vllm.kernels.native import library as arguments
from minference_vllm.selection import low_rank
from minference_vllm.selection.build import SparseIndex
from minference_vllm.selection.probe_queries import row_groups
from minference_vllm.selection.projection import LEVELS_PER_BIT, Factors
from minference_vllm.selection.score_bins import whole_pages

_LAYOUTS = {"rows": 0, "transposed": 1, "amx": 2}
_ELEMENTS = {torch.bfloat16: 0, torch.float32: 1}

_SUPPORTED = {"avx512bf16": torch.cpu._is_avx512_bf16_supported, "avx2": torch.cpu._is_avx2_supported}
INSTRUCTIONS = {"avx512bf16": "AVX512-BF16", "avx2": "AVX2"}
"""Builds of the kernels (``setup.py``), best first, and the instructions that each needs."""


def load(build: str) -> ctypes.CDLL | None:
    """One of the libraries; None when the processor cannot run it, or when it was not built from this version."""
    if not _SUPPORTED[build]():
        return None
    for path in Path(__file__).parents[2].glob(f"_cpu_kernels_{build}.*so"):
        library = ctypes.CDLL(str(path))
        if getattr(library, "minference_interface", int)() != arguments.INTERFACE:
            continue
        for name, structure in arguments.FUNCTIONS.items():
            getattr(library, f"minference_{name}").argtypes = (ctypes.POINTER(structure),)
        return library
    return None


@functools.cache
def _best(dtype: torch.dtype) -> tuple[str, ctypes.CDLL] | None:
    builds = ["avx2"] if dtype == torch.float32 else INSTRUCTIONS
    return next(((build, library) for build in builds if (library := load(build))), None)


def _library(dtype: torch.dtype = torch.bfloat16) -> ctypes.CDLL:
    best = _best(dtype)
    assert best is not None, unavailable_reason(dtype)
    return best[1]


def instructions(dtype: torch.dtype = torch.bfloat16) -> str | None:
    """What the kernels for this type that run here are built for; None when none do."""
    best = _best(dtype)
    return INSTRUCTIONS[best[0]] if best else None


@functools.cache
def unavailable_reason(dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why the kernels cannot run on this machine, or None when they can."""
    if not any(supported() for supported in _SUPPORTED.values()):
        return "the processor has no AVX2"
    if _best(dtype) is None:
        return "csrc/cpu was not built from this version: install from source with a C++20 compiler"
    return None


def unsupported_reason(dtype: torch.dtype, block_size: int, head_size: int) -> str | None:
    """Why the kernels cannot serve caches of this shape, or None when they can."""
    if dtype not in _ELEMENTS:
        return f"{dtype} is neither bfloat16 nor float32"
    if unavailable_reason(dtype):
        return unavailable_reason(dtype)
    if block_size % 32:
        return f"page size {block_size} is not a multiple of 32"
    if head_size % 16 or head_size > 256:
        return f"head size {head_size} is not a multiple of 16 up to 256"
    return None


def unsupported_cache_reason(dtype: torch.dtype, cache: PagedCache) -> str | None:
    """Why the kernels cannot serve this cache, its device and strides included, or None when they can."""
    if cache.key.device.type != "cpu":
        return f"the cache is on {cache.key.device}"
    if cache.key.stride() != cache.value.stride() or cache.key.stride(3) != 1:
        return "keys and values differ in strides, or a head's elements do not lie side by side"
    if cache.layout == "amx" and dtype != torch.bfloat16:
        return f"pages in tiles of the AMX unit hold bfloat16, not {dtype}"
    return unsupported_reason(dtype, cache.block_size, cache.head_size)


def _describe(cache: PagedCache) -> arguments.Cache:
    return arguments.Cache(
        cache.key.data_ptr(),
        cache.value.data_ptr(),
        cache.key.stride(0),
        cache.key.stride(1),
        cache.key.stride(2),
        cache.block_size,
        cache.head_size,
        cache.num_kv_heads,
        _LAYOUTS[cache.layout],
        _ELEMENTS[cache.key.dtype],
    )


def run(
    query: torch.Tensor,
    cache: PagedCache,
    pages: torch.Tensor,
    index: SparseIndex,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Attention of one chunk under ``index``, written to ``out``.

    Args:
        query, out: ``[chunk, H, D]``, in the cache's type, elements of a head side by side.
        cache: any layout, see ``unsupported_cache_reason``.
        pages: int64 ``[N]``, physical page of each logical block.
        lse: float32 ``[H, chunk]``, contiguous; receives the log-sum-exp of each row's scores.
    """
    columns = gather_columns(index, cache, pages)
    call = arguments.AttendArguments(
        _describe(cache),
        query.data_ptr(),
        out.data_ptr(),
        lse.data_ptr() if lse is not None else None,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        pages.data_ptr(),
        index.tile_starts.data_ptr(),
        index.blocks.data_ptr(),
        index.num_blocks.data_ptr(),
        index.columns.data_ptr(),
        index.num_columns.data_ptr(),
        columns.keys.data_ptr(),
        columns.values.data_ptr(),
        columns.row_of.data_ptr(),
        index.seq_len,
        index.num_heads,
        index.num_tiles,
        index.blocks.shape[2],
        index.columns.shape[2],
        scale,
        torch.get_num_threads(),
    )
    _library(cache.key.dtype).minference_attend(ctypes.byref(call))


def _rows_of(
    query: torch.Tensor,
    cache: PagedCache,
    pages: torch.Tensor,
    seq_len: int,
    rows: torch.Tensor,
    heads: torch.Tensor,
    scale: float,
) -> arguments.RowArguments:
    """``heads`` is int32, ascending, and ``rows`` int64; both must live as long as this is used."""
    return arguments.RowArguments(
        _describe(cache),
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        pages.data_ptr(),
        rows.data_ptr(),
        heads.data_ptr(),
        seq_len - query.shape[0],
        seq_len,
        query.shape[1],
        len(heads),
        len(rows),
        scale,
        torch.get_num_threads(),
    )


def row_weights(
    query: torch.Tensor,
    cache: PagedCache,
    pages: torch.Tensor,
    seq_len: int,
    rows: torch.Tensor,
    heads: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """``low_rank.row_weights`` straight from the pages.

    Args:
        query: ``[chunk, H, D]``, in the cache's type.
        rows: int64 ``[R]``, ascending, at most 64.
        heads: query heads wanted, ascending.

    Returns:
        float32 ``[len(heads), R, S]``.
    """
    assert len(rows) <= 64
    wanted = torch.tensor(list(heads), dtype=torch.int32)
    weights = torch.empty(len(wanted), len(rows), seq_len)
    of = _rows_of(query, cache, pages, seq_len, rows, wanted, scale)
    _library(cache.key.dtype).minference_row_weights(ctypes.byref(arguments.WeightArguments(of, weights.data_ptr())))
    return weights


def last_query_scores(
    query: torch.Tensor, cache: PagedCache, pages: torch.Tensor, seq_len: int, heads: Sequence[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``estimate.last_query_scores`` straight from the pages.

    Args:
        query: ``[chunk, H, D]``, in the cache's type.
        heads: query heads wanted, ascending.

    Returns:
        float32 ``[len(heads), S]`` twice: columns and diagonals.
    """
    groups = row_groups(query.shape[0])
    rows = torch.cat([torch.arange(begin, end) for begin, end in groups])
    starts = torch.tensor([0, *itertools.accumulate(end - begin for begin, end in groups)], dtype=torch.int32)
    wanted = torch.tensor(list(heads), dtype=torch.int32)
    columns = torch.empty(len(heads), seq_len)
    diagonals = torch.empty(len(heads), seq_len)
    of = _rows_of(query, cache, pages, seq_len, rows, wanted, scale)
    call = arguments.EstimateArguments(of, starts.data_ptr(), columns.data_ptr(), diagonals.data_ptr(), len(groups))
    _library(cache.key.dtype).minference_last_query_scores(ctypes.byref(call))
    return columns, diagonals


def low_rank_kernels() -> low_rank.Kernels:
    """Ours, where they can run; else torch."""
    return low_rank.Kernels() if unavailable_reason() else _KERNELS


def _describe_factors(factors: Factors) -> arguments.FactorArguments:
    """They must live as long as this is used."""
    heads, length, rank = factors.keys.shape
    assert rank % 16 == 0 and all(part.is_contiguous() for part in factors)
    return arguments.FactorArguments(
        *(part.data_ptr() for part in factors),
        factors.query.shape[1],
        length,
        heads,
        rank,
        LEVELS_PER_BIT,
        torch.get_num_threads(),
    )


def tile_levels(factors: Factors, tiling: Tiling, lowest: torch.Tensor) -> torch.Tensor:
    """``levels.tile_levels``; the rank is a multiple of 16 up to 256."""
    heads, length, _ = factors.keys.shape
    levels = torch.empty(heads, tiling.num_tiles, length, dtype=torch.uint8)
    call = arguments.LevelArguments(
        _describe_factors(factors),
        lowest.data_ptr(),
        levels.data_ptr(),
        tiling.starts.data_ptr(),
        tiling.num_tiles,
        tiling.tile,
    )
    _library().minference_tile_levels(ctypes.byref(call))
    return levels


def row_mass(factors: Factors, rows: torch.Tensor, tiling: Tiling, weights: torch.Tensor) -> torch.Tensor:
    """``levels.row_mass``; the rank is a multiple of 16 up to 256."""
    mass = torch.empty(*weights.shape[:2], 256)
    call = arguments.RowMassArguments(
        _describe_factors(factors), rows.data_ptr(), weights.data_ptr(), mass.data_ptr(), len(rows), tiling.tile
    )
    _library().minference_row_mass(ctypes.byref(call))
    return mass


def mass_by_level(levels: torch.Tensor, lists: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``levels.mass_by_level``."""
    levels, lists, weights = (part.contiguous() for part in (levels, lists, weights))
    heads, rows, length = weights.shape
    mass = torch.empty(heads, rows, 256)
    call = arguments.MassArguments(
        levels.data_ptr(),
        lists.data_ptr(),
        weights.data_ptr(),
        mass.data_ptr(),
        length,
        heads,
        rows,
        levels.shape[1],
        torch.get_num_threads(),
    )
    _library().minference_mass_by_level(ctypes.byref(call))
    return mass


def _call_keys(
    function: str,
    levels: torch.Tensor,
    threshold: torch.Tensor,
    block_size: int,
    counts: torch.Tensor,
    outside: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> None:
    heads, tiles, length = levels.shape
    call = arguments.KeyArguments(
        levels.data_ptr(),
        threshold.data_ptr(),
        counts.data_ptr(),
        None if outside is None else outside.data_ptr(),
        None if columns is None else columns.data_ptr(),
        length,
        heads,
        tiles,
        block_size,
        0 if columns is None else columns.shape[2],
        torch.get_num_threads(),
    )
    getattr(_library(), f"minference_{function}")(ctypes.byref(call))


def page_counts(levels: torch.Tensor, threshold: torch.Tensor, block_size: int) -> torch.Tensor:
    """``levels.page_counts``."""
    heads, tiles, length = levels.shape
    counts = torch.empty(heads, tiles, -(-length // block_size), dtype=torch.int32)
    _call_keys("page_counts", levels, threshold, block_size, counts)
    return counts


def lists(
    tiling: Tiling, levels: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``levels.keys_at_levels`` and ``lists.single_keys`` in one.

    Returns:
        blocks (bool ``[h, T, N]``), columns (int32 ``[h, T, C]``, -1 padded), their number (int32 ``[h, T]``).
    """
    counts = page_counts(levels, threshold, tiling.block_size)
    blocks, dense = whole_pages(tiling, counts, threshold)
    outside = ~(blocks | dense[:, None, None])
    num_columns = (counts * outside).sum(2, dtype=torch.int32)
    columns = torch.empty(*num_columns.shape, max(1, int(num_columns.max())), dtype=torch.int32)
    _call_keys("columns_at_levels", levels, threshold, tiling.block_size, counts, outside, columns)
    return blocks, columns, num_columns


_KERNELS = low_rank.Kernels(tile_levels, row_mass, mass_by_level, page_counts, lists)
