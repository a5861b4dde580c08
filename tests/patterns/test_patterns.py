"""Pattern files: the three formats, the shipped presets, and the errors of wrong files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.patterns.file import PatternFile, load_pattern_file, parse_patterns, shipped_pattern_files
from minference_vllm.patterns.kinds import (
    KINDS,
    MAX_BUDGET,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    LowRank,
    PatternError,
    TriShape,
    VerticalSlash,
)

OURS = PatternFile(
    model="tiny",
    provenance="written by a test",
    default=AShape(sink=64, local=512),
    layers={
        0: {0: Dense(), 1: VerticalSlash(vertical=30, slash=2048), 3: BlockSparse(top_k=7)},
        1: {0: TriShape(sink=1, local=2, last=3), 3: AShape(sink=0, local=0)},
    },
)
PUBLISHED_HEADS = {
    "0": ["vertical_and_slash", 30, 2048, 0.97],
    "1": ["stream_llm", 1024, 4096, 0.5],
    "2": ["block_sparse", 100, 0, 0.9],
}
PUBLISHED_PATTERNS = (VerticalSlash(vertical=30, slash=2048), AShape(sink=1024, local=4096), BlockSparse(top_k=100))


def written(folder: Path, content: Any) -> str:
    path = folder / "patterns.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def ours(**fields: Any) -> dict[str, Any]:
    return {"schema_version": 1, **fields}


# Formats


def test_our_format_survives_a_round_trip(tmp_path: Path) -> None:
    assert load_pattern_file(written(tmp_path, OURS.model_dump_json())) == OURS


@pytest.mark.parametrize("pattern", [LowRank(remainder=True), LowRank(), AShape(sink=1, local=2)], ids=str)
def test_a_pattern_is_read_as_it_is_shown(pattern: HeadPattern) -> None:
    """For example as printed in the log, with true and false."""
    assert load_pattern_file(str(pattern)).default == pattern


def test_minference_list_format(tmp_path: Path) -> None:
    loaded = load_pattern_file(written(tmp_path, [PUBLISHED_HEADS, {"2": ["stream_llm", 1, 2, 0.1]}]))
    assert loaded.for_layer(0, 3) == PUBLISHED_PATTERNS
    # Heads without an entry get the same pattern as in MInference.
    assert loaded.for_layer(1, 3) == (VerticalSlash(), VerticalSlash(), AShape(sink=1, local=2))
    assert VerticalSlash() == VerticalSlash(vertical=1000, slash=6096)
    assert "patterns.json" in loaded.provenance and "list" in loaded.provenance


def test_minference_files_with_shares_in_place_of_sizes(tmp_path: Path) -> None:
    """As ``Qwen2.5_3B_flex_0.90.json`` has them: ``[gamma, min_budget]`` for columns and for diagonals."""
    heads = {
        "0": ["flex_vertical_and_slash", [0.9, 4096], [0.9, 4096], 0.0],
        "1": ["flex_vertical_and_slash", [0.9, 1024], [0.95, 512], 0.0],
    }
    loaded = load_pattern_file(written(tmp_path, [heads]))
    assert loaded.for_layer(0, 2) == (Coverage(gamma=0.9, min_budget=4096), Coverage(gamma=0.95, min_budget=1024))


def test_sparse_attention_config_format(tmp_path: Path) -> None:
    loaded = load_pattern_file(written(tmp_path, {"1": PUBLISHED_HEADS, "0": {}}))
    assert loaded.for_layer(1, 3) == PUBLISHED_PATTERNS
    assert loaded.for_layer(0, 2) == (VerticalSlash(), VerticalSlash())
    assert "sparse_attention_config" in loaded.provenance


def test_heads_are_sliced_by_tensor_parallel_rank() -> None:
    whole = OURS.for_layer(0, 4)
    assert whole == (Dense(), VerticalSlash(vertical=30, slash=2048), OURS.default, BlockSparse(top_k=7))
    assert OURS.for_layer(0, 2, first_head=0) + OURS.for_layer(0, 2, first_head=2) == whole
    assert OURS.for_layer(7, 2) == (OURS.default, OURS.default)


# Shipped files

SHIPPED: dict[str, HeadPattern] = {
    "a_shape": AShape(sink=1024, local=4096),
    "block_sparse": BlockSparse(top_k=100),
    "coverage": Coverage(gamma=0.95, min_budget=3072),
    "default_cpu": LowRank(rank=64, gamma=0.94, remainder=True, queries=32, noise=0.022),
    "default_cuda": LowRank(rank=32, gamma=0.94, remainder=True, queries=32, noise=0.022),
    "dense": Dense(),
    "tri_shape": TriShape(sink=1024, local=4096, last=128),
    "vertical_slash_1000_6096": VerticalSlash(vertical=1000, slash=6096),
    "vertical_slash_30_2048": VerticalSlash(vertical=30, slash=2048),
    "vertical_slash_100_1800": VerticalSlash(vertical=100, slash=1800),
    "vertical_slash_500_1500": VerticalSlash(vertical=500, slash=1500),
    "vertical_slash_3000_200": VerticalSlash(vertical=3000, slash=200),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_presets_of_the_paper_are_shipped(name: str) -> None:
    assert load_pattern_file(name).for_layer(0, 1) == (SHIPPED[name],)


def test_every_shipped_file_loads_and_says_where_it_comes_from() -> None:
    files = shipped_pattern_files()
    assert set(SHIPPED) <= set(files)
    for name in files:
        assert load_pattern_file(name).provenance


# Bad files


def test_a_missing_file_lists_the_shipped_names() -> None:
    with pytest.raises(PatternError) as error:
        load_pattern_file("no/such/file.json")
    assert "no/such/file.json" in str(error.value)
    for name in SHIPPED:
        assert name in str(error.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="no pattern file"):
        load_pattern_file(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1,}', "[1, 2", "patterns: dense", "\ufeff{}"])
def test_broken_json_names_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(PatternError, match=r"patterns\.json: not valid JSON"):
        load_pattern_file(written(tmp_path, text))


def test_bytes_that_are_no_text_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_bytes(b"\x80\x02\xff\x00")
    with pytest.raises(PatternError, match=r"patterns\.json: not valid JSON"):
        load_pattern_file(str(path))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ours())

    def refuse(*arguments: Any, **options: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    for method in ("read_bytes", "is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            with pytest.raises(PatternError, match=r"pattern file '.*patterns\.json': Permission denied"):
                load_pattern_file(path)


def test_a_file_is_read_as_utf_8_in_any_locale(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_bytes(json.dumps(ours(provenance="\u00fc"), ensure_ascii=False).encode())
    script = (
        "import sys; from minference_vllm import load_pattern_file; "
        "print(ascii(load_pattern_file(sys.argv[1]).provenance))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "'\\xfc'\n"


@pytest.mark.parametrize("content", [{}, {"heads": []}, {"02": {}}, "dense", 5, None, True])
def test_other_json_is_refused_with_the_formats_that_are_not(content: Any) -> None:
    with pytest.raises(PatternError, match=r"FILE: .*schema_version.*MInference.*sparse_attention_config"):
        parse_patterns(content, "FILE")


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(PatternError) as error:
        parse_patterns(ours(layers={"3": {"5": {"kind": "zigzag"}}}), "FILE")
    assert "FILE: layers.3.5" in str(error.value)
    for kind in KINDS:
        assert kind in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "place"),
    [
        ({"kind": "a_shape", "sink": -1}, "sink = -1"),
        ({"kind": "a_shape", "local": MAX_BUDGET + 1}, f"local = {MAX_BUDGET + 1}"),
        ({"kind": "tri_shape", "last": -5}, "last = -5"),
        ({"kind": "vertical_slash", "vertical": "many"}, "vertical = 'many'"),
        ({"kind": "vertical_slash", "slash": 1.5}, "slash = 1.5"),
        ({"kind": "vertical_slash", "slash": None}, "slash = None"),
        ({"kind": "block_sparse", "top_k": 0}, "top_k = 0"),
        ({"kind": "block_sparse", "top_k": 10**12}, f"top_k = {10**12}"),
        ({"kind": "dense", "sink": 5}, "sink"),
        ({"sink": 5}, "kind"),
    ],
)
def test_a_bad_budget_names_its_place(pattern: dict[str, Any], place: str) -> None:
    with pytest.raises(PatternError) as error:
        parse_patterns(ours(default=pattern), "FILE")
    assert str(error.value).startswith("FILE: default") and place in str(error.value)


MEASURED = {"recall": 0.9, "density": 0.1, "output_error": 0.01}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"schema_version": 2}, "schema_version = 2"),
        ({"schema_version": True}, "schema_version = True: must be 1"),
        ({"comment": "x"}, "comment: unknown field; known ones are schema_version, model, "),
        ({"layer": {}}, "layer: unknown field; known ones are .*; did you mean 'layers'?"),
        ({"layers": []}, r"layers = \[\]: must be an object"),
        ({"layers": {"0": None}}, "layers.0 = None: must be an object"),
        ({"default": None}, "default = None: must be an object"),
        ({"default": {}}, "default.kind: a pattern needs its kind; allowed are dense, a_shape"),
        (
            {"default": {"kind": "low-rank"}},
            "default.kind = 'low-rank': unknown pattern kind; .*; did you mean 'low_rank'?",
        ),
        ({"default": {"kind": ["dense"]}}, r"default.kind = \['dense'\]: unknown pattern kind"),
        (
            {"default": {"kind": "a_shape", "sinks": 1}},
            "a_shape.sinks: unknown .* sink, local, remainder; did you mean 'sink'?",
        ),
        ({"default": {"kind": "dense", "sink": 1}}, "default.dense.sink: unknown field; known ones are none"),
        ({"model": 5}, "model = 5: must be text"),
        ({"measured": {"0": {"1": {"recall": 0.5}}}}, "measured.0.1.density: missing"),
        (
            {"measured": {"0": {"1": {"mass": 0.5, **MEASURED}}}},
            "measured.0.1.mass: unknown field; known ones are recall",
        ),
        ({5: 1}, "^FILE: 5 is no name of a field"),
    ],
)
def test_a_bad_field_names_its_place(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(PatternError, match=place.replace("?", r"\?")) as error:
        parse_patterns({"schema_version": 1, **fields}, "FILE")
    assert str(error.value).startswith("FILE: ")


@pytest.mark.parametrize(
    ("heads", "place"),
    [
        (
            {"0": ["zigzag", 1, 2, 0.5]},
            "head 0: unknown kind 'zigzag'.*vertical_and_slash, stream_llm",
        ),
        ({"0": ["stream_llm", -1, 2, 0.5]}, "head 0: .*sink = -1"),
        ({"0": ["vertical_and_slash", 1, 10**12, 0.5]}, "head 0: .*slash = 1000000000000"),
        ({"0": ["block_sparse", 0, 0, 0.5]}, "head 0: .*top_k = 0"),
        ({"0": ["flex_vertical_and_slash", 0.9, 4096, 0.0]}, r"head 0: expected .* \[gamma, min_budget\] twice"),
        (
            {"0": ["flex_vertical_and_slash", [0.9, "x"], [0.9, 1], 0.0]},
            r"head 0: expected .* \[gamma, min_budget\] twice",
        ),
        ({"0": ["flex_vertical_and_slash", [1.5, 1], [0.9, 1], 0.0]}, "head 0: .*gamma = 1.5"),
        ({"0": ["stream_llm"]}, r"head 0: expected \[kind, a, b, score\]"),
        ({"0": "stream_llm"}, r"head 0: expected \[kind, a, b, score\]"),
        ({"0": None}, r"head 0: expected \[kind, a, b, score\]"),
        ({"head": ["stream_llm", 1, 2, 3]}, "expected an object of head numbers"),
        (["stream_llm", 1, 2, 3], "expected an object of head numbers"),
        (None, "expected an object of head numbers"),
    ],
)
def test_a_bad_published_entry_names_layer_and_head(heads: Any, place: str) -> None:
    with pytest.raises(PatternError, match=f"FILE, layer 1.*{place}"):
        parse_patterns([{}, heads], "FILE")
    with pytest.raises(PatternError, match=f"FILE, layer 1.*{place}"):
        parse_patterns({"0": {}, "1": heads}, "FILE")


# Files of another model


@pytest.mark.parametrize(
    ("layers", "heads", "message"),
    [
        (3, 4, "FILE describes 2 layers, the model has 3"),
        (1, 4, "FILE describes 2 layers, the model has 1"),
        (2, 3, "FILE, layer [01]: describes head 3, the model has heads 0 to 2"),
        (2, 8, "FILE describes 4 heads per layer, the model has 8"),
    ],
)
def test_another_models_file_is_refused(layers: int, heads: int, message: str) -> None:
    OURS.check_model(2, 4, "FILE")
    with pytest.raises(PatternError, match=message):
        OURS.check_model(layers, heads, "FILE")


def test_a_file_without_layers_fits_every_model() -> None:
    PatternFile(default=Dense()).check_model(80, 64)


def test_patterns_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        OURS.default.sink = 5


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("dense", Dense()),
        ("dense()", Dense()),
        ("coverage(0.9, 256)", Coverage(gamma=0.9, min_budget=256)),
        ("coverage(min_budget=256)", Coverage(gamma=0.95, min_budget=256)),
        ("a_shape(7, local=8)", AShape(sink=7, local=8)),
    ],
)
def test_patterns_are_named_or_written_out(text: str, pattern: HeadPattern) -> None:
    assert load_pattern_file(text).for_layer(0, 2) == (pattern, pattern)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("coverage(0.9, 2, true, 3)", "coverage takes 3 values (gamma, min_budget, remainder)"),
        ("coverage(0.9, gamma=0.8)", "gamma is given twice"),
        ("coverage(0.9, much)", "'much' is not a number"),
        ("a_shape(1,,2)", "'' is not a number"),
        (f"a_shape({'[' * 100_000})", "is not a number"),
        ("coverage(1.5)", "gamma = 1.5: must be a number between 0 and 1"),
        ("cover(1)", "unknown pattern kind; allowed are dense, a_shape"),
        ("nowhere", "no pattern file at 'nowhere'"),
    ],
)
def test_patterns_that_are_not_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_pattern_file(text)
    assert message in str(error.value)
