"""``minference-vllm evaluate`` on the bundled model, as a user runs it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parent.parent.parent / "examples" / "demo" / "model"


def test_evaluate_compares_patterns_in_one_engine(tmp_path: Path, run_tool: Callable[..., Any]) -> None:
    """The default loses almost nothing; a pattern that attends little loses much, which the exit code shows."""
    done = run_tool(
        "evaluate", str(MODEL), "-o", str(tmp_path),
        "--patterns", "default", "a_shape(64, 64)", "--lengths", "6144", "--chunk", "1024", "--samples", "1",
        "--repeats", "1", "--max-loss", "0.01", "--settings", '{"min_context": 1024}',
        "--engine-args", '{"enforce_eager": true}',
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout[-4000:]
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = {(row["pattern"], row["task"]): row for row in csv.DictReader(file)}
    default, blind = (
        {task: row for (pattern, task), row in rows.items() if pattern == name}
        for name in ("default", "a_shape(64, 64)")
    )
    assert default.keys() == blind.keys() >= {"perplexity", "inside", "time to first token"}
    assert {row["dense"] for row in default.values() if row["unit"] == "nats"} == {
        row["dense"] for row in blind.values() if row["unit"] == "nats"
    }
    assert float(blind["perplexity"]["density"]) < float(default["perplexity"]["density"]) < 1.0
    assert float(default["inside"]["difference"]) < float(blind["inside"]["difference"])
    lost = [
        name
        for name, of in (("default", default), ("a_shape(64, 64)", blind))
        if float(of["perplexity"]["difference"]) > 0.01
    ]
    assert done.returncode == bool(lost) and all(f"{name} loses" in done.stdout for name in lost)
    assert f"report in {tmp_path}" in done.stdout and "Traceback" not in done.stdout
