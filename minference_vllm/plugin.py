"""Entry point of the vLLM plugin. Every vLLM process calls it, several times, before a backend is selected."""

from __future__ import annotations

import contextlib
import functools
import logging


def register() -> None:
    """Register our backend under the name ``minference`` (``--attention-backend minference``).

    If that fails (vLLM outside the supported range, its slot for custom backends taken, or anything else in this vLLM),
    a warning gives the reason, and selecting the name raises it as an error. Servers with other backends are not
    affected.
    """
    from minference_vllm.backend import compat

    try:
        from minference_vllm.backend.registration import make_name_known

        make_name_known()
    except Exception as error:
        reason = compat.unavailable(str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}")
        _warn(reason)
        # Without vLLM's enum of backends, the reason is only in the log.
        with contextlib.suppress(ImportError, AttributeError):
            compat.refuse_name(reason)


@functools.cache
def _warn(reason: str) -> None:
    """Warn once per process and reason, since vLLM may call ``register`` again."""
    logging.getLogger("vllm.minference_vllm").warning(reason)
