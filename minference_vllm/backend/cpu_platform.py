"""vLLM's CPU platform, which otherwise ignores the chosen attention backend, taught to honour ours."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform

from minference_vllm.backend.compat import CLASS_PATHS, NAME, is_minference, selects_minference


class MInferenceCpuPlatform(CpuPlatform):
    """``CpuPlatform`` in every respect unless minference was selected."""

    @classmethod
    def get_attn_backend_cls(cls, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if is_minference(selected_backend):
            from vllm.logger import init_logger

            init_logger(f"vllm.{__name__}").info_once("Using %s attention backend on CPU.", NAME)
            return CLASS_PATHS["cpu"]
        return super().get_attn_backend_cls(selected_backend, *args, **kwargs)

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)
        if vllm_config.model_config is not None and selects_minference(vllm_config):
            # Settings, pattern file and model are validated here, in the first process, before weights are loaded.
            from minference_vllm.backend.runtime import runtime_for

            runtime_for(vllm_config)
