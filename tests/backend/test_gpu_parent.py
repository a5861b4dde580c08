"""Which of vLLM's backends ours extends on a GPU, and how its caches are viewed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_layer import LAYOUTS, Layer, Parent


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_cache_is_viewed_as_pages(layout: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    from minference_vllm.backend.compat import gpu_pages

    key, value = (torch.randn(5, 32, 3, 16).to(dtype) for _ in range(2))
    memory = layout(key.view(torch.int8), value.view(torch.int8)) if dtype.itemsize == 1 else layout(key, value)
    views = gpu_pages(memory, 16)
    for view, rows in zip(views, (key, value), strict=True):
        assert view.shape == (5, 3, 32, 16) and view.stride(3) == 1
        assert torch.equal(view.view(dtype).float(), rows.transpose(1, 2).float())
        assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr(), "not a view"


@pytest.mark.parametrize("shape", [(5, 3, 32, 16), (5, 32, 3, 16, 2), (2, 2, 32, 3, 16), (5, 32, 48)])
def test_unknown_caches_are_refused(shape: tuple[int, ...]) -> None:
    from minference_vllm.backend.compat import gpu_pages

    with pytest.raises(ValueError, match="does not know a KV cache of shape"):
        gpu_pages(torch.empty(shape), 16)


def test_our_classes_stand_where_vllm_looks_for_them(parent: Parent, make_gpu_layer: Callable[..., Layer]) -> None:
    backend = parent.our_backend
    assert issubclass(backend, parent.backend) and not backend.supports_batch_invariance()
    assert backend.get_name() == "MINFERENCE"
    assert not backend.supports_device_cpu_query_lens_mismatch(), "runs are cut by the host's lengths"
    assert backend.get_impl_cls() is parent.our_impl
    assert backend.get_builder_cls() is parent.our_builder
    assert backend.get_preferred_block_size(16) == 128 and backend.get_preferred_block_size(256) == 256
    assert all(backend.supports_block_size(size) for size in (16, 48, 64, 128))
    assert not make_gpu_layer([(0, 400)]).impl.fused_output_quant_supported("any"), (
        "our kernels write what they compute"
    )


@pytest.mark.parametrize(
    ("gpu", "parent", "reason"),
    [
        ((True, (9, 0), None), "FLASH_ATTN", "FlashAttention runs here"),
        ((True, (8, 0), None), "FLASH_ATTN", "FlashAttention runs here"),
        ((True, None, None), "FLASH_ATTN", "FlashAttention runs here"),
        ((True, (7, 5), None), "TRITON_ATTN", "FlashAttention needs compute capability 8.0, this GPU has 7.5"),
        ((True, (9, 0), "No module named 'x'"), "TRITON_ATTN", "No module named 'x'"),
    ],
    ids=str,
)
def test_which_parent(gpu: tuple[Any, ...], parent: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from minference_vllm.backend import compat, cuda, gpu_parent, triton_attn

    assert gpu_parent.choose_gpu_parent(*gpu) == (parent, reason)
    monkeypatch.setattr(gpu_parent, "this_gpu", lambda: gpu)
    classes = {"FLASH_ATTN": cuda.MInferenceCUDABackend, "TRITON_ATTN": triton_attn.MInferenceTritonBackend}
    assert resolve_obj_by_qualname(compat.CLASS_PATHS["cuda"]) is classes[parent]


@pytest.mark.parametrize(("version", "problem"), [(3, None), (None, "vLLM finds no version of FlashAttention")])
def test_vllm_says_whether_there_is_flash_attention(
    version: int | None, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.platforms
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends import fa_utils

    from minference_vllm.backend import gpu_parent

    platform = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: DeviceCapability(8, 6))
    monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda: version)
    is_cuda, capability, found = gpu_parent.this_gpu()
    assert is_cuda and capability == (8, 6)
    assert found is None if problem is None else str(found).startswith(problem)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from minference_vllm.backend import compat, gpu_parent

    assert gpu_parent.this_gpu() == (False, None, None), "this is the CPU build"
    with pytest.raises(ValueError, match="minference runs on CPUs and NVIDIA GPUs"):
        resolve_obj_by_qualname(compat.CLASS_PATHS["cuda"])
