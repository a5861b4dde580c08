"""Checkpoints with dual chunk attention (Qwen2.5-1M): how to detect them, and what they do not support."""

from __future__ import annotations

from typing import Any

from minference_vllm.kernels.choose import DTYPES, VLLMS
from minference_vllm.patterns.file import PatternFile
from minference_vllm.prefill.dual_chunk import DualChunk
from minference_vllm.settings import Settings


def dual_chunk_of(model: Any) -> DualChunk | None:
    """The geometry of a model with dual chunk attention; None for one without.

    Args:
        model: vLLM's model configuration.

    Raises:
        ValueError: the configured sizes give no chunks.
    """
    config = getattr(model.hf_text_config, "dual_chunk_attention_config", None)
    return DualChunk.of(config) if config else None


def check_configuration(vllm_config: Any, settings: Settings, patterns: PatternFile) -> None:
    """Raise ValueError if the configuration has something that cannot be served with dual chunk attention."""
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)):
        raise refusal(f"a KV cache of {cache_dtype}", "set kv_cache_dtype to 'auto'")
    if getattr(vllm_config, "speculative_config", None) is not None:
        raise refusal("speculative decoding", "leave speculative_config out")
    if settings.kernel in VLLMS:
        raise refusal(f"the kernel {settings.kernel!r}", "set kernel to 'auto'")
    if settings.recall_floor is not None:
        raise refusal("a recall_floor, since parts of chunks are not selected again", "leave recall_floor out")


def check_pages(geometry: DualChunk, block_size: int) -> None:
    """Raise ValueError if chunks do not consist of whole pages."""
    if geometry.chunk_len % block_size:
        raise refusal(
            f"pages of {block_size} tokens, since its chunks of {geometry.chunk_len} tokens (chunk_size - local_size) "
            "are no whole number of them",
            "set block_size to a divisor",
        )


def refusal(what: str, remedy: str) -> ValueError:
    """The error for a feature that cannot be combined with dual chunk attention."""
    return ValueError(f"minference cannot serve dual chunk attention with {what}: {remedy}")
