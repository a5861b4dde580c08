"""Run ``vllm serve`` with a log file: start it on a free port, wait for it, and stop it with all of its processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

START_TIMEOUT = 600.0
STOP_TIMEOUT = 20.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Ignores proxies in the environment, since the server is on this machine."""


class Server(NamedTuple):
    """A server that is ready."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    """The leader of the server's process group."""


@contextlib.contextmanager
def serve(
    name: str, model: str, flags: list[str], log: Path, out: TextIO, environment: dict[str, str]
) -> Iterator[Server]:
    """Start a server of this model and wait until it is ready; stop it at the end. Exits with the end of its log if it
    does not start.

    Args:
        name: prefix of the lines on ``out``.
        flags: of ``vllm serve``.
        environment: variables; the caller's own environment takes precedence.
    """
    port = free_port()
    beside = Path(sys.executable).with_name("vllm")
    command = [
        str(beside) if beside.exists() else shutil.which("vllm") or sys.exit("no vllm command in this environment"),
        "serve",
        model,
        *("--host", "127.0.0.1", "--port", str(port)),
        *flags,
    ]
    variables = {**environment, **os.environ, "VLLM_NO_USAGE_STATS": "1"}
    if Path(model).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"
    print(f"{name}: starting vllm serve (log: {shown(log)})", file=out, flush=True)
    with log.open("w") as file:
        # In its own session, so that its processes form one group and Ctrl-C only reaches this process.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(name, url, process, log, out)
        yield Server(url, log, process)
    finally:
        stop(process)


def wait_until_ready(name: str, url: str, process: subprocess.Popen[bytes], log: Path, out: TextIO) -> None:
    """Return when the server answers; exit with the end of its log if it stops, or takes too long."""
    begin = reported = time.monotonic()
    while True:
        with contextlib.suppress(OSError), OPENER.open(f"{url}/health", timeout=5):
            print(f"{name}: ready after {time.monotonic() - begin:.0f} s", file=out, flush=True)
            return
        now = time.monotonic()
        problem = None
        if process.poll() is not None:
            problem = f"the server stopped with status {process.returncode}"
        elif now - begin > START_TIMEOUT:
            problem = f"the server was not ready after {START_TIMEOUT:.0f} s"
        if problem:
            sys.exit(f"{name}: {problem}; {log_tail(log)}")
        if now - reported >= 10:
            reported = now
            print(f"{name}: loading, {now - begin:.0f} s", file=out, flush=True)
        time.sleep(0.5)


def log_tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-40:]
    return "\n".join([f"the end of {shown(log)}:", *lines])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and every process of its group."""
    try:
        if signal_group(process.pid, signal.SIGTERM):
            deadline = time.monotonic() + STOP_TIMEOUT
            while time.monotonic() < deadline and signal_group(process.pid, 0):
                process.poll()
                time.sleep(0.1)
    finally:
        signal_group(process.pid, signal.SIGKILL)
        process.wait()


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False if it has no processes left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(path: Path) -> str:
    """A path as the reader would type it."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
