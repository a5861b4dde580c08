"""Patch two methods of vLLM's platform object, which chooses the attention backend, so that it serves ours.

CPU platforms, vLLM's own and those of other plugins, ignore the selected backend. A platform plugin of ours would not
help: vLLM accepts only one, and none with ``VLLM_TARGET_DEVICE=cpu``. So the methods are set on the object in use,
whatever its class, in every process where our name is known.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from minference_vllm.backend.compat import (
    NAME,
    StartError,
    is_minference,
    platform_name,
    selects_minference,
    serves_what_is_selected,
    vllm_platform,
)


def serve_our_name() -> None:
    """Make vLLM's platform serve minference if it is selected, or refuse to start. Otherwise the platform decides as
    before. Idempotent."""
    platform = vllm_platform()
    if serves_what_is_selected(platform):
        return
    for method in (get_attn_backend_cls, check_and_update_config):
        earlier = vars(platform).get(method.__name__)
        if not (isinstance(earlier, partial) and earlier.func is method):
            setattr(platform, method.__name__, partial(method, platform, earlier))


def _before(platform: Any, name: str, earlier: Any) -> Any:
    """The method without our patch: one set on the object, or that of its class, which other plugins may still replace
    later."""
    return earlier or inspect.getattr_static(type(platform), name).__get__(platform, type(platform))


def get_attn_backend_cls(platform: Any, earlier: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> Any:
    """The platform's method of this name.

    Raises:
        ValueError: minference is selected, but does not run on this platform or is replaced by it.
    """
    before = _before(platform, "get_attn_backend_cls", earlier)
    if not is_minference(selected_backend):
        return before(selected_backend, *args, **kwargs)
    _check_device(platform)
    if platform.is_cpu():
        from vllm.logger import init_logger

        init_logger(f"vllm.{__name__}").info_once("Using %s attention backend on CPU.", NAME)
        return selected_backend.get_path()
    path = before(selected_backend, *args, **kwargs)
    if not str(path).startswith("minference_vllm."):
        raise ValueError(_replaced_by(platform, path))
    return path


def check_and_update_config(platform: Any, earlier: Any, vllm_config: Any) -> None:
    """The platform's method of this name. With minference, it also validates settings, pattern file and model: in the
    first process, before weights are loaded.

    Raises:
        StartError: minference is selected and cannot serve.
    """
    before = _before(platform, "check_and_update_config", earlier)
    if vllm_config.model_config is None or not selects_minference(vllm_config):
        before(vllm_config)
        return
    with _ends_the_start():
        _check_device(platform)
    before(vllm_config)
    with _ends_the_start():
        if not selects_minference(vllm_config):
            raise ValueError(_replaced_by(platform, str(vllm_config.attention_config.backend)))
        if platform.is_cpu():
            _check_cpu(vllm_config)


@contextlib.contextmanager
def _ends_the_start() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise StartError(str(error)) from None


def _check_cpu(vllm_config: Any) -> None:
    from minference_vllm.backend.limits import check_cpu_kernel
    from minference_vllm.backend.runtime import runtime_for

    model, runtime = vllm_config.model_config, runtime_for(vllm_config)
    check_cpu_kernel(runtime.settings.kernel, model.dtype, model.get_head_size(), runtime.dual_chunk is not None)


def _check_device(platform: Any) -> None:
    if not (platform.is_cpu() or platform.is_cuda()):
        raise ValueError(
            f"minference runs on CPUs and NVIDIA GPUs, and vLLM's platform here is {platform_name(platform)}: "
            "select another attention backend"
        )


def _replaced_by(platform: Any, backend: str) -> str:
    return (
        f"minference is selected, but vLLM's platform {platform_name(platform)} serves {backend}: "
        "leave the plugin that brings this platform out of VLLM_PLUGINS, or select another attention backend"
    )
