"""The picture in docs/architecture.md against the imports: imports go down only, and vLLM stays at the edge."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minference_vllm"
PICTURE = re.search(r"```mermaid\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)

OUTSIDE: dict[str, set[str]] = {
    "core": {"torch", "pydantic"},
    "settings": {"pydantic"},
    "patterns": {"pydantic", "huggingface_hub"},
    "selection": {"torch"},
    "kernels": {"torch"},
    "triton_kernels": {"torch", "triton"},
    "prefill": {"torch"},
    "backend": {"torch", "vllm", "fastapi", "prometheus_client"},
    "offline": {"torch", "transformers", "matplotlib", "tqdm", "vllm", "numpy", "lm_eval"},
    "commands": {"torch", "transformers"},
    "reference": {"torch"},
}
"""Packages from outside that a part may import."""
REFERENCES = {"reference"}
VLLM_CALLS = {"kernels.block_table.cpu_ops", "kernels.block_table.flash", "kernels.fa4.attention"}
"""Of the kernels, the files that call vLLM."""
COMPILERS = {"kernels.fa4.attention": "cutlass"}
"""Files that hand a function of theirs to another compiler than Triton."""
ENTRIES = {"plugin": "backend", "__main__": "commands", "": "prefill"}
"""Files flat in the package beside ``settings`` and ``reference``, and the highest part that each may import. The
empty name is the package's own ``__init__``."""


def chains() -> list[list[str]]:
    """The lines of the picture: boxes from the highest part down."""
    assert PICTURE, "docs/architecture.md has no picture"
    return [re.split(r"\s*-->\s*", line.strip()) for line in PICTURE[1].splitlines()[1:] if line.strip()]


def below() -> dict[str, set[str]]:
    """Part -> the parts that the picture lets it import, itself included."""
    (chain,) = (line for line in chains() if len(line) > 1)
    (base,) = (line[0] for line in chains() if len(line) == 1)
    found = {part: {*chain[place:], base} for place, part in enumerate(chain)}
    return found | {base: {base}, "triton_kernels": found["kernels"]}


def modules() -> list[tuple[str, Path]]:
    """Name below the package, and file."""
    found = []
    for prefix, folder in {"": PACKAGE, "triton_kernels": ROOT / "triton_kernels"}.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix or parts[0] != "triton_kernels":  # within the package it is a link
                name = ".".join(filter(None, (prefix, *(part for part in parts if part != "__init__"))))
                found.append((name, path))
    return found


def part_of(name: str) -> str:
    return name.split(".")[0]


def imports(path: Path, module_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with ``module_level``, only those that importing it runs."""
    tree = ast.parse(path.read_text())
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            # ``from minference_vllm.kernels import choose`` imports the module minference_vllm.kernels.choose.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> Iterator[str]:
    """The parts of ours that a file imports."""
    for imported in imports(path):
        if imported.startswith("minference_vllm."):
            yield imported.split(".")[1]


def test_the_picture_shows_the_folders() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file() and not path.is_symlink()}
    boxes = {box for line in chains() for box in line}
    assert boxes == {*folders - REFERENCES, "settings"}
    assert len(boxes) == 9 and len(chains()) == 2, "eight parts in one chain, and core under all of them"


def test_few_files_lie_flat() -> None:
    flat = {path.stem for path in PACKAGE.glob("*.py")}
    assert flat == {"__init__", "__main__", "plugin", "settings"}


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_down(name: str, path: Path) -> None:
    allowed, part = below(), part_of(name)
    may = allowed["core"] | {"patterns", *REFERENCES} if part in REFERENCES else allowed[ENTRIES.get(part, part)]
    # The packages' version is in its ``__init__``, which imports nothing but names of the parts.
    found = set(ours(path)) - {"__version__", *(["triton_kernels"] if "kernels" in may else [])}
    assert found <= may, f"{name} imports {sorted(found - may)}; the picture allows {sorted(may)}"


def test_every_arrow_of_the_picture_is_used() -> None:
    (chain,) = (line for line in chains() if len(line) > 1)
    used = {(part_of(name), part) for name, path in modules() for part in ours(path)}
    for upper, lower in pairwise(chain):
        assert (upper, lower) in used, f"nothing in {upper} imports {lower}"
    assert {part for part in below() if (part, "core") in used} >= {"selection", "kernels", "prefill", "backend"}


def test_packages_from_outside() -> None:
    for name, path in modules():
        part = part_of(name)
        allowed = OUTSIDE.get(part, set()) | sys.stdlib_module_names | {"minference_vllm"}
        if name in VLLM_CALLS:
            allowed |= {"vllm", *([COMPILERS[name]] if name in COMPILERS else [])}
        outside = {imported.split(".")[0] for imported in imports(path)} - allowed
        assert not outside, f"{name} imports {outside}"


def test_help_needs_nothing_but_ourselves() -> None:
    """The tool answers ``--help`` at once: what is heavy loads when a command runs."""
    heavy = {"torch", "transformers", "vllm", "matplotlib"}
    found = dict(modules())
    waiting, seen = {name for name in found if part_of(name) == "commands"}, set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for imported in imports(found[name], module_level=True):
            assert imported.split(".")[0] not in heavy, f"{name} imports {imported}"
            below_package = imported.removeprefix("minference_vllm.")
            waiting |= {part for part in (below_package, below_package.rpartition(".")[0]) if part in found} - seen


def test_the_plugin_imports_nothing_until_it_is_called() -> None:
    """vLLM imports it in every process; versions are checked before anything of vLLM's is touched."""
    for name in ("plugin", "backend.compat"):
        outside = {imported.split(".")[0] for imported in imports(dict(modules())[name], module_level=True)}
        assert outside <= sys.stdlib_module_names, f"{name} imports {outside}"


def test_kinds_are_told_apart_in_their_families_alone() -> None:
    """One pattern, one place: only the file formats, which name kinds, ask what kind a pattern is."""
    kinds = {"Dense", "AShape", "TriShape", "VerticalSlash", "BlockSparse", "Coverage", "Antidiagonal", "PeakThreshold"}
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
            if asks and kinds & {inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)}:
                assert name in ("patterns.published", "patterns.file"), f"{name} asks what kind a pattern is"
