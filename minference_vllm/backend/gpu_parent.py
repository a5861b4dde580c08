"""Choose the vLLM backend that ours extends on a GPU. Importing this module imports none of vLLM's backends."""

from __future__ import annotations

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


def __getattr__(name: str) -> type:
    """The registered class. It is chosen when vLLM asks for it, not when it loads plugins: vLLM loads plugins in every
    process, whether minference is selected or not, and the choice queries the GPU."""
    if name != "MInferenceGPUBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    parent, reason = choose_gpu_parent(*this_gpu())
    logger.info_once("minference: over vLLM's %s backend: %s", parent, reason)
    if parent == "FLASH_ATTN":
        from minference_vllm.backend.cuda import MInferenceCUDABackend

        return MInferenceCUDABackend
    from minference_vllm.backend.triton_attn import MInferenceTritonBackend

    return MInferenceTritonBackend


def this_gpu() -> tuple[bool, tuple[int, int] | None, str | None]:
    """The arguments of ``choose_gpu_parent`` on this machine."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return False, None, None
    capability = current_platform.get_device_capability()
    found = (capability.major, capability.minor) if capability else None
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        problem = None if get_flash_attn_version() else "vLLM finds no version of FlashAttention that runs here"
    except ImportError as error:
        problem = f"vLLM has no FlashAttention here ({error})"
    return True, found, problem


def choose_gpu_parent(
    is_cuda: bool, capability: tuple[int, int] | None, flash_attention_problem: str | None
) -> tuple[str, str]:
    """The vLLM backend that ours extends on a GPU, and why.

    The model does not matter: FlashAttention supports head sizes up to 256 in steps of 8, and we serve no larger ones.

    Args:
        capability: the GPU's compute capability; None: unknown.
        flash_attention_problem: why vLLM cannot run FlashAttention, or None.

    Returns:
        ``FLASH_ATTN`` or ``TRITON_ATTN``, and the reason.

    Raises:
        ValueError: the device is not an NVIDIA GPU.
    """
    if not is_cuda:
        raise ValueError("minference runs on CPUs and NVIDIA GPUs: its kernels have been made for no other device")
    if capability is not None and capability < (8, 0):
        found = ".".join(map(str, capability))
        return "TRITON_ATTN", f"FlashAttention needs compute capability 8.0, this GPU has {found}"
    if flash_attention_problem:
        return "TRITON_ATTN", flash_attention_problem
    return "FLASH_ATTN", "FlashAttention runs here"
