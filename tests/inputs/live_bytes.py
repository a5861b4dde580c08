"""``LiveBytes``: peak memory of tensors, also counted on the meta device."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KNOWN: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
"""Cached shape, strides and dtype of results on the meta device, by operation and arguments."""


def question(part: Any) -> Any:
    """The properties of an argument that determine an operation's result on the meta device."""
    if isinstance(part, torch.Tensor):
        return part.shape, part.stride(), part.dtype, part.device
    return tuple(map(question, part)) if isinstance(part, list | tuple) else (type(part), part)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Call ``func``. On the meta device nearly all of its time is spent on the result's shape, which is cached."""
    if func._schema.is_mutable or len(func._schema.returns) != 1 or func._schema.returns[0].alias_info:
        return func(*args, **kwargs)
    key = func, question(args), question(list(kwargs.items()))
    if key in KNOWN:
        shape, strides, dtype = KNOWN[key]
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    result = func(*args, **kwargs)
    given = [part.untyped_storage()._cdata for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
    if isinstance(result, torch.Tensor) and result.is_meta and result.untyped_storage()._cdata not in given:
        KNOWN[key] = result.shape, result.stride(), result.dtype
    return result


class LiveBytes(TorchDispatchMode):
    """The peak number of bytes held by live tensors."""

    def __init__(self, *given: torch.Tensor) -> None:
        """``given``: tensors that do not count."""
        super().__init__()
        self.references = Counter(tensor.untyped_storage()._cdata for tensor in given)
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = run(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if not self.references[storage._cdata]:
                    self.live += storage.nbytes()
                self.references[storage._cdata] += 1
                weakref.finalize(tensor, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def release(self, storage: int, size: int) -> None:
        self.references[storage] -= 1
        if not self.references[storage]:
            self.live -= size
