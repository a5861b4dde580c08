"""``Variant``: what determines the kernels for a layer's sparse chunks, and synthetic chunks to run them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.plan import Chunk
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.selection.families import family_of, share_lists


@dataclass(frozen=True)
class Variant:
    """What determines which kernels the sparse chunks of a layer run."""

    kinds: frozenset[tuple[str, tuple[int, ...]]]
    """Kinds of its patterns, with ``Family.kernel_sizes``: budgets change no kernel."""
    remainder: bool
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

    @classmethod
    def of(cls, layer: Any, inputs: Inputs, patterns: Sequence[HeadPattern]) -> Variant:
        """
        Args:
            layer: vLLM's attention layer with our implementation.
            inputs: a chunk of the layer.
            patterns: one per query head.
        """
        cache = inputs.cache
        return cls(
            frozenset((pattern.kind, family_of(pattern).kernel_sizes(pattern)) for pattern in patterns),
            any(pattern.has_remainder for pattern in patterns),
            inputs.group if share_lists(patterns, inputs.group) else 1,
            inputs.num_heads,
            cache.num_kv_heads,
            cache.head_size,
            cache.block_size,
            inputs.query.dtype,
            cache.key.dtype,
            inputs.softcap != 0.0,
            inputs.sinks is not None,
            layer.impl.dual_chunk is not None,
        )

    def __str__(self) -> str:
        query, cache = (str(dtype).removeprefix("torch.") for dtype in (self.query, self.cache))
        flags = [name for name in ("remainder", "softcap", "sinks", "dual_chunk") if getattr(self, name)]
        sizes = f"{self.heads} heads over {self.kv_heads} of size {self.head_size}, pages of {self.page}"
        return ", ".join([f"{query} over {cache}", sizes, *flags, *sorted({kind for kind, _ in self.kinds})])


def empty_inputs(layer: Any, spec: Any, dtype: torch.dtype, chunk: Chunk, device: torch.device) -> Inputs:
    """A chunk of zeros. All pages of its sequence are the same page of zeros.

    Args:
        layer: vLLM's attention layer with our implementation.
        spec: vLLM's spec of its KV cache.
        dtype: the model's dtype.
    """
    memory = torch.zeros(_page_shape(layer, spec, 1), dtype=spec.dtype, device=device)
    pages = torch.zeros(-(-chunk.seq_len // spec.block_size), dtype=torch.int64, device=device)
    # With a quantised cache vLLM also quantises the queries, if the parent asks for it.
    query_dtype = torch.float8_e4m3fn if getattr(layer, "query_quant", None) is not None else dtype
    query = torch.zeros(chunk.query_len, layer.impl.num_heads, layer.impl.head_size, dtype=query_dtype, device=device)
    return _inputs(layer, query, memory, pages, dtype, chunk)


def random_inputs(
    layer: Any, spec: Any, dtype: torch.dtype, chunk: Chunk, num_blocks: int, pages: torch.Tensor
) -> Inputs:
    """A chunk of random queries, keys and values, not quantised. Uses a generator of its own, not the global one.

    Args:
        layer, spec, dtype: as for ``empty_inputs``.
        num_blocks: number of pages of the cache.
        pages: int64 ``[N]``, page of each block of the sequence, on the layer's device.
    """
    generator = torch.Generator(pages.device).manual_seed(0)
    shapes = _page_shape(layer, spec, num_blocks), (chunk.query_len, layer.impl.num_heads, layer.impl.head_size)
    memory, query = (
        torch.empty(shape, dtype=dtype, device=pages.device).normal_(generator=generator) for shape in shapes
    )
    return _inputs(layer, query, memory, pages, dtype, chunk)


def _page_shape(layer: Any, spec: Any, num_blocks: int) -> tuple[int, int, int, int]:
    """``[num_blocks, num_kv_heads, block_size, 2 * D]``: keys and values side by side."""
    return num_blocks, layer.impl.num_kv_heads, spec.block_size, 2 * layer.impl.head_size


def _inputs(
    layer: Any, query: torch.Tensor, memory: torch.Tensor, pages: torch.Tensor, dtype: torch.dtype, chunk: Chunk
) -> Inputs:
    inputs = layer.impl.inputs(layer, query, layer.impl.paged_cache(layer, memory, dtype), pages, chunk)
    assert isinstance(inputs, Inputs)
    return inputs


@torch.inference_mode()
def run_named(variant: Variant, inputs: Inputs, dtype: torch.dtype, run: Callable[[torch.Tensor], None]) -> None:
    """Call ``run`` with an output tensor for the chunk's attention, and synchronise with the GPU.

    Raises:
        RuntimeError: ``run`` failed; the message names the variant.
    """
    out = torch.empty(inputs.query.shape, dtype=dtype, device=inputs.query.device)
    try:
        run(out)
        if out.device.type == "cuda":
            torch.cuda.synchronize(out.device)
    except Exception as error:
        raise RuntimeError(f"minference: kernels for layers of {variant} do not run here: {error}") from error
