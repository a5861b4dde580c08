"""vLLM's rotary embedding for dual chunk attention, on any device."""

from __future__ import annotations

from typing import Any

from minference_vllm.backend.after_import import after_import

MODULE = "vllm.model_executor.layers.rotary_embedding.dual_chunk_rope"


def register_rotary_embedding() -> None:
    """Let vLLM's ``DualChunkRotaryEmbedding`` run on any device and rotate single tokens, as soon as vLLM imports it.
    Idempotent."""
    after_import(MODULE, _register)


def _register() -> None:
    """vLLM's class puts its tables on a CUDA device on every platform. For a batch of one token it drops the first
    dimension, which the attention layer reads as the number of tokens. No backend of vLLM serves such checkpoints, so
    replacing the class affects nobody else.
    """
    import torch
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.rotary_embedding.dual_chunk_rope import DualChunkRotaryEmbedding
    from vllm.platforms import current_platform

    class OnAnyDevice(DualChunkRotaryEmbedding):  # type: ignore[misc]  # vLLM's decorator hides its type
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The parent asks for a CUDA device index, which is replaced below; without an accelerator torch raises.
            asked = torch.accelerator.current_device_index
            torch.accelerator.current_device_index = lambda: 0
            try:
                super().__init__(*args, **kwargs)
            finally:
                torch.accelerator.current_device_index = asked

        def _compute_cos_sin_cache(self) -> Any:
            self.device = torch.device(current_platform.device_type)
            return super()._compute_cos_sin_cache()

        def forward_native(self, positions: torch.Tensor, query: Any, key: Any, offsets: Any = None) -> Any:
            tokens = query.shape[0]
            found = super().forward_native(positions, query, key, offsets)
            return tuple(rows.reshape(tokens, -1) for rows in found)

    CustomOp.register_oot(OnAnyDevice, name=DualChunkRotaryEmbedding.__name__)
