"""Run a script on the CPU as if it had an NVIDIA GPU, to rehearse the commands of ``gpu_check.py``.

GPU tensors are CPU tensors that claim to be on a GPU; Triton kernels run in Triton's interpreter; vLLM's FlashAttention
is replaced by a torch implementation; events use the host's clock. Everything else is the script's own. The printed
figures are meaningless.

    export PYTHONPATH=tests/inputs:benchmarks
    python tools/rehearsal.py benchmarks/bench_attention.py --device cuda ...
    python tools/rehearsal.py -m pytest -m gpu ...
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

# Before triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.overrides import TorchFunctionMode

NAME, CAPABILITY = "no GPU (a rehearsal)", (9, 0)


def is_gpu(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).split(":")[0] == "cuda"


class OnCPU(TorchFunctionMode):
    """Redirects calls with a GPU device to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: "cpu" if is_gpu(value) else value for name, value in (kwargs or {}).items()}
        return func(*("cpu" if is_gpu(value) else value for value in args), **kwargs)


class Generator(torch.Generator):
    """A CPU generator, also for a GPU device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, device="cpu" if is_gpu(device) else device)


class Event:
    """Replaces ``torch.cuda.Event``; on the CPU all earlier work has finished."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1000 * (end.at - self.at)


def pretend() -> None:
    """Patch torch, Triton and vLLM in this process."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.get_device_name = lambda *device: NAME
    cuda.get_device_capability = lambda *device: CAPABILITY
    cuda.get_device_properties = lambda *device: SimpleNamespace(name=NAME, total_memory=80 << 30)
    cuda.synchronize = cuda.empty_cache = cuda.reset_peak_memory_stats = cuda.set_sync_debug_mode = lambda *given: None
    cuda.max_memory_allocated = cuda.memory_allocated = lambda *device: 0
    cuda.Event = Event
    torch.Generator = Generator  # type: ignore[misc]
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: True)
    tensor.pin_memory = lambda self: self
    set_default_device: Any = torch.set_default_device
    torch.set_default_device = lambda device: set_default_device("cpu" if is_gpu(device) else device)
    OnCPU().__enter__()
    importlib.import_module("triton_interpreter")
    # Only now, since vLLM must detect the CPU as its platform first.
    backend: Any = importlib.import_module("vllm.v1.attention.backends.fa_utils")
    faked: Any = importlib.import_module("faked_cuda")
    backend.flash_attn_varlen_func = faked.flash_attention
    backend.get_flash_attn_version = lambda *arguments, **options: 3
    sys.modules["vllm.vllm_flash_attn"] = ModuleType("vllm.vllm_flash_attn")  # tests check whether it exists


def main() -> None:
    pretend()
    if sys.argv[1] == "-m":
        sys.argv[:] = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
