"""Cases that run inside a CUDA release of vLLM (``faked_cuda``): a process that has imported it forks for each case.

A test file has its cases as functions ``case_NAME``. It is run by pytest with whatever vLLM is installed, and as a
script, ``python FILE VERSION FOLDER``, with the CUDA release.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faked_cuda

LIMIT = 240
"""Time limit of a case in seconds."""


class CudaVLLM:
    """The process, as a test holds it."""

    def __init__(self, script: Path, version: str, folder: Path) -> None:
        inputs = str(Path(__file__).parent)
        paths = [inputs, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TRITON_INTERPRET": "1",
            "VLLM_TARGET_DEVICE": "cuda",
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            # vLLM then uses Triton although no driver is there.
            "CUDA_VISIBLE_DEVICES": "",
            "VLLM_PLUGINS": "",
        }
        self.version = version
        self._process = subprocess.Popen(
            [sys.executable, str(script), version, str(folder)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, case: str) -> None:
        """Raise an AssertionError with the case's traceback if it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(case, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"vLLM {self.version} could not be imported; see the captured stderr"
        error = json.loads(answer)
        assert error is None, f"in vLLM {self.version}:\n{error}"

    def close(self) -> None:
        self._process.communicate()


def names(functions: dict[str, Any]) -> list[str]:
    """The cases among a module's functions."""
    return [name for name in functions if name.startswith("case_")]


def serve(functions: dict[str, Callable[[], None]]) -> None:
    """Answer on stdout with one JSON line per case: None, or the traceback."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    version, folder = sys.argv[1:]
    faked_cuda.install(version, Path(folder))
    # Modules that every case imports.
    import contract_engine

    contract_engine.register()
    for line in sys.stdin:
        print(json.dumps(_in_a_fork(functions[line.strip()])), file=answers, flush=True)
    os._exit(0)


def _in_a_fork(case: Callable[[], None]) -> str | None:
    end, begin = os.pipe()
    child = os.fork()
    if child:
        os.close(begin)
        with os.fdopen(end) as answer:
            said = answer.read()
        status = os.waitpid(child, 0)[1]
        return (said or f"the process of the case ended with status {status}") if status else None
    signal.alarm(LIMIT)
    try:
        case()
        status = 0
    except BaseException:
        os.write(begin, traceback.format_exc()[-8000:].encode())
        status = 1
    os._exit(status)
