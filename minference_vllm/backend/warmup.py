"""Our Triton kernels compiled when the engine starts, so that the first long prompt does not wait for them.

Triton compiles a kernel for every combination of types, sizes and flags that it meets. The surest way to meet those
that serving will is to serve: a chunk of two tiles for every kind of layer, over a few empty pages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger

from minference_vllm.core.plan import Chunk
from minference_vllm.core.tiling import whole_tile
from minference_vllm.patterns.kinds import MAX_STEP, HeadPattern
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.selection.families import family_of, share_lists
from minference_vllm.settings import Settings

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class Variant:
    """What decides which kernels the sparse chunks of a layer run."""

    kinds: frozenset[tuple[str, int]]
    """Of its patterns, with the stride or rank of those that have one, and 1 for mean correction (else 0): budgets
    change no kernel."""
    heads_per_list: int
    heads: int
    kv_heads: int
    head_size: int
    page: int
    query: torch.dtype
    cache: torch.dtype
    softcap: bool
    sinks: bool
    dual_chunk: bool = False

    def __str__(self) -> str:
        query, cache = (str(dtype).removeprefix("torch.") for dtype in (self.query, self.cache))
        flags = [name for name in ("softcap", "sinks", "dual_chunk") if getattr(self, name)]
        sizes = f"{self.heads} heads over {self.kv_heads} of size {self.head_size}, pages of {self.page}"
        return ", ".join([f"{query} over {cache}", sizes, *flags, *sorted({kind for kind, _ in self.kinds})])


_ready: set[Variant] = set()
"""In this process: builders are made anew for every group of layers and micro-batch."""


def warm_up(layers: Sequence[Any], spec: Any, dtype: torch.dtype, settings: Settings, device: torch.device) -> None:
    """Run every kernel that the sparse chunks of these layers will run, each variant once per process.

    Args:
        layers: vLLM's attention layers that have our implementation and run sparsely.
        spec: vLLM's, of their KV cache.
        dtype: the model's.

    Raises:
        RuntimeError: a kernel does not compile or does not run here; names the variant, the kernel and its shapes.
    """
    begin, before = time.perf_counter(), len(_ready)
    # A floor raises heads to other kinds of patterns.
    for step in range(1 if settings.recall_floor is None else MAX_STEP + 1):
        for layer in layers:
            patterns = [pattern.at_step(step) for pattern in layer.impl.sparse_layer.patterns]
            _warm_up_layer(layer, patterns, spec, dtype, settings, device)
    if len(_ready) > before:
        seconds = time.perf_counter() - begin
        logger.info("minference: kernels for %d kinds of layers ready after %.1f s", len(_ready) - before, seconds)


@torch.inference_mode()
def _warm_up_layer(
    layer: Any, patterns: list[HeadPattern], spec: Any, dtype: torch.dtype, settings: Settings, device: torch.device
) -> None:
    impl, page = layer.impl, spec.block_size
    group = impl.num_heads // impl.num_kv_heads
    # Quantised queries come with quantised caches, where the parent asked for them.
    query_dtype = torch.float8_e4m3fn if getattr(layer, "query_quant", None) is not None else dtype
    tile = whole_tile(settings.tile, page)
    chunk = Chunk(request=0, query_start=0, context_len=tile, seq_len=3 * tile)
    pages = torch.arange(chunk.seq_len // page, device=device)
    memory = torch.zeros(len(pages), impl.num_kv_heads, page, 2 * impl.head_size, dtype=spec.dtype, device=device)
    cache = impl.paged_cache(layer, memory, dtype)
    query = torch.zeros(chunk.query_len, impl.num_heads, impl.head_size, dtype=query_dtype, device=device)
    inputs = impl.inputs(layer, query, cache, pages, chunk)
    variant = Variant(
        frozenset((pattern.kind, family_of(pattern).kernel_size(pattern)) for pattern in patterns),
        group if share_lists(patterns, group) else 1,
        impl.num_heads,
        impl.num_kv_heads,
        impl.head_size,
        page,
        query_dtype,
        cache.key.dtype,
        inputs.softcap != 0.0,
        inputs.sinks is not None,
        impl.dual_chunk is not None,
    )
    if variant in _ready:
        return
    out = torch.empty(query.shape, dtype=dtype, device=device)
    try:
        attend_chunk(inputs, patterns, impl.sparse_layer.kernel, out, settings.tile)
        if impl.dual_chunk is not None:
            impl.dual_chunk.warm_up(inputs, patterns, out, settings.tile)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        raise RuntimeError(f"minference: kernels for layers of {variant} do not run here: {error}") from error
    _ready.add(variant)
