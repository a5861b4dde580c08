"""Queries and keys of a model's layers over a prompt, and the indices that the backend would build from them.

The model runs with transformers, in this process and in one forward pass. Sizes: ``H`` query heads over ``HK`` KV
heads, ``S`` tokens, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.plan import Chunk, dense_reason
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling, whole_tile
from minference_vllm.kernels.choose import choose
from minference_vllm.patterns.kinds import Dense, HeadPattern
from minference_vllm.prefill.recall import sample_rows, sampled_recall
from minference_vllm.selection.build import build_index
from minference_vllm.selection.torch_scores import keys_at_once
from minference_vllm.settings import Settings

PAGE = 128
"""vLLM's page size on CPUs."""


class Layer(NamedTuple):
    """Rotated queries ``[H, S, D]``, rotated keys and values ``[HK, S, D]`` of one attention layer."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    softcap: float = 0.0
    """See ``Inputs``, also for ``window``."""
    window: int = 0

    def keys_of(self, head: int) -> torch.Tensor:
        """``[S, D]``: the keys of a query head."""
        return self.keys[head // (self.query.shape[0] // self.keys.shape[0])]

    def values_of(self, head: int) -> torch.Tensor:
        """``[S, D]``: the values of a query head."""
        return self.values[head // (self.query.shape[0] // self.keys.shape[0])]


def visit_layers(
    model_path: str,
    ids: torch.Tensor,
    visit: Callable[[int, Layer], None],
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> None:
    """Run a model over a prompt and pass on each attention layer's queries, keys and values as it is computed.

    Args:
        model_path: a folder, or a name on the Hugging Face hub.
        ids: int64 ``[1, S]``.
        visit: called with the layer's number and tensors on the CPU, in the model's order.
        device: where the model runs.

    Raises:
        OSError: no such model.
        ValueError: a model that transformers cannot run this way.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        rows = query[0].cpu(), key[0].cpu(), value[0].cpu()
        softcap, window = kwargs.get("softcap") or 0.0, kwargs.get("sliding_window") or 0
        visit(module.layer_idx, Layer(*rows, kwargs["scaling"], softcap, window))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("capture", attention)
    AttentionMaskInterface.register("capture", sdpa_mask)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype="auto", attn_implementation="capture", trust_remote_code=trust_remote_code
    ).to(device)
    with torch.inference_mode():
        model(ids.to(device), use_cache=False, logits_to_keep=1)


def capture_layers(model_path: str, ids: torch.Tensor) -> list[Layer]:
    """All layers from ``visit_layers``, kept in memory: as much as a KV cache that also holds queries."""
    layers: list[Layer] = []
    visit_layers(model_path, ids, lambda number, layer: layers.append(layer))
    return layers


def chunk_indices(
    layer: Layer, patterns: Sequence[HeadPattern], chunk_tokens: int, settings: Settings
) -> list[SparseIndex]:
    """The index of every prefill chunk of the prompt, as the backend builds them: each from some of its own queries.

    Args:
        patterns: one per query head.
        chunk_tokens: the server's ``max_num_batched_tokens``.
    """
    length = layer.keys.shape[1]
    return [
        chunk_index(layer, patterns, begin, min(begin + chunk_tokens, length), settings)
        for begin in range(0, length, chunk_tokens)
    ]


def sparse_chunks(indices: Sequence[SparseIndex], settings: Settings) -> list[SparseIndex]:
    """The indices of ``chunk_indices`` that the backend runs sparsely; a server logs density and recall of these."""
    return [index for index in indices if not _dense(index.tiling.context_len, index.tiling.seq_len, settings)]


def _dense(begin: int, end: int, settings: Settings) -> bool:
    return dense_reason(Chunk(0, begin, begin, end), settings.min_context, settings.min_chunk) is not None


def chunk_index(layer: Layer, patterns: Sequence[HeadPattern], begin: int, end: int, settings: Settings) -> SparseIndex:
    """The index of the chunk of rows ``begin`` to ``end``; dense if the backend would leave it to vLLM."""
    if _dense(begin, end, settings):
        patterns = [Dense()] * len(patterns)
    query = layer.query[:, begin:end].transpose(0, 1).contiguous()
    inputs = Inputs.of_rows(query, layer.keys[:, :end], layer.values[:, :end], layer.scale, PAGE)
    inputs = replace(inputs, softcap=layer.softcap, window=layer.window)
    # Without the filler columns with which vLLM's kernel would fill pages: a picture shows what patterns select.
    kernel = choose("auto", query.dtype, inputs.cache)
    tiling = Tiling.of(begin, end, PAGE, whole_tile(settings.tile, PAGE), window=layer.window)
    return build_index(tiling, patterns, kernel.scores(inputs))


def measure(layer: Layer, indices: Sequence[SparseIndex], rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Density and recall of every head over chunks of a prompt.

    Args:
        indices: of chunks, some or all of ``chunk_indices``.
        rows: number of rows sampled per chunk for the recall.

    Returns:
        float64 ``[H]`` twice.
    """
    pairs = sum(index.dense_pairs() for index in indices)
    density = torch.stack([index.computed_pairs() for index in indices]).sum(0) / pairs
    rows_in_all = sum(index.tiling.seq_len - index.tiling.context_len for index in indices)
    recall = torch.zeros_like(density)
    for index in indices:
        begin, end = index.tiling.context_len, index.tiling.seq_len
        query, keys = layer.query[:, begin:end], layer.keys[:, :end]
        sampled = sample_rows(end - begin, rows, seed=begin)
        norms, at_once = layer.values[:, :end].float().norm(dim=2), keys_at_once(len(query), rows, *keys.shape[::2])
        pieces = zip(keys.split(at_once, 1), norms.split(at_once, 1), strict=True)
        found = sampled_recall(query.transpose(0, 1), pieces, index, sampled, layer.scale, layer.softcap, layer.window)
        recall += found.mass.double().mean(1) * (end - begin) / rows_in_all
    return density, recall
