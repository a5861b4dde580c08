"""Print the kernel that the setting ``auto`` would choose on this GPU for some layers, without starting vLLM.

It runs the same trial as a server at its start (``prefill/kernel_trial.py``), by default on layers of Llama-3.1-8B's
shape: with pages of 16 and 128 tokens, and with patterns that list single keys, pages only, and one list for all heads
of a KV head. Kernels that cannot serve such a layer are reported with the reason. The choice is not stored.

    python tools/time_kernels.py
    python tools/time_kernels.py --heads 28 --kv-heads 4 --dtype float16
"""

from __future__ import annotations

import argparse
import sys

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.autotune import Trial, gpu_clock
from minference_vllm.kernels.choice_cache import Choice
from minference_vllm.kernels.choose import GPU_KERNELS, choose
from minference_vllm.patterns.discovery import default_pattern
from minference_vllm.patterns.kinds import AShape, BlockSparse, HeadPattern
from minference_vllm.prefill.kernel_trial import CHUNK_LEN, SEQ_LEN, result_in_words, run_trial, trial_pages

PATTERNS: list[HeadPattern] = [default_pattern("cuda"), BlockSparse(), AShape()]
PAGES = (16, 128)


def layer_inputs(args: argparse.Namespace, page: int) -> Inputs:
    """A chunk of random queries, keys and values at the end of the context."""
    device, dtype = torch.device("cuda"), getattr(torch, args.dtype)
    page_bytes = args.kv_heads * page * 2 * args.head_size * dtype.itemsize
    count, pages = trial_pages(-(-args.context // page), page_bytes, device)
    generator = torch.Generator(pages.device).manual_seed(0)
    shapes = (count, args.kv_heads, page, 2 * args.head_size), (args.chunk, args.heads, args.head_size)
    memory, query = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for shape in shapes)
    cache = PagedCache(memory[..., : args.head_size], memory[..., args.head_size :], "rows")
    chunk = Chunk(request=0, query_start=0, context_len=args.context - args.chunk, seq_len=args.context)
    return Inputs.of(query, cache, pages, chunk, args.head_size**-0.5)


@torch.inference_mode()
def time_kernels(args: argparse.Namespace, page: int, pattern: HeadPattern) -> bool:
    """Print the result for one kind of layer; returns whether every kernel that supports it ran."""
    inputs, kernels = layer_inputs(args, page), []
    for name in GPU_KERNELS:
        try:
            kernels.append(choose(name, inputs.query.dtype, inputs.cache))
        except ValueError as error:
            print(f"  {error}")
    trial = Trial([kernel.name for kernel in kernels], gpu_clock(inputs.query.device))
    run_trial(trial, kernels, inputs, [pattern] * args.heads, args.tile)
    for name, reason in trial.failed.items():
        print(f"  kernel {name!r} fails: {reason}", file=sys.stderr)
    if trial.left:
        choice = Choice(trial.fastest(), trial.totals())
        print(f"pages of {page}, {pattern}: {result_in_words(choice, args.chunk, args.context)}", flush=True)
    return not trial.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--context", type=int, default=SEQ_LEN)
    parser.add_argument("--chunk", type=int, default=CHUNK_LEN)
    parser.add_argument("--tile", type=int, default=None)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs an NVIDIA GPU")
    ran = [time_kernels(args, page, pattern) for page in PAGES for pattern in PATTERNS]
    return int(not all(ran))


if __name__ == "__main__":
    sys.exit(main())
