"""Mean keys of a growing prefix, chunk by chunk: kept per page (``page_means.PageMeans``) or recomputed every time.

One layer's key cache is filled chunk by chunk, as in prefill. After a chunk the mean keys of the whole prefix are
computed in both ways and compared. Seconds are per chunk.

    python benchmarks/bench_summaries.py --context 131072 1048576 --csv benchmarks/results/summaries_cpu.csv
"""

from __future__ import annotations

import argparse
import time

import torch
from record import emit

from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import PagedCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[131072, 262144, 524288, 1048576])
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    size, longest = args.block_size, max(args.context)
    blocks = -(-longest // size)
    memory = torch.zeros(blocks, args.kv_heads, size, args.head_size, dtype=torch.bfloat16)
    cache, pages = PagedCache(memory, memory, "transposed"), torch.randperm(blocks)
    kept = PageMeans()
    for end in range(args.chunk, longest + 1, args.chunk):
        mine = pages[(end - args.chunk) // size : end // size]
        memory[mine] = torch.randn(len(mine), *memory.shape[1:]).bfloat16()
        kept.forget((mine[:, None] * size + torch.arange(size)).flatten(), size)
        begin = time.perf_counter()
        means = kept.of(cache, pages[: end // size], end)
        kept_s = time.perf_counter() - begin
        if end not in args.context:
            continue
        begin = time.perf_counter()
        anew = PageMeans().of(cache, pages[: end // size], end)
        anew_s = time.perf_counter() - begin
        torch.testing.assert_close(means, anew, rtol=1e-4, atol=1e-4)
        row = {"context": end, "chunk": args.chunk, "kept_s": kept_s, "anew_s": anew_s, "ratio": anew_s / kept_s}
        emit(row, args.json, args.csv)


if __name__ == "__main__":
    main()
