"""Choose the kernel of a layer: the setting ``kernel``, or for ``auto`` the fastest that supports its cache."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.kernels.block_table import cpu, flash
from minference_vllm.kernels.fa4 import limits as fa4
from minference_vllm.kernels.kernel import Kernel
from minference_vllm.kernels.native import attention as native
from minference_vllm.kernels.native import library
from minference_vllm.kernels.native import remainder as native_remainder
from minference_vllm.kernels.native.scores import NativeScores
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection.torch_scores import TorchScores

KERNELS = ("auto", "block_table", "fa4", "native", "triton")
GPU_KERNELS = ("triton", "block_table", "fa4")
"""Kernels for GPUs. Without timings ``auto`` is the first that supports the cache."""
VLLMS = ("block_table", "fa4")
"""Kernels that are vLLM's own, at least in part. They support no soft caps, sinks, windows or FP8 caches."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TRITON_HEAD_SIZE = 256
NO_LSE = "the remainder needs every row's log-sum-exp, which vLLM's CPU kernel does not give and kernel 'native' does"


def choose(name: str, dtype: torch.dtype, cache: PagedCache, with_lse: bool = False, own: bool = False) -> Kernel:
    """The named kernel, or for ``auto`` the fastest that supports this cache (on GPUs the first of ``candidates``).

    For pages in AMX layout, vLLM's own kernel is faster than our kernels built without AMX. ``triton`` runs on GPUs
    and, for tests, in Triton's interpreter on CPUs. ``fa4`` runs on GPUs only.

    Args:
        name: one of ``KERNELS``.
        dtype: of the queries.
        cache: the layer's cache, or one with the same types, sizes, layout and device.
        with_lse: whether the kernel must return the log-sum-exp of every row, for the remainder.
        own: whether it must be one of our kernels, for features that ``block_table`` lacks (``own_kernel_reason``).

    Raises:
        ValueError: the kernel cannot run; the message says why.
    """
    if cache.key.is_cuda or name in ("triton", "fa4"):
        return _on_gpu(name, dtype, cache, own)[0]
    reason = library.unsupported_cache_reason(dtype, cache)
    if name == "auto":
        slower = cache.layout == "amx" and library.instructions(dtype) != "AMX" and not (with_lse or own)
        name = "block_table" if reason or slower else "native"
    if name == "native":
        if reason:
            raise ValueError(f"kernel 'native' cannot run: {reason}")
        return NATIVE
    if with_lse:
        raise ValueError(f"kernel 'block_table' cannot run: {no_lse_reason(reason)}")
    if own:
        raise ValueError(
            f"kernel 'block_table' cannot run: it knows no soft caps, sinks and windows; {reason or 'native does'}"
        )
    if library.unavailable_reason():
        return BLOCK_TABLE_ALONE
    return BLOCK_TABLE_WITH_NATIVE_PRODUCTS if reason else BLOCK_TABLE


def choose_for(
    patterns: Sequence[HeadPattern], name: str, dtype: torch.dtype, cache: PagedCache, own: bool = False
) -> tuple[Kernel, tuple[HeadPattern, ...], str | None]:
    """``choose`` for the patterns of some heads, and these patterns without what the kernel does not support.

    Returns:
        The kernel; the patterns, without sampling and without the remainder if the kernel does not support them; and
        the reason why it does not support the remainder, or None.

    Raises:
        ValueError: as ``choose``.
    """
    with_lse = any(pattern.has_remainder for pattern in patterns)
    try:
        kernel = choose(name, dtype, cache, with_lse, own)
        return kernel, tuple(kernel.served(patterns)), None
    except ValueError as error:
        if not with_lse:
            raise
        kernel, why = choose(name, dtype, cache, own=own), str(error)
    return kernel, tuple(pattern.without_remainder() for pattern in patterns), why


def own_kernel_reason(name: str, dtype: torch.dtype, head_size: int, block_size: int | None = None) -> str | None:
    """Why none of our own kernels can serve a layer on CPUs, or None when one can.

    Args:
        name: the setting ``kernel``.
        block_size: tokens per page; None: not known yet.
    """
    if name in VLLMS:
        return f"kernel {name!r} knows none"
    reason = library.unsupported_reason(dtype, head_size)
    if reason is None and block_size is not None:
        reason = library.unsupported_page_reason(block_size)
    return reason and f"kernel 'native' cannot run: {reason}"


def candidates(name: str, dtype: torch.dtype, cache: PagedCache, own: bool = False) -> list[Kernel]:
    """The kernels to time: on a GPU, for ``auto``, all that support this cache; otherwise the result of ``choose``.
    Arguments and errors as for ``choose``."""
    if name == "auto" and cache.key.is_cuda:
        return _on_gpu(name, dtype, cache, own)
    return [choose(name, dtype, cache, own=own)]


def _on_gpu(name: str, dtype: torch.dtype, cache: PagedCache, own: bool) -> list[Kernel]:
    """The named kernel, or for ``auto`` all that support the cache, in the order of ``GPU_KERNELS``."""
    if name == "native":
        raise ValueError(f"kernel 'native' cannot run: it runs on CPUs; tensors on {cache.key.device} need 'triton'")
    names = [name] if name != "auto" else ["triton"] if own else list(GPU_KERNELS)
    reasons = {name: _gpu_reason(name, dtype, cache) for name in names}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        raise ValueError("; ".join(f"kernel {name!r} cannot run: {reason}" for name, reason in reasons.items()))
    made = {"triton": _triton, "block_table": _block_table_on_gpu, "fa4": _fa4}
    return [made[name]() for name in able]


def _gpu_reason(name: str, dtype: torch.dtype, cache: PagedCache) -> str | None:
    """Why a kernel of ``GPU_KERNELS`` cannot serve this cache, or None when it can."""
    if name == "fa4":
        return fa4.unsupported_reason(dtype, cache)
    return flash.unsupported_cache_reason(dtype, cache) if name == "block_table" else triton_reason(cache)


def description(kernel: Kernel, wanted: str, dtype: torch.dtype, cache: PagedCache) -> str:
    """Description of a kernel for the log.

    Args:
        kernel: result of ``choose`` for the other arguments.
        wanted: the setting; for ``auto`` the description says why it is not our own kernel.
    """
    if kernel.name == "native":
        return f"our {library.instructions(dtype)} kernels (kernel 'native')"
    if kernel.name == "triton":
        return "our Triton kernels (kernel 'triton')"
    if kernel.name == "fa4":
        return "vLLM's FlashAttention 4, block-sparse, and our Triton kernels (kernel 'fa4')"
    if cache.key.is_cuda:
        return "vLLM's FlashAttention kernel (kernel 'block_table')"
    if wanted != "auto":
        return "vLLM's CPU kernel (kernel 'block_table')"
    reason = library.unsupported_cache_reason(dtype, cache) or "the faster one with AMX, for which ours were not built"
    return f"vLLM's CPU kernel (kernel 'block_table': {reason})"


def no_lse_reason(native_reason: str | None) -> str:
    """Why vLLM's CPU kernel cannot serve layers that need the log-sum-exp, and why ``native`` cannot, if so."""
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


NATIVE = Kernel(
    "native",
    native.run,
    NativeScores,
    run_with_remainder=native.run,
    remainder=native_remainder.of_heads,
    samples=True,
    softcap=True,
    sinks=True,
    window=True,
)
BLOCK_TABLE = Kernel("block_table", cpu.run, NativeScores, whole_pages=True, gives_lse=False)
BLOCK_TABLE_WITH_NATIVE_PRODUCTS = Kernel(
    "block_table", cpu.run, functools.partial(NativeScores, from_pages=False), whole_pages=True, gives_lse=False
)
"""For caches that our kernels cannot read. They still compute the products of quantized keys."""
BLOCK_TABLE_ALONE = Kernel("block_table", cpu.run, TorchScores, whole_pages=True, gives_lse=False)


# Imported on first use: it takes a second, and CPU installations may have no triton.
@functools.cache
def _triton() -> Kernel:
    from minference_vllm.triton_kernels import attention, remainder
    from minference_vllm.triton_kernels.scores import TritonScores

    return Kernel(
        "triton",
        attention.run,
        TritonScores,
        planned=True,
        run_with_remainder=attention.run,
        remainder=remainder.of_heads,
        samples=True,
        softcap=True,
        sinks=True,
        fp8=True,
    )


@functools.cache
def _block_table_on_gpu() -> Kernel:
    from minference_vllm.triton_kernels import remainder
    from minference_vllm.triton_kernels.scores import TritonScores

    return Kernel(
        "block_table", flash.run, TritonScores, planned=True, lists_everything=True, remainder=remainder.of_heads
    )


@functools.cache
def _fa4() -> Kernel:
    from minference_vllm.kernels.fa4 import attention
    from minference_vllm.triton_kernels import remainder
    from minference_vllm.triton_kernels.scores import TritonScores

    return Kernel(
        "fa4",
        attention.run,
        TritonScores,
        planned=True,
        lists_everything=True,
        run_with_remainder=attention.run,
        remainder=remainder.of_heads,
        samples=True,
    )
