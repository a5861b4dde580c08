"""``DeviceAccount``: count kernels, copies and host synchronisations without a GPU.

Tensors on PyTorch's ``meta`` device stand for those on the GPU: they report that they are on CUDA, and every operation
on them is intercepted. Launches of Triton kernels are counted, and not run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from live_bytes import run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATES = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal"}
"""Operations whose result, or result size, is read by the host."""


class DeviceAccount(TorchDispatchMode):
    """Context manager that counts everything; ``monkeypatch`` undoes what is replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        """Operations that start a kernel; views and allocations start none."""
        self.launches: Counter[str] = Counter()
        """Launches of our Triton kernels."""
        self.waits: Counter[str] = Counter()
        """Operations that read from the GPU."""
        self.pageable: Counter[str] = Counter()
        """Copies to the GPU from pageable memory; each is a host synchronisation."""
        self.pinned = 0
        """Copies to the GPU without a host synchronisation."""
        self._pinned: list[torch.Tensor] = []
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
        monkeypatch.setattr(torch, "tensor", self._copied(torch.tensor))
        monkeypatch.setattr(torch, "as_tensor", self._copied(torch.as_tensor))
        monkeypatch.setattr(torch.Tensor, "__getitem__", self._indexed(torch.Tensor.__getitem__))
        monkeypatch.setattr(torch.Tensor, "__setitem__", self._indexed(torch.Tensor.__setitem__))
        from launch_variants import MODULES

        for module in MODULES:
            monkeypatch.setattr(module, "launcher", self._launched)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.append(tensor.clone())
        return self._pinned[-1]

    def _copied(self, make: Any) -> Any:
        def made(data: Any, *arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
            to_gpu = device is not None and torch.device(device).type == "meta"
            if to_gpu and not (isinstance(data, torch.Tensor) and data.is_meta):
                self.pageable[make.__name__] += 1
            result = make(data, *arguments, device=device, **options)
            assert isinstance(result, torch.Tensor)
            return result

        return made

    def _indexed(self, access: Any) -> Any:
        def accessed(tensor: torch.Tensor, places: Any, *value: Any) -> Any:
            parts = places if isinstance(places, tuple) else (places,)
            if tensor.is_meta and any(isinstance(part, list) for part in parts):
                self.pageable["index"] += 1
            return access(tensor, places, *value)

        return accessed

    def _launched(self, kernel: Any, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.launches[kernel.__name__] += 1

        return launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        on_gpu = [tensor.is_meta for tensor in given]
        target = kwargs.get("device")
        to_host = target is not None and torch.device(target).type == "cpu"
        # It reads the length of its result from the GPU, unless given.
        of_unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        if any(on_gpu) and (name in WAITS or to_host or of_unknown_size):
            self.waits[name] += 1
            if name == "_local_scalar_dense":
                return 1
            if name == "_to_copy":
                return torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype, device="cpu")
        to_gpu = target is not None and torch.device(target).type == "meta"
        copied = name == "_to_copy" and to_gpu and not any(on_gpu)
        if copied:
            self._count_copy(name, given[0], bool(kwargs.get("non_blocking")))
        if name == "copy_" and on_gpu[:2] == [True, False]:
            self._count_copy(name, given[1], len(args) > 2 and bool(args[2]))
        if name.startswith("index") and any(on_gpu):
            # Indices on the host are copied to the GPU first.
            for tensor in given:
                if not tensor.is_meta and tensor.dim():
                    self._count_copy(name, tensor, False)
        result = run(func, args, kwargs)
        returned = [part for part in tree_leaves(result) if isinstance(part, torch.Tensor) and part.is_meta]
        # A view's result aliases what was given, and nothing is written.
        is_view = not func._schema.is_mutable and any(value.alias_info for value in func._schema.returns)
        if (any(on_gpu) or returned) and not is_view and name not in ALLOCATES and not copied:
            self.ops[name] += 1
        return result

    def _count_copy(self, name: str, source: torch.Tensor, non_blocking: bool) -> None:
        pinned = [tensor.untyped_storage()._cdata for tensor in self._pinned]
        if non_blocking and source.untyped_storage()._cdata in pinned:
            self.pinned += 1
        else:
            self.pageable[name] += 1
