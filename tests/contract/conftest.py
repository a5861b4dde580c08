"""CUDA releases of vLLM, each in a process that runs the cases of a test file (see ``contract_process``)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract_process import CudaVLLM

VERSIONS = ("0.26.0", "0.30.0", "0.33.0")
"""The oldest and the newest supported release, and one between."""


@pytest.fixture(
    scope="module",
    params=[*(pytest.param(version, marks=pytest.mark.older_vllm) for version in VERSIONS[:-1]), VERSIONS[-1]],
)
def cuda_vllm(request: pytest.FixtureRequest) -> Iterator[CudaVLLM]:
    import get_vllm_python

    pytest.importorskip("triton")
    folder = get_vllm_python.default_folder(request.param)
    try:
        get_vllm_python.make(request.param, folder)
    except get_vllm_python.MakeError as error:
        pytest.skip(str(error))
    process = CudaVLLM(request.path, request.param, folder)
    yield process
    process.close()
