"""What is shipped, and what types it has."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "triton_kernels").glob("*.py"))
SCRIPTS = sorted(path for folder in ("benchmarks", "examples/demo", "tools") for path in (ROOT / folder).glob("*.py"))
LINKS = {
    "benchmarks/tasks.py": "examples/demo/tasks.py",
    "benchmarks/vllm_server.py": "examples/demo/vllm_server.py",
    "minference_vllm/triton_kernels": "triton_kernels",
    "benchmarks/get_smollm2.py": "tools/get_smollm2.py",
    "tools/peers.py": "benchmarks/peers.py",
}
"""Files and folders that are also to be found where others look for them."""
OUTSIDE = ("pattern_configs", "triton_kernels")
"""Top-level folders that are installed below our package."""
GENERATED = ("PKG-INFO", "setup.cfg", "minference_vllm.egg-info/")
"""What setuptools adds to an sdist."""


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of this checkout that git knows."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    words = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    names = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of the tracked files, unpacked."""
    place = tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (place / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / "tree" / name, follow_symlinks=False)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(place)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=place / "tree", check=True, capture_output=True)
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    return place / archive.name.removesuffix(".tar.gz")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_sdist_holds_all_that_git_tracks(tracked: list[str], sdist: Path) -> None:
    """The link to a folder is left out: it shows type checkers what is there under its own name."""
    shipped = {name for name in files(sdist) if not name.startswith(GENERATED)}
    assert shipped == set(tracked) - {"minference_vllm/triton_kernels"}


def test_what_an_sdist_installs(tracked: list[str], sdist: Path, tmp_path: Path) -> None:
    """The package, the pattern files and the Triton kernels; no tests, no scripts."""
    words = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(words, cwd=sdist, check=True, capture_output=True)
    expected = {name for name in tracked if name.startswith("minference_vllm/")} - set(LINKS)
    expected |= {f"minference_vllm/{name}" for name in tracked if name.startswith(OUTSIDE)}
    assert {"minference_vllm/py.typed", "minference_vllm/pattern_configs/default_cpu.json"} <= expected
    assert files(tmp_path) == expected


def test_links_lead_to_what_they_show(tracked: list[str]) -> None:
    links = [name for name in tracked if (ROOT / name).is_symlink()]
    assert {name: str((ROOT / name).resolve().relative_to(ROOT.resolve())) for name in links} == LINKS


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_from_their_own_folder(path: Path) -> None:
    """Python searches that folder alone; what lies in another one is linked into it, and nothing edits ``sys.path``."""
    source = path.read_text()
    assert "sys.path" not in source
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            named.add(node.module)
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    siblings = named & {script.stem for script in SCRIPTS}
    assert siblings <= {script.stem for script in path.parent.glob("*.py")}


def untyped(tree: ast.AST) -> Iterator[str]:
    """Functions without a type for every parameter and for what they return, but for Triton's kernels."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and "triton.jit" not in map(decorator, function.decorator_list):
            parameters = [node for node in ast.walk(function.args) if isinstance(node, ast.arg) and node.arg != "self"]
            if function.returns is None or any(parameter.annotation is None for parameter in parameters):
                yield function.name


def decorator(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_of_the_triton_kernels_the_kernels_alone_are_untyped(path: Path) -> None:
    """mypy does not ask for types in this folder: it could not tell a kernel from its launcher."""
    assert list(untyped(ast.parse(path.read_text()))) == []


def test_a_function_without_types_is_found() -> None:
    source = """
@triton.jit(do_not_specialize=["rows"])
def kernel(p_query, rows): ...
def launch(query: Tensor, rows) -> None: ...
def run(query: Tensor): ...
def typed(query: Tensor, *rest: Tensor, scale: float) -> None: ...
"""
    assert list(untyped(ast.parse(source))) == ["launch", "run"]
