"""The path of a layer's ``query`` from the backend's ``forward`` to the kernel and back passes few modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from layer_inputs import MIN_CONTEXT

import minference_vllm

PACKAGE = Path(minference_vllm.__file__).parent
MAX_MODULES = 7
BESIDE = ("core.", "prefill.timing")
"""Containers of the query, and the timing of the scores. They are not needed to follow the path."""
PATTERNS = [
    {"kind": "low_rank", "gamma": 0.3},
    {"kind": "vertical_slash", "vertical": 60, "slash": 60},
    {"kind": "coverage", "gamma": 0.4, "min_budget": 0},
    {"kind": "peak_threshold", "alpha": 0.9, "sink": 16, "window": 40},
    {"kind": "a_shape", "sink": 16, "local": 64},
]


def holds(value: Any, storage: int) -> bool:
    """Whether a value is the query, a view of it, or holds it."""
    for found in (value, getattr(value, "query", None), getattr(getattr(value, "inputs", None), "query", None)):
        if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() == storage:
            return True
    return False


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern["kind"])
def test_the_query_enters_few_modules(pattern: dict[str, Any], make_cpu_layer: Callable[..., Any]) -> None:
    layer = make_cpu_layer([(MIN_CONTEXT, 200)], patterns=[pattern] * 8, settings={"audit_rows": 0})
    metadata = layer.metadata()
    assert metadata.sparse, "the batch must have a sparse chunk"
    query, out = layer.batch.query.clone(), torch.empty_like(layer.batch.query)
    key = torch.zeros(len(query), layer.kv_heads, query.shape[2], dtype=query.dtype)
    storage, entered = query.untyped_storage().data_ptr(), []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or PACKAGE not in path.parents or frame.f_code.co_name.startswith("<"):
            return
        count = frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
        if any(holds(frame.f_locals.get(name), storage) for name in frame.f_code.co_varnames[:count]):
            entered.append(".".join(path.relative_to(PACKAGE).with_suffix("").parts))

    sys.setprofile(watch)
    try:
        layer.impl.forward(layer.layer, query, key, key, layer.cache, metadata, out)
    finally:
        sys.setprofile(None)
    modules = list(dict.fromkeys(name for name in entered if not name.startswith(BESIDE)))
    assert modules[:3] == ["backend.sparse_prefill", "backend.serving", "prefill.attend"]
    assert len(modules) <= MAX_MODULES, modules
