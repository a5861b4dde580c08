"""``to_device``: copy small tensors from the host to a GPU without a host synchronisation."""

from __future__ import annotations

import torch


def to_device(host: torch.Tensor, device: torch.device, is_cuda: bool) -> torch.Tensor:
    """Copy a tensor to the device. A copy from pageable memory would synchronise with the GPU; one from pinned memory
    does not, and PyTorch keeps that memory until the copy is done.

    Args:
        host: on the CPU.
        is_cuda: whether tensors on the device are on a GPU.
    """
    return (host.pin_memory() if is_cuda else host).to(device, non_blocking=True)
