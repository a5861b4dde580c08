"""The libraries built from ``csrc/cpu``: which of them runs on this machine, and what it supports.

There are three builds, for AMX, AVX512-BF16 and AVX2. ``pip install`` compiles them if there is a compiler; without
them everything runs on vLLM's kernel. float32 and float16 use the AVX2 build on newer processors, too, since the
instructions of the other builds multiply bf16 only.

Head sizes are multiples of 16, the width of a register tile, up to 256: larger heads do not fit the buffers that a
thread keeps in its core's caches. Of the sizes that vLLM's own CPU kernel supports, only 512 is missing.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.kernels.native import interface

logger = logging.getLogger("vllm.minference_vllm")

ELEMENTS = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}
LAYOUTS = {"rows": 0, "transposed": 1, "amx": 2}
PAGE_MULTIPLE = 32
MAX_HEAD_SIZE = 256


def _has_avx512_bf16() -> bool:
    # Processors with AVX512-BF16 have VNNI, but a virtual machine may hide it.
    return torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()


def _has_amx() -> bool:
    # Linux lets a process use AMX only after it has requested it.
    return _has_avx512_bf16() and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


_SUPPORTED = {
    "amx": _has_amx,
    "avx512bf16": _has_avx512_bf16,
    "avx2": torch.cpu._is_avx2_supported,
}
INSTRUCTIONS = {"amx": "AMX", "avx512bf16": "AVX512-BF16", "avx2": "AVX2"}
"""Builds of the kernels (``setup.py``), best first, and the instructions that each needs."""


@functools.cache
def _open(build: str) -> ctypes.CDLL | str:
    """The library of a build, or why it cannot be used here."""
    if not _SUPPORTED[build]():
        return f"the processor has no {INSTRUCTIONS[build]}"
    refused = ""
    for path in Path(__file__).parents[2].glob(f"_cpu_kernels_{build}.*so"):
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            refused = f"{path.name} cannot be loaded: {error}"
            continue
        difference = interface.difference(library)
        if difference is None:
            for name, structure in interface.FUNCTIONS.items():
                getattr(library, f"minference_{name}").argtypes = (ctypes.POINTER(structure),)
            return library
        refused = f"{path.name} was built from other sources ({difference}): build the package again with pip install"
    if refused:
        logger.warning("The %s kernels are not used: %s.", INSTRUCTIONS[build], refused)
    return refused or "csrc/cpu was not built: install from source with a C++20 compiler"


def load(build: str) -> ctypes.CDLL | None:
    """The library of a build; None if the processor cannot run it, or if it was not built from these sources."""
    library = _open(build)
    return None if isinstance(library, str) else library


@functools.cache
def _best(dtype: torch.dtype) -> tuple[str, ctypes.CDLL] | None:
    builds = INSTRUCTIONS if dtype == torch.bfloat16 else ["avx2"]
    return next(((build, library) for build in builds if (library := load(build))), None)


def library(dtype: torch.dtype = torch.bfloat16) -> ctypes.CDLL:
    """The library for this type. Requires that ``unavailable_reason`` is None."""
    best = _best(dtype)
    assert best is not None, unavailable_reason(dtype)
    return best[1]


def instructions(dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Instruction set of the kernels for this type on this machine; None if there are none."""
    best = _best(dtype)
    return INSTRUCTIONS[best[0]] if best else None


@functools.cache
def unavailable_reason(dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why the kernels cannot run on this machine, or None when they can."""
    # The AVX2 build serves every type on every processor that has kernels at all.
    return None if _best(dtype) else str(_open("avx2"))


def unsupported_reason(dtype: torch.dtype, head_size: int) -> str | None:
    """Why the kernels cannot serve heads of this size and type, or None when they can."""
    if dtype not in ELEMENTS:
        return f"{dtype} is neither bfloat16, float16 nor float32"
    if unavailable_reason(dtype):
        return unavailable_reason(dtype)
    if head_size % 16 or head_size > MAX_HEAD_SIZE:
        return f"head size {head_size} is not a multiple of 16 up to {MAX_HEAD_SIZE}"
    return None


def unsupported_page_reason(block_size: int) -> str | None:
    """Why the kernels cannot serve pages of this size, or None when they can."""
    if block_size % PAGE_MULTIPLE:
        return f"page size {block_size} is not a multiple of {PAGE_MULTIPLE}"
    return None


def unsupported_cache_reason(dtype: torch.dtype, cache: PagedCache) -> str | None:
    """Why the kernels cannot serve this cache, its device and strides included, or None when they can."""
    if cache.key.device.type != "cpu":
        return f"the cache is on {cache.key.device}"
    if cache.key.stride() != cache.value.stride() or cache.key.stride(3) != 1:
        return "keys and values differ in strides, or a head's elements do not lie side by side"
    if cache.layout == "amx" and dtype != torch.bfloat16:
        return f"pages in tiles of the AMX unit hold bfloat16, not {dtype}"
    return unsupported_page_reason(cache.block_size) or unsupported_reason(dtype, cache.head_size)


def describe_cache(cache: PagedCache) -> interface.Cache:
    """The cache as an argument of the kernels."""
    return interface.Cache(
        cache.key.data_ptr(),
        cache.value.data_ptr(),
        cache.key.stride(0),
        cache.key.stride(1),
        cache.key.stride(2),
        cache.block_size,
        cache.head_size,
        cache.num_kv_heads,
        LAYOUTS[cache.layout],
        ELEMENTS[cache.key.dtype],
    )
