"""New processes for scripts that import vLLM, without the seconds that it takes to import what vLLM imports.

Run as a script this is a process that has imported that and waits; it forks for every script that it is given. vLLM,
its plugins and this package are imported by the script itself, as in a process started for it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

SLOW_IMPORTS = (
    "torch._inductor.compile_fx",
    "transformers.processing_utils",
    "openai.types.chat",
    "fastapi",
    "aiohttp",
    "opentelemetry.sdk.trace",
    "xgrammar",
)
LIMIT = 300
"""Seconds that a script may take."""


class ForkServer:
    """The process, as a test holds it."""

    def __init__(self) -> None:
        # As vLLM has it, so that torch starts no processes of its own.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script: Path, arguments: list[str], environment: dict[str, str], first_path: str) -> str:
        """What a script prints, given arguments, all of its environment, and the folder where it looks for modules
        first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = [str(script), arguments, environment, first_path]
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the fork server has ended"
        written, errors = (script.with_suffix(end).read_text() for end in (".out", ".err"))
        assert int(answer) == 0, errors[-4000:]
        return written

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    for name in SLOW_IMPORTS:
        # What one version of vLLM needs, another may not.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not {"vllm", "minference_vllm"} & set(sys.modules)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run_in_this_process(*request)
        print(os.waitpid(child, 0)[1], flush=True)
    os._exit(0)  # taking down what was imported takes a second


def run_in_this_process(script: str, arguments: list[str], environment: dict[str, str], first_path: str) -> Any:
    """What ``python script arguments`` does, to the end."""
    signal.alarm(LIMIT)
    place = Path(script)
    for number, end in enumerate((".out", ".err"), 1):
        os.dup2(os.open(place.with_suffix(end), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path[:1] = [first_path, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_fresh_vllm(
    server: ForkServer, folder: Path, script: str, *arguments: str, first_path: str | None = None, **changes: str
) -> Any:
    """The JSON value that a script prints last, which imports vLLM and may have arguments and changes to the
    environment."""
    path = folder / "script.py"
    path.write_text(script)
    printed = server.run(
        path, [*arguments], {**os.environ, **changes}, str(folder) if first_path is None else first_path
    )
    return json.loads(printed.splitlines()[-1])


if __name__ == "__main__":
    serve()
