"""Statistics over HTTP: ``GET /minference/stats`` (JSON) and ``/minference/metrics`` (Prometheus).

vLLM adds such routes to its server only if ``VLLM_PLUGINS`` names them; versions without endpoint plugins never do.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from minference_vllm.backend.compat import ask_every_engine, selects_minference
from minference_vllm.backend.counters import added, merged
from minference_vllm.backend.runtime import STATS_METHOD


class StatsEndpoint:
    """vLLM's ``EndpointPlugin``."""

    name = "minference"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/minference/stats", stats, methods=["GET"])
        app.add_api_route("/minference/metrics", metrics, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        state.minference_engine = engine_client


async def stats(request: Request) -> dict[str, Any]:
    """Totals since the server's start (see ``Counters.report``), over all data-parallel engines that this server sends
    requests to, and the number of these engines."""
    engine = request.app.state.minference_engine
    if engine is None or not selects_minference(engine.vllm_config):
        raise HTTPException(404, "this server does not run the attention backend minference")
    reports = [merged(workers) for workers in await ask_every_engine(engine, STATS_METHOD)]
    return {**added(reports), "engines": len(reports)}


async def metrics(request: Request) -> Response:
    """The same totals as Prometheus text."""
    registry = CollectorRegistry()
    registry.register(_Collector(await stats(request)))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Collector:
    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report

    def collect(self) -> Iterator[Metric]:
        totals = {
            "sparse_chunks": "Prefill chunks served sparsely",
            "sparse_tokens": "Tokens of these chunks",
            "computed_pairs": "Query-key pairs computed in them, over layers and heads",
            "dense_pairs": "Query-key pairs that dense attention would have computed there",
            "overflowed_tiles": "Query tiles that ran densely because their selection had no room",
        }
        for name, text in totals.items():
            yield CounterMetricFamily(f"minference_{name}", text, value=self.report[name])
        yield GaugeMetricFamily(
            "minference_engines", "Data-parallel engines counted here", value=self.report["engines"]
        )
        dense = CounterMetricFamily("minference_dense_chunks", "Prefill chunks left dense", labels=["reason"])
        for reason, count in self.report["dense_chunks"].items():
            dense.add_metric([reason], count)
        yield dense
        for name, text in totals.items():
            if name != "overflowed_tiles":
                asked = CounterMetricFamily(
                    f"minference_asked_{name}", f"{text}: of requests that asked for patterns", labels=["patterns"]
                )
                for patterns, work in self.report["asked_by_requests"].items():
                    asked.add_metric([patterns], work[name])
                yield asked
        place = ["layer", "head"]
        recall = GaugeMetricFamily("minference_recall", "Mean audited attention recall", labels=place)
        least = GaugeMetricFamily("minference_least_recall", "Least audited attention recall of a chunk", labels=place)
        value = GaugeMetricFamily("minference_value_recall", "Mean audited recall by weight times value", labels=place)
        least_value = GaugeMetricFamily(
            "minference_least_value_recall", "Least audited recall by weight times value of a chunk", labels=place
        )
        audited = CounterMetricFamily("minference_audited_chunks", "Chunks whose recall was audited", labels=place)
        raised = CounterMetricFamily(
            "minference_raised_chunks", "Chunks that ran with more keys because of recall_floor", labels=[*place, "to"]
        )
        for head in self.report["heads"]:
            at = [str(head["layer"]), str(head["head"])]
            if head["audited_chunks"]:
                recall.add_metric(at, head["recall"])
                least.add_metric(at, head["least_recall"])
                value.add_metric(at, head["value_recall"])
                least_value.add_metric(at, head["least_value_recall"])
            audited.add_metric(at, head["audited_chunks"])
            raised.add_metric([*at, "more_keys"], head["chunks_with_more_keys"])
            raised.add_metric([*at, "dense"], head["chunks_run_densely"])
        yield from (recall, least, value, least_value, audited, raised)
