"""The arrows of docs/architecture.md, read from the imports: data flows one way, and vLLM stays at the edge."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import minference_vllm

PACKAGE = Path(minference_vllm.__file__).parent
TRITON_KERNELS = Path(__file__).parent.parent / "triton_kernels"
# The parts from left to right, each with the packages from outside that it may import. A part imports from the parts to
# its left, never from those to its right.
PARTS: dict[str, set[str]] = {
    "settings": {"pydantic"},
    "patterns": {"pydantic"},
    "formats": {"pydantic"},
    "discovery": {"huggingface_hub"},
    "plan": set(),
    "tiling": {"torch"},
    "projection": {"torch"},
    "selection": {"torch"},
    "levels": {"torch"},
    "low_rank": {"torch"},
    "capacity": set(),
    "lists": {"torch"},
    "index": {"torch"},
    "estimate": {"torch"},
    "paged_cache": {"torch"},
    "summaries": {"torch"},
    "engines": {"torch", "vllm"},
    "triton_kernels": {"torch", "triton"},
    "mean_correction": {"torch"},
    "recall": {"torch"},
    "paged_estimates": {"torch"},
    "prefill_checks": {"torch"},
    "attend": {"torch"},
    "audit": set(),
    "backend": {"torch", "vllm", "fastapi", "prometheus_client"},
    "calibrate": {"torch", "tqdm", "transformers", "vllm"},
    "plugin": set(),
    "checkpoint": {"torch", "transformers"},
    "capture": {"torch", "transformers"},
    "plot": {"torch", "matplotlib"},
    "commands": {"torch", "transformers"},
    "cli": set(),
    "__main__": set(),
}
# Beside the road: tests and benchmarks alone import it.
REFERENCE = "reference"
# Of the engines, the files that call vLLM.
VLLM_CALLS = {"engines.cpu_kernel", "engines.flash"}


def modules() -> Iterator[tuple[str, Path]]:
    """Name below the package, and file; the package's own ``__init__`` only re-exports."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path
    for path in sorted(TRITON_KERNELS.rglob("*.py")):
        yield f"triton_kernels.{path.stem}", path


def imports(path: Path, module_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with ``module_level``, only those that importing it runs."""
    tree = ast.parse(path.read_text())
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            # ``from minference_vllm.engines import native`` imports the module minference_vllm.kernels.native.attention.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_place() -> None:
    known = {*PARTS, REFERENCE}
    assert {name.split(".")[0] for name, _ in modules()} <= known, "give the new module a place in PARTS"


def test_nothing_imports_to_its_right() -> None:
    order = list(PARTS)
    for name, path in modules():
        part = name.split(".")[0]
        for imported in imports(path):
            if not imported.startswith("minference_vllm."):
                continue
            other = imported.split(".")[1]
            if part == REFERENCE:
                assert other in order[: order.index("engines")], f"{name} imports {other}"
            elif other in order:
                assert order.index(other) <= order.index(part), f"{name} imports {other}, which lies to its right"
            else:
                assert other not in (REFERENCE, ""), f"{name} imports the reference"


def test_packages_from_outside() -> None:
    for name, path in modules():
        part = name.split(".")[0]
        allowed = PARTS.get(part, {"torch"}) | sys.stdlib_module_names | {"minference_vllm"}
        if part == "engines" and name not in VLLM_CALLS:
            allowed -= {"vllm"}
        outside = {imported.split(".")[0] for imported in imports(path)} - allowed
        assert not outside, f"{name} imports {outside}"


def test_help_needs_nothing_but_ourselves() -> None:
    """The tool answers ``--help`` at once: what is heavy loads when a command runs."""
    heavy = {"torch", "transformers", "vllm", "matplotlib"}
    ours = dict(modules())
    waiting, seen = {"cli", *(name for name in ours if name.startswith("commands"))}, set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for imported in imports(ours[name], module_level=True):
            assert imported.split(".")[0] not in heavy, f"{name} imports {imported}"
            below = imported.removeprefix("minference_vllm.")
            waiting |= {part for part in (below, below.rpartition(".")[0]) if part in ours} - seen


def test_the_plugin_imports_nothing_until_it_is_called() -> None:
    """vLLM imports it in every process; versions are checked before anything of vLLM's is touched."""
    for name in ("plugin", "backend.compat"):
        path = dict(modules())[name]
        outside = {imported.split(".")[0] for imported in imports(path, module_level=True)}
        assert outside <= sys.stdlib_module_names, f"{name} imports {outside}"
