"""``block_table`` on FlashAttention: its calls, with float64 attention in place of FlashAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.block_table import flash
from minference_vllm.patterns.kinds import AShape, BlockSparse, Dense, HeadPattern, TriShape, VerticalSlash
from minference_vllm.selection.build import build_index
from minference_vllm.selection.capacity import plan_capacity
from minference_vllm.selection.torch_scores import TorchScores

HEADS, KV_HEADS, DIM = 6, 2, 32
SCALE = DIM**-0.5
TOLERANCE = 0.03
"""Outputs of up to 4, rounded to bf16 in each of two parts and merged."""
PATTERNS: list[HeadPattern] = [
    VerticalSlash(vertical=50, slash=32),
    Dense(),
    AShape(sink=16, local=64),
    BlockSparse(top_k=1),
    TriShape(sink=16, local=32, last=40),
    VerticalSlash(vertical=70, slash=0),
]


def varlen_attention(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    return_softmax_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flash_attn_varlen_func`` over pages, by its documentation; requests without keys give 0 and -inf."""
    assert return_softmax_lse
    requests, page = len(seqused_k), k.shape[1]
    assert page % 16 == 0 and q.shape[1] % k.shape[2] == 0 and k.shape == v.shape
    assert all(tensor.dtype == torch.int32 for tensor in (cu_seqlens_q, seqused_k, block_table))
    assert len(cu_seqlens_q) == requests + 1 and block_table.shape[0] == requests
    assert int(cu_seqlens_q[0]) == 0 and int(cu_seqlens_q[-1]) == len(q)
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), -torch.inf)
    for request in range(requests):
        rows = slice(int(cu_seqlens_q[request]), int(cu_seqlens_q[request + 1]))
        length, new = int(seqused_k[request]), rows.stop - rows.start
        assert new <= max_seqlen_q and length <= max_seqlen_k <= block_table.shape[1] * page
        if not length:
            continue
        table = block_table[request, : -(-length // page)]
        assert int(table.min()) >= 0 and int(table.max()) < len(k)
        keys, values = (reference.gather_sequence(cache, table, length) for cache in (k, v))
        mask = reference.causal_mask(length - new, length) if causal else torch.ones(new, length, dtype=torch.bool)
        out[rows] = reference.masked_attention(q[rows], keys, values, mask[None], softmax_scale).to(q.dtype)
        scores = q[rows].double().transpose(0, 1) @ keys.transpose(1, 2) * softmax_scale
        lse[:, rows] = scores.masked_fill(~mask, -torch.inf).logsumexp(-1).float()
    return out, lse


def heads_first(rows: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, B, HK, D]`` as the kernel sees it, heads outside of tokens in memory (HND)."""
    return rows.transpose(1, 2).contiguous()


def tokens_first(rows: torch.Tensor) -> torch.Tensor:
    """The same with tokens outside of heads (NHD)."""
    return rows.transpose(1, 2)


def chunk(
    context: int,
    length: int,
    size: int,
    tile: int,
    order: Callable[..., torch.Tensor],
    kv_heads: int,
    shared: bool = False,
) -> tuple[Inputs, SparseIndex, torch.Tensor]:
    """Inputs, index of planned size, and the float64 answer; ``shared``: of lists per KV head."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(length - context, HEADS, DIM, generator=generator).bfloat16()
    keys, values = (torch.randn(length, kv_heads, DIM, generator=generator).bfloat16() for _ in range(2))
    blocks = -(-length // size)
    pages = torch.randperm(blocks + 3, generator=generator)[:blocks]
    position = torch.arange(length)
    memory = []
    for rows in (keys, values):
        pool = torch.full((blocks + 3, size, kv_heads, DIM), 100.0, dtype=torch.bfloat16)
        pool[pages[position // size], position % size] = rows
        memory.append(pool)
    # Keys and values side by side, as vLLM keeps them.
    key, value = order(torch.cat(memory, -1)).split(DIM, -1)
    inputs = Inputs(query, PagedCache(key, value, "rows"), pages, Chunk(0, 0, context, length), SCALE)
    by_head = keys.transpose(0, 1), values.transpose(0, 1)
    tiling = Tiling.of(context, length, size, tile)
    capacity = plan_capacity(PATTERNS, context, length, size, tile, list_everything=True)
    heads_per_list = HEADS // kv_heads if shared else 1
    scores = TorchScores(Inputs.of_rows(query[:, ::heads_per_list], *by_head, SCALE, size))
    # Any patterns will do: the kernel sees only lists.
    index = build_index(tiling, PATTERNS[: HEADS // heads_per_list], scores, capacity)
    index = replace(index, heads_per_list=heads_per_list)
    return inputs, index, reference.masked_attention(query, *by_head, index.to_mask(), SCALE)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kv_heads", [KV_HEADS, 1])
@pytest.mark.parametrize("order", [heads_first, tokens_first])
@pytest.mark.parametrize(
    ("context", "length", "size", "tile"),
    [(0, 300, 32, 64), (150, 700, 32, 128), (301, 330, 16, 64), (100, 450, 64, 64), (64, 65, 16, 32)],
)
def test_virtual_requests_give_the_indexs_attention(
    context: int, length: int, size: int, tile: int, order: Callable[..., torch.Tensor], kv_heads: int, shared: bool
) -> None:
    inputs, index, expected = chunk(context, length, size, tile, order, kv_heads, shared)
    query, cache = inputs.query, inputs.cache
    out = torch.full_like(query, torch.nan)
    lse = torch.full((HEADS, len(query)), torch.nan)
    flash.run(inputs, index, out, lse, varlen_attention)
    assert float((out.double() - expected).abs().max()) < TOLERANCE
    keys = reference.repeat_heads(reference.gather_sequence(cache.key.transpose(1, 2), inputs.pages, length), HEADS)
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) * SCALE
    torch.testing.assert_close(lse.double(), scores.masked_fill(~index.to_mask(), -torch.inf).logsumexp(-1))


@pytest.mark.parametrize("scratch", [1, 1 << 16])
def test_columns_are_gathered_piece_by_piece(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, index, expected = chunk(150, 700, 32, 128, tokens_first, KV_HEADS)
    assert bool((index.num_columns > 0).any()) and bool((index.num_columns == 0).any())
    monkeypatch.setattr(flash, "SCRATCH_BYTES", scratch)
    sizes: list[int] = []

    def watched(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(arguments["seqused_k"]))
        return varlen_attention(**arguments)

    out = torch.full_like(inputs.query, torch.nan)
    flash.run(inputs, index, out, attend=watched)
    assert float((out.double() - expected).abs().max()) < TOLERANCE
    requests = index.num_heads * index.num_tiles
    assert sizes[0] == requests == sum(sizes[1:]) and len(sizes) > 2


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


REFUSED = [
    # queries' type, keys, values, reason
    (torch.float32, zeros(4, 2, 16, 8, dtype=torch.float32), None, "bf16 or fp16"),
    (torch.bfloat16, zeros(4, 2, 16, 8, dtype=torch.float8_e4m3fn), None, "a cache in torch.float8_e4m3fn"),
    (torch.float16, zeros(4, 2, 24, 8), None, "pages of 24 tokens"),
    (torch.float16, zeros(4, 2, 16, 20), None, "heads of size 20"),
    (torch.float16, zeros(4, 2, 16, 264), None, "heads of size 264"),
    (torch.float16, zeros(4, 2, 16, 8), zeros(4, 2, 16, 16)[..., :8], "differ in strides"),
    (torch.float16, zeros(4, 300).as_strided((4, 2, 16, 8), (300, 128, 8, 1)), None, "no multiple of a head's"),
]


@pytest.mark.parametrize(("dtype", "key", "value", "reason"), REFUSED, ids=[case[3] for case in REFUSED])
def test_caches_that_cannot_be_addressed_are_refused(
    dtype: torch.dtype, key: torch.Tensor, value: torch.Tensor | None, reason: str
) -> None:
    cache = PagedCache(key, key if value is None else value, "rows")
    assert reason in str(flash.unsupported_cache_reason(dtype, cache))
