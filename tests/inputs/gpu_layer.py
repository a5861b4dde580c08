"""One layer of vLLM's FlashAttention or Triton backend with ours in it, driven on CPU tensors.

Their kernels cannot run here: the float64 reference replaces the parent's ``forward``. Builder, metadata,
cache views and everything of ours are the real ones.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_inputs import DIM, GPU_KINDS, HEADS, KV_HEADS, MIN_CHUNK, MIN_CONTEXT, PAGE, make_known
from paged_inputs import make_batch
from torch._subclasses.fake_tensor import FakeTensorMode

from minference_vllm import reference
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.prefill.attend import attend_chunk

DTYPE = torch.bfloat16


def side_by_side(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, num_kv_heads, block_size, 2 * D]``, heads outside of tokens (HND)."""
    return torch.cat([key, value], -1).transpose(1, 2).contiguous()


def side_by_side_tokens_first(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same shape with tokens outside of heads (NHD)."""
    return torch.cat([key, value], -1).transpose(1, 2)


def two_caches(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[2, num_blocks, block_size, num_kv_heads, D]``."""
    return torch.stack([key, value])


def two_caches_heads_first(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same shape with heads outside of tokens (HND)."""
    return torch.stack([key, value]).transpose(2, 3).contiguous().transpose(2, 3)


def two_per_block(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, 2, block_size, num_kv_heads, D]``."""
    return torch.stack([key, value], 1)


PARENTS = {
    "FlashAttention": ("flash_attn", "cuda", "MInferenceCUDA"),
    "TritonAttention": ("triton_attn", "triton_attn", "MInferenceTriton"),
}
"""What the names of vLLM's classes begin with: vLLM's module, ours, and what the names of ours begin with."""


class Parent:
    def __init__(self, name: str) -> None:
        theirs, ours, prefix = PARENTS[name]
        self.theirs = importlib.import_module(f"vllm.v1.attention.backends.{theirs}")
        ours_module = importlib.import_module(f"minference_vllm.backend.{ours}")
        self.backend, self.impl, self.metadata, self.builder = (
            getattr(self.theirs, name + part) for part in ("Backend", "Impl", "Metadata", "MetadataBuilder")
        )
        self.our_backend, self.our_impl, self.our_builder = (
            getattr(ours_module, prefix + part) for part in ("Backend", "Impl", "MetadataBuilder")
        )


def only(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("parent", [name], indirect=True)


LAYOUTS = (side_by_side, side_by_side_tokens_first, two_caches, two_caches_heads_first, two_per_block)


class Layer:
    """One attention layer with its builder and cache, and a batch in it."""

    heads, scale, dtype = HEADS, DIM**-0.5, DTYPE

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        parent: Parent,
        requests: Sequence[tuple[int, int]],
        patterns: Sequence[dict[str, Any]] = tuple(GPU_KINDS),
        layout: Callable[..., torch.Tensor] = side_by_side,
        settings: dict[str, Any] | None = None,
        speculative: int = 0,
        page_before: int = PAGE,
        device: str = "cpu",
        dual_chunk: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            dual_chunk: ``dual_chunk_attention_config`` of the model.
            page_before: page size in vLLM's configuration while layer and builder are made.
            device: see ``make_builder``.
        """
        from vllm.config import CUDAGraphMode
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from minference_vllm.backend import serving, sparse_prefill

        batch = make_batch(
            query_lens=[new for _, new in requests],
            context_lens=[context for context, _ in requests],
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_size=DIM,
            block_size=PAGE,
            dtype=DTYPE,
        )
        self.batch = batch
        path = folder / "patterns.json"
        path.write_text(json.dumps({"schema_version": 1, "layers": {0: {}, 1: dict(enumerate(patterns))}}))
        self.config = config = SimpleNamespace(
            model_config=SimpleNamespace(
                model="some/model",
                dtype=DTYPE,
                runner_type="generate",
                hf_config=SimpleNamespace(model_type="llama"),
                hf_text_config=SimpleNamespace(num_attention_heads=HEADS, dual_chunk_attention_config=dual_chunk),
                get_total_num_hidden_layers=lambda: 2,
                get_num_attention_heads=lambda parallel: HEADS,
                get_num_kv_heads=lambda parallel: KV_HEADS,
                get_head_size=lambda: DIM,
                rswa_window=None,
                is_mm_prefix_lm=False,
            ),
            cache_config=SimpleNamespace(block_size=page_before, cache_dtype="auto"),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1, cp_kv_cache_interleave_size=1),
            kernel_config=SimpleNamespace(enable_jit_warmup=False),
            attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32, flash_attn_version=None),
            compilation_config=SimpleNamespace(
                static_forward_context={},
                cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
                cudagraph_capture_sizes=[1, 512],
                max_cudagraph_capture_size=512,
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=8192),
            speculative_config=SimpleNamespace(num_speculative_tokens=speculative) if speculative else None,
            additional_config={
                "minference": {"patterns": str(path), "min_context": MIN_CONTEXT, "min_chunk": MIN_CHUNK}
                | (settings or {})
            },
        )
        monkeypatch.setattr(sparse_prefill, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(sparse_prefill, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(serving, "attend_chunk", self.watched_attend_chunk)
        monkeypatch.setattr(parent.impl, "forward", self.dense_forward)
        self.monkeypatch, self.parent = monkeypatch, parent
        self.layer = self.make_layer(1)
        self.impl = self.layer.impl
        self.spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=DIM, dtype=DTYPE)
        self.builder = self.make_builder(self.layer, device=device)
        self.cache = layout(batch.key_cache, batch.value_cache)
        self.indices: list[SparseIndex] = []
        self.dense_calls: list[Any] = []
        self.new_rows: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
        """Keys and values that the parent was called with, per call."""

    def make_layer(self, number: int) -> Any:
        """vLLM's attention layer of this number, as far as builder and implementation read it."""
        options: dict[str, Any] = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
        dual_chunk = self.config.model_config.hf_text_config.dual_chunk_attention_config
        if dual_chunk is not None:
            options |= {"layer_idx": number, "dual_chunk_attention_config": dual_chunk}
        return SimpleNamespace(
            layer_name=f"model.layers.{number}.self_attn.attn",
            impl=self.parent.our_impl(HEADS, DIM, DIM**-0.5, KV_HEADS, **options),
            _k_scale=torch.tensor(1.0),
        )

    def make_builder(self, *layers: Any, device: str = "cpu") -> Any:
        """The builder of a KV-cache group of these layers; it prepares them, as in vLLM's engine.

        Args:
            device: with "cuda" the tensors that it makes are PyTorch's fake ones, which have types, sizes, strides and
                a device, and no memory.
        """
        from minference_vllm.backend import compat

        names = make_known(self.monkeypatch, layers)
        with self.monkeypatch.context() as patch, nullcontext() if device == "cpu" else FakeTensorMode():
            # Slicing with ``[]`` needs the device's driver, even for a fake tensor.
            if device == "cuda":
                patch.setattr(compat, "gpu_pages", lambda kv_cache, head_size: kv_cache.split(head_size, 3))
            return self.parent.our_builder(self.spec, names, self.config, torch.device(device))

    def watched_attend_chunk(self, *arguments: Any, **keywords: Any) -> SparseIndex:
        index = attend_chunk(*arguments, **keywords)
        self.indices.append(index)
        return index

    def dense_forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, *scales: Any
    ) -> torch.Tensor:
        """Replaces the parent: dense causal attention of the metadata's requests."""
        self.dense_calls.append(metadata)
        self.new_rows.append((key, value))
        starts = metadata.query_start_loc.tolist()
        assert len(query) >= metadata.num_actual_tokens == starts[-1]
        for request, seq_len in enumerate(metadata.seq_lens.tolist()):
            rows = slice(starts[request], starts[request + 1])
            context = seq_len - (rows.stop - rows.start)
            table = metadata.block_table[request]
            keys, values = (
                reference.gather_sequence(cache, table, seq_len)
                for cache in (self.batch.key_cache, self.batch.value_cache)
            )
            mask = reference.causal_mask(context, seq_len).expand(HEADS, -1, -1)
            exact = reference.masked_attention(query[rows], keys, values, mask, DIM**-0.5)
            output[rows] = exact.to(output.dtype)
        return output

    def common(self, **changes: Any) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        batch = self.batch
        starts = batch.query_start_loc
        fields: dict[str, Any] = {
            "query_start_loc": starts,
            "query_start_loc_cpu": starts,
            "seq_lens": batch.seq_lens,
            "seq_lens_cpu_upper_bound": batch.seq_lens,
            "num_reqs": len(batch.seq_lens),
            "num_actual_tokens": int(starts[-1]),
            "max_query_len": int((starts[1:] - starts[:-1]).max()),
            "max_seq_len": int(batch.seq_lens.max()),
            "block_table_tensor": batch.block_table,
            "slot_mapping": torch.zeros(int(starts[-1]), dtype=torch.int64),
        }
        return CommonAttentionMetadata(**fields | changes)

    def run(self, metadata: Any, padding: int = 5, shares_cache: bool = False) -> torch.Tensor:
        """Forward, with rows behind the batch as vLLM pads it, and an output full of NaN.

        Args:
            shares_cache: the layer has no keys and values of its own: it reads those of another layer.
        """
        tokens = self.batch.query.shape[0] + padding
        query = torch.full((tokens, HEADS, DIM), torch.nan, dtype=DTYPE)
        query[: tokens - padding] = self.batch.query
        key = None if shares_cache else torch.zeros(tokens, KV_HEADS, DIM, dtype=DTYPE)
        output = torch.full_like(query, torch.nan)
        assert self.impl.forward(self.layer, query, key, key, self.cache, metadata, output) is output
        assert torch.isnan(output[tokens - padding :]).all(), "rows behind the batch were written"
        return output[: tokens - padding]
