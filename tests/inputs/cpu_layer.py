"""One layer of vLLM's CPU backend with ours in it, driven without an engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_inputs import DIM, HEADS, KINDS, KV_HEADS, MIN_CHUNK, MIN_CONTEXT, PAGE, make_known
from paged_inputs import make_batch

from minference_vllm.backend.counters import Counters
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.recall import RecallCheck

OPTIONS: dict[str, Any] = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
"""Default arguments of an implementation."""


@dataclass
class Layer:
    """One attention layer with its builder and cache, and a batch in it."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    requests: Sequence[tuple[int, int]]
    """Context and new tokens of each request."""
    dtype: torch.dtype = torch.bfloat16
    patterns: Sequence[dict[str, Any]] = tuple(KINDS)
    rank: int = 0
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    page: int = PAGE
    page_before: int | None = None
    """Page size in vLLM's configuration while layer and builder are made, if different."""
    kv_connector: Any = None
    """The connector that may write to the cache from outside, if any."""
    dual_chunk: dict[str, Any] | None = None
    """``dual_chunk_attention_config`` of the model."""
    indices: list[SparseIndex] = field(default_factory=list)
    checks: list[RecallCheck | None] = field(default_factory=list)
    steps_before: list[tuple[int, ...]] = field(default_factory=list)
    """The steps that each recall check began with."""

    def __post_init__(self) -> None:
        from vllm.v1.attention.backends import cpu_attn
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from minference_vllm.backend import serving, sparse_prefill

        path = self.folder / "patterns.json"
        heads = dict(enumerate(self.patterns))
        path.write_text(json.dumps({"schema_version": 1, "layers": {0: {}, 1: heads}}))
        self.heads, self.kv_heads = HEADS // self.ranks, KV_HEADS // self.ranks
        self.config = config = SimpleNamespace(
            model_config=SimpleNamespace(
                model="some/model",
                dtype=self.dtype,
                runner_type="generate",
                hf_config=SimpleNamespace(),
                hf_text_config=SimpleNamespace(num_attention_heads=HEADS, dual_chunk_attention_config=self.dual_chunk),
                get_total_num_hidden_layers=lambda: 2,
                get_num_attention_heads=lambda parallel: self.heads,
                get_head_size=lambda: DIM,
            ),
            cache_config=SimpleNamespace(block_size=self.page_before or self.page, cache_dtype="auto"),
            parallel_config=SimpleNamespace(),
            compilation_config=SimpleNamespace(static_forward_context={}),
            kv_transfer_config=self.kv_connector,
            additional_config={
                "minference": {
                    "patterns": str(path),
                    "min_context": MIN_CONTEXT,
                    "min_chunk": MIN_CHUNK,
                    **self.settings,
                }
            },
        )
        for module in (sparse_prefill, cpu_attn):
            self.monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
        self.monkeypatch.setattr(sparse_prefill, "get_tensor_model_parallel_rank", lambda: self.rank)
        self.monkeypatch.setattr(serving, "attend_chunk", self.watched_attend_chunk)
        self.parent = cpu_attn.CPUAttentionBackendImpl(*self.sizes, **OPTIONS | self.options)
        self.layer = self.make_layer(1, self.options)
        self.impl = self.layer.impl
        self.spec = FullAttentionSpec(block_size=self.page, num_kv_heads=self.kv_heads, head_size=DIM, dtype=self.dtype)
        self.builder = self.make_builder(self.layer)
        batch = make_batch(
            query_lens=[new for _, new in self.requests],
            context_lens=[context for context, _ in self.requests],
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=DIM,
            block_size=self.page,
            dtype=self.dtype,
        )
        self.fill(batch)

    def make_layer(self, number: int, options: dict[str, Any]) -> Any:
        """vLLM's attention layer of this number, as far as builder and implementation read it."""
        from minference_vllm.backend.cpu import MInferenceCPUImpl

        if self.dual_chunk is not None:
            options = {**options, "layer_idx": number, "dual_chunk_attention_config": self.dual_chunk}
        return SimpleNamespace(
            layer_name=f"model.layers.{number}.self_attn.attn",
            impl=MInferenceCPUImpl(*self.sizes, **OPTIONS | options),
            _k_scale_float=1.0,
            _v_scale_float=1.0,
        )

    def make_builder(self, *layers: Any) -> Any:
        """The builder of a KV-cache group of these layers; it prepares them, as in vLLM's engine."""
        from minference_vllm.backend.cpu import MInferenceCPUMetadataBuilder

        names = make_known(self.monkeypatch, layers)
        builder = MInferenceCPUMetadataBuilder(self.spec, names, self.config, torch.device("cpu"))
        for layer in layers:
            layer.isa = builder.isa  # as the parent does for the layers that it finds
        return builder

    @property
    def sizes(self) -> tuple[int, int, float, int]:
        """The leading arguments of an implementation."""
        return self.heads, DIM, self.scale, self.kv_heads

    @property
    def scale(self) -> float:
        return DIM**-0.5

    @property
    def counters(self) -> Counters:
        return self.impl.runtime.counters

    def watched_attend_chunk(self, *arguments: Any, **keywords: Any) -> SparseIndex:
        given = [*arguments, *keywords.values()]
        check = next((argument for argument in given if isinstance(argument, RecallCheck)), None)
        self.checks.append(check)
        self.steps_before.append(check.steps if check else ())
        index = attend_chunk(*arguments, **keywords)
        self.indices.append(index)
        return index

    def fill(self, batch: Any) -> None:
        """Put a batch's keys and values into a cache of vLLM's own layout, with vLLM's own function."""
        blocks = batch.key_cache.shape[0]
        self.batch = batch
        self.cache = torch.zeros(blocks, self.kv_heads, self.page, 2 * DIM, dtype=self.dtype)
        rows = batch.key_cache.nan_to_num().flatten(0, 1), batch.value_cache.nan_to_num().flatten(0, 1)
        self.impl.do_kv_cache_update(self.layer, *rows, self.cache, torch.arange(blocks * self.page))

    def metadata(self) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        batch = self.batch
        starts = batch.query_start_loc
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=batch.seq_lens,
            num_reqs=len(batch.seq_lens),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int((starts[1:] - starts[:-1]).max()),
            max_seq_len=int(batch.seq_lens.max()),
            block_table_tensor=batch.block_table,
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        )
        return self.builder.build(0, common)

    def run(self, impl: Any, metadata: Any, padding: int = 5, shares_cache: bool = False) -> torch.Tensor:
        """Forward, with rows behind the batch as vLLM pads it, and an output full of NaN.

        Args:
            shares_cache: the layer has no keys and values of its own: it reads those of another layer.
        """
        tokens = self.batch.query.shape[0] + padding
        query = torch.full((tokens, self.heads, DIM), torch.nan, dtype=self.dtype)
        query[: tokens - padding] = self.batch.query
        key = None if shares_cache else torch.zeros(tokens, self.kv_heads, DIM, dtype=self.dtype)
        output = torch.full_like(query, torch.nan)
        assert impl.forward(self.layer, query, key, key, self.cache, metadata, output) is output
        assert torch.isnan(output[tokens - padding :]).all(), "rows behind the batch were written"
        return output[: tokens - padding]


FIRST, SECOND = (0, 420), (420, 290)
"""(context, new tokens) of the two chunks of one request."""


def two_chunks(layer: Layer) -> tuple[Any, Any]:
    """Both chunks of one request, as batches over the same pages; attention is nearly flat."""
    shape: dict[str, Any] = {
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "head_size": DIM,
        "block_size": layer.page,
    }
    second = make_batch(query_lens=[SECOND[1]], context_lens=[SECOND[0]], **shape)
    query = make_batch(query_lens=[FIRST[1]], context_lens=[0], **shape).query
    first = dataclasses.replace(
        second,
        query=query / 4,
        query_start_loc=torch.tensor([0, FIRST[1]], dtype=torch.int32),
        seq_lens=torch.tensor([FIRST[1]], dtype=torch.int32),
        context_lens=[0],
    )
    return first, dataclasses.replace(second, query=second.query / 4)
