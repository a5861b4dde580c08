"""Conversion between the three pattern file formats: round trips, and losses, which are reported or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_inputs import Ended

from minference_vllm.commands.convert import convert
from minference_vllm.patterns.file import Measurement, PatternFile, parse_patterns, read_pattern_json, to_text
from minference_vllm.patterns.kinds import (
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
)
from minference_vllm.patterns.published import published_entry

PUBLISHED = [
    {"0": ["vertical_and_slash", 30, 2048, 0.97], "1": ["stream_llm", 1024, 4096, 0.5]},
    {"0": ["block_sparse", 100, 0, 0.9], "1": ["vertical_and_slash", 1000, 6096, 1]},
]
QWEN = {str(layer): heads for layer, heads in enumerate(PUBLISHED)}
EXPRESSIBLE = PatternFile(
    layers={
        0: {0: VerticalSlash(vertical=30, slash=2048), 1: AShape(sink=1024, local=4096)},
        1: {0: BlockSparse(top_k=100), 1: VerticalSlash(vertical=1000, slash=6096)},
    }
)


def through_json(content: Any) -> Any:
    return json.loads(to_text(content))


def ours(file: PatternFile) -> Any:
    return through_json(file.model_dump(mode="json"))


# Round trips


def test_published_formats_turn_into_each_other_and_back_as_they_are() -> None:
    qwen, losses = convert(PUBLISHED, "qwen", "FILE")
    assert qwen == QWEN and losses == []
    back, losses = convert(qwen, "minference", "FILE")
    assert back == PUBLISHED and losses == []


@pytest.mark.parametrize("published", [PUBLISHED, QWEN], ids=["minference", "qwen"])
def test_a_published_file_survives_ours(published: Any) -> None:
    target = "minference" if published is PUBLISHED else "qwen"
    converted, losses = convert(published, "minference-vllm", "FILE")
    assert parse_patterns(converted, "FILE").layers == EXPRESSIBLE.layers
    assert losses == ["the scores of 4 heads; nothing is computed from them"]
    back, losses = convert(through_json(converted), target, "FILE")
    assert parse_patterns(back, "FILE").layers == EXPRESSIBLE.layers
    assert [loss.split(":")[0] for loss in losses] == ["provenance"]


@pytest.mark.parametrize("target", ["minference", "qwen"])
def test_ours_survives_a_published_format(target: Any) -> None:
    published, _ = convert(ours(EXPRESSIBLE), target, "FILE")
    back, _ = convert(through_json(published), "minference-vllm", "FILE")
    assert parse_patterns(back, "FILE").layers == EXPRESSIBLE.layers


def test_ours_stays_ours() -> None:
    assert convert(ours(EXPRESSIBLE), "minference-vllm", "FILE") == (ours(EXPRESSIBLE), [])


@pytest.mark.parametrize("target", ["minference", "qwen"])
def test_heads_without_an_entry_get_the_default_of_the_file(target: Any) -> None:
    file = PatternFile(default=AShape(sink=1, local=2), layers={1: {2: BlockSparse(top_k=3)}})
    published, _ = convert(ours(file), target, "FILE")
    back = parse_patterns(published, "FILE")
    assert [back.for_layer(layer, 3) for layer in range(2)] == [file.for_layer(layer, 3) for layer in range(2)]


def test_layers_that_a_published_object_leaves_out_stay_left_out() -> None:
    listed, losses = convert({"2": {"0": ["stream_llm", 1, 2, 0.5]}}, "minference", "FILE")
    assert listed == [{}, {}, {"0": ["stream_llm", 1, 2, 0.5]}] and losses == []


# Losses


def test_every_kind_of_loss_has_its_line() -> None:
    entries = {"0": ["block_sparse", 100, 800, 0.5], "1": ["stream_llm", 1, 2, 0.5, "note"], "2": ["stream_llm", 1, 2]}
    _, losses = convert([entries], "minference-vllm", "FILE")
    assert [loss.split(";")[0] for loss in losses] == [
        "the scores of 2 heads",
        "the second number of 1 block_sparse heads",
        "what stands behind the score of 1 heads",
    ]
    measured = {1: {0: Measurement(recall=0.97, density=0.1, output_error=0.02)}}
    file = EXPRESSIBLE.model_copy(update={"model": "Org/Model", "provenance": "calibrated", "measured": measured})
    published, losses = convert(ours(file), "minference", "FILE")
    assert [entry[3] for heads in published for entry in heads.values()] == [1.0, 1.0, 0.97, 1.0]
    assert [loss.split(",")[0] for loss in losses] == [
        "what was measured",
        "model: Org/Model",
        "provenance: calibrated",
    ]


INEXPRESSIBLE: list[HeadPattern] = [Dense(), TriShape(), Coverage(), Antidiagonal(), PeakThreshold(), LowRank()]


@pytest.mark.parametrize("pattern", INEXPRESSIBLE, ids=lambda pattern: pattern.kind)
@pytest.mark.parametrize("target", ["minference", "qwen"])
def test_a_kind_that_the_target_lacks_is_refused_with_layer_and_head(pattern: HeadPattern, target: Any) -> None:
    assert published_entry(pattern, 1.0) is None
    file = PatternFile(layers={0: {0: AShape(), 1: AShape()}, 1: {1: pattern}})
    with pytest.raises(PatternError) as error:
        convert(ours(file), target, "FILE")
    assert f"layer 1, head 1: {pattern}" in str(error.value) and "head 0" not in str(error.value)
    # As the default it applies to every head without an entry.
    with pytest.raises(PatternError, match="layer 0, head 1"):
        convert(ours(PatternFile(default=pattern, layers={0: {0: AShape(), 2: AShape()}})), target, "FILE")


def test_many_refused_heads_are_counted() -> None:
    with pytest.raises(PatternError, match=r"layer 0, head 4: dense; and 123 more$"):
        convert(ours(PatternFile(default=Dense())), "qwen", "FILE", num_layers=4, num_heads=32)


@pytest.mark.parametrize("target", ["minference", "qwen"])
def test_a_default_alone_needs_the_size_of_the_model(target: Any) -> None:
    content = ours(PatternFile(default=AShape(sink=1, local=2)))
    with pytest.raises(PatternError, match="--layers and --heads"):
        convert(content, target, "FILE")
    converted, _ = convert(content, target, "FILE", num_layers=2, num_heads=3)
    assert parse_patterns(converted, "FILE").layers == {
        layer: dict.fromkeys(range(3), AShape(sink=1, local=2)) for layer in range(2)
    }


def test_a_size_that_the_file_contradicts_is_refused() -> None:
    with pytest.raises(PatternError, match="describes 2 layers, the model has 3"):
        convert(ours(EXPRESSIBLE), "qwen", "FILE", num_layers=3, num_heads=2)


def test_wrong_content_is_refused_whatever_the_target() -> None:
    for target in ("minference-vllm", "minference", "qwen"):
        with pytest.raises(PatternError, match="layer 1, head 0: unknown kind"):
            convert([{}, {"0": ["zigzag", 1, 2, 0.5]}], target, "FILE")


# Text


def test_text_has_a_line_per_head(tmp_path: Path) -> None:
    text = to_text(ours(EXPRESSIBLE))
    assert '      "0": {"kind": "vertical_slash", "vertical": 30, "slash": 2048},\n' in text
    path = tmp_path / "patterns.json"
    path.write_text(text)
    assert read_pattern_json(str(path))[0] == ours(EXPRESSIBLE)


@pytest.mark.parametrize("content", [{}, [], 'a"b', 1.5, None, {"a": []}, [[1, [2]], {"b": {"c": {}}}]])
def test_text_is_json(content: Any) -> None:
    assert json.loads(to_text(content)) == content


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text('{"0": {"7": ["stream_llm", 1, 2, 1], "7": ["stream_llm", 3, 4, 1]}}')
    with pytest.raises(PatternError, match=r"patterns\.json: '7' stands twice"):
        read_pattern_json(str(path))


# The command


def test_convert_there_and_back(tool: Callable[..., Ended], tmp_path: Path) -> None:
    published = tmp_path / "published.json"
    published.write_text(json.dumps([{"0": ["stream_llm", 1024, 4096, 0.5], "1": ["block_sparse", 9, 0, 0.75]}]))
    ours, qwen = tmp_path / "ours.json", tmp_path / "qwen.json"
    ended = tool("convert", published, "-o", ours)
    assert ended == (0, "", "left out: the scores of 2 heads; nothing is computed from them\n")
    ended = tool("convert", ours, "-o", qwen, "--to", "qwen")
    assert ended.code == 0 and [line.split(":")[1] for line in ended.err.splitlines()] == [" provenance"]
    ended = tool("convert", qwen, "-o", "-", "--to", "minference")
    assert ended.code == 0 and ended.err == ""
    assert json.loads(ended.out) == [{"0": ["stream_llm", 1024, 4096, 1.0], "1": ["block_sparse", 9, 0, 1.0]}]


def test_convert_writes_nothing_when_it_refuses(tool: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ended = tool("convert", "dense", "-o", out, "--to", "qwen", "--layers", 1, "--heads", 1)
    assert ended.code == 1 and "layer 0, head 0: dense" in ended.err and not out.exists()
