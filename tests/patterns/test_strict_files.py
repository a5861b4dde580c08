"""Pattern files are taken literally, or refused with the place, the shortened value, and what is allowed."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.patterns.file import PatternFile, load_pattern_file, parse_patterns
from minference_vllm.patterns.kinds import (
    MAX_BUDGET,
    MAX_NUMBER,
    AShape,
    Dense,
    PatternError,
    parse_written_pattern,
)

OURS = PatternFile(default=AShape(sink=64, local=512), layers={0: {0: Dense(), 3: AShape()}})
MEASURED = {"recall": 0.9, "density": 0.1, "output_error": 0.01}


def written(folder: Path, content: Any) -> str:
    path = folder / "patterns.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def ours(**fields: Any) -> dict[str, Any]:
    return {"schema_version": 1, **fields}


@pytest.mark.parametrize(
    "key", ["02", " 2 ", "2.0", "1_0", "+2", "-0", "-1", "1e0", "", "first", "4096", "\u0662", "9" * 5000]
)
def test_layer_and_head_numbers_are_written_plainly(key: str) -> None:
    """Also next to the plain number, since the last one would win."""
    dense, shown = {"kind": "dense"}, re.escape(key if len(key) < 10 else "999...999")
    numbered = rf": layers and heads are numbered 0 to {MAX_NUMBER}, without"
    for place, fields in {
        f"layers.{shown}": {"layers": {"2": {"0": dense}, key: {"0": dense}}},
        rf"layers\.0\.{shown}": {"layers": {"0": {"2": dense, key: dense}}},
        f"measured.{shown}": {"measured": {key: {"0": MEASURED}}},
        rf"measured\.0\.{shown}": {"measured": {"0": {key: MEASURED}}},
    }.items():
        with pytest.raises(PatternError, match=f"^FILE: {place.replace('999', '9+')}{numbered}"):
            parse_patterns(ours(**fields), "FILE")
    entry = ["stream_llm", 1, 2, 0.5]
    with pytest.raises(PatternError, match=r"^FILE, layer '.*': layers and heads are numbered"):
        parse_patterns({"2": {"0": entry}, key: {"0": entry}}, "FILE")
    for published in ([{"2": entry, key: entry}], {"0": {"2": entry, key: entry}}):
        with pytest.raises(
            PatternError, match=r"^FILE, layer 0: expected an object of head numbers, found '.*'; layers and"
        ):
            parse_patterns(published, "FILE")


def test_numbers_of_python_are_numbers() -> None:
    """As pydantic returns them, and as they may be in a checkpoint's configuration."""
    assert parse_patterns(OURS.model_dump(), "FILE") == OURS
    assert parse_patterns({0: {1: ["stream_llm", 1, 2, 0.5]}}, "FILE").layers == {0: {1: AShape(sink=1, local=2)}}
    for key in (True, 1.0, -1, None, ("1",)):
        with pytest.raises(PatternError, match="layers and heads are numbered"):
            parse_patterns({"schema_version": 1, "layers": {key: {}}}, "FILE")


@pytest.mark.parametrize("value", [True, "12", 0.0, 1.0, None, [], {}, -1, 10**30, float("nan"), float("inf")], ids=str)
def test_budgets_are_whole_numbers(value: Any) -> None:
    allowed = f"must be a whole number from 0 to {MAX_BUDGET}"
    with pytest.raises(PatternError) as error:
        parse_patterns(ours(layers={"0": {"3": {"kind": "a_shape", "sink": value}}}), "FILE")
    assert str(error.value) == f"FILE: layers.0.3.a_shape.sink = {value!r}: {allowed}"
    with pytest.raises(PatternError) as error:
        parse_patterns([{"3": ["stream_llm", value, 2, 0.5]}], "FILE")
    assert str(error.value).startswith("FILE, layer 0, head 3: ") and f"sink = {value!r}: {allowed}" in str(error.value)
    with pytest.raises(PatternError):
        parse_written_pattern(f"a_shape({json.dumps(value)})")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ({"kind": "coverage", "gamma": 1}, 1, "a number between 0 and 1, both excluded"),
        ({"kind": "coverage", "gamma": "0.5"}, "0.5", "a number between 0 and 1, both excluded"),
        ({"kind": "coverage", "gamma": True}, True, "a number between 0 and 1, both excluded"),
        ({"kind": "coverage", "gamma": float("nan")}, float("nan"), "a number between 0 and 1, both excluded"),
        ({"kind": "low_rank", "rank": 20}, 20, "a whole number from 16 to 128 that 16 divides"),
        ({"kind": "antidiagonal", "stride": 1}, 1, "a whole number from 2 to 64"),
        ({"kind": "peak_threshold", "remainder": 1}, 1, "true or false"),
    ],
)
def test_a_bad_value_of_a_pattern_is_told_what_is_allowed(field: dict[str, Any], value: Any, allowed: str) -> None:
    with pytest.raises(PatternError) as error:
        parse_patterns(ours(default=field), "FILE")
    assert str(error.value).endswith(f" = {value!r}: must be {allowed}")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("recall", value, "from 0 to 1") for value in (-0.1, 1.1, True, "0.5", None, float("nan"), float("inf"))),
        *(("value_recall", value, "from 0 to 1") for value in (-0.1, 1.1, True)),
        *(
            (name, value, "of at least 0")
            for name in ("density", "output_error")
            for value in (-1, False, float("inf"))
        ),
    ],
)
def test_measurements_are_shares_and_errors(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(PatternError) as error:
        parse_patterns(ours(measured={"0": {"1": {**MEASURED, name: value}}}), "FILE")
    assert str(error.value) == f"FILE: measured.0.1.{name} = {value!r}: must be a number {allowed}"
    assert parse_patterns(ours(measured={"0": {"1": {**MEASURED, "recall": 1}}}), "FILE").measured[0][1].recall == 1.0


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_could_not_be_written_again_are_refused(tmp_path: Path, number: str) -> None:
    for text, place in {
        '{"schema_version": 1, "measured": {"0": {"3": {"recall": %s}}}}': "measured.0.3.recall",
        '{"1": {"2": ["stream_llm", 1, 2, %s]}}': "1.2.3",
        '[{}, {"2": ["stream_llm", 1, 2, 0.5, [%s]]}]': "1.2.4.0",
    }.items():
        with pytest.raises(PatternError, match=rf"patterns\.json: {place} = -?(nan|inf): numbers must be finite"):
            load_pattern_file(written(tmp_path, text % number))


@pytest.mark.parametrize("content", [[], [{}], [{}, {}], {"0": {}, "1": {}}])
def test_a_published_file_names_a_head(content: Any) -> None:
    with pytest.raises(PatternError, match="FILE: no head of any layer is named"):
        parse_patterns(content, "FILE")


def test_a_name_that_stands_twice_is_found_in_time(tmp_path: Path) -> None:
    names = ",".join(f'"{number}": 1' for number in range(16000))
    path = written(tmp_path, f'{{"schema_version": 1, "layers": {{"0": {{{names}, "15999": 2}}}}}}')
    begin = time.process_time()
    with pytest.raises(PatternError, match=r"patterns\.json: '15999' stands twice in layers\.0"):
        load_pattern_file(path)
    assert time.process_time() - begin < 1


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    with path.open("wb") as file:
        file.truncate(50 << 20)
    with pytest.raises(PatternError, match=r"patterns\.json: 50\.0 MiB; a pattern file has at most 8 MiB"):
        load_pattern_file(str(path))


@pytest.mark.parametrize(
    "content",
    [
        ours(default={"kind": "x" * 10**6}),
        ours(default={"kind": "a_shape", "sink": "x" * 10**6}),
        ours(default={"kind": "a_shape", "x" * 10**6: 1}),
        ours(default=["x" * 10**6] * 9),
        ours(**{"x" * 10**6: 1}),
        ours(layers={"x" * 10**6: {}}),
        [{"0": "x" * 10**6}],
        [{"0": ["x" * 10**6, 1, 2, 3]}],
        [{"0": ["stream_llm", "x" * 10**6, 2, 3]}],
        [{"x" * 10**6: []}],
        ["x" * 10**6],
        {"x" * 10**6: []},
        '{"%s": 1, "%s": 2}' % (("x" * 10**6,) * 2),
        '{"schema_version": %s}' % (10**5 * "1"),
        10**5 * "[",
    ],
    ids=range(15),
)
def test_no_message_echoes_without_end(tmp_path: Path, content: Any) -> None:
    path = written(tmp_path, content)
    with pytest.raises(PatternError) as error:
        load_pattern_file(path)
    assert len(str(error.value)) < len(path) + 400


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[31mred"], ids=ascii)
def test_names_in_a_message_can_be_printed(name: str) -> None:
    for content in (ours(**{name: 1}), ours(default={"kind": "dense", name: 1}), ours(layers={name: {}})):
        with pytest.raises(PatternError) as error:
            parse_patterns(content, "FILE")
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "text", ["{" + 10**5 * "x" + "}", 10**5 * "x", f"a_shape({10**5 * 'x'})", f"a_shape({10**5 * '1'})"]
)
def test_no_message_echoes_a_name_without_end(text: str) -> None:
    with pytest.raises(PatternError) as error:
        load_pattern_file(text)
    assert len(str(error.value)) < 900
