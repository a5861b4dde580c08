"""The picture of the language benchmark's rows."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import plot_language
from plot_language import Point

ROW = {"model": "tiny", "text": "words", "tokens": "8000", "chunk": "2048", "pattern": "low_rank", "density": "0.25"}
ROW |= {"standard_error": "0.01"}
PROMPTS = "words, 8000 tokens, chunks of 2048"


def test_points_by_task_the_last_row_counts() -> None:
    rows = [
        ROW | {"task": "end", "difference": "0.5"},
        ROW | {"task": "end", "difference": "0.002"},
        ROW | {"task": "inside", "difference": "-0.1"},
        ROW | {"task": "heads", "difference": ""},
    ]
    assert plot_language.points(rows) == {
        "end": [Point("low_rank", PROMPTS, 0.25, 0.002, 0.01)],
        "inside": [Point("low_rank", PROMPTS, 0.25, -0.1, 0.01)],
    }


def test_a_picture_says_what_it_shows(tmp_path: Path) -> None:
    target = tmp_path / "pictures" / "loss.svg"
    plot_language.draw([ROW | {"task": "end", "difference": 0.5}, ROW | {"task": "inside", "difference": 0.1}], target)
    text = target.read_text()
    # Text is drawn as outlines, each preceded by a comment with its characters.
    for words in ("Loss of sparse prefill against dense, tiny", "low_rank", PROMPTS, "end", "inside", "share of dense"):
        assert words in text
    with pytest.raises(ValueError, match="no row has a loss to draw"):
        plot_language.draw([ROW | {"task": "heads", "difference": ""}], target)
