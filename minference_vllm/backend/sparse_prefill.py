"""What our backends share: sparse chunks are served by us, everything else of a batch by the parent.

Its classes stand in front of vLLM's own in the order of base classes: ``super()`` is the parent backend.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata

from minference_vllm.backend.compat import dense_batch_reason, host_seq_lens, page_reasons, slice_requests
from minference_vllm.backend.dual_chunk import DualChunkLayer
from minference_vllm.backend.dual_chunk_limits import refusal
from minference_vllm.backend.runtime import attention_chunk_reasons, check_page_size, runtime_for
from minference_vllm.backend.serving import SparseLayer, serve_chunk
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import PREFILL_FROM, Chunk, plan_batch
from minference_vllm.core.tiling import whole_tile
from minference_vllm.kernels.choose import choose_for, description
from minference_vllm.selection.families import family_of

# A child of vLLM's own logger, so that our lines appear where vLLM's do.
logger = init_logger(f"vllm.{__name__}")


DENSE_LAYERS = "minference: some layers run densely: %s"


@dataclass
class SparsePrefillMetadata:
    """What the metadata of a batch with a chunk for us has beside the parent's fields."""

    sparse: tuple[tuple[Chunk, torch.Tensor], ...] = ()
    """The sparse chunks, and the physical pages (int64) of each."""
    dense_runs: tuple[tuple[tuple[int, int], slice, Any], ...] = ()
    """Per run of other requests: which they are, their query rows, and their metadata for the parent."""
    far: tuple[tuple[Chunk, torch.Tensor], ...] = ()
    """As ``sparse``: chunks that are ours though they are dense, see ``Plan``."""


class SparsePrefillBuilder(AttentionMetadataBuilder):
    """Plans each batch; one with a sparse chunk carries ``metadata_cls``, every other the parent's metadata."""

    metadata_cls: Any
    """A dataclass below ``SparsePrefillMetadata`` and the parent's."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        self.layers = [layer for layer in layers if isinstance(layer.impl, SparsePrefillImpl)]
        # The configuration is the served model's, also where the layers are a draft model's.
        self.runtime = self.layers[0].impl.runtime if self.layers else runtime_for(vllm_config)
        # Builders are made once the weights are there and pages have their size; the layers were made before.
        self.prepare_layers()
        self.runtime.layer_groups.append(weakref.WeakMethod(self.prepare_layers))
        # A group of windowed layers, say: its batches are the parent's alone, and are not counted.
        self.dense_only = bool(layers) and all(layer.impl.dense_only for layer in self.layers)
        self.group = next(iter(layer_names), "")
        if not self.dense_only:
            self.runtime.sparse_groups[self.group] = any(map(_attention_chunk, self.layers))
        speculative = getattr(vllm_config, "speculative_config", None)
        # Decodes may replay a CUDA graph of the parent's path: whatever the setting says, they are never ours.
        decode_len = 1 + (getattr(speculative, "num_speculative_tokens", None) or 0)
        self.min_chunk = max(self.runtime.settings.min_chunk, decode_len + 1)
        dual_chunk = self.runtime.dual_chunk
        self.plain_len = dual_chunk.plain_len if dual_chunk else None
        logger.info_once("minference: %s", self.runtime.summary(self._kernels()))

    def prepare_layers(self) -> None:
        """Find the patterns of the group's layers, and what they need; again when the runtime has others."""
        config = self.vllm_config
        for layer in self.layers:
            layer.impl.prepare(layer, self.kv_cache_spec, config.model_config.dtype, self.device)
        self.sparse_layers = [layer for layer in self.layers if layer.impl.sparse_layer is not None]
        # Heads of layers that are dense by their patterns, beside sparse ones: the density is that of the patterns.
        dense = [layer for layer in self.layers if layer.impl.sparse_layer is None and not layer.impl.dense_only]
        self.dense_heads = sum(layer.impl.num_heads for layer in dense) if self.sparse_layers else 0
        # Pages may also be written from outside (a KV connector); then nothing is kept.
        connected = getattr(config, "kv_transfer_config", None) is not None
        wanting = () if connected else filter(_wants_page_means, self.sparse_layers)
        self.page_means = [layer.impl.keep_page_means() for layer in wanting]

    def _kernels(self) -> str:
        """What attends the sparse chunks of these layers, for the log."""
        found = {layer.impl.attends for layer in self.sparse_layers}
        return f"attention by {', '.join(sorted(found))}" if found else "no layer of this KV-cache group runs sparsely"

    @staticmethod
    def _log(line: str | None) -> None:
        if line:
            logger.info(line)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        # Of the steps before: this one's layers have not run. Decode steps ask, too, or a prompt's last chunks would
        # wait for the next prompt.
        self._log(self.runtime.counters.line_when_due(self.runtime.settings.log_interval))
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        for means in self.page_means:
            means.forget(common_attn_metadata.slot_mapping, self.kv_cache_spec.block_size)
        far = self.plain_len is not None and common_attn_metadata.max_seq_len > self.plain_len
        if not far and (common_attn_metadata.max_query_len < PREFILL_FROM or self.dense_only or common_prefix_len):
            return metadata  # nothing but decodes, most of the time
        lengths = host_seq_lens(common_attn_metadata, self.runtime.is_draft)
        reason = dense_batch_reason(common_attn_metadata)
        if reason or lengths is None:
            if far:
                raise refusal(f"a batch that is {reason or 'of unknown lengths'}", "choose another attention backend")
            logger.info_once("minference: some batches are served densely: %s", reason or "lengths are on the GPU only")
            return metadata
        settings, counters = self.runtime.settings, self.runtime.counters
        starts = common_attn_metadata.query_start_loc_cpu[: len(lengths) + 1].tolist()
        plan = plan_batch(starts, lengths, settings.min_context, self.min_chunk, self.plain_len)
        if self.runtime.counts_batches_of(self.group):
            counters.count_batch(plan)
        if not plan.sparse and not plan.far:
            return metadata
        pairs = self.dense_heads * sum(chunk.dense_pairs for chunk in plan.sparse)
        counters.count_layer(pairs, pairs)
        table = common_attn_metadata.block_table_tensor
        # A fast build: FlashAttention keeps its ahead-of-time schedule in one buffer per builder, which every run
        # would write anew.
        runs = tuple(
            (
                (first, last),
                slice(starts[first], starts[last]),
                super(SparsePrefillBuilder, self).build(0, slice_requests(common_attn_metadata, first, last), True),
            )
            for first, last in plan.dense_runs
        )
        inherited = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
        sparse, far_chunks = _with_pages(plan.sparse, table), _with_pages(plan.far, table)
        return self.metadata_cls(**inherited, sparse=sparse, dense_runs=runs, far=far_chunks)

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """The same batch for another group of layers, whose pages are others."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        if isinstance(metadata, self.metadata_cls):
            for name in ("sparse", "far"):
                chunks = [chunk for chunk, _ in getattr(metadata, name)]
                setattr(updated, name, _with_pages(chunks, blk_table))
            updated.dense_runs = tuple(
                (requests, rows, super(SparsePrefillBuilder, self).update_block_table(
                    run, blk_table[requests[0] : requests[1]], slot_mapping[rows]
                ))
                for requests, rows, run in metadata.dense_runs
            )  # fmt: skip
        return updated


def _wants_page_means(layer: Any) -> bool:
    """Whether a head of a sparse layer is scored by mean keys, with code that can use kept ones (not on a GPU)."""
    found = layer.impl.sparse_layer
    return not found.kernel.planned and any(family_of(pattern).reads_page_means for pattern in found.patterns)


def _with_pages(chunks: Any, block_table: torch.Tensor) -> tuple[tuple[Chunk, torch.Tensor], ...]:
    return tuple((chunk, block_table[chunk.request].long()) for chunk in chunks)


class SparsePrefillImpl(AttentionImpl):
    """Serves the sparse chunks under an index and leaves the rest to the parent."""

    def __init__(self, *args: Any, layer_idx: int = -1, dual_chunk_attention_config: Any = None, **kwargs: Any) -> None:
        """Arguments of the parent's.

        Args:
            layer_idx, dual_chunk_attention_config: of layers with dual chunk attention. Neither says more than the
                layer's name and the model's configuration do.
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
        """How sparse chunks run; None before ``prepare``, and where every chunk runs densely."""
        self.attends = ""
        """What attends sparse chunks, for the log."""
        self.page_means: PageMeans | None = None
        self.dense_only = False
        """Whether something about the layer, not its patterns, keeps it dense."""
        self._run_densely(self.dense_reasons(vllm_config))

    def _run_densely(self, reasons: list[str]) -> None:
        if reasons:
            if self.dual_chunk is not None:
                raise refusal(", ".join(reasons), "choose another attention backend")
            self.dense_only = True
            logger.info_once(DENSE_LAYERS, ", ".join(reasons))

    def dense_reasons(self, vllm_config: Any) -> list[str]:
        """Why this layer runs densely, as far as that is known when it is made; empty when it can run sparsely.

        Raises:
            ValueError: the kernel that the user named cannot run.
        """
        raise NotImplementedError

    def cache_reasons(self, layer: Any, block_size: int, dtype: torch.dtype) -> list[str]:
        """The same, once the weights are loaded and pages have their size."""
        return []

    def measure(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor) -> None:
        """Take the memory that sparse chunks will take, while vLLM measures what it may give to its cache. Not on CPUs,
        where the user says how large the cache is."""

    def paged_cache(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> PagedCache:
        """vLLM's cache of this layer as ours."""
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
        """Keys that a row of a sparse layer sees at most, itself included; 0: all before it."""
        return 0

    @property
    def needs_own_kernel(self) -> bool:
        """Whether only a kernel of ours can serve the layer (``choose``)."""
        return False

    def prepare(self, layer: Any, spec: Any, dtype: torch.dtype, device: torch.device) -> None:
        """Find the layer's patterns and choose its kernel, once the weights are loaded and pages have their size.

        Args:
            layer: vLLM's, of this implementation.
            spec: vLLM's, of its KV cache.
            dtype: the model's.

        Raises:
            ValueError: the kernel that the user named, or a pattern, cannot run on such a cache.
        """
        self.sparse_layer = self.page_means = None
        if self.dense_only:
            return
        settings, page = self.runtime.settings, spec.block_size
        check_page_size(self.runtime, page)
        reasons = [
            *attention_chunk_reasons(_attention_chunk(layer), settings.min_context),
            *page_reasons(spec),
            *self.cache_reasons(layer, page, dtype),
        ]
        if reasons:
            self._run_densely(reasons)
            return
        number = _layer_number(layer.layer_name)
        patterns = self.runtime.patterns.for_layer(number, self.num_heads, self.first_head)
        one_page = torch.zeros(1, self.num_kv_heads, page, 2 * self.head_size, dtype=spec.dtype, device=device)
        cache = self.paged_cache(layer, one_page, dtype)
        if self.dual_chunk is not None:
            self.dual_chunk.prepare(number, self.first_head, patterns, cache)
        if all(pattern.kind == "dense" for pattern in patterns):
            return
        try:
            own = self.needs_own_kernel
            kernel, patterns, without = choose_for(patterns, settings.kernel, dtype, cache, own)
        except ValueError as error:
            raise ValueError(f"minference: patterns from {self.runtime.source}: {error}") from None
        if without:
            logger.info_once("minference: no remainder is added, and low_rank selects more keys instead: %s", without)
        self.attends = description(kernel, settings.kernel, dtype, cache)
        self.sparse_layer = SparseLayer(number, self.first_head, patterns, kernel)

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
            query: with dual chunk attention all rotations of each token, see ``DualChunkLayer.rotations``.
            key, value: of the new tokens; None in a layer that shares another one's cache.
        """
        rotated, plain_layer = query, self.sparse_layer
        sparse, far = getattr(attn_metadata, "sparse", ()), getattr(attn_metadata, "far", ())
        if self.dual_chunk is not None:
            rotated = self.dual_chunk.rotations(query, self.num_heads, self.head_size)
            query = rotated[:, 0].contiguous()
            if any(self.dual_chunk.is_far(chunk) for chunk, _ in (*sparse, *far)):
                plain_layer = plain_layer or self.dual_chunk.layer
        if attn_metadata is None:
            self.measure(layer, query, kv_cache)
        if not (sparse or far) or plain_layer is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        for _, rows, metadata in attn_metadata.dense_runs:
            new_key, new_value = (None if new is None else new[rows] for new in (key, value))
            super().forward(
                layer, query[rows], new_key, new_value, kv_cache, metadata, output[rows],
                output_scale, output_block_scale,
            )  # fmt: skip
        cache = self.paged_cache(layer, kv_cache, query.dtype)
        query = query.view(-1, self.num_heads, self.head_size)
        out = output.view(-1, self.num_heads, self.head_size)
        for number, (chunk, block_table) in enumerate((*sparse, *far)):
            rows = slice(chunk.query_start, chunk.query_start + chunk.query_len)
            inputs = self.inputs(layer, query[rows], cache, block_table, chunk)
            if self.dual_chunk is not None and self.dual_chunk.is_far(chunk):
                is_sparse = number < len(sparse) and self.sparse_layer is not None
                self.dual_chunk.serve(rotated[rows], inputs, out[rows], is_sparse)
            else:
                serve_chunk(self.runtime, plain_layer, inputs, out[rows])
        return output

    def keep_page_means(self) -> PageMeans:
        """From now on; the caller tells what is written to the cache."""
        self.page_means = PageMeans()
        return self.page_means


def _attention_chunk(layer: Any) -> int | None:
    """Tokens of the chunks of the sequence within which one of vLLM's layers attends; None: it attends everything."""
    return getattr(layer, "attention_chunk_size", None)


def _layer_number(layer_name: str) -> int:
    """The layer's number in its name, or -1, which no pattern file has, for a name without a clear one."""
    try:
        return int(extract_layer_index(layer_name))
    except (AssertionError, ValueError):
        logger.info_once("minference: layer %s has no clear number and runs the default pattern", layer_name)
        return -1
