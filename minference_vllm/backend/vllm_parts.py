"""The parts of vLLM that we use, and a check whether a vLLM has them."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

PARTS: dict[str, tuple[str, ...]] = {
    "_custom_ops": (
        "cpu_attention_with_kv_cache", "cpu_attn_get_scheduler_metadata", "cpu_attn_reshape_and_cache",
    ),
    "config": ("get_current_vllm_config", "get_layers_from_vllm_config"),
    "config.attention": ("AttentionConfig.backend",),
    "config.scheduler": ("SchedulerConfig.max_num_batched_tokens",),
    "config.vllm": (
        "VllmConfig.additional_config", "VllmConfig.attention_config", "VllmConfig.compilation_config",
        "VllmConfig.model_config", "VllmConfig.scheduler_config",
    ),
    "distributed.parallel_state": ("get_tensor_model_parallel_rank",),
    "exceptions": ("VLLMValidationError",),
    "logger": ("init_logger",),
    "model_executor.custom_op": ("CustomOp.register_oot",),
    "model_executor.layers.attention": ("Attention",),
    "model_executor.layers.rotary_embedding.dual_chunk_rope": (
        "DualChunkRotaryEmbedding._compute_cos_sin_cache", "DualChunkRotaryEmbedding.forward_native",
    ),
    "model_executor.models.utils": ("extract_layer_index",),
    "platforms": ("current_platform",),
    "platforms.interface": (
        "Platform.check_and_update_config", "Platform.get_attn_backend_cls", "Platform.get_device_capability",
        "Platform.import_kernels", "Platform.is_cpu", "Platform.is_cuda", "Platform.is_unspecified",
    ),
    "plugins": ("load_general_plugins",),
    "v1.attention.backend": (
        "AttentionBackend.get_preferred_block_size", "AttentionBackend.supports_batch_invariance",
        "AttentionCGSupport.UNIFORM_BATCH", "AttentionImpl.forward", "AttentionImpl.fused_output_quant_supported",
        "AttentionMetadataBuilder.build", "AttentionMetadataBuilder.get_cudagraph_support",
        "AttentionMetadataBuilder.update_block_table", "AttentionType.DECODER",
        *(
            f"CommonAttentionMetadata.{field}"
            for field in (
                "block_table_tensor", "causal", "max_query_len", "num_actual_tokens", "num_reqs", "query_start_loc",
                "query_start_loc_cpu", "seq_lens", "slot_mapping",
            )
        ),
    ),
    "v1.attention.backends.cpu_attn": (
        "CPUAttentionBackend", "CPUAttentionBackendImpl", "CPUAttentionMetadata", "CPUAttentionMetadataBuilder",
        "_get_attn_isa",
    ),
    "v1.attention.backends.fa_utils": ("flash_attn_varlen_func", "get_flash_attn_version"),
    "v1.attention.backends.flash_attn": (
        "FlashAttentionBackend", "FlashAttentionImpl", "FlashAttentionMetadata", "FlashAttentionMetadataBuilder",
    ),
    "v1.attention.backends.registry": (
        "AttentionBackendEnum.CUSTOM", "AttentionBackendEnum.get_path", "AttentionBackendEnum.is_overridden",
        "_ATTN_OVERRIDES", "register_backend",
    ),
    "v1.attention.backends.triton_attn": (
        "TritonAttentionBackend", "TritonAttentionImpl", "TritonAttentionMetadata", "TritonAttentionMetadataBuilder",
    ),
    "v1.core.sched.output": (
        "NewRequestData.req_id", "NewRequestData.sampling_params", "SchedulerOutput.finished_req_ids",
        "SchedulerOutput.num_scheduled_tokens", "SchedulerOutput.scheduled_new_reqs",
    ),
    "v1.engine": ("EngineCoreRequest.cache_salt", "EngineCoreRequest.sampling_params"),
    "v1.engine.async_llm": ("AsyncLLM.generate",),
    "v1.engine.input_processor": ("InputProcessor.process_inputs",),
    "v1.worker.gpu.input_batch": ("InputBatch.req_ids",),
    "v1.worker.gpu.model_runner": ("GPUModelRunner.execute_model", "GPUModelRunner.prepare_inputs"),
    "v1.worker.gpu_input_batch": ("InputBatch.req_ids",),
    "v1.worker.gpu_model_runner": ("GPUModelRunner._prepare_inputs", "GPUModelRunner.execute_model"),
    "v1.worker.worker_base": ("WorkerBase",),
}  # fmt: skip
"""By module of vLLM: required names, and required members of classes."""


def missing_parts(vllm: Path) -> Iterator[str]:
    """Parts that we use and this vLLM lacks, read from its source without importing it.

    Args:
        vllm: folder of the package.
    """
    for module, names in PARTS.items():
        path = vllm.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        defined = set(_defined(ast.parse(path.read_bytes()).body)) if path.is_file() else set()
        yield from (f"vllm.{module}.{name}" for name in names if name not in defined)


def _defined(statements: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Names that these statements of a module define or import, and the members of classes."""
    for node in statements:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from _defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (prefix + (alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            handlers = node.handlers if isinstance(node, ast.Try) else []
            for part in (node.body, node.orelse, *(handler.body for handler in handlers)):
                yield from _defined(part, prefix)


def vllm_folder() -> Path:
    """Folder of the installed package, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
