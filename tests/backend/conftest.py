"""Fresh processes that import vLLM, and the warnings logged in this one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer, run_fresh_vllm

from minference_vllm import plugin


@pytest.fixture
def fresh_vllm(fork_server: ForkServer, tmp_path: Path) -> Callable[..., Any]:
    """Runs a script that imports vLLM in its own process: ``fresh_vllm(script, *arguments, **changes to the
    environment)`` returns the JSON value that it prints last."""
    return partial(run_fresh_vllm, fork_server, tmp_path)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What we log in this process."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.minference_vllm")
    logger.addHandler(handler)
    plugin._warn.cache_clear()
    yield lines
    logger.removeHandler(handler)
