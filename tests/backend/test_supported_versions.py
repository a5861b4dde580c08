"""The supported versions of vLLM, and the errors in others."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.backend import compat, vllm_parts

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("version", ["0.26.0", "0.26.1rc1", "0.32.0+cpu", "0.33.9", "0.33.1.dev5+g1234", "v0.32.0"])
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert compat.check_vllm() == f"{version} (supported: 0.26 to 0.33)"


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "0.9.2", "1.0.0", "0.34.0.dev1+g1234"])
def test_other_versions_are_refused_with_the_range(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"supports vLLM 0.26 to 0.33, found {version}".replace("+", r"\+")):
        compat.check_vllm()


@pytest.mark.parametrize("version", ["0.1.dev1+g3f2a9c1", "0.1.dev17804+g3f2a9c1.cpu", "0.0.0", "dev", "", "0"])
def test_a_build_from_source_is_judged_by_what_it_offers(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert compat.check_vllm().startswith(f"{version}, a build from source with all that minference uses")
    lacking = {**vllm_parts.PARTS, "v1.attention.backend": ("AttentionImpl.gone",), "nowhere": ("anything",)}
    monkeypatch.setattr(vllm_parts, "PARTS", lacking)
    with pytest.raises(RuntimeError) as error:
        compat.check_vllm()
    assert str(error.value) == (
        f"minference-vllm supports vLLM 0.26 to 0.33; this build from source, {version!r}, lacks "
        "vllm.v1.attention.backend.AttentionImpl.gone, vllm.nowhere.anything"
    )


OUTSIDE = """
import importlib.metadata, json, logging
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.34.0+cpu" if name == "vllm" else real(name)
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm.minference_vllm").addHandler(handler)
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

def start(backend):
    try:
        return EngineArgs(MODEL, attention_backend=backend).create_engine_config().attention_config.backend is None
    except (RuntimeError, ValueError) as error:
        return str(error)

print(json.dumps({
    "minference": start("minference"),
    "lines": list(lines),
    "other": start("no_such_backend"),
    "none": start(None),
    "is_a_member": "MINFERENCE" in AttentionBackendEnum.__members__,
    "custom": AttentionBackendEnum.CUSTOM.is_overridden(),
    "own_attributes": sorted(set(vars(current_platform)) - set(vars(type(current_platform)()))),
}))
"""


def test_an_unsupported_vllm_says_so_to_whoever_selects_us(fresh_vllm: Callable[..., Any]) -> None:
    """Everybody else starts as before: vLLM does not catch errors of general plugins, and its platform is unchanged."""
    reason = (
        "attention backend 'minference' is not available: minference-vllm supports vLLM 0.26 to 0.33, found 0.34.0+cpu"
    )
    found = fresh_vllm(OUTSIDE.replace("MODEL", repr(str(ROOT / "examples" / "demo" / "model"))))
    assert found["minference"] == reason
    assert found["lines"] == [reason]
    assert "Unknown attention backend: 'NO_SUCH_BACKEND'" in found["other"]
    assert found["none"] is True
    assert not found["is_a_member"] and not found["custom"] and found["own_attributes"] == []


def test_every_name_of_vllm_that_is_imported_is_looked_for() -> None:
    """Compare the names by which builds from source are checked with the imports of the serving code."""
    wanted = {"__version__"}  # read only if vLLM is not installed as a distribution
    for folder in ("backend", "kernels"):
        for path in sorted((ROOT / "minference_vllm" / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vllm."):
                    looked_for = {name.split(".")[0] for name in vllm_parts.PARTS.get(str(node.module)[5:], ())}
                    wanted |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name not in looked_for}
    # Only the kernel ``fa4`` is refused without FlashAttention 4.
    fa4 = {"block_sparsity.BlockSparseTensorsTorch", "interface._flash_attn_fwd"}
    without = {f"vllm.vllm_flash_attn.cute.{name}" for name in fa4}
    assert wanted == {"__version__", "vllm.v1.attention.backends.registry"} | without
