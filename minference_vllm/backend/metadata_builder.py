"""Code shared by our metadata builders: plan each batch and separate its sparse chunks from the rest.

The builder precedes vLLM's own in the order of base classes: ``super()`` is the parent's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from minference_vllm.backend.compat import dense_batch_reason, host_seq_lens, slice_requests
from minference_vllm.backend.dual_chunk_limits import refusal
from minference_vllm.backend.request_patterns import Asked
from minference_vllm.backend.runtime import runtime_for
from minference_vllm.backend.sparse_prefill import SparsePrefillImpl, attention_chunk
from minference_vllm.backend.vllm_requests import follow_requests
from minference_vllm.core.plan import PREFILL_FROM, Chunk, plan_batch
from minference_vllm.selection.families import family_of

# A child of vLLM's logger, so that our lines appear where vLLM's do.
logger = init_logger(f"vllm.{__name__}")


DenseRun = tuple[tuple[int, int], slice, Any]
"""Neighbouring requests ``[first, last)``, their query rows, and their metadata for the parent."""


@dataclass
class SparsePrefillMetadata:
    """Fields that the metadata of a batch with a chunk for our path has in addition to the parent's."""

    sparse: tuple[tuple[Chunk, torch.Tensor], ...] = ()
    """The sparse chunks, and the physical pages (int64) of each."""
    dense_runs: tuple[DenseRun, ...] = ()
    """Runs of the other requests."""
    far: tuple[tuple[Chunk, torch.Tensor], ...] = ()
    """As ``sparse``: dense chunks that only our path can serve, see ``Plan``."""
    alone: dict[int, DenseRun] = field(default_factory=dict)
    """By request: each plain sparse chunk as a run of its own, for layers in which its patterns are dense and those of
    other chunks in the batch are not."""


class SparsePrefillBuilder(AttentionMetadataBuilder):
    """Plans each batch. Batches with a chunk for our path get ``metadata_cls``, others the parent's metadata."""

    metadata_cls: Any
    """A dataclass derived from ``SparsePrefillMetadata`` and the parent's."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        self.layers = [layer for layer in layers if isinstance(layer.impl, SparsePrefillImpl)]
        # ``vllm_config`` is the served model's even if the layers are a draft model's.
        self.runtime = self.layers[0].impl.runtime if self.layers else runtime_for(vllm_config)
        # Builders are created after the weights are loaded and the page size is known; layers were created earlier.
        self.prepare_layers()
        self.runtime.add_group(self)
        follow_requests()
        # E.g. a group of sliding-window layers: the parent serves all of its batches, and they are not counted.
        self.dense_only = bool(layers) and all(layer.impl.dense_only for layer in self.layers)
        self.group = next(iter(layer_names), "")
        if not self.dense_only:
            self.runtime.sparse_groups[self.group] = any(map(attention_chunk, self.layers))
        speculative = getattr(vllm_config, "speculative_config", None)
        # Decodes may replay a CUDA graph of the parent's path: they are never ours, whatever the setting is.
        decode_len = 1 + (getattr(speculative, "num_speculative_tokens", None) or 0)
        self.min_chunk = max(self.runtime.settings.min_chunk, decode_len + 1)
        dual_chunk = self.runtime.dual_chunk
        self.plain_len = dual_chunk.plain_len if dual_chunk else None
        logger.info_once("minference: %s", self.runtime.summary(self._kernels()))

    def prepare_layers(self) -> None:
        """Prepare the group's layers for the runtime's patterns; called again when the patterns change."""
        config = self.vllm_config
        for layer in self.layers:
            layer.impl.prepare(layer, self.kv_cache_spec, config.model_config.dtype, self.device)
        self.sparse_layers = [layer for layer in self.layers if layer.impl.sparse_layer is not None]
        # A KV connector writes pages without telling us, so nothing is kept then.
        connected = getattr(config, "kv_transfer_config", None) is not None
        wanting = () if connected else filter(_wants_page_means, self.sparse_layers)
        self.page_means = [layer.impl.keep_page_means() for layer in wanting]

    def prepare_asked(self, asked: Asked) -> bool:
        """The same for requests that asked for other patterns; returns whether any layer runs them sparsely.

        Raises:
            ValueError: the patterns cannot run on a layer's cache.
        """
        for layer in self.layers:
            layer.impl.prepare_asked(asked, layer, self.kv_cache_spec, self.vllm_config.model_config.dtype, self.device)
        return any(layer.impl.layer_for(asked.name) is not None for layer in self.layers)

    def forget_asked(self) -> None:
        """Drop everything that ``prepare_asked`` has prepared."""
        for layer in self.layers:
            layer.impl.forget_asked()

    def _dense_heads(self, name: str | None) -> int:
        """Number of heads in layers that the patterns of this name leave dense, 0 if they leave all layers dense. These
        heads count in the density, which is that of the patterns."""
        impls = [layer.impl for layer in self.layers if not layer.impl.dense_only]
        dense = [impl.num_heads for impl in impls if impl.layer_for(name) is None]
        return sum(dense) if len(dense) < len(impls) else 0

    def _kernels(self) -> str:
        """Description of the kernels for the sparse chunks of these layers, for the log."""
        found = {layer.impl.attends for layer in self.sparse_layers}
        return f"attention by {', '.join(sorted(found))}" if found else "no layer of this KV-cache group runs sparsely"

    @staticmethod
    def _log(line: str | None) -> None:
        if line:
            logger.info(line)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        # Covers earlier steps: the layers of this step have not run yet. Decode steps log, too; otherwise a prompt's
        # last chunks would not be logged before the next prompt.
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
        dense, patterns = self._asked(starts, lengths)
        plan = plan_batch(starts, lengths, settings.min_context, self.min_chunk, self.plain_len, dense, patterns)
        if self.runtime.counts_batches_of(self.group):
            counters.count_batch(plan)
        if not plan.sparse and not plan.far:
            return metadata
        for chunk in plan.sparse:
            pairs = self._dense_heads(chunk.patterns) * chunk.dense_pairs
            counters.count_layer(pairs, pairs, name=chunk.patterns)
        plain = [chunk for chunk in plan.sparse if self.plain_len is None or chunk.seq_len <= self.plain_len]
        several = plan.far or plain != list(plan.sparse) or len({chunk.patterns for chunk in plan.sparse}) > 1
        ranges = [(chunk.request, chunk.request + 1) for chunk in plain] if several else []
        table = common_attn_metadata.block_table_tensor
        inherited = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
        return self.metadata_cls(
            **inherited,
            sparse=_with_pages(plan.sparse, table),
            dense_runs=tuple(self._dense_runs(common_attn_metadata, starts, plan.dense_runs)),
            far=_with_pages(plan.far, table),
            alone={run[0][0]: run for run in self._dense_runs(common_attn_metadata, starts, ranges)},
        )

    def _asked(self, starts: Sequence[int], lengths: Sequence[int]) -> tuple[dict[int, str], dict[int, str]]:
        """Requests that asked for other patterns, as arguments of ``plan_batch``: ``dense`` and ``patterns``."""
        dense, patterns = {}, {}
        for row, asked in self.runtime.requests.of_rows([end - start for start, end in pairwise(starts)]).items():
            new = starts[row + 1] - starts[row]
            if new < self.min_chunk or lengths[row] < self.runtime.settings.min_context:
                continue  # dense in any case
            reason = self.runtime.dense_reason(asked)
            if reason is None:
                patterns[row] = asked.name
            else:
                dense[row] = reason
        return dense, patterns

    def _dense_runs(
        self, common: CommonAttentionMetadata, starts: Sequence[int], ranges: Iterable[tuple[int, int]]
    ) -> Iterator[DenseRun]:
        for first, last in ranges:
            # A fast build: FlashAttention keeps its ahead-of-time schedule in one buffer per builder, which each run
            # would overwrite.
            metadata = super().build(0, slice_requests(common, first, last), True)
            yield (first, last), slice(starts[first], starts[last]), metadata

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """Metadata of the same batch for another group of layers, which has other pages."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        if isinstance(metadata, self.metadata_cls):
            for name in ("sparse", "far"):
                chunks = [chunk for chunk, _ in getattr(metadata, name)]
                setattr(updated, name, _with_pages(chunks, blk_table))
            updated.dense_runs = tuple(self._updated_runs(metadata.dense_runs, blk_table, slot_mapping))
            alone = self._updated_runs(metadata.alone.values(), blk_table, slot_mapping)
            updated.alone = {run[0][0]: run for run in alone}
        return updated

    def _updated_runs(
        self, runs: Iterable[DenseRun], blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Iterator[DenseRun]:
        for requests, rows, run in runs:
            metadata = super().update_block_table(run, blk_table[slice(*requests)], slot_mapping[rows])
            yield requests, rows, metadata


def _wants_page_means(layer: Any) -> bool:
    """Whether any head of a sparse layer is scored by mean keys, with code that can use kept ones (not on a GPU)."""
    found = layer.impl.sparse_layer
    return not found.kernel.planned and any(family_of(pattern).reads_page_means for pattern in found.patterns)


def _with_pages(chunks: Any, block_table: torch.Tensor) -> tuple[tuple[Chunk, torch.Tensor], ...]:
    return tuple((chunk, block_table[chunk.request].long()) for chunk in chunks)
