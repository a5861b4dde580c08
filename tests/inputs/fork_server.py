"""New processes for scripts that import vLLM, without the seconds that importing vLLM's dependencies takes.

Run as a script, this process imports the dependencies, waits, and forks for every script that it is given. vLLM, its
plugins and this package are imported by the script itself, as in a new process.
"""

from __future__ import annotations

import atexit
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
LIMIT = 600
"""Time limit of a script in seconds."""


class ForkServer:
    """The process, as a test holds it."""

    def __init__(self) -> None:
        # As in vLLM, so that torch starts no processes of its own; and no threads, which a fork would lack.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        script: Path,
        arguments: list[str],
        environment: dict[str, str],
        out: Path,
        err: Path,
        folder: Path | None = None,
        first_path: str | None = None,
    ) -> int:
        """The exit status of a script.

        Args:
            environment: the complete environment.
            out, err: files for its output; may be the same.
            folder: its working directory; None: that of this process.
            first_path: first entry of its module search path; None: its own folder.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        places = map(str, (folder or Path.cwd(), out.resolve(), err.resolve()))
        first_path = str(script.parent) if first_path is None else first_path
        request = [str(script), arguments, environment, *places, first_path]
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the fork server has ended"
        return int(answer)

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
    os._exit(0)  # a regular exit takes a second


def run_in_this_process(
    script: str, arguments: list[str], environment: dict[str, str], folder: str, out: str, err: str, first_path: str
) -> Any:
    """Do what ``python script arguments`` does, and exit."""
    signal.alarm(LIMIT)
    for number, path in enumerate((out, err), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Otherwise processes that it forks would print its buffered output again.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path[:1] = [first_path, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # vLLM ends the processes that it has started here.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_fresh_vllm(
    server: ForkServer, folder: Path, script: str, *arguments: str, first_path: str | None = None, **changes: str
) -> Any:
    """The JSON value that a script printed last. The script imports vLLM, and may get arguments and changes to the
    environment."""
    path, out, err = (folder / name for name in ("script.py", "script.out", "script.err"))
    path.write_text(script)
    status = server.run(path, [*arguments], {**os.environ, **changes}, out, err, first_path=first_path)
    assert status == 0, err.read_text()[-4000:]
    return json.loads(out.read_text().splitlines()[-1])


if __name__ == "__main__":
    serve()
