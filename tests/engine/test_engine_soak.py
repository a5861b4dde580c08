"""A small ``make soak``: a server under mixed load, killed and restarted once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_a_short_soak(tmp_path: Path) -> None:
    words = ["--minutes", "0.5", "--kills", "1", "--longest", "6000", "--eager", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "\nresult                 passed\n" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"server_0.log", "server_1.log", "memory_1.json"}
