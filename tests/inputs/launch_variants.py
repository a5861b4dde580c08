"""``Variants``: kernel variants that Triton would compile on a GPU, recorded at their launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minference_vllm.triton_kernels import (
    antidiagonal,
    attention,
    calibration,
    chunk_queries,
    column_diagonal,
    fit,
    key_codes,
    key_lists,
    low_rank,
    page_means,
    physical_lists,
    remainder,
    representatives,
    thresholds,
)
from minference_vllm.triton_kernels.launch import launcher

MODULES: tuple[Any, ...] = (
    antidiagonal, attention, calibration, chunk_queries, column_diagonal, fit, key_codes, key_lists, low_rank,
    page_means, physical_lists, remainder, representatives, thresholds,
)  # fmt: skip
LENGTHS = (
    "num_tiles", "num_blocks", "num_rows", "num_lists", "max_blocks", "max_columns", "rows", "context_len",
    "seq_len", "first_kv_head", "num_items", "num_pages", "num_parts", "max_singles", "page_units", "slot_units",
    "num_queries", "window", "chunk", "query_step", "key_step", "num_alone", "num_drawn", "num_unlike", "num_sampled",
    "num_last", "most", "num_samples", "step", "own_from",
)  # fmt: skip
"""Arguments that kernels are not specialised on."""


class Variants:
    """Context manager that records launches and runs them. The attention kernel may be skipped: no later launch depends
    on its result."""

    def __init__(self, run_attention: bool = True) -> None:
        self.found: list[Any] = []
        """``[kernel's name, kinds of its arguments, its constants]``, each once."""
        self._run_attention = run_attention

    def __enter__(self) -> Variants:
        self._launchers = [module.launcher for module in MODULES]
        for module in MODULES:
            module.launcher = self._recording
        return self

    def __exit__(self, *error: Any) -> None:
        for module, before in zip(MODULES, self._launchers, strict=True):
            module.launcher = before

    def _recording(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **constants: Any) -> None:
            free = [kernel.arg_names.index(name) for name in LENGTHS if name in kernel.arg_names]
            kinds = [_kind(value) for place, value in enumerate(arguments) if place not in free]
            variant = [kernel.__name__, kinds, {name: str(value) for name, value in constants.items()}]
            if variant not in self.found:
                self.found.append(variant)
            if self._run_attention or kernel is not attention.sparse_attention_kernel:
                launcher(kernel, grid)(*arguments, **constants)

        return run


def _kind(value: Any) -> Any:
    """What Triton specialises on for an argument that is not excluded from specialisation."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.data_ptr() % 16 == 0]
    return [type(value).__name__, isinstance(value, int) and value % 16 == 0]
