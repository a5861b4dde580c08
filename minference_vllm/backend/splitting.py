"""What our backends share: the sparse chunks of a batch taken out of the parent's path.

Its classes stand in front of vLLM's own in the order of base classes: ``super()`` is the parent backend.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata

from minference_vllm.backend.compat import dense_batch_reason, host_seq_lens, slice_requests
from minference_vllm.backend.runtime import runtime_for
from minference_vllm.backend.serving import serve_chunk
from minference_vllm.paged_cache import PagedCache
from minference_vllm.patterns import BlockSparse, Dense, HeadPattern, PeakThreshold
from minference_vllm.plan import PREFILL_FROM, Chunk, plan_batch
from minference_vllm.summaries import PageMeans

# A child of vLLM's own logger, so that our lines appear where vLLM's do.
logger = init_logger(f"vllm.{__name__}")


@dataclass
class SplittingMetadata:
    """What the metadata of a batch with at least one sparse chunk has beside the parent's fields."""

    sparse: tuple[tuple[Chunk, torch.Tensor], ...] = ()
    """The sparse chunks, and the physical pages (int64) of each."""
    dense_runs: tuple[tuple[tuple[int, int], slice, Any], ...] = ()
    """Per run of other requests: which they are, their query rows, and their metadata for the parent."""


class SplittingBuilder(AttentionMetadataBuilder):
    """Plans each batch; one with a sparse chunk carries ``metadata_cls``, every other the parent's metadata."""

    metadata_cls: Any
    """A dataclass below ``SplittingMetadata`` and the parent's."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.runtime = runtime_for(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        # A group of windowed layers, say: its batches are the parent's alone, and are not counted.
        self.dense_only = bool(layers) and all(getattr(layer.impl, "dense_only", True) for layer in layers)
        self.sparse_layers = [layer for layer in layers if _runs_sparsely(layer)]
        # Pages may also be written from outside (a KV connector); then nothing is kept.
        connected = getattr(vllm_config, "kv_transfer_config", None) is not None
        wanting = () if connected else filter(_wants_page_means, self.sparse_layers)
        self.page_means = [layer.impl.keep_page_means() for layer in wanting]
        speculative = getattr(vllm_config, "speculative_config", None)
        # Decodes may replay a CUDA graph of the parent's path: whatever the setting says, they are never ours.
        decode_len = 1 + (getattr(speculative, "num_speculative_tokens", None) or 0)
        self.min_chunk = max(self.runtime.settings.min_chunk, decode_len + 1)
        logger.info_once("minference: %s", self.runtime.summary(self._kernels()))

    def _kernels(self) -> str:
        """What attends the sparse chunks of these layers, for the log."""
        dtype, block_size = self.vllm_config.model_config.dtype, self.kv_cache_spec.block_size
        found = {layer.impl.kernels(dtype, block_size) for layer in self.sparse_layers}
        return f"attention by {', '.join(sorted(found))}" if found else "no layer of this KV-cache group runs sparsely"

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        for means in self.page_means:
            means.forget(common_attn_metadata.slot_mapping, self.kv_cache_spec.block_size)
        if common_attn_metadata.max_query_len < PREFILL_FROM or self.dense_only or common_prefix_len:
            return metadata  # nothing but decodes, most of the time
        lengths = host_seq_lens(common_attn_metadata)
        reason = dense_batch_reason(common_attn_metadata)
        if reason or lengths is None:
            logger.info_once("minference: some batches are served densely: %s", reason or "lengths are on the GPU only")
            return metadata
        settings, counters = self.runtime.settings, self.runtime.counters
        starts = common_attn_metadata.query_start_loc_cpu[: len(lengths) + 1].tolist()
        plan = plan_batch(starts, lengths, settings.min_context, self.min_chunk)
        counters.count_batch(plan)
        line = counters.line_when_due(settings.log_interval)
        if line:
            logger.info(line)
        if not plan.sparse:
            return metadata
        table = common_attn_metadata.block_table_tensor
        # A fast build: FlashAttention keeps its ahead-of-time schedule in one buffer per builder, which every run
        # would write anew.
        runs = tuple(
            (
                (first, last),
                slice(starts[first], starts[last]),
                super(SplittingBuilder, self).build(0, slice_requests(common_attn_metadata, first, last), True),
            )
            for first, last in plan.dense_runs
        )
        inherited = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
        return self.metadata_cls(**inherited, sparse=_with_pages(plan.sparse, table), dense_runs=runs)

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """The same batch for another group of layers, whose pages are others."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        if isinstance(metadata, self.metadata_cls):
            updated.sparse = _with_pages([chunk for chunk, _ in metadata.sparse], blk_table)
            updated.dense_runs = tuple(
                (requests, rows, super(SplittingBuilder, self).update_block_table(
                    run, blk_table[requests[0] : requests[1]], slot_mapping[rows]
                ))
                for requests, rows, run in metadata.dense_runs
            )  # fmt: skip
        return updated


def _runs_sparsely(layer: Any) -> bool:
    """Whether chunks of this layer may be sparse; it then knows its patterns."""
    return isinstance(layer.impl, SplittingImpl) and not layer.impl.dense_only and not layer.impl.runs_densely(layer)


def _wants_page_means(layer: Any) -> bool:
    """Whether a head of a sparse layer is estimated from mean keys, by code that can use kept ones (not on a GPU)."""
    if not layer.impl.keeps_page_means:
        return False
    return any(isinstance(pattern, BlockSparse | PeakThreshold) for pattern in layer.impl.patterns)


def _with_pages(chunks: Any, block_table: torch.Tensor) -> tuple[tuple[Chunk, torch.Tensor], ...]:
    return tuple((chunk, block_table[chunk.request].long()) for chunk in chunks)


class SplittingImpl(AttentionImpl):
    """Serves the sparse chunks under an index and leaves the rest to the parent."""

    keeps_page_means = False
    """Whether mean keys are taken from ``summaries.PageMeans``; a GPU's kernels read the pages anew."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        self.runtime = runtime_for(vllm_config)
        self.first_head = get_tensor_model_parallel_rank() * self.num_heads
        self.layer_number = -1
        self.patterns: tuple[HeadPattern, ...] | None = None
        self.page_means: PageMeans | None = None
        reasons = self.dense_reasons(vllm_config)
        self.dense_only = bool(reasons)
        if reasons:
            logger.info_once("minference: some layers run densely: %s", ", ".join(reasons))

    def dense_reasons(self, vllm_config: Any) -> list[str]:
        """Why this layer runs densely; empty when it can run sparsely.

        Raises:
            ValueError: the engine that the user named cannot run.
        """
        raise NotImplementedError

    def kernels(self, dtype: torch.dtype, block_size: int) -> str:
        """What attends this layer's sparse chunks, by which engine, for the log; of a layer that knows its patterns.

        Args:
            dtype: the model's. block_size: tokens per page.
        """
        raise NotImplementedError

    def paged_cache(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> PagedCache:
        """vLLM's cache of this layer as ours."""
        raise NotImplementedError

    def attend_options(self, layer: Any, query: torch.Tensor) -> dict[str, Any]:
        """What ``attend_chunk`` must know of this layer beside its patterns."""
        return {"scale": self.scale}

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
        """As the parent's; chunks that the plan names are computed under a sparse index.

        Args:
            key, value: of the new tokens; None in a layer that shares another one's cache.
        """
        sparse = getattr(attn_metadata, "sparse", None)
        if not sparse or self.dense_only or self.runs_densely(layer):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        assert self.patterns is not None
        for _, rows, metadata in attn_metadata.dense_runs:
            new_key, new_value = (None if new is None else new[rows] for new in (key, value))
            super().forward(
                layer, query[rows], new_key, new_value, kv_cache, metadata, output[rows],
                output_scale, output_block_scale,
            )  # fmt: skip
        cache = self.paged_cache(layer, kv_cache, query.dtype)
        query = query.view(-1, self.num_heads, self.head_size)
        out = output.view(-1, self.num_heads, self.head_size)
        options = {"page_means": self.page_means, **self.attend_options(layer, query)}
        for chunk, pages in sparse:
            rows = slice(chunk.query_start, chunk.query_start + chunk.query_len)
            serve_chunk(
                self.runtime, self.layer_number, self.first_head, query[rows], cache, pages, chunk, self.patterns,
                out[rows], **options,
            )  # fmt: skip
        return output

    def keep_page_means(self) -> PageMeans:
        """From now on; the caller tells what is written to the cache."""
        self.page_means = PageMeans()
        return self.page_means

    def runs_densely(self, layer: Any) -> bool:
        """Whether every head of this layer has the dense pattern; finds the layer's patterns on first use."""
        if self.patterns is None:
            self.layer_number = _layer_number(layer.layer_name)
            self.patterns = self.runtime.patterns.for_layer(self.layer_number, self.num_heads, self.first_head)
        return all(isinstance(pattern, Dense) for pattern in self.patterns)


def _layer_number(layer_name: str) -> int:
    """The layer's number in its name, or -1, which no pattern file has, for a name without a clear one."""
    try:
        return int(extract_layer_index(layer_name))
    except (AssertionError, ValueError):
        logger.info_once("minference: layer %s has no clear number and runs the default pattern", layer_name)
        return -1
