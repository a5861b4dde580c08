"""The backend on CUDA: vLLM's FlashAttention backend under our name.

No CUDA engine executes a sparse index yet, so every request is served densely by the parent, and the log says so once.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from minference_vllm.backend.compat import NAME
from minference_vllm.backend.runtime import runtime_for

logger = init_logger(f"vllm.{__name__}")


class MInferenceCUDABackend(FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[MInferenceCUDAImpl]:
        return MInferenceCUDAImpl


class MInferenceCUDAImpl(FlashAttentionImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        runtime_for(get_current_vllm_config())
        logger.warning_once("minference: no engine for CUDA yet; every request is served densely")
