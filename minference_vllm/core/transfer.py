"""``to_device``: small tensors from the host to a GPU, without waiting for it."""

from __future__ import annotations

import torch


def to_device(host: torch.Tensor, device: torch.device, is_cuda: bool) -> torch.Tensor:
    """A copy on the device. From ordinary memory the host would wait until the GPU has taken it; from pinned memory it
    goes on, and PyTorch keeps that memory until the copy is done.

    Args:
        host: on the CPU.
        is_cuda: whether tensors on the device are on a GPU.
    """
    return (host.pin_memory() if is_cuda else host).to(device, non_blocking=True)
