"""``vllm serve MODEL --attention-backend minference``, asked through the ``openai`` client."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def server(
    llama: Path,
    served_at: Any,
    with_minference: Callable[..., Any],
    sparse_patterns: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Path]]:
    """Address and log of a server with vLLM's defaults."""
    log = tmp_path_factory.mktemp("server") / "log"
    additional = json.dumps(with_minference(sparse_patterns)["additional_config"])
    arguments = ["--max-model-len", "4096", "--max-num-batched-tokens", "1024"]
    arguments += ["--attention-backend", "minference", "--additional-config", additional]
    # Without this vLLM does not add the routes of plugins.
    with served_at(llama, arguments, log, VLLM_PLUGINS="minference") as address:
        yield address, log


@pytest.fixture(scope="module")
def client(server: tuple[str, Path]) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=300)


def words(prompt: Callable[..., list[int]], length: int, seed: int) -> str:
    return " ".join(f"w{token}" for token in prompt(length, seed))


def test_a_long_prompt_is_answered(client: Any, prompt: Callable[..., list[int]]) -> None:
    answer = client.completions.create(model="tiny", prompt=words(prompt, 2000, 0), max_tokens=8, temperature=0)
    assert answer.usage.prompt_tokens == 2000
    assert answer.usage.completion_tokens == 8
    assert len(answer.choices[0].text.split()) == 8


def test_streaming_gives_the_same_text(client: Any, prompt: Callable[..., list[int]]) -> None:
    # Salts keep the second request from reusing the first one's cache, which would change its chunk.
    arguments = {"model": "tiny", "prompt": words(prompt, 1500, 1), "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**arguments, extra_body={"cache_salt": "whole"})
    stream = client.completions.create(**arguments, stream=True, extra_body={"cache_salt": "stream"})
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].text


def test_concurrent_requests_are_all_answered(client: Any, prompt: Callable[..., list[int]]) -> None:
    lengths = [2500, 40, 1200, 700, 1, 1800]

    def ask(seed: int, length: int) -> tuple[int, int]:
        answer = client.completions.create(
            model="tiny", prompt=words(prompt, length, 100 + seed), max_tokens=16, temperature=0
        )
        return answer.usage.prompt_tokens, answer.usage.completion_tokens

    with ThreadPoolExecutor(len(lengths)) as pool:
        answers = list(pool.map(ask, range(len(lengths)), lengths))
    assert answers == [(length, 16) for length in lengths]


def test_a_repeated_prompt_is_served_from_the_prefix_cache(client: Any, prompt: Callable[..., list[int]]) -> None:
    arguments = {"model": "tiny", "prompt": words(prompt, 2000, 5), "max_tokens": 4, "temperature": 0}
    first, second = client.completions.create(**arguments), client.completions.create(**arguments)
    assert first.usage.completion_tokens == second.usage.completion_tokens == 4


def test_a_prompt_beyond_the_models_length_is_refused_and_the_server_goes_on(
    client: Any, prompt: Callable[..., list[int]]
) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError):
        client.completions.create(model="tiny", prompt=words(prompt, 5000, 6), max_tokens=4)
    answer = client.completions.create(model="tiny", prompt=words(prompt, 600, 6), max_tokens=4, temperature=0)
    assert answer.usage.completion_tokens == 4


def stats_of(server: tuple[str, Path]) -> Any:
    with urllib.request.urlopen(f"{server[0]}/minference/stats", timeout=60) as answer:
        return json.load(answer)


def test_a_request_may_ask_for_dense_prefill_or_other_patterns(
    server: tuple[str, Path], client: Any, prompt: Callable[..., list[int]]
) -> None:
    """Even if the prefix cache holds the same prompt, computed with the server's patterns."""
    arguments = {"model": "tiny", "prompt": words(prompt, 2000, 8), "max_tokens": 4, "temperature": 0}

    def ask(**extra: Any) -> tuple[int, int, list[int]]:
        """Chunks that a request adds: sparse ones, those dense on request, and those of each requested pattern."""
        before = stats_of(server)
        assert client.completions.create(**arguments, extra_body=extra).usage.completion_tokens == 4
        after = stats_of(server)
        dense = [report["dense_chunks"].get("the request asked for it", 0) for report in (before, after)]
        asked = [
            work["sparse_chunks"] - before["asked_by_requests"].get(name, {}).get("sparse_chunks", 0)
            for name, work in after["asked_by_requests"].items()
        ]
        return after["sparse_chunks"] - before["sparse_chunks"], dense[1] - dense[0], asked

    assert ask() == (2, 0, [])
    assert ask(vllm_xargs={"minference": "dense"}) == (0, 2, [])
    assert ask(vllm_xargs={"minference": "a_shape(64, 128)"}) == (2, 0, [2])
    sparse, dense, _ = ask(vllm_xargs={"minference": "default"})
    assert sparse < 2 and dense == 0, "from the cache"
    assert stats_of(server)["asked_by_requests"]["a_shape(sink=64, local=128)"]["density"] < 0.5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a_shap", "asks for 'a_shap'; allowed are default (what the server runs), a_shape, "),
        (7, "asks for 7; allowed are default"),
        ("a_shape(-1)", "a_shape.sink = -1: must be a whole number from 0"),
        ("antidiagonal(48)", "antidiagonal stride 48 must divide the page size, here 128"),
        ("/etc/hostname", "asks for '/etc/hostname'; allowed are default"),
    ],
)
def test_what_may_not_be_asked_for_is_a_bad_request(
    value: Any, message: str, stream: bool, server: tuple[str, Path], client: Any
) -> None:
    from openai import BadRequestError

    before = stats_of(server)
    with pytest.raises(BadRequestError) as error:
        client.completions.create(
            model="tiny", prompt="w1 w2", max_tokens=1, stream=stream, extra_body={"vllm_xargs": {"minference": value}}
        )
    assert error.value.status_code == 400 and message in str(error.value)
    assert stats_of(server) == before
    assert client.completions.create(model="tiny", prompt="w1 w2", max_tokens=1).usage.completion_tokens == 1


def test_the_log_tells_what_ran(server: tuple[str, Path], client: Any, density_in: Callable[[str], float]) -> None:
    log = server[1].read_text()
    assert "Using MINFERENCE attention backend on CPU" in log
    assert 0.05 < density_in(log) < 0.9


def test_what_was_served_can_be_asked_for(server: tuple[str, Path], client: Any) -> None:
    stats = stats_of(server)
    assert stats["sparse_chunks"] > 0 and 0.05 < stats["density"] < 0.9 and stats["dense_chunks"]
    assert {head["layer"] for head in stats["heads"]} <= {0, 1, 2}
    assert stats["heads"] and all(0 < head["recall"] <= 1 for head in stats["heads"] if head["audited_chunks"])
    with urllib.request.urlopen(f"{server[0]}/minference/metrics", timeout=60) as answer:
        assert f"minference_sparse_chunks_total {stats['sparse_chunks']:.1f}" in answer.read().decode()
