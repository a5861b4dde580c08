"""Register the backend name ``minference`` with vLLM."""

from __future__ import annotations

from minference_vllm.backend.compat import check_vllm, register_name
from minference_vllm.backend.cpu_platform import serve_our_name
from minference_vllm.backend.dual_chunk_rope import register_rotary_embedding
from minference_vllm.backend.vllm_requests import check_new_requests


def make_name_known() -> None:
    """Register ``minference`` as our backend in this process. Idempotent.

    Raises:
        RuntimeError: vLLM is outside the supported range, lacks parts that we use, or its custom backend slot is taken.
    """
    check_vllm()
    # First: the name must not be known before the platform serves it.
    serve_our_name()
    register_rotary_embedding()
    check_new_requests()
    register_name()
