"""What single requests may ask for, and how their rows in a batch are identified."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from minference_vllm.backend import request_patterns, vllm_requests
from minference_vllm.backend.request_patterns import ASKED_DENSE, UNKNOWN, UNTOLD, Asked, RequestRows, asked_by
from minference_vllm.backend.runtime import Runtime
from minference_vllm.patterns.file import PatternFile, load_pattern_file
from minference_vllm.patterns.kinds import AShape, Dense, LowRank, PatternError
from minference_vllm.settings import Settings

OWN = PatternFile(default=AShape(sink=7, local=9))


def params(value: Any) -> Any:
    return SimpleNamespace(extra_args={"minference": value, "somebody else's": 1})


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        ("a_shape", AShape()),
        ("default_cuda", load_pattern_file("default_cuda").default),
        ("low_rank(16, gamma=0.5)", LowRank(rank=16, gamma=0.5)),
        ("a_shape(128, 1024)", AShape(sink=128, local=1024)),
    ],
)
def test_patterns_are_asked_for_by_shipped_names_or_written_out(value: str, pattern: Any) -> None:
    found = asked_by(params(value), OWN)
    assert found is not None and found.patterns is not None
    assert (found.name, found.dense) == (str(pattern), None)
    assert found.patterns.for_layer(2, 3) == (pattern,) * 3


@pytest.mark.parametrize("value", ["dense", "dense()"])
def test_dense_is_a_reason(value: str) -> None:
    found = asked_by(params(value), OWN)
    assert found == Asked("dense", load_pattern_file("dense" if value == "dense" else value), ASKED_DENSE)


@pytest.mark.parametrize(
    "asked",
    [
        SimpleNamespace(extra_args=None),
        SimpleNamespace(extra_args={"other": "dense"}),
        SimpleNamespace(),
        None,
        params(None),
        params("default"),
        params("a_shape(7, 9)"),
    ],
    ids=str,
)
def test_what_the_server_runs_is_nothing_to_ask_for(asked: Any) -> None:
    assert asked_by(asked, OWN) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "a_shap",
            r"asks for 'a_shap'; allowed are default .*, a_shape, .*, dense, .*; did you mean 'a_shape'",
        ),
        ("", "asks for ''; allowed are default"),
        (7, "asks for 7; allowed are default .* one pattern for all heads: low_rank"),
        (["dense"], r"asks for \['dense'\]; allowed are"),
        (True, "asks for True; allowed are"),
        ({"kind": "dense"}, "asks for {'kind': 'dense'}; allowed are"),
        ("a_shape(-1)", "a_shape.sink = -1: must be a whole number from 0"),
        ("cover(1)", "unknown pattern kind; allowed are dense, a_shape"),
        (f"a_shape({'0' * 190}1, 1)", "asks for 'a_shape.*; allowed are"),
        ("low_rank(" + "[" * 100_000, r"asks for 'low_rank\(\[\[\[\[.*; allowed are"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_all_else_is_refused_with_what_is_allowed(value: Any, message: str) -> None:
    with pytest.raises(PatternError, match=message) as error:
        asked_by(params(value), OWN)
    assert str(error.value).startswith("minference: a request asks for ") and len(str(error.value)) < 700


def test_no_file_is_read_for_a_request(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would choose its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"schema_version": 1, "default": {"kind": "dense"}}')
    assert load_pattern_file("mine.json").default == Dense()
    for path in ("mine.json", str(tmp_path / "mine.json")):
        with pytest.raises(PatternError, match="allowed are default"):
            asked_by(params(path), OWN)


# Rows of batches


def step(scheduled: dict[str, int], finished: Sequence[str] = (), **new: Any) -> Any:
    """The parts of vLLM's ``SchedulerOutput`` that are read: new tokens per request, and what new requests ask for."""
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[SimpleNamespace(req_id=name, sampling_params=params(value)) for name, value in new.items()],
        num_scheduled_tokens=scheduled,
    )


def rows(requests: RequestRows, lengths: list[int]) -> dict[int, str]:
    return {row: asked.dense or asked.name for row, asked in requests.of_rows(lengths).items()}


def test_rows_are_found_in_every_step_whatever_their_order() -> None:
    requests = RequestRows()
    requests.begin(step({"a": 600, "b": 700, "c": 1}, a="dense", b=None, c="a_shape"), OWN)
    requests.stand(["c", "b", "a"])
    assert rows(requests, [1, 700, 600]) == {0: str(AShape()), 2: ASKED_DENSE}
    assert rows(requests, [1, 700, 600, 0, 0]) == {0: str(AShape()), 2: ASKED_DENSE}, "as padded for a CUDA graph"
    requests.end()
    assert rows(requests, [1, 700, 600]) == {}, "a dummy batch between steps"
    requests.begin(step({"a": 400, "b": 300}), OWN)
    requests.stand(["a", "b"])
    assert rows(requests, [400, 300]) == {0: ASKED_DENSE}, "the next chunk"


def test_a_preempted_request_is_still_the_same_and_a_finished_one_is_forgotten() -> None:
    requests = RequestRows()
    requests.begin(step({"a": 600, "b": 600}, a="dense", b=None), OWN)
    requests.begin(step({"b": 1}), OWN)
    requests.begin(step({"b": 1, "a": 601}), OWN)  # resumed: a cached request for model runner V1
    requests.stand(["b", "a"])
    assert rows(requests, [1, 601]) == {1: ASKED_DENSE}
    requests.begin(step({"a": 601}, a="dense"), OWN)  # resumed: a new request for V2
    requests.stand(["a"])
    assert rows(requests, [601]) == {0: ASKED_DENSE}
    requests.begin(step({"a": 700}, finished=["a"], a=None), OWN)  # another request of the same name
    requests.stand(["a"])
    assert rows(requests, [700]) == {}


@pytest.mark.parametrize(
    ("order", "lengths"),
    [(["a", "b"], [600]), (["a", "b"], [700, 600]), ([], [600, 700]), (["a", "b"], [600, 700, 50])],
    ids=["a micro-batch", "another order", "no order", "more rows"],
)
def test_rows_that_cannot_be_told_are_all_dense(order: list[str], lengths: list[int]) -> None:
    requests = RequestRows()
    requests.begin(step({"a": 600, "b": 700}, a=None, b=None), OWN)
    requests.stand(order)
    assert rows(requests, lengths) == {}, "nobody asked for anything"
    requests.begin(step({"a": 600, "b": 700}, b="dense"), OWN)
    requests.stand(order)
    assert rows(requests, lengths) == dict.fromkeys(range(len(lengths)), UNTOLD)


def test_drafted_tokens_that_were_dropped_make_no_other_rows() -> None:
    requests = RequestRows()
    requests.begin(step({"a": 5, "b": 700}, b="dense"), OWN)
    requests.stand(["a", "b"])
    assert rows(requests, [2, 700]) == {1: ASKED_DENSE}


def test_what_came_past_the_front_end_is_dense_and_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(request_patterns.logger, "warning_once", lambda text, *values: lines.append(text % values))
    requests = RequestRows()
    requests.begin(step({"a": 600, "b": 600}, a="no_such", b=5), OWN)
    requests.stand(["a", "b"])
    assert rows(requests, [600, 600]) == {0: UNKNOWN, 1: UNKNOWN}
    assert len(lines) == 2 and all("it is served densely" in line for line in lines)
    assert "asks for 'no_such'; allowed are default" in lines[0]


# vLLM's model runners


@pytest.mark.parametrize("module", vllm_requests.RUNNERS)
def test_a_model_runner_tells_what_it_executes(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of vLLM's model runners, with stand-ins for their methods. They keep the order in different places."""
    runtime = Runtime(Settings(), OWN, "a test")
    selected, seen = [True], []
    method, _ = vllm_requests.RUNNERS[module]

    def execute_model(self: Any, scheduler_output: Any, *others: Any, fails: bool = False) -> Any:
        returned = getattr(self, method)(scheduler_output)
        seen.append(rows(runtime.requests, [700, 600]))
        if fails:
            raise RuntimeError("in the model")
        return returned, others

    batch = SimpleNamespace(req_ids=["b", "a"])
    keeps_it = method == "_prepare_inputs"
    members = {
        "vllm_config": "a configuration",
        "input_batch": batch if keeps_it else None,
        "execute_model": execute_model,
        method: lambda self, scheduler_output: "logits" if keeps_it else batch,
    }
    found = ModuleType(module)
    found.GPUModelRunner = type("GPUModelRunner", (), members)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, found)
    monkeypatch.setattr(vllm_requests, "selects_minference", lambda config: selected[-1])
    monkeypatch.setattr("minference_vllm.backend.runtime.runtime_for", lambda config: runtime)
    vllm_requests._follow_requests(module)
    runner = found.GPUModelRunner()
    given = step({"a": 600, "b": 700}, a="dense", b=None)
    assert runner.execute_model(given, "intermediate") == ("logits" if keeps_it else batch, ("intermediate",))
    with pytest.raises(RuntimeError, match="in the model"):
        runner.execute_model(given, fails=True)
    assert seen == [{1: ASKED_DENSE}] * 2
    assert rows(runtime.requests, [700, 600]) == {}, "the step is over"
    selected.append(False)
    runner.execute_model(given)
    assert seen[-1] == {}, "another backend's engine"
