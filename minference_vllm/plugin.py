"""vLLM's entry point. It is called in every vLLM process, several times, before anything was selected."""

from __future__ import annotations

import contextlib
import functools
import logging


def register() -> None:
    """Make the name ``minference`` (``--attention-backend minference``) stand for our backend.

    Where that cannot be (vLLM outside the supported range, its slot for custom backends taken, or whatever else fails
    in this vLLM) a warning says why, and whoever selects the name gets that as the error. Whoever did not must not be
    kept from serving: for them nothing changes.
    """
    from minference_vllm.backend import compat

    try:
        from minference_vllm.backend.registration import make_name_known

        make_name_known()
    except Exception as error:
        reason = compat.unavailable(str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}")
        _warn(reason)
        # A vLLM without its enum of backends has no place for the reason, but that in the log.
        with contextlib.suppress(ImportError, AttributeError):
            compat.refuse_name(reason)


@functools.cache
def _warn(reason: str) -> None:
    """Once per process and reason: vLLM may call ``register`` again."""
    logging.getLogger("vllm.minference_vllm").warning(reason)
