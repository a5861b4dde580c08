"""vLLM's entry points. Both are called in every vLLM process, several times, before anything was selected."""

from __future__ import annotations


def register() -> None:
    """Make the name ``minference`` (``--attention-backend minference``) stand for our backend.

    Raises:
        RuntimeError: vLLM is outside the supported range, or its slot for custom backends is taken. (vLLM logs the
            message and goes on; selecting ``minference`` then fails as an unknown backend.)
    """
    from minference_vllm.backend.compat import check_vllm_version, register_name

    check_vllm_version()
    register_name()


def cpu_platform() -> str | None:
    """Our platform class on vLLM's CPU build, None everywhere else.

    vLLM's CPU platform ignores the chosen attention backend; the subclass honours ours and leaves all else alone.
    """
    from minference_vllm.backend.compat import is_plain_cpu_platform

    return "minference_vllm.backend.cpu_platform.MInferenceCpuPlatform" if is_plain_cpu_platform() else None
