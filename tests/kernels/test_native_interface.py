"""A library of our CPU kernels is used only if it was built with the structures that Python calls it with."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minference_vllm.kernels.native import interface, library

Fields = tuple[tuple[str, type], ...]
FIELDS: Fields = interface.KeyArguments._fields_
built = pytest.mark.skipif(bool(library.unavailable_reason()), reason=str(library.unavailable_reason()))


def without(name: str) -> Fields:
    return tuple(field for field in FIELDS if field[0] != name)


def retyped(name: str, kind: type) -> Fields:
    return tuple((field, kind if field == name else part) for field, part in FIELDS)


def swapped(name: str, other: str) -> Fields:
    order = {name: other, other: name}
    kinds = dict(FIELDS)
    return tuple((order.get(field, field), kinds[order.get(field, field)]) for field, _ in FIELDS)


DOCTORED = {
    "missing": (without("seq_len"), "KeyArguments.seq_len is int64 at byte 40 in the library, absent in this package"),
    # Four bytes of padding follow it: neither a size nor an offset shows that it is missing.
    "missing before padding": (
        without("threads"),
        "KeyArguments.threads is int32 at byte 64 in the library, absent in this package",
    ),
    "added": (
        (*FIELDS, ("rank", ctypes.c_int32)),
        "KeyArguments.rank is absent in the library, int32 at byte 68 in this package",
    ),
    "reordered": (
        swapped("heads", "tiles"),
        "KeyArguments.heads is int32 at byte 48 in the library, int32 at byte 52 in this package",
    ),
    "other size": (
        retyped("heads", ctypes.c_int64),
        "KeyArguments.heads is int32 at byte 48 in the library, int64 at byte 48 in this package",
    ),
    "other type of the same size": (
        retyped("threads", ctypes.c_float),
        "KeyArguments.threads is int32 at byte 64 in the library, float32 at byte 64 in this package",
    ),
    "pointer to another type": (
        retyped("counts", dict(FIELDS)["bins"]),
        "KeyArguments.counts is int32* at byte 16 in the library, uint8* at byte 16 in this package",
    ),
}


@pytest.fixture
def reopen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str | None]:
    """Opens the libraries again, as a new process would; returns ``unavailable_reason``."""
    for name in ("_open", "_best"):
        monkeypatch.setattr(library, name, getattr(library, name).__wrapped__)
    return lambda: library.unavailable_reason.__wrapped__(torch.bfloat16)


@built
@pytest.mark.parametrize("build", library.INSTRUCTIONS)
def test_a_library_describes_every_structure_field_and_function(build: str) -> None:
    loaded = library.load(build)
    if loaded is None:
        pytest.skip(f"no kernels for {library.INSTRUCTIONS[build]} here")
    lines = loaded.minference_describe_interface().decode().splitlines()
    assert lines[0] == "Cache.key: void* at byte 0"
    assert sorted(lines) == sorted(f"{name}: {what}" for name, what in interface.interface().items())


@built
@pytest.mark.parametrize("build", library.INSTRUCTIONS)
def test_nothing_of_a_library_is_shared_with_those_of_other_builds(build: str) -> None:
    """gcc marks a static variable of an inline function ``u``: all libraries of a process then share it."""
    if shutil.which("nm") is None:
        pytest.skip("nm lists a library's symbols")
    loaded = library.load(build)
    if loaded is None:
        pytest.skip(f"no kernels for {library.INSTRUCTIONS[build]} here")
    found = subprocess.run(["nm", "-D", "--defined-only", loaded._name], capture_output=True, text=True, check=True)
    ours = [line for line in found.stdout.splitlines() if "minference" in line]
    assert ours and not any(" u " in line for line in ours)


@built
@pytest.mark.parametrize("case", DOCTORED)
def test_a_library_with_another_structure_is_refused(
    case: str, reopen: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fields, difference = DOCTORED[case]
    doctored = type("KeyArguments", (ctypes.Structure,), {"_fields_": fields})
    assert reopen() is None
    for name in ("page_counts", "keys_above"):
        monkeypatch.setitem(interface.FUNCTIONS, name, doctored)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    reason = reopen()
    assert reason is not None and difference in reason and "build the package again with pip install" in reason
    assert [library.load(build) for build in library.INSTRUCTIONS] == [None] * len(library.INSTRUCTIONS)
    assert difference in caplog.text


@built
@pytest.mark.parametrize(
    ("function", "difference"),
    [
        (
            "page_counts",
            "page_counts is a function of KeyArguments in the library, a function of BinMassArguments in this",
        ),
        ("decode", "decode is absent in the library, a function of BinMassArguments in this package"),
    ],
)
def test_a_library_with_other_functions_is_refused(
    function: str, difference: str, reopen: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(interface.FUNCTIONS, function, interface.BinMassArguments)
    assert difference in str(reopen())


def test_a_library_that_does_not_describe_itself_is_refused() -> None:
    assert interface.difference(ctypes.CDLL(None)) == "the library does not describe its interface"


def test_a_file_that_is_no_library_is_refused(
    reopen: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for build in library.INSTRUCTIONS:
        (tmp_path / f"_cpu_kernels_{build}.so").write_text("not a library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "kernels" / "native" / "library.py"))
    monkeypatch.setattr(
        library, "_SUPPORTED", {build: lambda build=build: build == "avx2" for build in library.INSTRUCTIONS}
    )
    assert str(reopen()).startswith("_cpu_kernels_avx2.so cannot be loaded: ")


def test_libraries_that_were_not_built_are_named_as_that(
    reopen: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "kernels" / "native" / "library.py"))
    monkeypatch.setattr(library, "_SUPPORTED", dict.fromkeys(library.INSTRUCTIONS, lambda: True))
    assert reopen() == "csrc/cpu was not built: install from source with a C++20 compiler"
