"""Peers of the attention benchmark: our index in their formats, their calls, and their refusals."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import peers
import pytest
import torch
from peers import PEERS, Lists, Peer, Problem, Size
from score_inputs import scores_of

from minference_vllm import reference
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import AShape, BlockSparse, Dense, HeadPattern, VerticalSlash
from minference_vllm.selection.build import build_index
from minference_vllm.selection.capacity import plan_capacity
from minference_vllm.selection.compaction import EXACT_WIDTH

DIM, KV_HEADS, TILE = 16, 2, 128
SCALE = DIM**-0.5
PATTERNS: list[HeadPattern] = [
    VerticalSlash(vertical=30, slash=130),
    Dense(),
    AShape(sink=64, local=128),
    VerticalSlash(vertical=150, slash=64),
    BlockSparse(top_k=2),
    AShape(sink=0, local=1),
]
CHUNKS = {
    # name: (context_len, seq_len, block_size)
    "prompt": (0, 640, 128),
    "prompt of odd length": (0, 619, 64),
    "chunk": (256, 640, 64),
    "chunk of odd length": (256, 619, 128),
}


def problem(context_len: int, seq_len: int, block_size: int, planned: bool) -> Problem:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(seq_len - context_len, len(PATTERNS), DIM, generator=generator) * 2
    keys, values = (torch.randn(seq_len, KV_HEADS, DIM, generator=generator) for _ in range(2))
    tiling = Tiling.of(context_len, seq_len, block_size, TILE)
    capacity = plan_capacity(PATTERNS, context_len, seq_len, block_size, TILE) if planned else EXACT_WIDTH
    index = build_index(tiling, PATTERNS, scores_of(query, keys.transpose(0, 1), SCALE, block_size), capacity)
    return Problem(query, keys, values, index, SCALE)


@pytest.fixture(params=[False, True], ids=["exact", "planned"])
def planned(request: pytest.FixtureRequest) -> bool:
    """In an index with planned widths, tiles that attend everything have no list."""
    return bool(request.param)


@pytest.fixture(params=CHUNKS)
def given(request: pytest.FixtureRequest, planned: bool) -> Problem:
    return problem(*CHUNKS[request.param], planned)


def answer(given: Problem, mask: torch.Tensor) -> torch.Tensor:
    keys, values = (rows.transpose(0, 1) for rows in (given.keys, given.values))
    return reference.masked_attention(given.query, keys, values, mask, given.scale)


def assert_answers(peer: Peer, given: Problem) -> None:
    """The peer's output equals attention under its index."""
    torch.testing.assert_close(peer.attend().double(), answer(given, peer.index.to_mask()), rtol=1e-4, atol=1e-4)


def mask_of_lists(lists: Lists, rows: int, keys: int) -> torch.Tensor:
    """bool ``[H, rows, keys]`` as vLLM's kernel reads the lists: the causal mask is applied in the last block, or the
    last two where lengths are no multiples of 64, and nowhere else; single keys are read in groups of 64."""
    heads, groups = lists.block_count.shape[1:]
    assert groups == -(-rows // 64)
    assert all(part.dtype == torch.int32 and part.is_contiguous() for part in lists)
    last_masked = 1 if rows % 64 == 0 and keys % 64 == 0 else 2
    mask = torch.zeros(heads, groups * 64, keys + 64, dtype=torch.bool)
    row = torch.arange(groups * 64)[:, None] + keys - rows
    for head in range(heads):
        for group in range(groups):
            own = slice(group * 64, group * 64 + 64)
            count = int(lists.block_count[0, head, group])
            for place, first in enumerate(lists.block_offset[0, head, group, :count].tolist()):
                seen = torch.ones(64, 64, dtype=torch.bool)
                if place >= count - last_masked:
                    seen = torch.arange(first, first + 64) <= row[own]
                assert not mask[head, own, first : first + 64].any(), "no key is named twice"
                mask[head, own, first : first + 64] = seen
            count = int(lists.column_count[0, head, group])
            read = lists.column_index[0, head, group, : -(-count // 64) * 64].long()
            assert len(read) % 64 == 0 and bool(((read >= 0) & (read < keys)).all())
            assert not mask[head, own, read[:count]].any(), "no key is named twice"
            mask[head, own, read[:count]] = True
    assert not mask[:, :rows, keys:].any()
    return mask[:, :rows, :keys]


def test_lists_of_64_rows_name_the_indexs_own_keys(given: Problem) -> None:
    lists = peers.lists_of_64_rows(given.index)
    found = mask_of_lists(lists, given.query.shape[0], given.keys.shape[0])
    torch.testing.assert_close(found, given.index.to_mask())


@pytest.mark.parametrize("pattern", [AShape(sink=64, local=128), Dense()], ids=["a_shape", "dense"])
def test_heads_that_share_a_list_get_one_each(pattern: HeadPattern, planned: bool) -> None:
    context_len, seq_len, block_size = CHUNKS["chunk of odd length"]
    patterns = [pattern] * len(PATTERNS)
    tiling = Tiling.of(context_len, seq_len, block_size, TILE)
    capacity = plan_capacity(patterns, context_len, seq_len, block_size, TILE) if planned else EXACT_WIDTH
    query, keys = torch.randn(seq_len - context_len, len(patterns), DIM), torch.randn(KV_HEADS, seq_len, DIM)
    scores = scores_of(query, keys, 1.0, block_size)
    shared, own = (build_index(tiling, patterns, scores, capacity, group) for group in (len(patterns) // KV_HEADS, 1))
    assert shared.heads_per_list > 1
    found = peers.one_list_per_head(shared)
    for name in ("blocks", "num_blocks", "columns", "num_columns"):
        assert getattr(found, name).equal(getattr(own, name))
    assert peers.everything(found).density().tolist() == [1.0] * len(patterns)
    assert [list(part.shape[:2]) for part in peers.lists_of_64_rows(found)] == [[1, len(patterns)]] * 4


def test_columns_become_whole_blocks(given: Problem) -> None:
    whole, index = peers.columns_as_blocks(given.index), given.index
    mask, total = index.to_mask(), -(-index.tiling.seq_len // index.tiling.block_size)
    causal = reference.causal_mask(index.tiling.context_len, index.tiling.seq_len)
    for tile in range(index.num_tiles):
        rows = slice(*(index.tiling.starts[tile : tile + 2] - index.tiling.context_len).tolist())
        keys = torch.nn.functional.pad(
            mask[:, rows].any(1), (0, total * index.tiling.block_size - index.tiling.seq_len)
        )
        held = keys.view(-1, total, index.tiling.block_size).any(-1).repeat_interleave(index.tiling.block_size, 1)
        expected = held[:, None, : index.tiling.seq_len] & causal[rows]
        torch.testing.assert_close(whole.to_mask()[:, rows], expected)
    assert not whole.num_columns.any()


def test_everything_is_causal_attention(given: Problem) -> None:
    index = peers.everything(given.index)
    causal = reference.causal_mask(index.tiling.context_len, index.tiling.seq_len)
    torch.testing.assert_close(index.to_mask(), causal.expand(len(PATTERNS), -1, -1))
    assert index.density().tolist() == [1.0] * len(PATTERNS)


def test_flex_block_mask_is_the_index(given: Problem) -> None:
    index = peers.columns_as_blocks(given.index)
    found = peers.block_mask(index)
    rows, keys = index.tiling.seq_len - index.tiling.context_len, index.tiling.seq_len
    assert (found.seq_lengths, found.BLOCK_SIZE) == ((rows, keys), (TILE, index.tiling.block_size))
    allowed = found.mask_mod(None, None, torch.arange(rows)[:, None], torch.arange(keys))
    mask = torch.zeros(index.num_heads, rows, keys, dtype=torch.bool)
    kinds = [(found.kv_num_blocks, found.kv_indices, True), (found.full_kv_num_blocks, found.full_kv_indices, False)]
    for counts, listed, masked in kinds:
        for head, tile in torch.cartesian_prod(torch.arange(index.num_heads), torch.arange(index.num_tiles)).tolist():
            own = slice(tile * TILE, (tile + 1) * TILE)
            for block in listed[0, head, tile, : counts[0, head, tile]].tolist():
                seen = slice(block * index.tiling.block_size, (block + 1) * index.tiling.block_size)
                assert not mask[head, own, seen].any(), "no block is named twice"
                mask[head, own, seen] = allowed[own, seen] if masked else True
    torch.testing.assert_close(mask, index.to_mask())
    assert int(found.full_kv_num_blocks.sum()) > 0, "blocks of the past need no mask"


@pytest.mark.engine  # takes as long as starting one
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with a C++ compiler")
def test_flex_attends_whole_blocks() -> None:
    """Compiled for a CPU: uncompiled it uses its mask function only and ignores the block lists."""
    given = problem(*CHUNKS["chunk of odd length"], planned=True)
    peer = PEERS["flex"].prepare(given)
    assert_answers(peer, given)
    assert peer.computes == "the index, its columns' blocks whole"
    assert float(given.index.density().mean()) < float(peer.index.density().mean()) < 1


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace a module, which may not be installed, by one with the given contents."""

    def put(name: str, **contents: Any) -> None:
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    return put


def test_xformers_is_asked_for_dense_causal_attention(given: Problem, module: Callable[..., None]) -> None:
    class LowerTriangularFromBottomRightMask:
        pass

    def memory_efficient_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_bias: Any, scale: float
    ) -> torch.Tensor:
        """Inputs are ``[B, M, G, H, K]``; the caller has broadcast keys and values."""
        assert isinstance(attn_bias, LowerTriangularFromBottomRightMask)
        assert query.shape[2:] == key.shape[2:] == value.shape[2:]
        rows, keys = query.shape[1], key.shape[1]
        scores = torch.einsum("bmghk,bnghk->bghmn", query, key) * scale
        weights = scores.masked_fill(~reference.causal_mask(keys - rows, keys), -torch.inf).softmax(-1)
        return torch.einsum("bghmn,bnghk->bmghk", weights, value)

    module("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    module("xformers.ops.fmha.attn_bias", LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask)
    assert_answers(PEERS["xformers"].prepare(given), given)


def test_vllm_sparse_gets_the_index(given: Problem, module: Callable[..., None]) -> None:
    def sparse_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *lists: torch.Tensor,
        softmax_scale: float,
        causal: bool,
    ) -> torch.Tensor:
        assert causal and q.shape[0] == k.shape[0] == v.shape[0] == 1
        mask = mask_of_lists(Lists(*lists), q.shape[1], k.shape[1])
        return reference.masked_attention(q[0], k[0].transpose(0, 1), v[0].transpose(0, 1), mask, softmax_scale)[None]

    module("vllm.vllm_flash_attn.flash_attn_interface", sparse_attn_func=sparse_attn_func)
    # Where the module loads no FlashAttention its parent does not load, either.
    module("vllm.vllm_flash_attn")
    assert_answers(PEERS["vllm_sparse"].prepare(given), given)


def test_minference_gets_the_index(planned: bool, module: Callable[..., None]) -> None:
    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, *rest: Any) -> torch.Tensor:
        *lists, scale, block_rows, block_keys = rest
        assert q.shape == k.shape == v.shape and lengths.tolist() == [q.shape[2]]
        assert (block_rows, block_keys) == (64, 64)
        mask = mask_of_lists(Lists(*lists), q.shape[2], k.shape[2])
        return reference.masked_attention(q[0].transpose(0, 1), k[0], v[0], mask, scale).transpose(0, 1)[None]

    module(peers.MINFERENCE_MODULE, **{peers.MINFERENCE_KERNEL: kernel})
    given = problem(*CHUNKS["prompt"], planned)
    assert_answers(PEERS["minference"].prepare(given), given)


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch, module: Callable[..., None]) -> Iterator[None]:
    monkeypatch.setattr(peers, "installed", lambda name: True)
    module("vllm.vllm_flash_attn")
    monkeypatch.setitem(vars(torch.ops), "_vllm_fa2_C", SimpleNamespace(fwd_sparse=None))
    module(peers.MINFERENCE_MODULE, **{peers.MINFERENCE_KERNEL: None})
    yield


SIZE = {
    "device": "cuda",
    "context": 32768,
    "chunk": 32768,
    "heads": 32,
    "head_size": 128,
    "block_size": 128,
    "tile": 128,
}


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize("name", PEERS)
def test_on_a_gpu_with_everything_installed_all_peers_run(name: str) -> None:
    assert PEERS[name].reason(Size(**SIZE)) is None


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("flex", {"block_size": 16}, "pages of 16"),
        ("flex", {"chunk": 64}, "multiples of 128"),
        ("xformers", {"device": "cpu"}, "NVIDIA GPU"),
        ("vllm_sparse", {"device": "cpu"}, "NVIDIA GPU"),
        ("vllm_sparse", {"head_size": 64}, "heads of size 128, not 64"),
        ("vllm_sparse", {"block_size": 16}, "pages of 16"),
        ("vllm_sparse", {"chunk": 100}, "two of our tiles"),
        ("minference", {"chunk": 8192}, "whole prompts"),
        ("minference", {"head_size": 96}, "not 96"),
        ("minference", {"context": 1 << 20, "chunk": 1 << 20}, "32 bits"),
    ],
)
def test_peers_say_what_they_cannot_do(name: str, change: dict[str, Any], reason: str) -> None:
    assert reason in str(PEERS[name].reason(Size(**SIZE | change)))


@pytest.mark.parametrize("name", ["xformers", "minference"])
def test_peers_that_are_not_installed_say_how_to_install_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda name: False)
    assert f"pip install {name}" in str(PEERS[name].reason(Size(**SIZE)))
