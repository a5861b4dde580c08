"""One attention layer: estimate + index + attention against a dense kernel, in one process.

On CPUs the dense kernel is vLLM's own; on GPUs vLLM's FlashAttention (version 3 on Hopper) on the same pages, or, if
vLLM is not installed for CUDA, torch's scaled dot-product attention on contiguous keys and values. GPU times are
measured with events. The stages are timed one after the other with a host synchronisation after each, so their sum
exceeds the total time.

For every context the outputs are checked first: sampled rows against float64 attention under the index's own mask
(error), and the share of the dense softmax mass that the index keeps (recall). The dense kernel is checked, too. If an
output is wrong, the row is left out and the exit status is 1. Then dense and sparse are timed alternately and the
medians reported. If the context is longer than ``--chunk``, the page summaries that a server on CPUs keeps (norms of
values, mean keys) exist already for the earlier pages. TFLOP/s (GPU rows) count 4 * head_size per query-key pair of the
index.

``--peer`` adds rows of other kernels (see ``peers.py``) on the index that the first of our kernels attended, checked in
the same way and timed alternately with the dense kernel. Such a row has the columns ``peer`` and ``computes`` (what it
attended); its seconds and speed-up are of attention only, without estimate and index. A peer that cannot run is
reported before anything is measured. If a peer fails, its row is left out and the exit status is 1.

    python benchmarks/bench_attention.py --context 32768 65536 131072 --csv benchmarks/results/attention_cpu.csv
    python benchmarks/bench_attention.py --device cuda --heads 32 --kv-heads 8 --context 131072 --chunk 8192
    python benchmarks/bench_attention.py --device cuda --context 32768 --pattern block_sparse --peer flex xformers
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from peers import PEERS, Problem, Size, everything, one_list_per_head
from record import emit
from synthetic import Structure, structured_qkv

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.remainder import sample_step, sampled_positions
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling, whole_tile
from minference_vllm.kernels.block_table import cpu_ops
from minference_vllm.kernels.choose import KERNELS, choose
from minference_vllm.patterns.discovery import DEFAULTS, default_pattern
from minference_vllm.patterns.kinds import AShape, BlockSparse, Coverage, HeadPattern, TriShape, VerticalSlash
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.timing import Timing

# Fixed budgets are about 4K tokens per row.
PATTERNS: dict[str, HeadPattern] = {
    **{f"default_{platform}": default_pattern(platform) for platform in DEFAULTS},
    "coverage": Coverage(),
    "vertical_slash": VerticalSlash(vertical=1000, slash=3096),
    "a_shape": AShape(sink=1024, local=3072),
    "tri_shape": TriShape(sink=1024, local=3072, last=128),
    "block_sparse": BlockSparse(top_k=64),
}
MAX_ERROR = 0.03
"""Relative to a row's largest output; several times the rounding error of bf16."""


def fill_cache(keys: torch.Tensor, values: torch.Tensor, block_size: int) -> tuple[PagedCache, torch.Tensor]:
    """Write the tokens into shuffled pages in the dense kernel's layout; also returns each logical block's page."""
    tokens, heads, dim = keys.shape
    blocks = -(-tokens // block_size)
    pages = torch.randperm(blocks, generator=torch.Generator(keys.device).manual_seed(1))
    position = torch.arange(tokens)
    slots = pages[position // block_size] * block_size + position % block_size
    if keys.is_cuda:
        memory = torch.zeros(blocks, heads, block_size, 2 * dim, dtype=keys.dtype)
        by_slot = memory.transpose(1, 2)
        by_slot[slots // block_size, slots % block_size] = torch.cat([keys, values], -1)
        return PagedCache(memory[..., :dim], memory[..., dim:], "rows"), pages
    cache = torch.zeros(blocks, heads, 2 * block_size, dim, dtype=keys.dtype)
    layout = cpu_ops.layout_for(keys.dtype, block_size, dim)
    assert layout is not None
    cpu_ops.write_pages(keys, values, cache, slots, cpu_ops.isa_for(keys.dtype, block_size, dim))
    key, value = cache.chunk(2, dim=2)
    return PagedCache(key, value, layout), pages


def dense_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cache: PagedCache, pages: torch.Tensor, scale: float
) -> tuple[str, Callable[[], torch.Tensor]]:
    """The dense kernel's name, and a function that returns its output."""
    chunk, context = query.shape[0], keys.shape[0]
    table = pages[None].to(torch.int32)
    starts = torch.tensor([0, chunk], dtype=torch.int32)
    length = torch.tensor([context], dtype=torch.int32)
    out = torch.full_like(query, torch.nan)
    if not query.is_cuda:

        def on_cpu() -> torch.Tensor:
            cpu_ops.attend(query, cache.key, cache.value, table, starts, length, scale, out)
            return out

        return "vLLM CPU", on_cpu
    try:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    except ImportError:
        from torch.nn.attention.bias import causal_lower_right

        by_head = [rows.transpose(0, 1)[None] for rows in (query, keys, values)]
        mask = causal_lower_right(chunk, context)

        def by_torch() -> torch.Tensor:
            found = torch.nn.functional.scaled_dot_product_attention(
                *by_head, attn_mask=mask, scale=scale, enable_gqa=True
            )
            return found[0].transpose(0, 1)

        return "torch SDPA", by_torch
    version = get_flash_attn_version()

    def flash() -> torch.Tensor:
        return flash_attn_varlen_func(
            q=query,
            k=cache.key.transpose(1, 2),
            v=cache.value.transpose(1, 2),
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=chunk,
            seqused_k=length,
            max_seqlen_k=context,
            softmax_scale=scale,
            causal=True,
            block_table=table,
            fa_version=version,
        )

    return f"FlashAttention {version}", flash


def sampled_check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    index: SparseIndex,
    scale: float,
    remainder: bool = False,
) -> tuple[float, float]:
    """Largest error over sampled rows relative to the largest output, and mean recall."""
    # The remainder is computed for all rows of a tile, so the check takes that much longer per row.
    rows = torch.linspace(0, query.shape[0] - 1, 4 if remainder else 16).long().unique()
    starts = index.tiling.starts.tolist()
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    group = query.shape[1] // keys.shape[0]
    errors, recalls = [], []
    for row in rows.tolist():
        position = index.tiling.context_len + row
        tile = torch.searchsorted(index.tiling.starts, torch.tensor([position]), right=True) - 1
        for kv_head in range(keys.shape[0]):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            mask, counts = index.tile_mask(tile, heads), index.tile_counts(tile, heads)
            one = query[row : row + 1, heads]
            seen = keys[kv_head : kv_head + 1, : position + 1], values[kv_head : kv_head + 1, : position + 1]
            if remainder:
                begin, end = starts[int(tile)], starts[int(tile) + 1]
                expected = reference.with_remainder(
                    query[begin - index.tiling.context_len : end - index.tiling.context_len, heads],
                    keys[kv_head : kv_head + 1, :end],
                    values[kv_head : kv_head + 1, :end],
                    mask[..., :end] & reference.causal_mask(begin, end),
                    Tiling.of(begin, end, index.tiling.block_size, index.tiling.tile),
                    scale,
                    [head for head in range(group) if heads.start + head not in index.sampled],
                    sampled_positions(index.tiling.seq_len),
                    sample_step(index.tiling.seq_len),
                    counts=counts[..., :end].expand(-1, end - begin, -1),
                )[position - begin : position - begin + 1]
            else:
                expected = reference.masked_attention(
                    one, *seen, mask[..., : position + 1], scale, counts=counts[..., : position + 1]
                )
            mask = mask[..., : position + 1]
            errors.append((out[row : row + 1, heads].double() - expected).abs().max() / expected.abs().max())
            recalls.append(reference.attention_recall(one, seen[0], mask, position, scale).mean())
    # Python's max would ignore NaN.
    return float(torch.stack(errors).max()), float(torch.stack(recalls).mean())


def wrong(error: float) -> str | None:
    """The reason not to time a kernel with this error, which may be NaN."""
    return None if error <= MAX_ERROR else f"its answer is off by {error:.3g} of the largest output, so it is not timed"


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1000


def measure(
    args: argparse.Namespace, context: int, pattern_name: str, kernel_name: str, peers: list[str], failed: list[str]
) -> Iterator[dict[str, object]]:
    """The row of the kernel, then those of the peers. Wrong or failing ones are added to ``failed`` instead."""
    structure = Structure()
    chunk_len = min(args.chunk or context, context)
    dtype = getattr(torch, args.dtype)
    query, keys, values = structured_qkv(context, args.heads, args.kv_heads, args.head_size, structure, dtype=dtype)
    query = query[context - chunk_len :].contiguous()
    cache, pages = fill_cache(keys, values, args.block_size)
    scale = args.head_size**-0.5
    kernel = choose(kernel_name, query.dtype, cache)
    # The summaries of earlier pages, where a server keeps them (``metadata_builder``).
    kept = None if kernel.planned else PageMeans()
    inputs = Inputs(query, cache, pages, Chunk(0, 0, context - chunk_len, context), scale, page_means=kept)
    positions = torch.arange(context - chunk_len, context, device=pages.device)
    slots = pages[positions // args.block_size] * args.block_size + positions % args.block_size
    patterns = kernel.served([PATTERNS[pattern_name]] * args.heads)
    out = torch.full_like(query, torch.nan)
    dense_kernel, dense = dense_attention(query, keys, values, cache, pages, scale)
    on_gpu = args.device == "cuda"
    waited_for = query.device if on_gpu else None

    def sparse(timing: Timing | None = None) -> SparseIndex:
        if kept is not None:
            kept.forget(slots, args.block_size)
        return attend_chunk(inputs, patterns, kernel, out, args.tile, timing=timing)

    index = sparse()
    remainder = patterns[0].has_remainder
    error, recall = sampled_check(query, keys, values, out, index, scale, remainder)
    problem = Problem(query, keys, values, one_list_per_head(index), scale)
    dense_error, _ = sampled_check(query, keys, values, dense(), everything(problem.index), scale)
    reasons = {f"kernel {kernel.name!r}": wrong(error), dense_kernel: wrong(dense_error)}
    if any(reasons.values()):
        where = f"context {context}, {pattern_name}"
        failed += [f"{what}, {where}: {reason}" for what, reason in reasons.items() if reason]
        return
    timings, dense_seconds, sparse_seconds = [], [], []
    for _ in range(args.repeat):
        dense_seconds.append(seconds(dense, args.device))
        timings.append(Timing(device=waited_for))
        if on_gpu:
            sparse_seconds.append(seconds(sparse, args.device))
            sparse(timings[-1])
        else:
            sparse_seconds.append(seconds(functools.partial(sparse, timings[-1]), args.device))
    dense_s, sparse_s = statistics.median(dense_seconds), statistics.median(sparse_seconds)
    attend_s = statistics.median(t.attend for t in timings)
    row = {
        "kernel": kernel.name,
        "pattern": pattern_name,
        "context": context,
        "chunk": chunk_len,
        "density": float(index.density().mean()),
        "recall": recall,
        "max_error": error,
        "dense_s": dense_s,
        "estimate_s": statistics.median(t.estimate for t in timings),
        "index_s": statistics.median(t.index for t in timings),
        "attend_s": attend_s,
        "sparse_s": sparse_s,
        "speedup": dense_s / sparse_s,
    }
    shape: dict[str, object] = {}
    if on_gpu:
        flops = 4 * args.head_size * float(index.computed_pairs().sum())
        dense_flops = 4 * args.head_size * args.heads * index.dense_pairs()
        shape = {
            "dense_kernel": dense_kernel,
            "heads": args.heads,
            "kv_heads": args.kv_heads,
            "block_size": args.block_size,
        }
        row |= {"dense_tflops": dense_flops / dense_s / 1e12, "attend_tflops": flops / attend_s / 1e12} | shape
    yield row
    for name in peers:
        try:
            found = measure_peer(args, name, problem, dense)
        except Exception as error:  # a failing peer must not cost the other rows
            failed.append(f"peer {name!r}, context {context}, {pattern_name}: {type(error).__name__}: {error}")
        else:
            yield {"peer": name, "pattern": pattern_name, "context": context, "chunk": chunk_len} | found | shape


def measure_peer(
    args: argparse.Namespace, name: str, problem: Problem, dense: Callable[[], torch.Tensor]
) -> dict[str, object]:
    """A peer's part of the row for this pattern and context.

    Raises:
        ValueError: its output is not attention under its index.
    """
    peer = PEERS[name].prepare(problem)
    # A copy, since a kernel may reuse its output tensor.
    out = peer.attend().clone()
    error, recall = sampled_check(problem.query, problem.keys, problem.values, out, peer.index, problem.scale)
    reason = wrong(error)
    if reason:
        raise ValueError(reason)
    dense_seconds, peer_seconds = [], []
    for _ in range(args.repeat):
        dense_seconds.append(seconds(dense, args.device))
        peer_seconds.append(seconds(peer.attend, args.device))
    dense_s, peer_s = statistics.median(dense_seconds), statistics.median(peer_seconds)
    row: dict[str, object] = {
        "computes": peer.computes,
        "density": float(peer.index.density().mean()),
        "recall": recall,
        "max_error": error,
        "dense_s": dense_s,
        "attend_s": peer_s,
        "speedup": dense_s / peer_s,
    }
    if args.device == "cuda":
        flops = 4 * args.head_size * float(peer.index.computed_pairs().sum())
        row["attend_tflops"] = flops / peer_s / 1e12
    return row


def check_peers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with the reason if a requested peer cannot run at one of the sizes."""
    tile = whole_tile(args.tile, args.block_size)
    for name in args.peer:
        for context in args.context:
            chunk = min(args.chunk or context, context)
            size = Size(args.device, context, chunk, args.heads, args.head_size, args.block_size, tile)
            reason = PEERS[name].reason(size)
            if reason:
                parser.error(f"peer {name!r} cannot run at context {context}, chunk {chunk}: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--context", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--chunk", type=int, default=None, help="new tokens at the end of the context; default: all")
    parser.add_argument("--pattern", nargs="+", choices=list(PATTERNS), default=["vertical_slash"])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=["auto"], help="the setting of that name")
    parser.add_argument("--peer", nargs="+", choices=list(PEERS), default=[], help="other kernels, see peers.py")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--tile", type=int, default=None)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    check_peers(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    failed: list[str] = []
    for context in args.context:
        for pattern in args.pattern:
            for kernel in args.kernel:
                peers = args.peer if kernel == args.kernel[0] else []
                for row in measure(args, context, pattern, kernel, peers, failed):
                    emit(row, args.json, args.csv)
    print("\n".join(failed), file=sys.stderr, end="\n" if failed else "")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
