"""vLLM's entry points. Both are called in every vLLM process, several times, before anything was selected."""

from __future__ import annotations

import logging


def register() -> None:
    """Make the name ``minference`` (``--attention-backend minference``) stand for our backend.

    Where that cannot be (vLLM outside the supported range, its slot for custom backends taken) a warning says why, and
    the name stays unknown: whoever did not select it must not be kept from serving.
    """
    from minference_vllm.backend.compat import check_vllm_version, register_name

    try:
        check_vllm_version()
        register_name()
    except RuntimeError as error:
        logging.getLogger("vllm.minference_vllm").warning("attention backend 'minference' is not available: %s", error)


def cpu_platform() -> str | None:
    """Our platform class on vLLM's CPU build, None everywhere else.

    vLLM's CPU platform ignores the chosen attention backend; the subclass honours ours and leaves all else alone.
    """
    from minference_vllm.backend.compat import is_plain_cpu_platform

    return "minference_vllm.backend.cpu_platform.MInferenceCpuPlatform" if is_plain_cpu_platform() else None
