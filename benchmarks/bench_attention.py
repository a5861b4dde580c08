"""One attention layer: estimate + index + attention against vLLM's own dense kernel, in one process.

For every context the answer is checked first: sampled rows against float64 attention under the index's own mask (error)
and the share of the dense softmax mass that the index keeps (recall). Then dense and sparse are timed in turns and the
medians reported. "GFLOP/s" would count 4 * head_size per query-key pair; here only seconds are compared.

    python benchmarks/bench_attention.py --context 32768 65536 131072 --csv benchmarks/results/attention_cpu.csv
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from record import emit
from synthetic import Structure, structured_qkv

from minference_vllm import reference
from minference_vllm.attend import Timing, attend_chunk, choose_engine
from minference_vllm.engines import cpu_kernel
from minference_vllm.index import SparseIndex
from minference_vllm.paged_cache import PagedCache
from minference_vllm.patterns import AShape, BlockSparse, HeadPattern, TriShape, VerticalSlash
from minference_vllm.plan import Chunk

# Every budget is about 4K tokens per row.
PATTERNS: dict[str, HeadPattern] = {
    "vertical_slash": VerticalSlash(vertical=1000, slash=3096),
    "a_shape": AShape(sink=1024, local=3072),
    "tri_shape": TriShape(sink=1024, local=3072, last=128),
    "block_sparse": BlockSparse(top_k=64),
}


def fill_cache(keys: torch.Tensor, values: torch.Tensor, block_size: int) -> tuple[PagedCache, torch.Tensor]:
    """The tokens in shuffled pages of the kernel's own layout, and the page of each logical block."""
    tokens, heads, dim = keys.shape
    blocks = -(-tokens // block_size)
    pages = torch.randperm(blocks, generator=torch.Generator().manual_seed(1))
    cache = torch.zeros(blocks, heads, 2 * block_size, dim, dtype=keys.dtype)
    position = torch.arange(tokens)
    slots = pages[position // block_size] * block_size + position % block_size
    layout = cpu_kernel.layout_for(keys.dtype, block_size, dim)
    assert layout is not None
    cpu_kernel.write_pages(keys, values, cache, slots, cpu_kernel.isa_for(keys.dtype, block_size, dim))
    key, value = cache.chunk(2, dim=2)
    return PagedCache(key, value, layout), pages


def sampled_check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    index: SparseIndex,
    scale: float,
    samples: int = 16,
) -> tuple[float, float]:
    """Largest error over sampled rows relative to the largest output, and mean recall."""
    rows = torch.linspace(0, query.shape[0] - 1, samples).long().unique()
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    worst, recalls = 0.0, []
    for row in rows.tolist():
        position = index.context_len + row
        tile = int(torch.searchsorted(index.tile_starts, position, right=True)) - 1
        whole_pages = -(-index.seq_len // index.block_size) * index.block_size
        mask = torch.zeros(query.shape[1], 1, whole_pages, dtype=torch.bool)
        for head in range(query.shape[1]):
            blocks = index.blocks[head, tile, : index.num_blocks[head, tile]].long()
            mask[head].view(-1, index.block_size)[blocks] = True
            mask[head, 0, index.columns[head, tile, : index.num_columns[head, tile]].long()] = True
        mask = mask[..., : index.seq_len] & (torch.arange(index.seq_len) <= position)
        one = query[row : row + 1]
        expected = reference.masked_attention(one, keys, values, mask, scale)
        worst = max(worst, float((out[row : row + 1].double() - expected).abs().max() / expected.abs().max()))
        visible = keys[:, : position + 1]
        recalls.append(reference.attention_recall(one, visible, mask[..., : position + 1], position, scale).mean())
    return worst, float(torch.stack(recalls).mean())


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(args: argparse.Namespace, context: int, pattern_name: str, engine: str) -> dict[str, object]:
    structure = Structure()
    chunk_len = min(args.chunk or context, context)
    query, keys, values = structured_qkv(context, args.heads, args.kv_heads, args.head_size, structure)
    query = query[context - chunk_len :].contiguous()
    cache, pages = fill_cache(keys, values, args.block_size)
    scale = args.head_size**-0.5
    chunk = Chunk(0, 0, context - chunk_len, context)
    patterns = [PATTERNS[pattern_name]] * args.heads
    out = torch.full_like(query, torch.nan)
    dense_out = torch.full_like(query, torch.nan)
    table = pages[None].to(torch.int32)
    starts = torch.tensor([0, chunk_len], dtype=torch.int32)
    length = torch.tensor([context], dtype=torch.int32)

    def dense() -> None:
        cpu_kernel.attend(query, cache.key, cache.value, table, starts, length, scale, dense_out)

    timings: list[Timing] = []

    def sparse() -> SparseIndex:
        timings.append(Timing())
        return attend_chunk(query, cache, pages, chunk, patterns, scale, out, engine, args.tile, timings[-1])

    index = sparse()
    error, recall = sampled_check(query, keys, values, out, index, scale)
    timings.clear()
    dense_seconds, sparse_seconds = [], []
    for _ in range(args.repeat):
        dense_seconds.append(seconds(dense))
        sparse_seconds.append(seconds(sparse))
    dense_s, sparse_s = statistics.median(dense_seconds), statistics.median(sparse_seconds)
    return {
        "engine": choose_engine(engine, query.dtype, cache),
        "pattern": pattern_name,
        "context": context,
        "chunk": chunk_len,
        "density": float(index.density().mean()),
        "recall": recall,
        "max_error": error,
        "dense_s": dense_s,
        "estimate_s": statistics.median(t.estimate for t in timings),
        "index_s": statistics.median(t.index for t in timings),
        "attend_s": statistics.median(t.attend for t in timings),
        "sparse_s": sparse_s,
        "speedup": dense_s / sparse_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--context", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--chunk", type=int, default=None, help="new tokens at the end of the context; default: all")
    parser.add_argument("--pattern", nargs="+", choices=list(PATTERNS), default=["vertical_slash"])
    parser.add_argument("--engine", nargs="+", default=["auto"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--tile", type=int, default=None)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for context in args.context:
        for pattern in args.pattern:
            for engine in args.engine:
                emit(measure(args, context, pattern, engine), args.json, args.csv)


if __name__ == "__main__":
    main()
