"""What the soak test of a server detects, and what makes it fail; whole servers are in ``test_engine_soak.py``."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import soak_watch as watch
import tasks
from soak_clients import Answer, Mix, Request, Tally, send
from soak_report import Report

from minference_vllm.core.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT

PROMPT = tasks.needle(300, 0.5, 1)
RIGHT = {"choices": [{"text": f" {PROMPT.answer} ."}], "usage": {"prompt_tokens": 300}}
STATS: dict[str, Any] = {
    "sparse_chunks": 4,
    "sparse_tokens": 7000,
    "dense_chunks": {BELOW_MIN_CONTEXT: 3},
    "computed_pairs": 25.0,
    "dense_pairs": 100.0,
    "density": 0.25,
    "overflowed_tiles": 0,
    "heads": [
        {
            "layer": 0,
            "head": 1,
            "audited_chunks": 2,
            "recall": 0.9,
            "least_recall": 0.8,
            "value_recall": 0.9,
            "least_value_recall": 0.7,
            "chunks_with_more_keys": 0,
            "chunks_run_densely": 0,
        }
    ],
}


# Requests


class Server(ThreadingHTTPServer):
    """Answers with ``reply``; counts the connections that were closed before it finished."""

    daemon_threads = True
    reply: Callable[[Any], None]
    closed = 0


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            server.reply(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def answer(text: bytes, status: int = 200) -> Callable[[Any], None]:
    def reply(handler: Any) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(text)

    return reply


def slowly(handler: Any) -> None:
    """Stream until the client disconnects."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b'data: {"choices": [{"text": " 1"}]}\n\n')
            time.sleep(0.02)
    except OSError:
        handler.server.closed += 1


def ask(server: Server, killed: bool = False, **request: Any) -> Tally:
    tally, event = Tally(), threading.Event()
    if killed:
        event.set()
    url = f"http://127.0.0.1:{server.server_port}"
    send(url, "model", Request(PROMPT, 6, **{"stream": False, **request}), tally, event)
    assert tally.sent == tally.done == 1
    return tally


def test_answers_are_checked(server: Server) -> None:
    server.reply = answer(json.dumps(RIGHT).encode())
    assert ask(server).right == 1
    server.reply = answer(json.dumps({**RIGHT, "choices": [{"text": "0 0 0 0 ."}]}).encode())
    assert [found.text for _, found in ask(server).wrong] == ["0 0 0 0 ."]
    server.reply = answer(json.dumps({**RIGHT, "usage": {"prompt_tokens": 299}}).encode())
    assert list(ask(server).problems) == ["a prompt of 300 tokens was counted as 299"]


def test_a_stream_is_put_together(server: Server) -> None:
    words = [f" {word}" for word in [*PROMPT.answer.split(), "."]]
    parts = [{"choices": [{"text": word}]} for word in words] + [{"choices": [], "usage": {"prompt_tokens": 300}}]
    lines = [f"data: {json.dumps(part)}\n\n" for part in parts]
    server.reply = answer("".join([*lines, "data: [DONE]\n\n"]).encode())
    tally = ask(server, stream=True)
    assert tally.right == tally.streamed == 1 and tally.first_tokens[0][0] == 300
    server.reply = answer("".join(lines).encode())
    assert ask(server, stream=True).failed == 1, "it breaks off before its end"


def test_a_request_is_cancelled_by_closing_its_connection(server: Server) -> None:
    server.reply = slowly
    tally = ask(server, stream=True, cancel_after=0.1)
    assert tally.cancelled == 1 and not tally.problems
    end = time.monotonic() + 10
    while not server.closed and time.monotonic() < end:
        time.sleep(0.01)
    assert server.closed == 1


def test_broken_connections_are_problems_but_for_a_kill(server: Server) -> None:
    server.reply = lambda handler: handler.connection.close()
    assert ask(server).failed == 1
    tally = ask(server, killed=True)
    assert tally.cut_off == 1 and not tally.problems


@pytest.mark.parametrize(("text", "status"), [(b"{", 200), (b'{"error": "full"}', 200), (b"busy", 503)])
def test_other_answers_are_problems(server: Server, text: bytes, status: int) -> None:
    server.reply = answer(text, status)
    assert ask(server).failed == 1


def test_requests_are_of_every_sort() -> None:
    mix = Mix(random.Random(1), 4000)
    drawn = [mix.draw(1e-3) for _ in range(400)]
    assert 0.15 < sum(request.cancel_after is not None for request in drawn) / 400 < 0.25
    assert 0.4 < sum(request.stream for request in drawn) / 400 < 0.6
    begins = Counter(request.prompt.text[:60] for request in drawn)
    assert 0.2 < sum(count for count in begins.values() if count > 1) / 400 < 0.5, "texts that others begin with"
    lengths = [request.prompt.tokens for request in drawn]
    assert min(lengths) < 250 and 2000 < max(lengths) <= 4000
    for request in drawn:
        assert request.prompt.tokens == len(request.prompt.text.split()) + 1
        key = request.prompt.text.split()[-5:-3]
        assert f"{' '.join(key)} is {request.prompt.answer} ." in request.prompt.text


# Memory, log, counters


def test_growth_is_the_slope_of_memory() -> None:
    samples = [(second, (1000 + 90 * second / 3600) * watch.MIB) for second in range(0, 1200, 2)]
    found = watch.growth(samples)
    assert found is not None and found.minutes == 20
    assert found.slope == pytest.approx(90) and found.error == pytest.approx(0, abs=1e-6)
    assert watch.growth(samples[:60]) is None


def test_the_error_of_a_slope_covers_noise() -> None:
    rng = random.Random(1)
    levels = [rng.gauss(0, 5) for _ in range(20)]
    found = watch.growth([(second, (1000 + levels[second // 60]) * watch.MIB) for second in range(1200)])
    assert found is not None and abs(found.slope) < 3 * found.error and 5 < found.error < 20


def test_memory_is_that_of_all_processes_of_a_group() -> None:
    source = "import os, sys, time\npid = os.fork()\nheld = b'x' * (50 << 20)\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() and process.stdout.readline()
        held = sum(watch.resident(process.pid).values())
        os.killpg(process.pid, 9)
    assert 100 < held / watch.MIB < 200
    end = time.monotonic() + 30
    while watch.resident(process.pid) and time.monotonic() < end:  # the other one may need a moment
        time.sleep(0.05)
    assert watch.resident(process.pid) == {}


def test_lines_that_must_not_be_in_a_log() -> None:
    bad = [
        "(Worker pid=1) ERROR 11-29 04:08:46 [core.py:1] failed",
        "Traceback (most recent call last):",
        "(Worker) INFO minference: some batches are served densely: lengths are on the GPU only",
    ]
    good = [
        "(Worker) INFO minference: patterns from shipped 'low_rank'",
        "(Worker) INFO minference: 3 prefill chunks (6144 tokens) sparse, density 0.1; dense: 2 (prompt so far ...)",
        'INFO:     127.0.0.1:1 - "POST /v1/completions HTTP/1.1" 200 OK',
    ]
    assert watch.log_problems("\n".join([*good, *bad])) == bad


def test_what_vllm_calls_an_error_when_it_ends_is_none() -> None:
    told = "(APIServer pid=1) INFO 11-29 09:11:35 [launcher.py:254] [shutdown] API server: shutdown triggered"
    vllms = "(APIServer pid=1) ERROR 11-29 09:11:35 [async_llm.py:906] AsyncLLM output_handler failed."
    ours = '(Worker pid=2) ERROR 11-29 09:11:35 [worker.py:1]   File "site-packages/minference_vllm/plugin.py", line 3'
    assert watch.log_problems("\n".join([told, vllms])) == []
    assert watch.log_problems("\n".join([vllms, told, vllms, ours, "Segmentation fault"])) == [
        vllms, ours, "Segmentation fault",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1000, (0, 0, {BELOW_MIN_CONTEXT: 1})),
        (1024, (1, 1024, {})),
        (2048, (1, 2048, {})),
        (2060, (1, 2048, {})),  # a rest below 16 tokens counts as a decode
        (2148, (1, 2048, {BELOW_MIN_CHUNK: 1})),
        (5000, (3, 5000, {})),
    ],
)
def test_what_a_prompt_adds_to_the_counters(tokens: int, expected: tuple[int, int, dict[str, int]]) -> None:
    assert watch.account(tokens, 2048, 1024, 256) == expected


def test_counters_that_agree() -> None:
    before = STATS | {"sparse_chunks": 3, "dense_chunks": {}}
    assert watch.stats_problems(STATS, None, 256) == watch.stats_problems(STATS, before, 256) == []
    fresh = {**dict.fromkeys(STATS, 0), "dense_chunks": {}, "heads": [], "density": 1.0}
    assert watch.stats_problems(fresh, None, 256) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sparse_tokens": 1000}, "shorter than min_chunk"),
        ({"computed_pairs": 101.0, "density": 1.01}, "more pairs"),
        ({"density": 0.3}, "not that of the pairs"),
        ({"computed_pairs": 0.0, "density": 0.0}, "no pairs"),
        ({"overflowed_tiles": 1}, "without room"),
        ({"dense_chunks": {"sliding window": 1}}, "unexpected reasons"),
        ({"sparse_chunks": 1, "sparse_tokens": 7000}, "more audits than chunks"),
        ({"head": {"least_recall": 0.95}}, "no share"),
        ({"head": {"value_recall": 1.1}}, "no share"),
        ({"head": {"chunks_run_densely": 1}}, "without a floor"),
        ({"sparse_chunks": 3}, "went back"),
        ({"dense_chunks": {}}, "went back"),
    ],
)
def test_counters_that_do_not(changes: dict[str, Any], problem: str) -> None:
    found = copy.deepcopy(STATS)
    found["heads"][0] |= changes.pop("head", {})
    (line,) = watch.stats_problems(found | changes, STATS if problem == "went back" else None, 256)
    assert problem in line


def test_one_prompt_is_accounted_for() -> None:
    expected = watch.account(2148, 2048, 1024, 256)
    after = STATS | {
        "sparse_chunks": 5,
        "sparse_tokens": 9048,
        "dense_chunks": {BELOW_MIN_CONTEXT: 3, BELOW_MIN_CHUNK: 1},
    }
    assert watch.account_problems(STATS, after, expected) == []
    assert watch.account_problems(STATS, after | {"sparse_chunks": 6}, expected)
    assert watch.account_problems(STATS, after | {"dense_chunks": {BELOW_MIN_CONTEXT: 4}}, expected)


# Summary


WRONG = Request(PROMPT, 6, True), Answer("0 .", 300, 0.5)


def reported(dense_wrong: int = 0, growth: float = 0.0, metrics: Any = None, **changes: Any) -> Report:
    """The report of a run in which everything happened, with these changes to its tally."""
    happened = {
        "sent": 9, "right": 5, "wrong": [WRONG] * dense_wrong, "cancelled": 3, "cut_off": 1, "streamed": 2,
        "first_tokens": [(300, 0.5), (3000, 2.0)],
    }  # fmt: skip
    tally = Tally(**happened | changes)
    tally.sent += dense_wrong
    memory = [
        (second, {"server": 2000 << 20, "worker": int(growth * second / 3600 * watch.MIB)}) for second in range(960)
    ]
    counted = {"vllm:num_preemptions_total": 4.0, "vllm:prefix_cache_hits_total": 256.0, **(metrics or {})}
    server: Any = SimpleNamespace(memory=memory, stats=STATS, metrics=counted)
    return Report(tally, [server, server], dense_wrong, 60.0, 4000, {"note": "a test"})


def test_a_run_that_passes() -> None:
    report = reported(growth=30.0, dense_wrong=1)
    rows = dict(line.split("  ", 1) for line in report.text().splitlines() if "  " in line.strip())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert report.problems == [] and rows["result"] == "passed"
    assert rows["preemptions"] == "8" and rows["restarts"] == "1" and rows["note"] == "a test"
    assert rows["right"] == "5; wrong by vLLM's own backend, too: 1; by ours alone: 0"
    assert rows["memory growth"].startswith("+30.0 ± 0.0 MiB per hour over 12 minutes")
    assert rows["first token"].startswith("p50 1.25 s, p99 2.00 s")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"growth": 61.0}, "memory grows by 61.0 MiB per hour, more than 60"),
        ({"wrong": [WRONG], "sent": 10}, "1 of 6 answers are wrong where vLLM's own backend is right"),
        ({"sent": 10}, "1 requests have no end: a client failed"),
        ({"cancelled": 0, "sent": 6}, "not tested: there were no cancelled requests"),
        ({"metrics": {"vllm:num_preemptions_total": 0.0}}, "not tested: there were no preemptions"),
        ({"metrics": {"vllm:prefix_cache_hits_total": 0.0}}, "not tested: there were no hits of the prefix cache"),
        ({"problems": Counter({"a client hangs": 2})}, "2 times: a client hangs"),
    ],
)
def test_a_run_that_fails(changes: dict[str, Any], problem: str) -> None:
    report = reported(**changes)
    assert report.problems == [problem]
    assert report.text().endswith(f"result                 failed\nproblem: {problem}\n")
