"""On-disk cache of the fastest kernel: one JSON file for each machine, set of versions and kind of layer.

A file that is unreadable or has unexpected content is ignored with a log message, and replaced by the next timing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

UNUSABLE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
"""Exceptions that reading an invalid file may raise."""
logger = logging.getLogger("vllm.minference_vllm")

Key = Mapping[str, str | int]
"""Everything that the timings depend on, by name."""


@dataclass(frozen=True)
class Choice:
    kernel: str
    seconds: dict[str, float]
    """Total time of each kernel that was timed."""


def default_folder() -> Path:
    """Below vLLM's own cache, ``~/.cache/vllm`` unless ``VLLM_CACHE_ROOT`` or ``XDG_CACHE_HOME`` say otherwise."""
    root = os.environ.get("VLLM_CACHE_ROOT")
    if not root:
        root = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vllm")
    return Path(os.path.expandvars(root)).expanduser() / "minference" / "kernels"


def path_of(folder: Path, key: Key) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:24]}.json"


def load(folder: Path, key: Key, kernels: Collection[str]) -> Choice | None:
    """The stored choice for this key; None if there is no usable one.

    Args:
        kernels: names of the allowed kernels.
    """
    path = path_of(folder, key)
    try:
        found = json.loads(path.read_text())
        if found["key"] != dict(key):
            raise ValueError("it belongs to another key")
        choice = _choice(found)
        if choice.kernel not in kernels:
            raise ValueError(f"kernel {choice.kernel!r} cannot run here")
    except FileNotFoundError:
        return None
    except UNUSABLE as error:
        _warn_once(f"{path} is ignored ({type(error).__name__}: {error})")
        return None
    return choice


def store(folder: Path, key: Key, choice: Choice) -> None:
    """Write the choice atomically, since several processes may write the same one at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the rename is atomic.
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            try:
                json.dump({"key": dict(key), **asdict(choice)}, file, indent=1)
                file.close()
                Path(file.name).replace(path_of(folder, key))
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(file.name).unlink()
                raise
    except OSError as error:
        _warn_once(f"the fastest kernel cannot be kept in {folder}, and is timed again at the next start ({error})")


def stored(folder: Path) -> Iterator[tuple[dict[str, Any], Choice]]:
    """All readable choices, with their keys."""
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(*UNUSABLE):
            found = json.loads(path.read_text())
            yield dict(found["key"]), _choice(found)


def _choice(found: Any) -> Choice:
    seconds = {str(name): float(value) for name, value in dict(found["seconds"]).items()}
    if found["kernel"] not in seconds or not all(math.isfinite(value) and value > 0 for value in seconds.values()):
        raise ValueError("its times are no times of its kernel")
    return Choice(found["kernel"], seconds)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("minference: %s", message)
