"""The routes that show the counters, attached as vLLM does, with a stand-in for the engine."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from minference_vllm.backend import compat
from minference_vllm.backend.counters import Counters
from minference_vllm.backend.endpoint import StatsEndpoint

vllm_interface = pytest.importorskip("vllm.plugins.endpoint_plugins.interface")


def client(engine: Any) -> TestClient:
    app, endpoint = FastAPI(), StatsEndpoint()
    assert isinstance(endpoint, vllm_interface.EndpointPlugin)
    endpoint.attach_router(app)
    asyncio.run(endpoint.init_state(engine, app.state, Namespace()))
    return TestClient(app)


def engine(*ranks: Counters) -> Any:
    async def collective_rpc(method: str) -> list[dict[str, Any]]:
        assert method == "minference_stats"
        return [counters.report() for counters in ranks]

    return SimpleNamespace(vllm_config=None, collective_rpc=collective_rpc)


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    monkeypatch.setattr("minference_vllm.backend.endpoint.selects_minference", lambda config: True)
    counters = Counters(sparse_chunks=3, sparse_tokens=700)
    counters.dense_chunks['too "short"'] = 2
    counters.count_layer(30.0, 120.0)
    counters.count_layer(3.0, 12.0, name="a_shape")
    counters.count_recall(1, 0, torch.tensor([[0.5, 0.75], [0.25, 0.625]], dtype=torch.float64))
    counters.count_raised(1, 0, dense=False)
    return counters


def test_stats_are_the_report(counters: Counters) -> None:
    assert client(engine(counters)).get("/minference/stats").json() == {**counters.report(), "engines": 1}


def test_every_data_parallel_engine_is_asked(counters: Counters) -> None:
    """vLLM's own ``collective_rpc`` returns the answer of the first one only."""
    ranks = {b"first": counters, b"second": Counters(sparse_chunks=4)}

    async def call(method: str, *args: Any, engine: bytes) -> Any:
        assert (method, args) == ("collective_rpc", ("minference_stats", None, (), None))
        return [ranks[engine].report()]

    served = engine(counters)
    served.engine_core = SimpleNamespace(core_engines=list(ranks), _call_utility_async=call)
    found = client(served)
    stats = found.get("/minference/stats").json()
    assert (stats["engines"], stats["sparse_chunks"], stats["sparse_tokens"]) == (2, 3 + 4, 700)
    assert {"minference_engines 2.0", "minference_sparse_chunks_total 7.0"} <= set(
        found.get("/minference/metrics").text.splitlines()
    )


def test_metrics_are_prometheus_text(counters: Counters) -> None:
    found = client(engine(counters)).get("/minference/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    lines = found.text.splitlines()
    for line in (
        "minference_sparse_chunks_total 3.0",
        "minference_sparse_tokens_total 700.0",
        "minference_computed_pairs_total 33.0",
        "minference_dense_pairs_total 132.0",
        'minference_asked_computed_pairs_total{patterns="a_shape"} 3.0',
        'minference_asked_dense_pairs_total{patterns="a_shape"} 12.0',
        "minference_overflowed_tiles_total 0.0",
        'minference_dense_chunks_total{reason="too \\"short\\""} 2.0',
        'minference_recall{head="1",layer="1"} 0.75',
        'minference_least_recall{head="0",layer="1"} 0.5',
        'minference_value_recall{head="1",layer="1"} 0.625',
        'minference_least_value_recall{head="0",layer="1"} 0.25',
        'minference_audited_chunks_total{head="0",layer="1"} 1.0',
        'minference_raised_chunks_total{head="0",layer="1",to="more_keys"} 1.0',
        'minference_raised_chunks_total{head="0",layer="1",to="dense"} 0.0',
    ):
        assert line in lines, found.text


@pytest.mark.parametrize("route", ["stats", "metrics"])
@pytest.mark.parametrize("with_engine", [False, True], ids=["no engine", "another backend"])
def test_a_server_of_another_backend_says_so(route: str, with_engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minference_vllm.backend.endpoint.selects_minference", lambda config: False)
    found = client(engine() if with_engine else None).get(f"/minference/{route}")
    assert found.status_code == 404 and "does not run the attention backend minference" in found.text


def test_workers_know_the_method() -> None:
    worker_base = pytest.importorskip("vllm.v1.worker.worker_base")
    compat.add_worker_method("minference_test", lambda worker: ("called with", worker))
    try:
        worker = object.__new__(worker_base.WorkerBase)
        assert worker.minference_test() == ("called with", worker)
    finally:
        del worker_base.WorkerBase.minference_test
