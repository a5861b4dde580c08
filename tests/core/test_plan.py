"""The plan of a batch: which chunks run sparsely, which requests stay together, and where tiles begin."""

from __future__ import annotations

from itertools import accumulate

import pytest

from minference_vllm.core.plan import BELOW_MIN_CHUNK, BELOW_MIN_CONTEXT, Chunk, Plan, plan_batch

MIN_CONTEXT, MIN_CHUNK = 1000, 100


def plan(*requests: tuple[int, int]) -> Plan:
    """Requests as (context, new tokens)."""
    starts = [0, *accumulate(new for _, new in requests)]
    return plan_batch(starts, [context + new for context, new in requests], MIN_CONTEXT, MIN_CHUNK)


def test_an_empty_batch() -> None:
    assert plan() == Plan((), (), ())


def test_decodes_alone_are_one_dense_run_without_reasons() -> None:
    assert plan((5000, 1), (3, 1), (70000, 1)) == Plan((), ((0, 3),), ())


def test_one_long_prompt() -> None:
    assert plan((0, 4096)) == Plan((Chunk(0, 0, 0, 4096),), (), ())


def test_a_mixed_batch_keeps_neighbours_together() -> None:
    found = plan(
        (5000, 1),  # decode
        (5000, 4),  # verification of drafted tokens
        (2048, 512),  # chunk of a long prompt
        (0, 600),  # short prompt
        (5000, 1),  # decode
        (0, 2048),  # long prompt
        (4096, 1024),  # chunk of another
        (4096, 40),  # the last few tokens of a third
    )
    assert found.sparse == (Chunk(2, 5, 2048, 2560), Chunk(5, 1118, 0, 2048), Chunk(6, 3166, 4096, 5120))
    assert found.dense_runs == ((0, 2), (3, 5), (7, 8))
    assert found.dense_reasons == (BELOW_MIN_CONTEXT, BELOW_MIN_CHUNK)


def test_chunks_that_end_beyond_the_plain_length_are_nobody_elses() -> None:
    """Including decodes; the rest of the plan does not change."""
    lengths = [3000, 3001, 3001, 4500, 3400]
    found = plan_batch([0, 1, 2, 22, 1522, 1922], lengths, MIN_CONTEXT, MIN_CHUNK, plain_len=3000)
    assert found.far == (Chunk(1, 1, 3000, 3001), Chunk(2, 2, 2981, 3001))
    assert found.sparse == (Chunk(3, 22, 3000, 4500), Chunk(4, 1522, 3000, 3400))
    assert found.dense_runs == ((0, 1),) and found.dense_reasons == (BELOW_MIN_CHUNK,)


@pytest.mark.parametrize(
    ("context", "new", "reason"),
    [
        (MIN_CONTEXT - MIN_CHUNK, MIN_CHUNK, None),
        (MIN_CONTEXT - MIN_CHUNK - 1, MIN_CHUNK, BELOW_MIN_CONTEXT),
        (MIN_CONTEXT - MIN_CHUNK + 1, MIN_CHUNK - 1, BELOW_MIN_CHUNK),
        (0, MIN_CONTEXT, None),
        (0, MIN_CONTEXT - 1, BELOW_MIN_CONTEXT),
        (10**6, MIN_CHUNK, None),
        (10**6, MIN_CHUNK - 1, BELOW_MIN_CHUNK),
    ],
)
def test_thresholds_are_inclusive(context: int, new: int, reason: str | None) -> None:
    found = plan((context, new))
    assert found.dense_reasons == (() if reason is None else (reason,))
    assert found.sparse == ((Chunk(0, 0, context, context + new),) if reason is None else ())


def test_every_request_is_served_exactly_once() -> None:
    requests = [(context, new) for context in (0, 950, 5000) for new in (1, 15, 16, 99, 100, 5000)]
    found = plan(*requests)
    served = [chunk.request for chunk in found.sparse]
    for first, last in found.dense_runs:
        served += range(first, last)
    assert sorted(served) == list(range(len(requests)))
    # Neighbouring dense requests form one run, so two runs are never adjacent.
    assert all(a[1] < b[0] for a, b in zip(found.dense_runs, found.dense_runs[1:], strict=False))


def test_requests_that_asked_for_other_than_the_servers_patterns() -> None:
    """If a request is dense because of its length, that is the reason given."""
    lengths = [3000, 600, 3000, 3000, 3000]
    starts = [0, *accumulate([500, 600, 500, 500, 500])]
    dense, patterns = {0: "asked", 1: "asked", 4: "other"}, {2: "a_shape", 1: "a_shape"}
    found = plan_batch(starts, lengths, MIN_CONTEXT, MIN_CHUNK, dense=dense, patterns=patterns)
    assert found.sparse == (Chunk(2, 1100, 2500, 3000, "a_shape"), Chunk(3, 1600, 2500, 3000))
    assert found.dense_runs == ((0, 2), (4, 5)) and found.dense_reasons == ("asked", BELOW_MIN_CONTEXT, "other")
    beyond = plan_batch(starts, lengths, MIN_CONTEXT, MIN_CHUNK, plain_len=2800, dense=dense)
    assert [chunk.request for chunk in beyond.far] == [0, 4] and beyond.dense_reasons == found.dense_reasons
