"""The benchmark's peers on a GPU: their output under the index, and ours next to a dense kernel other than vLLM's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bench_attention import MAX_ERROR, fill_cache, sampled_check
from peers import PEERS, Problem, Size

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.choose import choose
from minference_vllm.patterns.kinds import BlockSparse, Dense, HeadPattern, VerticalSlash
from minference_vllm.prefill.attend import attend_chunk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
HEADS, KV_HEADS, DIM, CONTEXT, PAGE = 8, 2, 128, 4096, 128
SCALE = DIM**-0.5


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


def skip_unless_it_runs(name: str, chunk: int) -> None:
    reason = PEERS[name].reason(Size("cuda", CONTEXT, chunk, HEADS, DIM, PAGE, PAGE))
    if reason:
        pytest.skip(f"peer {name}: {reason}")


def ours(chunk: int, pattern: HeadPattern) -> tuple[Problem, torch.Tensor]:
    """A problem, and the output of our kernel for its index."""
    torch.manual_seed(0)
    query = torch.randn(chunk, HEADS, DIM, dtype=torch.bfloat16) * 2
    keys, values = (torch.randn(CONTEXT, KV_HEADS, DIM, dtype=torch.bfloat16) for _ in range(2))
    cache, pages = fill_cache(keys, values, PAGE)
    out = torch.full_like(query, torch.nan)
    inputs = Inputs.of(query, cache, pages, Chunk(0, 0, CONTEXT - chunk, CONTEXT), SCALE)
    index = attend_chunk(inputs, [pattern] * HEADS, choose("triton", query.dtype, cache), out)
    return Problem(query, keys, values, index, SCALE), out


@pytest.mark.parametrize(
    "pattern", [VerticalSlash(vertical=200, slash=500), BlockSparse(top_k=8)], ids=lambda p: p.kind
)
@pytest.mark.parametrize("chunk", [CONTEXT, 1024])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_answers_what_it_says(name: str, chunk: int, pattern: HeadPattern) -> None:
    skip_unless_it_runs(name, chunk)
    given, _ = ours(chunk, pattern)
    peer = PEERS[name].prepare(given)
    error, _ = sampled_check(given.query, given.keys, given.values, peer.attend(), peer.index, SCALE)
    assert error <= MAX_ERROR


def test_our_dense_heads_agree_with_xformers() -> None:
    skip_unless_it_runs("xformers", 1024)
    given, out = ours(1024, Dense())
    torch.testing.assert_close(out, PEERS["xformers"].prepare(given).attend(), rtol=0.02, atol=0.01)
