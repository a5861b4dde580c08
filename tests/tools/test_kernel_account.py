"""The default variants of the Triton kernels, compiled for Hopper: no spills, tensor-core instructions, and inner loops
that keep up with a dense kernel according to the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

LOW_RANK = ("unlike_rows", "query_codes", "moments", "fit", "representatives", "threshold", "key_codes",
            "share_levels", "value_norms", "key_lists", "approx_lse",
            "bins", "bins representatives", "share_levels sampled", "threshold sampled",
            "key_lists sampled")  # fmt: skip
TOOL = Path(__file__).parents[2] / "tools" / "kernel_account.py"


def test_default_variants_keep_their_registers_tensor_cores_and_pace() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--arch", "90"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0 and done.stdout, f"{done.stdout}\n{done.stderr[-4000:]}"
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert all(line.endswith("  ok") for line in lines)
    kernels = ("sparse_attention", "physical_lists", "row_lse", "column_diagonal", "block_mean", "square_lse")
    for kernel in (*kernels, "square_mass", "left_out", "remainder", *LOW_RANK):
        assert any(line.startswith(kernel) for line in lines)
    assert any("packed 7" in line for line in lines) and sum("counted" in line for line in lines) == 5
    loops = [line for line in done.stdout.splitlines() if line.startswith(" ")]
    assert any("keys before" in line and "380 TFLOP/s, 1.00 of dense" in line for line in loops)
    ours = [line for line in loops if "whole pages" in line]
    assert len(ours) == 16
    assert all("buffers" in line and "model" in line for line in ours)


def test_a_launch_that_prefetches_nothing_is_a_problem() -> None:
    from kernel_account import attention_account
    from kernel_variants import Variant

    from minference_vllm.triton_kernels.launch import LaunchShape

    good = attention_account(Variant(), True, 90)
    assert good.problems == []
    assert good.row["whole_pages_buffers"] == 3 and good.row["single_keys_model_tflops"] >= 320
    bad = attention_account(Variant(), True, 90, LaunchShape(block_m=128, block_n=64, block_own=64, stages=2))
    assert len(bad.problems) == 2
    for problem, loop in zip(bad.problems, ("whole pages", "single keys"), strict=True):
        assert problem.startswith(f"{loop} at 0.") and problem.endswith(" of the dense kernel")
