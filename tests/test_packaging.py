"""What is shipped, and what types it has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "triton_kernels").glob("*.py"))


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
