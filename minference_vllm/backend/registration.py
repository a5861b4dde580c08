"""How vLLM comes to know our name."""

from __future__ import annotations

from minference_vllm.backend.compat import check_vllm, register_name
from minference_vllm.backend.cpu_platform import serve_our_name
from minference_vllm.backend.dual_chunk_rope import register_rotary_embedding
from minference_vllm.backend.vllm_requests import check_new_requests


def make_name_known() -> None:
    """Let ``minference`` stand for our backend in this process. Idempotent.

    Raises:
        RuntimeError: vLLM is outside the supported range, lacks what we use, or has its slot for custom backends taken.
    """
    check_vllm()
    # First, so that no name is known that the platform does not serve.
    serve_our_name()
    register_rotary_embedding()
    check_new_requests()
    register_name()
