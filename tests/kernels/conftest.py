"""Fixtures of the tests of kernels."""

from __future__ import annotations

import pytest
import torch
from native_inputs import BUILDS

from minference_vllm.kernels.native import library


@pytest.fixture(params=BUILDS, ids=lambda param: f"{param[0]}-{param[1]}".replace("torch.", ""))
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Types for each build of our CPU kernels that the processor can run, not only the best one."""
    build, dtype = request.param
    loaded = library.load(build)
    if loaded is None:
        pytest.skip(f"no kernels for {library.INSTRUCTIONS[build]} here")
    monkeypatch.setattr(library, "_best", lambda dtype: (build, loaded))
    return dtype
