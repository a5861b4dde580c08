"""Code shared by our implementations: we serve the sparse chunks of a batch, the parent serves the rest.

The class precedes vLLM's own in the order of base classes: ``super()`` is the parent backend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl

from minference_vllm.backend.compat import page_reasons
from minference_vllm.backend.dual_chunk import DualChunkLayer
from minference_vllm.backend.dual_chunk_limits import refusal
from minference_vllm.backend.limits import attention_chunk_reasons, check_page_size
from minference_vllm.backend.request_patterns import Asked
from minference_vllm.backend.runtime import runtime_for
from minference_vllm.backend.serving import SparseLayer, serve_chunk
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.tiling import whole_tile
from minference_vllm.kernels.choose import choose_for, description
from minference_vllm.kernels.kernel import Kernel
from minference_vllm.patterns.file import PatternFile

# A child of vLLM's logger, so that our lines appear where vLLM's do.
logger = init_logger(f"vllm.{__name__}")

DENSE_LAYERS = "minference: some layers run densely: %s"


class SparsePrefillImpl(AttentionImpl):
    """Serves sparse chunks with an index and leaves the rest to the parent."""

    def __init__(self, *args: Any, layer_idx: int = -1, dual_chunk_attention_config: Any = None, **kwargs: Any) -> None:
        """Arguments as the parent's.

        Args:
            layer_idx, dual_chunk_attention_config: passed to layers with dual chunk attention. Both are redundant with
                the layer's name and the model's configuration.
        """
        super().__init__(*args, **kwargs)
        self.vllm_config = vllm_config = get_current_vllm_config()
        self.runtime = runtime_for(vllm_config)
        geometry = self.runtime.dual_chunk
        if (geometry is None) != (not dual_chunk_attention_config):
            raise refusal("some layers that do not have it", "choose another attention backend")
        self.dual_chunk = DualChunkLayer(self.runtime, geometry) if geometry else None
        self.first_head = get_tensor_model_parallel_rank() * self.num_heads
        self.sparse_layer: SparseLayer | None = None
        """How sparse chunks run; None before ``prepare``, and if every chunk runs densely."""
        self.asked_layers: dict[str, SparseLayer | None] = {}
        """The same for chunks whose requests asked for other patterns, by the names of these."""
        self.attends = ""
        """Description of the kernel for sparse chunks, for the log."""
        self.page_means: PageMeans | None = None
        self.dense_only = False
        """Whether the layer itself, not its patterns, requires dense attention."""
        self._run_densely(self.dense_reasons(vllm_config))

    def _run_densely(self, reasons: list[str]) -> None:
        if reasons:
            if self.dual_chunk is not None:
                raise refusal(", ".join(reasons), "choose another attention backend")
            self.dense_only = True
            logger.info_once(DENSE_LAYERS, ", ".join(reasons))

    def dense_reasons(self, vllm_config: Any) -> list[str]:
        """Why this layer runs densely, as far as known when it is created; empty if it can run sparsely.

        Raises:
            ValueError: the kernel that the user chose cannot run.
        """
        raise NotImplementedError

    def cache_reasons(self, layer: Any, block_size: int, dtype: torch.dtype) -> list[str]:
        """As ``dense_reasons``, once the weights are loaded and the page size is known."""
        return []

    def measure(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor) -> None:
        """Allocate the peak memory of sparse chunks while vLLM measures how much memory is left for its cache. Does
        nothing on CPUs, where the user sets the size of the cache."""

    def paged_cache(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> PagedCache:
        """vLLM's cache of this layer as a ``PagedCache``."""
        raise NotImplementedError

    def inputs(
        self, layer: Any, query: torch.Tensor, cache: PagedCache, block_table: torch.Tensor, chunk: Chunk
    ) -> Inputs:
        """One chunk of this layer; ``query`` holds the chunk's rows."""
        softcap = float(self.logits_soft_cap or 0.0)
        inputs = Inputs.of(query, cache, block_table, chunk, self.scale, softcap, self.sinks, self.page_means)
        if not self.window:
            return inputs
        return inputs.in_window(self.window, whole_tile(self.runtime.settings.tile, cache.block_size))

    @property
    def window(self) -> int:
        """Sliding window of a sparse layer: maximum number of keys that a row sees, itself included; 0: no limit."""
        return 0

    @property
    def needs_own_kernel(self) -> bool:
        """Whether only one of our own kernels can serve the layer (``choose``)."""
        return False

    def kernel_for(self, name: str | None) -> str:
        """The setting ``kernel`` for patterns of this name (``Chunk.patterns``)."""
        return self.runtime.settings.kernel

    def run_by(self, kernel: Kernel, dtype: torch.dtype, cache: PagedCache) -> None:
        """Switch the sparse chunks of the prepared layer to another kernel.

        Args:
            cache: a cache with the layer's types and sizes.
        """
        assert self.sparse_layer is not None
        patterns = tuple(kernel.served(self.sparse_layer.patterns))
        self.sparse_layer = replace(self.sparse_layer, kernel=kernel, patterns=patterns)
        self.attends = description(kernel, self.runtime.settings.kernel, dtype, cache)

    def prepare(self, layer: Any, spec: Any, dtype: torch.dtype, device: torch.device) -> None:
        """Find the layer's patterns and choose its kernel, once the weights are loaded and the page size is known.

        Args:
            layer: vLLM's attention layer with this implementation.
            spec: vLLM's spec of its KV cache.
            dtype: the model's dtype.

        Raises:
            ValueError: the kernel that the user chose, or a pattern, cannot run on this cache.
        """
        self.sparse_layer = self.page_means = None
        if self.dense_only:
            return
        runtime, page = self.runtime, spec.block_size
        check_page_size(runtime.patterns, runtime.source, page)
        reasons = [
            *attention_chunk_reasons(attention_chunk(layer), runtime.settings.min_context),
            *page_reasons(spec),
            *self.cache_reasons(layer, page, dtype),
        ]
        if reasons:
            self._run_densely(reasons)
            return
        cache = self._one_page(layer, spec, dtype, device)
        self.sparse_layer = found = self._layer_with(runtime.patterns, runtime.source, None, layer, dtype, cache)
        if found is not None:
            self.attends = description(found.kernel, runtime.settings.kernel, dtype, cache)

    def prepare_asked(self, asked: Asked, layer: Any, spec: Any, dtype: torch.dtype, device: torch.device) -> None:
        """The same for requests that asked for other patterns; arguments and errors as for ``prepare``."""
        found = None
        if not self.dense_only and asked.patterns is not None:
            check_page_size(asked.patterns, asked.name, spec.block_size)
            cache = self._one_page(layer, spec, dtype, device)
            found = self._layer_with(asked.patterns, asked.name, asked.name, layer, dtype, cache)
        self.asked_layers[asked.name] = found

    def forget_asked(self) -> None:
        """Drop everything that ``prepare_asked`` has prepared."""
        self.asked_layers.clear()
        if self.dual_chunk is not None:
            self.dual_chunk.forget_asked()

    def layer_for(self, name: str | None) -> SparseLayer | None:
        """How sparse chunks with patterns of this name (``Chunk.patterns``) run; None: densely."""
        return self.sparse_layer if name is None else self.asked_layers[name]

    def _one_page(self, layer: Any, spec: Any, dtype: torch.dtype, device: torch.device) -> PagedCache:
        """A cache of one page, with the layer's types and sizes."""
        memory = torch.zeros(1, self.num_kv_heads, spec.block_size, 2 * self.head_size, dtype=spec.dtype, device=device)
        return self.paged_cache(layer, memory, dtype)

    def _layer_with(
        self, file: PatternFile, source: str, name: str | None, layer: Any, dtype: torch.dtype, cache: PagedCache
    ) -> SparseLayer | None:
        """The layer with the patterns of this file; None if all of its heads run densely."""
        number = _layer_number(layer.layer_name)
        patterns = file.for_layer(number, self.num_heads, self.first_head)
        if self.dual_chunk is not None:
            self.dual_chunk.prepare(name, number, self.first_head, patterns, cache)
        if all(pattern.kind == "dense" for pattern in patterns):
            return None
        try:
            own = self.needs_own_kernel
            kernel, patterns, without = choose_for(patterns, self.kernel_for(name), dtype, cache, own)
        except ValueError as error:
            raise ValueError(f"minference: patterns from {source}: {error}") from None
        if without:
            logger.info_once("minference: no remainder is added, and low_rank selects more keys instead: %s", without)
        return SparseLayer(number, self.first_head, patterns, kernel)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the parent's; chunks in the plan are computed with a sparse index.

        Args:
            query: with dual chunk attention, all rotations of each token, see ``DualChunkLayer.rotations``.
            key, value: keys and values of the new tokens; None in a layer that shares another layer's cache.
        """
        rotated = query
        sparse, far = getattr(attn_metadata, "sparse", ()), getattr(attn_metadata, "far", ())
        if self.dual_chunk is not None:
            rotated = self.dual_chunk.rotations(query, self.num_heads, self.head_size)
            query = rotated[:, 0].contiguous()
        if attn_metadata is None:
            self.measure(layer, query, kv_cache)
        layers = [self.layer_for(chunk.patterns) for chunk, _ in sparse]
        if not any(layers) and not any(self._is_far(chunk) for chunk, _ in (*sparse, *far)):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        # Chunks whose patterns are dense in this layer, while others of the batch are not.
        dense = [chunk for (chunk, _), found in zip(sparse, layers, strict=True) if not (found or self._is_far(chunk))]
        alone = [attn_metadata.alone[chunk.request] for chunk in dense]
        for _, rows, metadata in (*attn_metadata.dense_runs, *alone):
            new_key, new_value = (None if new is None else new[rows] for new in (key, value))
            super().forward(
                layer, query[rows], new_key, new_value, kv_cache, metadata, output[rows],
                output_scale, output_block_scale,
            )  # fmt: skip
        cache = self.paged_cache(layer, kv_cache, query.dtype)
        query = query.view(-1, self.num_heads, self.head_size)
        out = output.view(-1, self.num_heads, self.head_size)
        for (chunk, block_table), found in zip((*sparse, *far), (*layers, *[None] * len(far)), strict=True):
            rows = slice(chunk.query_start, chunk.query_start + chunk.query_len)
            if self.dual_chunk is not None and self.dual_chunk.is_far(chunk):
                inputs = self.inputs(layer, query[rows], cache, block_table, chunk)
                self.dual_chunk.serve(rotated[rows], inputs, out[rows], sparse=found is not None)
            elif found is not None:
                inputs = self.inputs(layer, query[rows], cache, block_table, chunk)
                serve_chunk(self.runtime, found, inputs, out[rows])
        return output

    def _is_far(self, chunk: Chunk) -> bool:
        return self.dual_chunk is not None and self.dual_chunk.is_far(chunk)

    def keep_page_means(self) -> PageMeans:
        """Keep page means from now on. The caller must report cache writes with ``PageMeans.forget``."""
        self.page_means = PageMeans()
        return self.page_means


def attention_chunk(layer: Any) -> int | None:
    """Tokens per chunk of a vLLM layer with chunked local attention; None: the layer attends everything."""
    return getattr(layer, "attention_chunk_size", None)


def _layer_number(layer_name: str) -> int:
    """The layer's number from its name, or -1, which no pattern file has, if the name has no clear number."""
    try:
        return int(extract_layer_index(layer_name))
    except (AssertionError, ValueError):
        logger.info_once("minference: layer %s has no clear number and runs the default pattern", layer_name)
        return -1
