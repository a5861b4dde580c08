"""Our plugin as vLLM sees it, in fresh processes: plugins are loaded once per process, and early."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer, run_fresh_vllm

from minference_vllm import plugin
from minference_vllm.backend import compat, registration

ROOT = Path(__file__).parent.parent.parent
OUR_CLASS = "minference_vllm.backend.cpu.MInferenceCPUBackend"


def fresh(tmp_path: Path, script: str) -> Any:
    """Run a script in a new interpreter, from the repository's root; returns the JSON value that it prints last.

    The script is a file, like the ``vllm`` command: ``python -c`` would put the current folder on the path.
    """
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


AFTER_PLUGINS = """
import json, logging, pickle, sys
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm.minference_vllm").addHandler(handler)
if "zen" in sys.argv:
    from vllm import platforms
    platforms._is_amd_zen_cpu = lambda: True
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from minference_vllm.plugin import register
register(); register()
from vllm.platforms import current_platform
import torch
from vllm.v1.attention.selector import AttentionSelectorConfig
member = AttentionBackendEnum["MINFERENCE"]
without_us = type(current_platform)()
asked = AttentionSelectorConfig(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=128)
others = [None, AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.FLASH_ATTN]
backend = member.get_class()
print(json.dumps({
    "class": f"{backend.__module__}.{backend.__qualname__}",
    "name": backend.get_name(),
    "looked_up_by_its_name": AttentionBackendEnum[backend.get_name()] is member,
    "pickled": pickle.dumps(member).hex(),
    "platform": type(current_platform).__qualname__,
    "selected": current_platform.get_attn_backend_cls(member, asked),
    "others": [current_platform.get_attn_backend_cls(other, asked) for other in others],
    "others_without_us": [without_us.get_attn_backend_cls(other, asked) for other in others],
    "own_attributes": sorted(set(vars(current_platform)) - set(vars(without_us))),
    "copied": pickle.loads(pickle.dumps(current_platform)).get_attn_backend_cls(member, asked),
    "lines": lines,
}))
"""
FOREIGN_PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class ForeignPlatform(CpuPlatform):
    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        return "foreign.Attention"

def plugin():
    return "foreign.ForeignPlatform"
"""


@pytest.fixture(scope="module")
def after_plugins(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = run_fresh_vllm(fork_server, tmp_path_factory.mktemp("plugin"), AFTER_PLUGINS)
    assert isinstance(found, dict)
    return found


def test_the_name_resolves_to_our_class(after_plugins: dict[str, Any]) -> None:
    assert after_plugins["class"] == OUR_CLASS
    assert after_plugins["name"] == "MINFERENCE"
    assert after_plugins["looked_up_by_its_name"], "attention layers look their backend up again by its name"


def check_served(found: dict[str, Any], platform: str) -> None:
    """Our class serves where it is selected, the platform decides everything else, and nothing is logged."""
    assert found["platform"].endswith(platform)
    assert found["selected"] == OUR_CLASS
    assert found["others"] == found["others_without_us"] and OUR_CLASS not in found["others"]
    assert found["own_attributes"] == ["check_and_update_config", "get_attn_backend_cls"]
    assert found["copied"] == OUR_CLASS, "a platform that user code sends to the workers"
    assert found["lines"] == []


def test_vllms_cpu_platform_serves_our_name(after_plugins: dict[str, Any]) -> None:
    check_served(after_plugins, "CpuPlatform")


@pytest.mark.parametrize(
    "environment",
    [{"VLLM_TARGET_DEVICE": "cpu"}, {"VLLM_PLUGINS": "minference"}, {"VLLM_PLUGINS": "minference,minference_cpu"}],
    ids=str,
)
def test_our_name_is_served_where_vllm_loads_no_platform_plugin(
    environment: dict[str, str], fresh_vllm: Callable[..., Any]
) -> None:
    check_served(fresh_vllm(AFTER_PLUGINS, **environment), "CpuPlatform")


def test_vllms_platform_for_amd_zen_serves_our_name(tmp_path: Path, fresh_vllm: Callable[..., Any]) -> None:
    (tmp_path / "zentorch.py").touch()
    check_served(fresh_vllm(AFTER_PLUGINS, "zen", PYTHONPATH=str(tmp_path)), "ZenCpuPlatform")


def test_another_plugins_cpu_platform_serves_our_name(
    install: Callable[..., str], fresh_vllm: Callable[..., Any]
) -> None:
    path = install("foreign", "foreign:plugin", FOREIGN_PLATFORM)
    found = fresh_vllm(AFTER_PLUGINS, PYTHONPATH=path)
    check_served(found, "ForeignPlatform")
    assert set(found["others"]) == {"foreign.Attention"}


def test_a_platform_plugin_that_does_not_load_changes_nothing(
    install: Callable[..., str], fresh_vllm: Callable[..., Any]
) -> None:
    """vLLM continues without it, and so do we."""
    path = install("broken", "no_such_module_anywhere:plugin")
    check_served(fresh_vllm(AFTER_PLUGINS, PYTHONPATH=path), "CpuPlatform")


def test_a_vllm_without_a_distribution_is_asked_itself(fresh_vllm: Callable[..., Any]) -> None:
    """A source tree, or a build under another name."""
    hidden = """
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name == "vllm":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
"""
    found = fresh_vllm(hidden + AFTER_PLUGINS, VLLM_TARGET_DEVICE="cpu")
    check_served(found, "CpuPlatform")


def test_the_choice_survives_the_spawn_of_the_engine_process(
    after_plugins: dict[str, Any], fresh_vllm: Callable[..., Any]
) -> None:
    """That process unpickles the configuration before it loads any plugin."""
    script = """
import json, pickle, sys
member = pickle.loads(bytes.fromhex(sys.argv[1]))
before = member.name
from vllm.plugins import load_general_plugins
load_general_plugins()
print(json.dumps([before, member.get_path()]))
"""
    assert fresh_vllm(script, after_plugins["pickled"]) == ["CUSTOM", OUR_CLASS]


@pytest.mark.parametrize("first", [True, False], ids=["before_us", "after_us"])
def test_a_taken_slot_for_custom_backends_is_left_to_its_holder(first: bool, fresh_vllm: Callable[..., Any]) -> None:
    """A warning names the holder. Users who did not select us are not affected; those who did get an error with the
    reason, not somebody else's backend."""
    script = """
import json, logging, sys, torch
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm.minference_vllm").addHandler(handler)
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
if sys.argv[1] == "after":
    load_general_plugins()
    assert AttentionBackendEnum["MINFERENCE"] is AttentionBackendEnum.CUSTOM
    register_backend(AttentionBackendEnum.FLASH_ATTN, "somebody.elses.FlashAttention")
    assert AttentionBackendEnum["MINFERENCE"] is AttentionBackendEnum.CUSTOM
register_backend(AttentionBackendEnum.CUSTOM, "somebody.elses.Backend")
load_general_plugins()
from vllm.platforms import current_platform
from vllm.v1.attention.selector import AttentionSelectorConfig
asked = AttentionSelectorConfig(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=128)
try:
    AttentionBackendEnum["MINFERENCE"]
    told = None
except RuntimeError as error:
    told = str(error)
print(json.dumps({
    "lines": lines,
    "path": AttentionBackendEnum.CUSTOM.get_path(),
    "told": told,
    "served_by": current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, asked),
}))
"""
    found = fresh_vllm(script, "before" if first else "after")
    (line,) = found["lines"]
    assert "'minference' is not available: " in line and "somebody.elses.Backend" in line and "VLLM_PLUGINS" in line
    assert found["path"] == "somebody.elses.Backend"
    assert found["told"] == line
    assert not found["served_by"].startswith("minference_vllm")


def test_leaving_us_out_leaves_vllm_as_it_is(fresh_vllm: Callable[..., Any]) -> None:
    script = """
import json
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print(json.dumps([type(current_platform).__qualname__, "MINFERENCE" in AttentionBackendEnum.__members__]))
"""
    assert fresh_vllm(script, VLLM_PLUGINS="") == ["CpuPlatform", False]


def test_importing_the_package_imports_neither_torch_nor_vllm(tmp_path: Path) -> None:
    script = """
import json, sys
import minference_vllm, minference_vllm.plugin, minference_vllm.core.plan, minference_vllm.backend.compat
print(json.dumps(sorted({"torch", "vllm", "numpy", "transformers"} & set(sys.modules))))
"""
    assert fresh(tmp_path, script) == []


def test_our_folders_answer_no_import_of_their_own_names(tmp_path: Path) -> None:
    """vLLM looks for OpenAI's kernels with ``find_spec("triton_kernels")``, which must not find our folder."""
    script = """
import json, sys
from importlib.util import find_spec
found = {}
for name in ("triton_kernels", "pattern_configs", "csrc", "benchmarks", "tests"):
    spec = find_spec(name)
    found[name] = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
print(json.dumps(found))
"""
    for name, places in fresh(tmp_path, script).items():
        assert not any(Path(place).is_relative_to(ROOT) for place in places if place), f"{name} is found at {places}"


def test_from_the_checkouts_root_vllm_finds_its_own_triton_kernels(fresh_vllm: Callable[..., Any]) -> None:
    """``python -c`` and ``-m`` have the current folder on the path, and with it our folder of that name."""
    script = """
import json, sys, types
from importlib.machinery import ModuleSpec
from vllm.utils.import_utils import _has_module, has_triton_kernels
import vllm.model_executor.layers.fused_moe.config
before = [has_triton_kernels(), "triton_kernels" in sys.modules]
try:
    import triton_kernels.attention
except ImportError as error:
    message = str(error)
vllms = types.ModuleType("vllm.third_party.triton_kernels")
vllms.__spec__, vllms.__file__ = ModuleSpec(vllms.__name__, None), "its own"
sys.modules[vllms.__name__] = vllms
_has_module.cache_clear()
after = [has_triton_kernels(), sys.modules["triton_kernels"] is vllms]
import minference_vllm.triton_kernels
print(json.dumps([before, message, after]))
"""
    before, message, after = fresh_vllm(script, first_path="")
    assert before == [False, False], "there are none on this machine"
    assert after == [True, True]
    assert message.startswith("this triton_kernels is a folder of minference-vllm, not OpenAI's package")


def test_the_pattern_files_are_installed_with_the_package(tmp_path: Path) -> None:
    script = """
import json
from minference_vllm.patterns.file import load_pattern_file
print(json.dumps(load_pattern_file("coverage").default.kind))
"""
    assert fresh(tmp_path, script) == "coverage"


def test_whatever_fails_in_vllm_goes_on_without_us(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    def fail() -> None:
        raise AttributeError("CUSTOM")

    monkeypatch.setattr(registration, "register_name", fail)
    refused: list[str] = []
    monkeypatch.setattr(compat, "refuse_name", refused.append)
    plugin.register()
    assert refused == warnings
    assert warnings == ["attention backend 'minference' is not available: AttributeError: CUSTOM"]
