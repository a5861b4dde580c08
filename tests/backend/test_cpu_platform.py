"""vLLM's platform object, patched to serve our name, with stand-ins for platforms that this machine lacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from minference_vllm.backend import compat, cpu_platform

OURS = "minference_vllm.backend.cuda.MInferenceCUDABackend"


class Platform:
    """A platform of another plugin. The object keeps what it serves and the calls that it got."""

    serves = "other.Attention"
    kind = "cuda"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    # Instance methods, where vLLM specifies class methods: some plugins do this, and it works.
    def get_attn_backend_cls(self, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> str:
        self.calls.append((selected_backend, attn_selector_config, num_heads))
        return self.serves

    def check_and_update_config(self, vllm_config: Any) -> None:
        self.calls.append(vllm_config)


@pytest.fixture
def custom() -> Any:
    """The member of vLLM's enum for ``minference``."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    compat.register_name()
    return AttentionBackendEnum["MINFERENCE"]


def taught(monkeypatch: pytest.MonkeyPatch, cls: type = Platform, **attributes: Any) -> Any:
    platform = type("Foreign", (cls,), attributes)()
    monkeypatch.setattr(cpu_platform, "vllm_platform", lambda: platform)
    cpu_platform.serve_our_name()
    return platform


def config(backend: Any, **kinds: Any) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=object(), attention_config=SimpleNamespace(backend=backend, backend_per_kind=kinds)
    )


def test_who_did_not_select_us_gets_what_the_platform_says(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = taught(monkeypatch, kind="npu", serves=None)
    assert platform.get_attn_backend_cls(None, "asked", num_heads=8) is None
    other = config(None)
    platform.check_and_update_config(other)
    assert platform.calls == [(None, "asked", 8), other]


@pytest.mark.parametrize("method", [staticmethod, classmethod])
def test_a_method_of_any_kind_is_called_as_before(custom: Any, monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    calls: list[Any] = []
    function = calls.append if method is staticmethod else lambda cls, config: calls.append((cls, config))
    platform = taught(monkeypatch, check_and_update_config=method(function))
    other = config(None)
    platform.check_and_update_config(other)
    assert calls == [other if method is staticmethod else (type(platform), other)]


def test_a_class_that_is_patched_after_us_is_heard(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = taught(monkeypatch)
    type(platform).get_attn_backend_cls = lambda self, *args: "patched.Attention"
    assert platform.get_attn_backend_cls(None, "asked") == "patched.Attention"


def test_an_object_that_was_patched_before_us_is_heard(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform()
    platform.get_attn_backend_cls = lambda *args: "patched.Attention"  # type: ignore[method-assign]
    monkeypatch.setattr(cpu_platform, "vllm_platform", lambda: platform)
    for _ in range(3):
        cpu_platform.serve_our_name()
    assert platform.get_attn_backend_cls(None, "asked") == "patched.Attention"
    platform.kind = "cpu"
    assert platform.get_attn_backend_cls(custom, "asked") == compat.CLASS_PATHS["cpu"]
    assert platform.calls == []


def test_vllms_platform_for_cuda_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = taught(monkeypatch, __module__="vllm.platforms.cuda")
    assert vars(platform) == {"calls": []}


def test_another_platform_for_cuda_must_serve_us(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = taught(monkeypatch, serves=OURS)
    assert platform.get_attn_backend_cls(custom, "asked") == OURS
    platform = taught(monkeypatch)
    message = r"minference is selected, but vLLM's platform \S+Foreign serves other.Attention: .* VLLM_PLUGINS"
    with pytest.raises(ValueError, match=message):
        platform.get_attn_backend_cls(custom, "asked")


def test_a_platform_that_changes_the_selection_ends_the_start(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(vllm_config: Any) -> None:
        vllm_config.attention_config.backend = "OTHER"

    platform = taught(monkeypatch, kind="cpu", check_and_update_config=staticmethod(change))
    with pytest.raises(compat.StartError, match=r"minference is selected, but vLLM's platform \S+Foreign serves OTHER"):
        platform.check_and_update_config(config(custom))


def test_other_devices_end_the_start(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = taught(monkeypatch, kind="npu")
    message = r"runs on CPUs and NVIDIA GPUs, and vLLM's platform here is \S+Foreign: select another attention backend"
    for selected in (config(custom), config(None, full_attention=custom)):
        with pytest.raises(compat.StartError, match=message):
            platform.check_and_update_config(selected)
    with pytest.raises(ValueError, match=message):
        platform.get_attn_backend_cls(custom, "asked")
    assert platform.calls == []


def test_a_configuration_without_a_model_is_not_checked(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = taught(monkeypatch, kind="npu")
    selected = config(custom)
    selected.model_config = None
    platform.check_and_update_config(selected)
    assert platform.calls == [selected]
