"""vLLM's rotation of queries and keys for dual chunk attention, on any device."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE = "vllm.model_executor.layers.rotary_embedding.dual_chunk_rope"


def register_rotary_embedding() -> None:
    """Let vLLM build its ``DualChunkRotaryEmbedding`` on any device, and rotate single tokens, from the moment that it
    imports it: processes without a model never do, and that import takes seconds. Idempotent."""
    if MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Has the module found by the others, and ``_register`` called when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


@functools.cache
def _register() -> None:
    """vLLM's own puts its tables on a CUDA device, whatever the platform, and drops the first dimension of a batch of
    one token, which the attention layer then takes for the number of tokens. No backend of vLLM serves such
    checkpoints, so nobody else builds one. Idempotent.
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
