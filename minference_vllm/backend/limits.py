"""Models, layers, kernels and page sizes that cannot be served, and the reasons."""

from __future__ import annotations

from typing import Any

import torch

from minference_vllm.kernels.choose import DTYPES
from minference_vllm.kernels.native import library
from minference_vllm.patterns.discovery import total_query_heads
from minference_vllm.patterns.file import PatternFile
from minference_vllm.selection.families import family_of

MAX_GPU_HEAD_SIZE = 256
"""Limit of all GPU kernels, including vLLM's FlashAttention."""


def check_model(model: Any) -> None:
    """Raise ValueError with all reasons if a model as a whole cannot be served."""
    reasons = unsupported_model_reasons(model)
    if reasons:
        raise ValueError(f"minference cannot serve {model.model}: " + "; ".join(reasons))


def unsupported_model_reasons(model: Any) -> list[str]:
    """Why a model as a whole cannot be served; empty if it can."""
    reasons = []
    if getattr(model, "use_mla", False):
        reasons.append("multi-head latent attention (MLA) keeps no keys per head; choose another attention backend")
    if model.runner_type not in ("generate", "draft"):
        reasons.append(f"{model.runner_type} models run no causal prefill; minference serves text generation")
    elif getattr(model, "is_encoder_decoder", False):
        reasons.append("encoder-decoder models are not supported; minference serves decoder-only models")
    if not total_query_heads(model):
        reasons.append("it has no attention heads, and with them nothing that an attention backend computes")
    if model.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        reasons.append(f"dtype {str(model.dtype).removeprefix('torch.')} is not supported; allowed are {allowed}")
    return reasons


def check_cpu_kernel(kernel: str, dtype: torch.dtype, head_size: int, dual_chunk: bool = False) -> None:
    """Raise ValueError if the kernel that the user chose, or that the layer needs, cannot run on this CPU.

    Args:
        kernel: the setting ``kernel``.
        dual_chunk: whether the layer has dual chunk attention.
    """
    reason = None
    if kernel == "triton":
        reason = "it needs an NVIDIA GPU"
    elif kernel == "native" or dual_chunk:
        reason = library.unsupported_reason(dtype, head_size)
        if reason and dual_chunk:
            raise ValueError(f"minference: dual chunk attention needs kernel 'native', which cannot run here: {reason}")
    if reason:
        raise ValueError(f"minference: kernel {kernel!r} cannot run here: {reason}; set kernel to 'auto'")


def check_page_size(patterns: PatternFile, source: str, block_size: int) -> None:
    """Raise ValueError if a pattern cannot run on pages of this size."""
    for pattern in patterns.used:
        problem = family_of(pattern).page_size_problem(pattern, block_size)
        if problem:
            raise ValueError(f"minference: patterns from {source}: {problem}")


def gpu_head_size_reasons(head_size: int) -> list[str]:
    """Why a layer with this head size runs densely on GPUs; empty if it can run sparsely."""
    return [f"head size {head_size} is above {MAX_GPU_HEAD_SIZE}"] if head_size > MAX_GPU_HEAD_SIZE else []


def attention_chunk_reasons(size: int | None, min_context: int) -> list[str]:
    """Why a layer with chunked local attention runs densely; empty if it can run sparsely.

    Args:
        size: tokens per attention chunk; None: full causal attention.
        min_context: the setting ``min_context``.
    """
    short = size is not None and size < min_context
    return [f"attention within chunks of {size} tokens, below min_context"] if short else []


def unsupported_layer_reasons(
    *,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    alibi_slopes: Any,
    sinks: Any,
    is_decoder: bool,
    kv_cache_dtype: str,
    dtype: torch.dtype,
    min_window: int | None = None,
) -> list[str]:
    """Why a single layer runs densely; empty if it can run sparsely.

    Args:
        min_window: minimum sliding window, in tokens, that runs sparsely; None: no window does.
    """
    reasons = []
    if not is_decoder:
        reasons.append("not causal self-attention")
    if sliding_window is not None and sliding_window >= 0:
        if min_window is None:
            reasons.append("sliding window")
        elif sliding_window < min_window:
            reasons.append(f"sliding window of {sliding_window} tokens, below min_context")
    if logits_soft_cap:
        reasons.append("soft cap on logits")
    if alibi_slopes is not None:
        reasons.append("ALiBi")
    if sinks is not None:
        reasons.append("attention sinks")
    if kv_cache_dtype not in ("auto", str(dtype).removeprefix("torch.")):
        reasons.append(f"KV cache of {kv_cache_dtype}")
    return reasons
