"""The default variants of the Triton kernels, compiled for Hopper: no spills, and tensor-core instructions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TOOL = Path(__file__).parents[2] / "tools" / "kernel_account.py"


def test_default_variants_keep_their_registers_and_tensor_cores() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--arch", "90"], capture_output=True, text=True, timeout=600, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert all(line.endswith("  ok") for line in lines)
    kernels = ("sparse_attention", "row_lse", "column_diagonal", "block_mean", "square_lse", "square_mass")
    for kernel in (*kernels, "peak_lse", "tile_bins", "mass "):
        assert any(line.startswith(kernel) for line in lines)
    assert any("packed 7" in line for line in lines)
