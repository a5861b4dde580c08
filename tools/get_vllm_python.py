"""Put the Python files of a CUDA release of vLLM into the user's cache, for the tests in ``tests/contract``.

Those tests run our GPU classes on vLLM's own code for CUDA, on machines without a GPU. The compiled parts cannot be
loaded there and are not kept: of the wheel of 300 MB that pip downloads, 60 MB remain. Running it again does nothing.
Only the folder to put on the path is printed on stdout:

    python tools/get_vllm_python.py 0.33.0
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

from get_smollm2 import MakeError, cache_folder, download_wheel, make_parent

PLATFORM = ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"]
"""Selects vLLM's wheel for NVIDIA GPUs on any machine; it is the same for every Python version."""
KEPT = (".py", ".json")
NEEDED_BYTES = 1 << 30
"""Free disk space required for the download and the files that are kept, with a margin."""


def default_folder(version: str) -> Path:
    return cache_folder("vllm-python") / version


def is_made(folder: Path) -> bool:
    return (folder / "vllm" / "__init__.py").is_file()


def make(version: str, folder: Path) -> None:
    """Unzip the Python files of this release below ``folder / "vllm"``, unless they exist.

    Raises:
        MakeError: the download fails, the disk is full, or the folder holds something else.
    """
    if is_made(folder):
        return
    if folder.exists():
        raise MakeError(f"{folder} exists and holds no vLLM; remove it, or name another with --output")
    make_parent(folder, NEEDED_BYTES)
    # Written beside the folder and then renamed, so that an interrupted run leaves nothing that looks finished.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        unzipped = Path(scratch) / "unzipped"
        with zipfile.ZipFile(download_wheel(f"vllm=={version}", Path(scratch), *PLATFORM)) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(KEPT)]
            wheel.extractall(unzipped, names)
        if not is_made(unzipped):
            raise MakeError(f"the wheel of vllm=={version} has no Python files of vLLM")
        unzipped.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of vLLM, as the package index names it")
    parser.add_argument("--output", type=Path, help="the folder; default: in the user's cache")
    args = parser.parse_args()
    folder = args.output or default_folder(args.version)
    try:
        make(args.version, folder)
    except MakeError as error:
        sys.exit(f"get_vllm_python: {error}")
    print(folder)


if __name__ == "__main__":
    main()
