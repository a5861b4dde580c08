"""vLLM's rotation of queries and keys for dual chunk attention, on any device."""

from __future__ import annotations

from typing import Any

from minference_vllm.backend.after_import import after_import

MODULE = "vllm.model_executor.layers.rotary_embedding.dual_chunk_rope"


def register_rotary_embedding() -> None:
    """Let vLLM build its ``DualChunkRotaryEmbedding`` on any device, and rotate single tokens, from the moment that it
    imports it. Idempotent."""
    after_import(MODULE, _register)


def _register() -> None:
    """vLLM's own puts its tables on a CUDA device, whatever the platform, and drops the first dimension of a batch of
    one token, which the attention layer then takes for the number of tokens. No backend of vLLM serves such
    checkpoints, so nobody else builds one.
    """
    import torch
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.rotary_embedding.dual_chunk_rope import DualChunkRotaryEmbedding
    from vllm.platforms import current_platform

    class OnAnyDevice(DualChunkRotaryEmbedding):  # type: ignore[misc]  # vLLM's decorator hides its type
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # For the number of a CUDA device that is replaced below; without an accelerator torch raises.
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
