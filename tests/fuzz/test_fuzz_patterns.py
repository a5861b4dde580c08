"""Nearly correct pattern files: they survive a round trip, or are refused with one error."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from fuzz_inputs import assert_readable, examples, misspelt, mutated, mutated_text, numbers, texts
from hypothesis import given
from hypothesis import strategies as st

from minference_vllm.commands.convert import convert
from minference_vllm.patterns.file import FORMATS, PatternFile, load_pattern_file, parse_patterns, to_text
from minference_vllm.patterns.kinds import (
    FIELDS,
    KINDS,
    MAX_BUDGET,
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PatternError,
    PeakThreshold,
    TriShape,
    VerticalSlash,
    parse_written_pattern,
)

OURS = {
    "schema_version": 1,
    "model": "some/model",
    "provenance": "a test",
    "default": {"kind": "low_rank", "rank": 64, "gamma": 0.94, "remainder": True, "queries": 32, "noise": 0.022},
    "layers": {
        "0": {"0": {"kind": "a_shape", "sink": 64, "local": 512}, "1": {"kind": "dense"}},
        "1": {"0": {"kind": "peak_threshold", "alpha": 0.1, "remainder": True}},
    },
    "measured": {"0": {"0": {"recall": 0.9, "density": 0.1, "output_error": 0.01, "value_recall": None, "cost": 1}}},
}
MINFERENCE = [
    {"0": ["vertical_and_slash", 1000, 6096, 0.97], "1": ["stream_llm", 1024, 4096, 0.99]},
    {"0": ["block_sparse", 100, 0, 0.95]},
]
QWEN = {
    "0": {"0": ["vertical_and_slash", 1000, 6096, 0.97], "1": ["block_sparse", 100, 0, 0.95]},
    "1": {"0": ["flex_vertical_and_slash", [0.9, 64], [0.8, 128], 0.5]},
}
FILES = [OURS, MINFERENCE, QWEN]
WORDS = [
    *KINDS,
    *sorted({name for fields in FIELDS.values() for name in fields}),
    *PatternFile.model_fields,
    *("vertical_and_slash", "stream_llm", "flex_vertical_and_slash", "0", "1", "2", "01", "4095", "4096"),
    *(0, 1, 16, 64, 0.5, True, None, [], {}),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "patterns.json"


def read(path: Path) -> PatternFile | None:
    """The content of a file, or None if it is refused with one readable error."""
    try:
        return load_pattern_file(str(path))
    except PatternError as error:
        assert str(path) in str(error)
        assert_readable(str(error))
        return None


def assert_comes_back(patterns: PatternFile, path: Path) -> None:
    path.write_text(to_text(patterns.model_dump(mode="json")))
    assert load_pattern_file(str(path)) == patterns


@examples(300)
@given(content=mutated(FILES, WORDS))
def test_content_is_read_or_refused(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
    patterns = read(path)
    if patterns is not None:
        assert_comes_back(patterns, path)


@examples(300)
@given(text=mutated_text([json.dumps(file).encode() for file in FILES]))
def test_text_is_read_or_refused(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    patterns = read(path)
    if patterns is not None:
        assert_comes_back(patterns, path)


@examples(300)
@given(content=mutated(FILES, WORDS), target=st.sampled_from(FORMATS))
def test_what_is_converted_says_the_same(content: Any, target: Any) -> None:
    """For the heads that it names; other formats name all heads that the file mentions."""
    try:
        before = parse_patterns(content, "FILE")
        converted, _ = convert(content, target, "FILE")
    except PatternError as error:
        assert_readable(str(error))
        return
    after = parse_patterns(json.loads(to_text(converted)), "FILE")
    heads = 1 + max((head for heads in before.layers.values() for head in heads), default=-1)
    for layer, head in itertools.product(before.layers, range(heads)):
        if head in before.layers[layer] or target != "minference-vllm":
            assert after.for_layer(layer, heads)[head] == before.for_layer(layer, heads)[head]


budgets, shares = st.integers(0, MAX_BUDGET), st.floats(0, 1, exclude_min=True, exclude_max=True)
patterns_of_all_kinds = st.one_of(
    st.builds(Dense),
    st.builds(AShape, sink=budgets, local=budgets),
    st.builds(TriShape, sink=budgets, local=budgets, last=budgets),
    st.builds(VerticalSlash, vertical=budgets, slash=budgets),
    st.builds(BlockSparse, top_k=st.integers(1, MAX_BUDGET // 64)),
    st.builds(Coverage, gamma=shares, min_budget=budgets),
    st.builds(Antidiagonal, stride=st.integers(2, 64), tau=shares),
    st.builds(PeakThreshold, alpha=shares, sink=budgets, window=budgets, remainder=st.booleans()),
    st.builds(
        LowRank,
        rank=st.sampled_from(range(16, 129, 16)),
        gamma=shares,
        remainder=st.booleans(),
        queries=st.sampled_from([0, 16]),
    ),
)
arguments = st.one_of(numbers.map(str), texts, st.sampled_from(["true", "rank=16", "sink = 3", "=", "[1]"]))
written = st.one_of(
    misspelt(["low_rank(32, 0.95)", "coverage(gamma=0.95, min_budget=3072)", "dense()"]),
    st.builds("{}({})".format, st.one_of(st.sampled_from(KINDS), texts), st.lists(arguments).map(", ".join)),
    texts,
)


@examples(100)
@given(patterns_of_all_kinds)
def test_a_pattern_is_read_as_it_is_shown(pattern: HeadPattern) -> None:
    assert load_pattern_file(str(pattern)).default == pattern


@examples(200)
@given(written)
def test_a_written_pattern_is_read_or_refused(text: str) -> None:
    try:
        pattern = parse_written_pattern(text)
        patterns = load_pattern_file(text)
    except PatternError as error:
        assert_readable(str(error))
        return
    assert pattern is None or patterns.default == pattern
