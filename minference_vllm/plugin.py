"""vLLM's entry point. It is called in every vLLM process, several times, before anything was selected."""

from __future__ import annotations

import functools
import logging


def register() -> None:
    """Make the name ``minference`` (``--attention-backend minference``) stand for our backend.

    Where that cannot be (vLLM outside the supported range, its slot for custom backends taken, or whatever else fails
    in this vLLM) a warning says why, and the name stays unknown: whoever did not select it must not be kept from
    serving.
    """
    try:
        from minference_vllm.backend.registration import make_name_known

        make_name_known()
    except Exception as error:
        _warn(str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}")


@functools.cache
def _warn(reason: str) -> None:
    """Once per process and reason: vLLM may call ``register`` again."""
    logging.getLogger("vllm.minference_vllm").warning("attention backend 'minference' is not available: %s", reason)
