"""One layer with dual chunk attention: serve and count the chunks of a batch that are not plain attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from minference_vllm.backend.dual_chunk_limits import check_pages
from minference_vllm.backend.runtime import Runtime
from minference_vllm.backend.serving import SparseLayer, audit_is_due, audit_seed
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.choose import choose
from minference_vllm.patterns.kinds import Dense, HeadPattern
from minference_vllm.prefill.dual_chunk import ROTATIONS, DualChunk, attend_dual_chunk, decode_dual_chunk
from minference_vllm.prefill.dual_chunk_recall import audited_recall
from minference_vllm.prefill.timing import Timing
from minference_vllm.settings import Settings


class DualChunkLayer:
    """The part of an attention implementation that handles dual chunk attention."""

    def __init__(self, runtime: Runtime, geometry: DualChunk) -> None:
        self.runtime, self.geometry = runtime, geometry
        self.layers: dict[str | None, SparseLayer] = {}
        """By name of the patterns (``Chunk.patterns``): the patterns as parts run them, and their kernel."""

    def prepare(
        self, name: str | None, number: int, first_head: int, patterns: Sequence[HeadPattern], cache: PagedCache
    ) -> None:
        """Choose the kernel for some patterns.

        Args:
            name: name of the patterns if requests asked for them; None: the server's patterns.
            cache: a cache with the layer's types and sizes.

        Raises:
            ValueError: the page size does not divide the chunks, or the kernel for parts cannot run on this cache.
        """
        check_pages(self.geometry, cache.block_size)
        # Only these two kernels return the log-sum-exp of rows and accept an index without the rows' own keys.
        serves_parts = "triton" if cache.key.is_cuda else "native"
        try:
            kernel = choose(serves_parts, cache.key.dtype, cache, with_lse=True)
        except ValueError as error:
            raise ValueError(f"minference: dual chunk attention: {error}") from None
        # A remainder covers one set of keys, but each part is selected and merged separately.
        alone = tuple(pattern.without_remainder() for pattern in patterns)
        self.layers[name] = SparseLayer(number, first_head, alone, kernel)

    def forget_asked(self) -> None:
        """Drop all patterns but the server's."""
        self.layers = {name: layer for name, layer in self.layers.items() if name is None}

    def rotations(self, query: torch.Tensor, num_heads: int, head_size: int) -> torch.Tensor:
        """``[tokens, ROTATIONS, H, D]``: view of the queries, which vLLM passes as ``[tokens * ROTATIONS, H, D]``."""
        return query.view(-1, ROTATIONS, num_heads, head_size)

    def is_far(self, chunk: Chunk) -> bool:
        """Whether the chunk needs more than plain attention with the first rotation."""
        return chunk.seq_len > self.plain_len

    @property
    def plain_len(self) -> int:
        """See ``DualChunk.plain_len``."""
        return self.geometry.plain_len

    def warm_up(self, inputs: Inputs, out: torch.Tensor, tile: int | None) -> None:
        """Run all paths of serving (sparse, dense, decode; all parts) on a chunk of two tiles after one of context."""
        layer = self.layers[inputs.chunk.patterns]
        rotated = inputs.query[:, None].expand(-1, ROTATIONS, -1, -1)
        geometry = DualChunk(inputs.chunk.context_len, 0)
        for of_heads in (layer.patterns, [Dense()] * inputs.num_heads):
            attend_dual_chunk(rotated, inputs, geometry, of_heads, layer.kernel, out, tile)
        last = replace(
            inputs, query=inputs.query[-1:], chunk=replace(inputs.chunk, context_len=inputs.chunk.seq_len - 1)
        )
        decode_dual_chunk(rotated[-1:], last, geometry, layer.kernel, out[-1:])

    def take_memory(self, inputs: Inputs, out: torch.Tensor, settings: Settings) -> None:
        """Allocate the peak memory of a sparse chunk and its audit."""
        layer = self.layers[inputs.chunk.patterns]
        rotated = inputs.query[:, None].expand(-1, ROTATIONS, -1, -1)
        patterns, kernel = layer.patterns, layer.kernel
        parts = attend_dual_chunk(rotated, inputs, self.geometry, patterns, kernel, out, settings.tile)
        if settings.audit_rows:
            audited_recall(parts, kernel, settings.audit_rows, seed=0)

    def serve(self, rotated: torch.Tensor, inputs: Inputs, out: torch.Tensor, sparse: bool) -> None:
        """As ``attend_dual_chunk``; also audits recall when that is due, and counts sparse work.

        Args:
            sparse: False: attend every key, whatever the patterns are.

        Raises:
            ValueError: the model is being calibrated, which measures plain attention only.
        """
        runtime, layer = self.runtime, self.layers[inputs.chunk.patterns]
        if runtime.recorder is not None:
            raise ValueError(
                "minference: patterns are measured on plain attention, which this model with dual chunk attention has "
                f"for prompts of up to {self.plain_len} tokens"
            )
        if inputs.chunk.query_len == 1 and not sparse:
            decode_dual_chunk(rotated, inputs, self.geometry, layer.kernel, out)
            return
        patterns = layer.patterns if sparse else (Dense(),) * inputs.num_heads
        timing = Timing()
        parts = attend_dual_chunk(
            rotated, inputs, self.geometry, patterns, layer.kernel, out, runtime.settings.tile, timing
        )
        if not sparse:
            return
        counters, chunk = runtime.counters, inputs.chunk
        if audit_is_due(runtime, layer, inputs):
            with timing.stage("audit"):
                seed = audit_seed(layer, chunk)
                recall = audited_recall(parts, layer.kernel, runtime.settings.audit_rows, seed).mean()
            counters.count_recall(layer.number, layer.first_head, torch.stack(recall).double())
        for index in (part.index for part in parts):
            overflowed = 0 if index.overflowed is None else index.overflowed.sum() * index.heads_per_list
            pairs = index.computed_pairs().sum()
            counters.count_layer(pairs, index.num_heads * index.dense_pairs(), overflowed, chunk.patterns)
        counters.count_seconds(timing.estimate + timing.index + timing.attend, timing.audit)
