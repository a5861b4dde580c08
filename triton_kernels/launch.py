"""How kernels are started: an error on the way says which variant it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """``kernel[grid]``, to be called with the kernel's arguments.

    Raises (the returned function):
        RuntimeError: the kernel could not be compiled or started; names kernel, grid, constants and tensors.
    """

    def run(*arguments: Any, **constants: Any) -> None:
        try:
            kernel[grid](*arguments, **constants)
        except Exception as error:
            # Triton's own messages say what was too much, and not for whom.
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
