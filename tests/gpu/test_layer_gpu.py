"""One layer on a GPU: what the CPU tests of ``sparse_prefill``, which also run with the GPU kernels, do not cover."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from score_inputs import scores_of

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose
from minference_vllm.kernels.fa4 import limits
from minference_vllm.patterns.kinds import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Dense,
    HeadPattern,
    LowRank,
    TriShape,
    VerticalSlash,
)
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.recall import RecallCheck
from minference_vllm.selection.antidiagonal import antidiagonal_scores
from minference_vllm.selection.build import build_index

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
DIM = 128
SCALE = DIM**-0.5
MIXED: list[HeadPattern] = [
    VerticalSlash(vertical=1000, slash=3096),
    BlockSparse(top_k=64),
    AShape(sink=1024, local=3072),
    TriShape(sink=1024, local=3072, last=128),
] * 2
LOOKING_UP: list[HeadPattern] = [LowRank(), Dense(), LowRank(), LowRank(), *[LowRank(gamma=0.5)] * 4]
SAMPLED: list[HeadPattern] = [*[LowRank(noise=0.1, queries=32)] * 4, *[LowRank(noise=0.1)] * 3, Dense()]


@pytest.fixture(params=["triton", "block_table", "fa4"])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "block_table":
        pytest.importorskip("vllm.vllm_flash_attn")
    if request.param == "fa4":
        reason = limits.unsupported_gpu_reason(torch.cuda.get_device_capability()) or limits.unavailable_reason()
        page = request.node.callspec.params.get("page", limits.BLOCK)
        if reason or page != limits.BLOCK:
            pytest.skip(reason or f"it takes no pages of {page}")
    return str(request.param)


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


def attend(
    query: torch.Tensor,
    cache: PagedCache,
    pages: torch.Tensor,
    chunk: Chunk,
    patterns: Sequence[HeadPattern],
    out: torch.Tensor,
    name: str = "triton",
    check: RecallCheck | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> SparseIndex:
    inputs = Inputs.of(query, cache, pages, chunk, SCALE, softcap, sinks)
    kernel = choose(name, out.dtype, cache)
    return attend_chunk(inputs, kernel.served(patterns), kernel, out, check=check)


def layer(
    seq_len: int,
    chunk_len: int,
    heads: int = 8,
    kv_heads: int = 2,
    page: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, PagedCache, torch.Tensor, Chunk]:
    """Queries, a cache as vLLM lays it out (keys and values side by side), pages in random order, and the chunk."""
    torch.manual_seed(0)
    blocks = -(-seq_len // page)
    memory = torch.randn(blocks, kv_heads, page, 2 * DIM).to(dtype)
    pages = torch.randperm(blocks)
    query = torch.randn(chunk_len, heads, DIM).to(torch.bfloat16) * 2
    return (
        query,
        PagedCache(memory[..., :DIM], memory[..., DIM:], "rows"),
        pages,
        Chunk(0, 0, seq_len - chunk_len, seq_len),
    )


def sampled_error(
    query: torch.Tensor,
    cache: PagedCache,
    pages: torch.Tensor,
    index: SparseIndex,
    out: torch.Tensor,
    rows: Sequence[int],
) -> float:
    """Largest error of some rows against float64 attention under the index's own selection."""
    keys = cache.keys_by_head(pages)[:, : index.tiling.seq_len]
    values = PagedCache(cache.value, cache.value, "rows").keys_by_head(pages)[:, : index.tiling.seq_len]
    group = query.shape[1] // cache.num_kv_heads
    worst = 0.0
    for row in rows:
        position = index.tiling.context_len + row
        tile = int(torch.searchsorted(index.tiling.starts, torch.tensor(position), right=True)) - 1
        for head in range(query.shape[1]):
            counts = index.tile_counts(torch.tensor([tile]), slice(head, head + 1))[0, 0]
            kept = counts[: position + 1].nonzero().view(-1)
            logits = keys[head // group, kept].double() * cache.key_scale @ query[row, head].double() * SCALE
            weights = (logits + counts[kept].double().log()).softmax(0)
            exact = weights @ values[head // group, kept].double() * cache.value_scale
            worst = max(worst, float((out[row, head].double() - exact).abs().max()))
    return worst


@pytest.mark.parametrize("patterns", [MIXED, LOOKING_UP, SAMPLED], ids=["fixed", "low_rank", "sampled"])
def test_nothing_waits_for_the_gpu(kernel: str, patterns: list[HeadPattern]) -> None:
    """No host synchronisation after the first call, which compiles and copies a few constants."""
    query, cache, pages, chunk = layer(32768, 2048)
    out = torch.empty_like(query)
    first, second = (RecallCheck(torch.tensor([0, 700, 2047], device="cuda")) for _ in range(2))
    attend(query, cache, pages, chunk, patterns, out, kernel, check=first)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index = attend(query, cache, pages, Chunk(0, 0, 28672, 30720), patterns, out, kernel, check=second)
        computed = index.computed_pairs().sum()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert float(computed) > 0
    assert second.recall is not None and 0 < float(second.recall.min()) <= float(second.recall.max()) <= 1 + 1e-5


def test_the_index_is_the_torch_paths() -> None:
    """In float32, where scores agree; selections may differ only where scores tie up to rounding."""
    torch.manual_seed(0)
    query, keys = torch.randn(2048, 8, DIM) * 2, torch.randn(2, 8192, DIM)
    pages = torch.randperm(64)
    memory = torch.empty(64, 2, 128, DIM)
    memory[pages] = keys.view(2, 64, 128, DIM).transpose(0, 1)
    cache = PagedCache(memory, memory, "rows")
    out = torch.empty_like(query)
    index = attend(query, cache, pages, Chunk(0, 0, 6144, 8192), MIXED, out)
    by_torch = build_index(Tiling.of(6144, 8192, 128, 128, device="cuda"), MIXED, scores_of(query, keys, SCALE, 128))
    different = (index.to_mask() != by_torch.to_mask()).float().mean()
    assert float(different) < 1e-4
    expected = reference.masked_attention(query, keys, keys, index.to_mask(), SCALE)
    assert float((out.double() - expected).abs().max()) < 1e-3


@pytest.mark.parametrize("rank", [16, 48, 128])
@pytest.mark.parametrize("tile", [64, 128, 384])
def test_bins_are_the_torch_paths(tile: int, rank: int) -> None:
    """Except where a different summation order rounds to the neighbouring bin."""
    from low_rank_inputs import as_quantized

    from minference_vllm.selection import score_bins
    from minference_vllm.triton_kernels import low_rank as kernels

    torch.manual_seed(0)
    tiling = Tiling.of(17010, 20011, 64, tile, device="cuda")
    query, keys = torch.randn(3, 3001, rank) * 4 * rank**-0.5, torch.randn(3, 20011, rank)
    chosen = as_quantized(query, keys, tiling), tiling
    found, right = kernels.tile_bins(*chosen), score_bins.tile_bins(*chosen, torch.zeros(3, dtype=torch.bool))
    difference = (found.int() - right.int()).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 0.01


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_antidiagonal_scores_are_the_torch_paths(dtype: torch.dtype, page: int, stride: int) -> None:
    """The torch path runs in float32; neither rounds its logits."""
    from minference_vllm.triton_kernels import antidiagonal

    query, cache, pages, chunk = layer(20011, 3001, page=page, dtype=dtype)
    tiling = Tiling.of(chunk.context_len, chunk.seq_len, page, 128, device="cuda")
    found = antidiagonal.antidiagonal_scores(query.to(dtype), cache, pages, [7, 0, 3], tiling, stride, SCALE)
    keys = cache.keys_by_head(pages)[:, : chunk.seq_len].float()
    right = antidiagonal_scores(query.float(), keys, [7, 0, 3], tiling, stride, SCALE)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_antidiagonal_at_a_million_tokens() -> None:
    """Keys of the prefix are not copied: the layer stays within the stated memory."""
    query, cache, pages, chunk = layer(1 << 20, 8192, heads=32, kv_heads=8)
    out = torch.full_like(query, torch.nan)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(query, cache, pages, chunk, [Antidiagonal()] * 32, out)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 320 << 20
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("page", [16, 128])
def test_heads_that_share_lists(kernel: str, page: int, group: int) -> None:
    query, cache, pages, chunk = layer(10000, 3001, heads=2 * group, kv_heads=2, page=page)
    patterns = [AShape(sink=256, local=512)] * group + [TriShape(sink=256, local=512, last=100)] * group
    out = torch.full_like(query, torch.nan)
    index = attend(query, cache, pages, chunk, patterns, out, kernel)
    assert (index.num_lists, index.heads_per_list) == (2, group)
    assert sampled_error(query, cache, pages, index, out, [0, 1, 1500, 2899, 3000]) < 0.02


def test_sampled_keys_count_for_the_others(kernel: str) -> None:
    query, cache, pages, chunk = layer(20000, 2048)
    out = torch.full_like(query, torch.nan)
    index = attend(query, cache, pages, chunk, SAMPLED, out, kernel)
    assert index.sampled == (() if kernel == "block_table" else tuple(range(7)))
    assert float(index.density()[:7].max()) < 1 or kernel == "block_table"
    assert sampled_error(query, cache, pages, index, out, [0, 1, 1500, 2047]) < 0.02


@pytest.mark.parametrize("page", [16, 64, 128])
def test_a_million_tokens(kernel: str, page: int) -> None:
    """The last 8K of 1M tokens, 32 heads over 8; the index stays within the stated memory."""
    query, cache, pages, chunk = layer(1 << 20, 8192, heads=32, kv_heads=8, page=page)
    patterns = [VerticalSlash(vertical=1000, slash=6096)] * 24 + [BlockSparse(top_k=100)] * 7 + [AShape()]
    out = torch.full_like(query, torch.nan)
    attend(query, cache, pages, chunk, patterns, out, kernel)
    out.fill_(torch.nan)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    index = attend(query, cache, pages, chunk, patterns, out, kernel)
    torch.cuda.synchronize()
    # The kernel `block_table` holds head-major queries, outputs and gathered columns beside the index; `fa4` its lists.
    allowed = (320 if kernel == "triton" else 1024) << 20
    assert torch.cuda.max_memory_allocated() - before <= allowed
    assert bool(torch.isfinite(out).all())
    assert sampled_error(query, cache, pages, index, out, [0, 4095, 8191]) < 0.02


def test_dense_heads_agree_with_scaled_dot_product_attention() -> None:
    query, cache, pages, chunk = layer(16384, 16384)
    out = torch.full_like(query, torch.nan)
    attend(query, cache, pages, chunk, [Dense()] * 8, out)
    keys = cache.keys_by_head(pages)
    values = PagedCache(cache.value, cache.value, "rows").keys_by_head(pages)
    repeated = (reference.repeat_heads(rows, 8)[None] for rows in (keys, values))
    dense = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1)[None], *repeated, is_causal=True)
    torch.testing.assert_close(out, dense[0].transpose(0, 1), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("fp8_query", [False, True])
def test_fp8_caches(fp8_query: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    query, cache, pages, chunk = layer(16384, 2048, dtype=torch.float8_e4m3fn)
    cache = PagedCache(cache.key, cache.value, "rows", key_scale=0.75, value_scale=2.0)
    out = torch.full_like(query, torch.nan)
    given = query.to(torch.float8_e4m3fn) if fp8_query else query
    index = attend(given, cache, pages, chunk, MIXED, out)
    wide = PagedCache(cache.key.bfloat16(), cache.value.bfloat16(), "rows", 0.75, 2.0)
    assert sampled_error(given.to(query.dtype), wide, pages, index, out, [0, 1000, 2047]) < 0.05


@pytest.mark.parametrize("extras", [{"softcap": 20.0}, {"sinks": True}, {"softcap": 5.0, "sinks": True}], ids=str)
def test_soft_caps_and_sinks(extras: dict[str, float]) -> None:
    query, cache, pages, chunk = layer(2048, 1024, heads=4, kv_heads=1)
    sinks = torch.randn(4) if extras.get("sinks") else None
    softcap = extras.get("softcap", 0.0)
    out = torch.full_like(query, torch.nan)
    patterns = [VerticalSlash(vertical=100, slash=256)] * 4
    index = attend(query, cache, pages, chunk, patterns, out, softcap=softcap, sinks=sinks)
    keys, values = (cache.keys_by_head(pages), PagedCache(cache.value, cache.value, "rows").keys_by_head(pages))
    logits = query.double().transpose(0, 1) @ keys.double().transpose(1, 2) * SCALE
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits).masked_fill(~index.to_mask(), -torch.inf)
    total = logits.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.double()[:, None])
    expected = ((logits - total[..., None]).exp() @ values.double()).transpose(0, 1)
    assert float((out.double() - expected).abs().max()) < 0.05
