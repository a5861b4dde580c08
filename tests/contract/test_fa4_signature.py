"""FlashAttention 4 as the kernel ``fa4`` calls it, in the code of vLLM's CUDA releases, which is read, not imported."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import get_vllm_python
import pytest
from get_smollm2 import MakeError

import minference_vllm
from minference_vllm.kernels.fa4.block_lists import BlockLists, own_page

RELEASES = ("0.26.0", "0.30.0", "0.33.0")


def definition(tree: ast.AST, name: str) -> ast.FunctionDef | ast.ClassDef:
    kinds = ast.FunctionDef | ast.ClassDef
    (found,) = (node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name)
    return found


def our_call() -> ast.Call:
    source = Path(minference_vllm.__file__).parent / "kernels" / "fa4" / "attention.py"
    (found,) = (
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_flash_attn_fwd"
    )
    return found


@pytest.mark.contract
@pytest.mark.parametrize(
    "release", [*(pytest.param(release, marks=pytest.mark.older_vllm) for release in RELEASES[:-1]), RELEASES[-1]]
)
def test_a_release_takes_our_call(release: str) -> None:
    folder = get_vllm_python.default_folder(release)
    try:
        get_vllm_python.make(release, folder)
    except MakeError as error:
        pytest.skip(str(error))
    cute = folder / "vllm" / "vllm_flash_attn" / "cute"
    function = definition(ast.parse((cute / "interface.py").read_bytes()), "_flash_attn_fwd")
    assert isinstance(function, ast.FunctionDef)
    names, call = [argument.arg for argument in function.args.args], our_call()
    assert names[: len(call.args)] == ["q", "k", "v"]
    assert {keyword.arg for keyword in call.keywords} <= set(names)
    lists = definition(ast.parse((cute / "block_sparsity.py").read_bytes()), "BlockSparseTensorsTorch")
    taken = {
        node.target.id for node in lists.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert {field.name for field in fields(BlockLists)} | {"block_size"} <= taken
    # The arguments of a mask_mod without auxiliary scalars.
    last = definition(ast.parse((cute / "mask.py").read_bytes()), "call_mask_mod").body[-1]
    assert isinstance(last, ast.Return) and isinstance(last.value, ast.Call)
    assert len(last.value.args) == own_page.__code__.co_argcount
