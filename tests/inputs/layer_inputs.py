"""Patterns and batches for one layer of a backend, on a CPU or a GPU, and what its output should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm import reference

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 64, 64
MIN_CONTEXT, MIN_CHUNK = 300, 100
KINDS: list[dict[str, Any]] = [
    {"kind": "vertical_slash", "vertical": 40, "slash": 110},
    {"kind": "block_sparse", "top_k": 2},
    {"kind": "a_shape", "sink": 16, "local": 100},
    {"kind": "tri_shape", "sink": 16, "local": 64, "last": 40},
    {"kind": "dense"},
    {"kind": "a_shape", "sink": 0, "local": 1},
    {"kind": "vertical_slash", "vertical": 100, "slash": 0},
    {"kind": "block_sparse", "top_k": 1},
]
GPU_KINDS: list[dict[str, Any]] = [*KINDS[:3], {"kind": "dense"}] * 2
PEAKS: dict[str, Any] = {"kind": "peak_threshold", "alpha": 0.99, "sink": 0, "window": 0}
ADAPTIVE_KINDS: list[dict[str, Any]] = [
    {"kind": "coverage", "gamma": 0.4, "min_budget": 0},
    {"kind": "antidiagonal", "stride": 16, "tau": 0.4},
    {"kind": "peak_threshold", "alpha": 0.9, "sink": 16, "window": 40},
    {"kind": "low_rank", "gamma": 0.1},
    {"kind": "antidiagonal", "stride": 64, "tau": 0.1},
    {"kind": "peak_threshold", "alpha": 0.95, "sink": 0, "window": 0},
    {"kind": "dense"},
    {"kind": "coverage", "gamma": 0.99, "min_budget": 0},
]
MIXED = [(500, 1), (0, 400), (700, 1), (20, 30), (350, 150), (0, 120), (600, 40), (128, 300)]
"""(context, new tokens): decodes, long and short prompts, chunks of others, and the last few tokens of one."""
SPARSE = (1, 4, 7)


def make_known(monkeypatch: pytest.MonkeyPatch, layers: Sequence[Any]) -> list[str]:
    """Let our builders find these attention layers, as in vLLM's engine; returns the names to ask for them by."""
    from minference_vllm.backend import metadata_builder

    named = {layer.layer_name: layer for layer in layers}
    find = lambda config, kind, names: {name: named[name] for name in names}  # noqa: E731
    monkeypatch.setattr(metadata_builder, "get_layers_from_vllm_config", find)
    return list(named)


def record_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record every message that our builders and implementations log once, each time it is logged."""
    from minference_vllm.backend import metadata_builder, sparse_prefill

    lines: list[str] = []
    record = lambda message, *values: lines.append(message % values)  # noqa: E731
    for module in (metadata_builder, sparse_prefill):
        monkeypatch.setattr(module.logger, "info_once", record, raising=False)
    return lines


def planned(layer: Any, asked: dict[int, str], build: Callable[[], Any]) -> Any:
    """The metadata that ``build`` makes in a step in which the requests in these rows are new and ask for this."""
    lengths = layer.batch.query_start_loc.diff().tolist()
    names = [f"request {row}" for row in range(len(lengths))]
    new = [
        SimpleNamespace(req_id=names[row], sampling_params=SimpleNamespace(extra_args={"minference": value}))
        for row, value in asked.items()
    ]
    scheduled = dict(zip(names, lengths, strict=True))
    runtime = layer.impl.runtime
    with runtime.step(SimpleNamespace(finished_req_ids=names, scheduled_new_reqs=new, num_scheduled_tokens=scheduled)):
        runtime.requests.stand(names)
        return build()


def assert_right(layer: Any, output: torch.Tensor, sparse: Sequence[int]) -> None:
    """Sparse requests match attention under their (latest) index, all others dense attention, to the accuracy of
    the type."""
    batch, options = layer.batch, getattr(layer, "options", {})
    indices = dict(zip(sparse, layer.indices[-len(sparse) :], strict=True))
    for request, context in enumerate(batch.context_lens):
        seq_len = int(batch.seq_lens[request])
        if request in indices:
            index = indices[request]
            assert index.tiling.seq_len - index.tiling.context_len == seq_len - context
            mask = torch.nn.functional.pad(index.to_mask(), (seq_len - index.tiling.seq_len, 0))
        else:
            window = options.get("sliding_window") or 0
            mask = reference.causal_mask(context, seq_len, window).expand(layer.heads, -1, -1)
        query = batch.query[batch.rows(request)]
        exact = reference.masked_attention(
            query,
            batch.keys(request),
            batch.values(request),
            mask,
            layer.scale,
            options.get("logits_soft_cap") or 0.0,
            options.get("sinks"),
        )
        found = output[batch.rows(request)]
        assert torch.isfinite(found).all(), f"request {request}"
        budget = 3 * max(torch.finfo(layer.dtype).eps, 1e-6) * float(exact.abs().max())
        assert float((found.double() - exact).abs().max()) <= budget, f"request {request}"
