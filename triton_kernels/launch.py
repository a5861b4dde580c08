"""Kernel launches: attention's launch shapes, and errors that name the variant that failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """``kernel[grid]``, to be called with the kernel's arguments.

    Raises (the returned function):
        RuntimeError: the kernel could not be compiled or started; names kernel, grid, constants and tensors.
    """

    def run(*arguments: Any, **constants: Any) -> None:
        try:
            # Triton 3.10 does not fuse multiplications and additions unless it is asked to.
            kernel[grid](*arguments, **constants, enable_fp_fusion=True)
        except Exception as error:
            # Triton's own messages say which limit was exceeded, but not by which variant.
            shape = ", ".join(f"{name}={value}" for name, value in constants.items())
            tensors = ", ".join(
                f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
                for value in arguments
                if isinstance(value, torch.Tensor)
            )
            raise RuntimeError(
                f"Triton kernel {kernel.__name__} cannot run on grid {grid} with {shape} on {tensors}: "
                f"{type(error).__name__}: {error}"
            ) from error

    return run


def major_capability(tensor: torch.Tensor) -> int:
    """Major compute capability of the tensor's device; Hopper's in the interpreter."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9


@dataclass(frozen=True)
class LaunchShape:
    """How one variant is launched; found with ``tools/kernel_account.py``, not yet timed on a GPU."""

    block_m: int
    """Packed rows per program."""
    block_n: int
    """Keys of whole pages, and single keys, per step."""
    block_own: int
    """Keys of the tile's own pages per step."""
    stages: int
    """Steps whose keys and values are in flight at once, as far as Triton can (see the account)."""
    num_warps: int = 8


def launch_shape(major: int, head_size: int, compute_size: int, cache_size: int) -> LaunchShape:
    """The fastest shape by the account that spills no registers and fits into shared memory.

    Args:
        major: compute capability.
        compute_size: bytes of an element that is multiplied.
        cache_size: bytes of an element of the cache.
    """
    if compute_size == 4:
        return LaunchShape(block_m=64, block_n=32, block_own=32, stages=2)
    if major not in (9, 10):
        # 99 KiB of shared memory, except for compute capability 8.0.
        return LaunchShape(64, 32, 32, 2) if head_size > 128 else LaunchShape(128, 64, 32, 3)
    if head_size > 128:
        return LaunchShape(128, 32, 32, 4)
    if head_size > 64 and (major == 10 or cache_size < compute_size):
        return LaunchShape(128, 64, 64, 5)
    return LaunchShape(128, 128, 64, 3 if head_size > 64 else 4)
