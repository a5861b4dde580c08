"""Warm-up when the engine starts: compile the kernels that the first long prompt needs, and allocate its peak memory
before vLLM gives that memory to its cache.

Triton compiles a kernel for every combination of types, sizes and flags. The most reliable way to compile those that
serving needs is to serve a chunk of two tiles for every kind of layer, over an empty page. Likewise for memory: while
vLLM measures what the model needs besides its cache, the largest chunk is served over one empty page.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.logger import init_logger

from minference_vllm.backend.kernel_choice import LayerChoice
from minference_vllm.backend.variants import Variant, empty_inputs, run_named
from minference_vllm.core.plan import Chunk
from minference_vllm.core.tiling import whole_tile
from minference_vllm.kernels.kernel import Kernel
from minference_vllm.patterns.kinds import MAX_STEP, HeadPattern, LowRank
from minference_vllm.prefill import kernel_trial
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.recall import RecallCheck, audited_rows
from minference_vllm.selection.capacity import MEMORY_LIMIT
from minference_vllm.selection.families import family_of
from minference_vllm.selection.family import ADAPTIVE_COLUMNS
from minference_vllm.settings import Settings

logger = init_logger(f"vllm.{__name__}")

WIDEST = LowRank(rank=128)
"""The pattern that needs the most memory. On the longest contexts one head exceeds what is left of ``MEMORY_LIMIT``."""


_ready: set[tuple[Variant, str]] = set()
"""Variants and kernel names that are compiled in this process. Global, since vLLM makes a builder for every group of
layers and micro-batch."""


def warm_up(
    layers: Sequence[Any],
    spec: Any,
    dtype: torch.dtype,
    settings: Settings,
    device: torch.device,
    name: str | None = None,
) -> None:
    """Run every kernel that sparse chunks of these layers need, each variant once per process.

    Args:
        layers: vLLM's attention layers that have our implementation and run sparsely.
        spec: vLLM's spec of their KV cache.
        dtype: the model's dtype.
        name: name of the patterns that requests asked for; None: the server's patterns.

    Raises:
        RuntimeError: a kernel does not compile or run here; the message names the variant, the kernel and its shapes.
    """
    begin, before = time.perf_counter(), len(_ready)
    for layer in layers:
        for patterns in _patterns_of(layer, settings, name):
            _warm_up_layer(layer, patterns, spec, dtype, settings, device, name)
    if len(_ready) > before:
        seconds = time.perf_counter() - begin
        logger.info("minference: kernels for %d kinds of layers ready after %.1f s", len(_ready) - before, seconds)


_profiled: dict[tuple[Variant, tuple[HeadPattern, ...], str | None], int] = {}
"""Tokens of the largest chunk whose memory this process has allocated once. Keys end in the kernel's name, or None for
far chunks of dual chunk attention."""


def take_memory(layer: Any, vllm_config: Any, tokens: int, device: torch.device) -> None:
    """Allocate, once, the peak memory of a layer's largest sparse chunk: the index with its scores, and the audit.
    Called while vLLM measures how much memory is left for its cache.

    The sizes of an index depend on patterns and lengths only, not on content: every page of the sequence is the same
    empty page. If several kernels may serve the layer, each of them runs, and the memory of their trial is added.

    Args:
        layer: vLLM's attention layer with our implementation.
        tokens: maximum number of tokens of a batch.

    Raises:
        RuntimeError: see ``warm_up``.
    """
    model, settings = vllm_config.model_config, layer.impl.runtime.settings
    spec = layer.get_kv_cache_spec(vllm_config)
    layer.impl.prepare(layer, spec, model.dtype, device)
    dual_chunk, seq_len = layer.impl.dual_chunk, model.max_model_len
    if dual_chunk is not None and dual_chunk.plain_len < seq_len:
        chunk = _last_chunk(tokens, seq_len)
        _take_room(spec, chunk, settings, device)
        _take_memory(layer, spec, model.dtype, chunk, dual_chunk.layers[None].patterns, None, settings, device)
        seq_len = dual_chunk.plain_len
    chunk = _last_chunk(tokens, seq_len)
    if seq_len < settings.min_context or chunk.query_len < settings.min_chunk:
        return
    _take_room(spec, chunk, settings, device)
    if layer.impl.sparse_layer is None:
        return
    choice = LayerChoice(layer, spec, vllm_config, device)
    kernels = choice.candidates()
    of_the_trial = torch.empty(kernel_trial.MEMORY if len(kernels) > 1 else 0, dtype=torch.uint8, device=device)
    for kernel in kernels:
        try:
            for patterns in _patterns_of(layer, settings):
                _take_memory(layer, spec, model.dtype, chunk, patterns, kernel, settings, device)
        except RuntimeError as error:
            if choice.candidates() == [kernel]:
                raise
            choice.leave_out(kernel, error)
    del of_the_trial


def _take_room(spec: Any, chunk: Chunk, settings: Settings, device: torch.device) -> None:
    """Allocate the maximum memory for building an index with any patterns that requests may ask for. Shorter chunks
    score as many heads at once as fit, and may therefore need more than the largest chunk."""
    tiles = -(-chunk.query_len // whole_tile(settings.tile, spec.block_size)) + 1
    pages = -(-chunk.seq_len // spec.block_size)
    one_head = family_of(WIDEST).selection_bytes(WIDEST, tiles, chunk.seq_len, pages, ADAPTIVE_COLUMNS)
    size = max(MEMORY_LIMIT, MEMORY_LIMIT * 3 // 4 + one_head)  # the lists of all heads, and a single head's selection
    torch.empty(size, dtype=torch.uint8, device=device)


def _last_chunk(tokens: int, seq_len: int) -> Chunk:
    return Chunk(request=0, query_start=0, context_len=max(0, seq_len - tokens), seq_len=seq_len)


def _take_memory(
    layer: Any,
    spec: Any,
    dtype: torch.dtype,
    chunk: Chunk,
    patterns: Sequence[HeadPattern],
    kernel: Kernel | None,
    settings: Settings,
    device: torch.device,
) -> None:
    """``kernel``: None for a far chunk of dual chunk attention, which has a kernel of its own."""
    inputs = empty_inputs(layer, spec, dtype, chunk, device)
    variant = Variant.of(layer, inputs, patterns)
    key = variant, tuple(patterns), None if kernel is None else kernel.name
    if _profiled.get(key, 0) >= chunk.query_len:
        return
    _profiled[key] = chunk.query_len

    def run(out: torch.Tensor) -> None:
        if kernel is None:
            layer.impl.dual_chunk.take_memory(inputs, out, settings)
            return
        rows = audited_rows(inputs.query, settings.audit_rows, seed=0) if settings.audit_rows else None
        check = None if rows is None else RecallCheck(rows)
        attend_chunk(inputs, kernel.served(patterns), kernel, out, settings.tile, check)

    run_named(variant, inputs, dtype, run)


def _patterns_of(layer: Any, settings: Settings, name: str | None = None) -> Iterator[list[HeadPattern]]:
    """The patterns of a layer's heads, and those that ``recall_floor`` may raise them to."""
    for step in range(1 if settings.recall_floor is None else MAX_STEP + 1):
        yield [pattern.at_step(step) for pattern in layer.impl.layer_for(name).patterns]


def _warm_up_layer(
    layer: Any,
    patterns: list[HeadPattern],
    spec: Any,
    dtype: torch.dtype,
    settings: Settings,
    device: torch.device,
    name: str | None,
) -> None:
    tile = whole_tile(settings.tile, spec.block_size)
    chunk = Chunk(request=0, query_start=0, context_len=tile, seq_len=3 * tile, patterns=name)
    inputs = empty_inputs(layer, spec, dtype, chunk, device)
    variant, impl = Variant.of(layer, inputs, patterns), layer.impl
    kernel = impl.layer_for(name).kernel

    def run(out: torch.Tensor) -> None:
        attend_chunk(inputs, patterns, kernel, out, settings.tile)
        if impl.dual_chunk is not None:
            impl.dual_chunk.warm_up(inputs, out, settings.tile)

    if (variant, kernel.name) not in _ready:
        run_named(variant, inputs, dtype, run)
        _ready.add((variant, kernel.name))
