"""Pictures: the down-sampled map against a brute-force computation, and files that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import pytest
import torch
from score_inputs import scores_of

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.offline.plot import HeadMap, draw_head, draw_layers, draw_pattern_map, head_map
from minference_vllm.offline.plot.pattern_map import text_colour
from minference_vllm.patterns.kinds import (
    KINDS,
    AShape,
    Coverage,
    Dense,
    HeadPattern,
    VerticalSlash,
    parse_head_pattern,
)
from minference_vllm.selection.build import build_index
from minference_vllm.selection.families import FAMILIES
from minference_vllm.selection.static import DenseFamily

pytest.importorskip("matplotlib")

LENGTH, DIM, BLOCK, TILE = 301, 16, 32, 64
CHUNKS = ((0, 130), (130, LENGTH))
PATTERNS: list[HeadPattern] = [AShape(sink=32, local=40), VerticalSlash(vertical=40, slash=64), Dense()]


@pytest.fixture(scope="module")
def query() -> torch.Tensor:
    return 2 * torch.randn(len(PATTERNS), LENGTH, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def keys() -> torch.Tensor:
    return torch.randn(LENGTH, DIM, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def indices(query: torch.Tensor, keys: torch.Tensor) -> list[SparseIndex]:
    found = []
    for begin, end in CHUNKS:
        scores = scores_of(query[:, begin:end].transpose(0, 1), keys[None, :end], DIM**-0.5, BLOCK)
        found.append(build_index(Tiling.of(begin, end, BLOCK, TILE), PATTERNS, scores))
    return found


def brute_force(
    query: torch.Tensor, keys: torch.Tensor, indices: list[SparseIndex], head: int
) -> dict[str, torch.Tensor]:
    """``[S, S]``: all weights, and the keys that each row computes, by blocks and by columns."""
    scores = query.double() @ keys.double().T * DIM**-0.5
    weights = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    kept = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    blocks, columns = torch.zeros_like(kept), torch.zeros_like(kept)
    for index in indices:
        kept[index.tiling.context_len : index.tiling.seq_len, : index.tiling.seq_len] = index.to_mask()[head]
        for tile in range(index.num_tiles):
            rows = slice(int(index.tiling.starts[tile]), int(index.tiling.starts[tile + 1]))
            for block in index.blocks[head, tile, : index.num_blocks[head, tile]].tolist():
                blocks[rows, block * BLOCK : (block + 1) * BLOCK] = True
            columns[rows, index.columns[head, tile, : index.num_columns[head, tile]].long()] = True
    return {"weights": weights, "kept": kept, "blocks": blocks, "columns": columns}


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("cells", [7, 50, LENGTH])
@pytest.mark.parametrize("head", range(len(PATTERNS)))
def test_head_map_equals_brute_force(
    query: torch.Tensor, keys: torch.Tensor, indices: list[SparseIndex], head: int, cells: int, reduce: str
) -> None:
    found = head_map(query[head], keys, indices, head, DIM**-0.5, cells, reduce)  # type: ignore[arg-type]
    expected = brute_force(query[head], keys, indices, head)
    cell = -(-LENGTH // cells)
    width = -(-LENGTH // cell)
    assert found.cell == cell and found.attention.shape == (width, width)

    def sampled(image: torch.Tensor, how: str) -> torch.Tensor:
        padded = torch.zeros(width * cell, width * cell, dtype=torch.float64)
        padded[:LENGTH, :LENGTH] = image
        by_cell = padded.view(width, cell, width, cell)
        return by_cell.amax((1, 3)) if how == "max" else by_cell.sum((1, 3))

    weights, kept = expected["weights"], expected["kept"]
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.attention.double(), sampled(weights, reduce), **tolerance)
    torch.testing.assert_close(found.left_out.double(), sampled(weights * ~kept, reduce), **tolerance)
    assert found.recall == pytest.approx(float((weights * kept).sum() / LENGTH), abs=1e-5)
    pairs = LENGTH * (LENGTH + 1) / 2
    assert found.density == pytest.approx(sum(float(index.computed_pairs()[head]) for index in indices) / pairs)
    # Shares of whole cells, also of those past the last key: below the diagonal, where the picture shows them.
    below = torch.ones(width - 1, width - 1, dtype=torch.bool).tril(-1)
    for name in ("blocks", "columns"):
        shares = sampled(expected[name].double(), "sum")[:-1, :-1] / cell**2
        image = getattr(found, name)[:-1, :-1].double()
        torch.testing.assert_close(image[below], shares[below], **tolerance)


def test_a_dense_head_leaves_nothing_out(query: torch.Tensor, keys: torch.Tensor, indices: list[SparseIndex]) -> None:
    found = head_map(query[2], keys, indices, 2, DIM**-0.5)
    assert found.density == 1.0 and found.recall == pytest.approx(1.0) and not found.left_out.any()


def test_indices_must_cover_the_prompt(query: torch.Tensor, keys: torch.Tensor, indices: list[SparseIndex]) -> None:
    for wrong in (indices[1:], indices[:1], indices[::-1]):
        with pytest.raises(ValueError, match="the indices must cover rows 0 to 301"):
            head_map(query[0], keys, wrong, 0, DIM**-0.5)


# Files


def words(path: Path) -> str:
    """All text of an SVG. Matplotlib draws letters as outlines, with the text in a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return " | ".join(node.text or "" for node in root.iter() if node.tag is ElementTree.Comment)


@pytest.fixture(scope="module")
def drawn(query: torch.Tensor, keys: torch.Tensor, indices: list[SparseIndex]) -> HeadMap:
    return head_map(query[1], keys, indices, 1, DIM**-0.5, 60)


def test_a_head_as_svg(drawn: HeadMap, tmp_path: Path) -> None:
    path = draw_head(drawn, "tiny, layer 3, head 1", tmp_path / "new" / "head.svg", BLOCK, {"a needle": (50, 60)})
    text = words(path)
    for expected in (
        "tiny, layer 3, head 1",
        "query position (token)",
        "key position (token)",
        f"keys computed: {drawn.density:.1%} of the prompt's dense pairs",
        f"(recall {drawn.recall:.2%})",
        "largest weight in a cell of 6 x 6 tokens",
        "whole blocks of 32 keys",
        "not computed",
        "a needle",
    ):
        assert expected in text


LAYERS: list[list[HeadPattern]] = [
    [Dense(), AShape(), VerticalSlash(), Coverage()],
    [Coverage(), Coverage(), AShape(sink=1, local=2), Dense()],
]


def test_the_pattern_map_as_svg(tmp_path: Path) -> None:
    text = words(draw_pattern_map(LAYERS, "tiny\npatterns: a file", tmp_path / "map.svg"))
    for expected in (
        "tiny",
        "patterns: a file",
        "query head",
        "layer",
        "coverage: 3",
        "dense: 2",
        "(sink, local)",
        "6096",
    ):
        assert expected in text
    text = words(draw_pattern_map(LAYERS, "tiny", tmp_path / "map.svg", {1: "dense: sliding window"}))
    for expected in ("coverage: 1", "dense: sliding window", "no pattern runs"):
        assert expected in text


def luminance(colour: Any) -> float:
    """Relative luminance (WCAG 2.2) of anything that matplotlib accepts as a colour."""
    from matplotlib.colors import to_rgb

    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: Any, other: Any) -> float:
    """From 1 to 21; text needs 4.5 (WCAG 2.2, 1.4.3)."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


class Tenth(Dense):
    """A new kind of pattern."""

    kind: Literal["tenth"] = "tenth"  # type: ignore[assignment]
    budget: int = 12345


class TenthFamily(DenseFamily):
    """The family of the new kind; the picture needs nothing else to draw it."""

    pattern = Tenth
    colour = "#8B4513"


def test_every_cells_numbers_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **b: figures.append(self) or save(self, *a, **b))
    every = [parse_head_pattern({"kind": kind}) for kind in FAMILIES]
    monkeypatch.setitem(FAMILIES, "tenth", TenthFamily())
    layers = [[*every, Tenth()], [Tenth(), *every], [Dense()] * 10]
    text = words(draw_pattern_map(layers, "tiny\npatterns: a file", tmp_path / "map.svg", {2: "dense: windows"}))
    assert "tenth: 2" in text and "(budget)" in text
    (axes,) = figures[0].axes
    FigureCanvasAgg(figures[0]).draw()
    cells = axes.images[0].get_array()
    assert len({tuple(cell) for cell in cells[0].tolist()}) == 10, "every kind has its own colour"
    labels = {label.get_position(): label for label in axes.texts if label.get_text() != "dense: windows"}
    assert len(labels) == 20
    assert {label.get_text() for label in labels.values()} >= {"12345", "32\n0.95", "0.1\n256\n512"}
    for (head, layer), label in labels.items():
        assert contrast(label.get_color(), cells[layer, head]) >= 4.5, (layer, head)
        lines = label.get_window_extent()
        (left, low), (right, high) = axes.transData.transform([(head - 0.5, layer + 0.5), (head + 0.5, layer - 0.5)])
        assert left <= lines.x0 and lines.x1 <= right and low <= lines.y0 and lines.y1 <= high, (layer, head)
    legend, page = axes.get_legend().get_window_extent(), figures[0].bbox
    assert page.x0 <= legend.x0 and legend.x1 <= page.x1 and page.y0 <= legend.y0 and legend.y1 <= page.y1


def test_every_kind_has_a_colour_of_its_own_and_text_stands_out_on_any() -> None:
    from matplotlib.colors import to_rgb

    colours = {kind: to_rgb(family.colour) for kind, family in FAMILIES.items()}
    assert set(colours) == set(KINDS) and len(set(colours.values())) == len(KINDS)
    assert min(contrast(colour, text_colour(colour)) for colour in colours.values()) >= 4.5
    shades = [(red / 8, green / 8, blue / 8) for red in range(9) for green in range(9) for blue in range(9)]
    assert min(contrast(shade, text_colour(shade)) for shade in shades) >= 4.5


def test_a_large_pattern_map_has_no_numbers_in_its_cells(tmp_path: Path) -> None:
    text = words(draw_pattern_map([[VerticalSlash()] * 32] * 40, "large", tmp_path / "map.svg"))
    assert "vertical_slash: 1280" in text and "6096" not in text


def test_layers_as_svg(tmp_path: Path) -> None:
    density, recall = torch.tensor([[0.1, 0.3], [0.2, 0.2]]), torch.tensor([[1.0, 0.9], [0.98, 1.0]])
    text = words(draw_layers([4, 7], density, recall, "tiny, 301 tokens", tmp_path / "layers.svg"))
    for expected in (
        "tiny, 301 tokens",
        "recall: mean 97.00%, worst head 90.00%",
        "density: mean 20.00% of the dense pairs in sparse chunks",
        "layer",
        "one head",
        "mean of the layer",
    ):
        assert expected in text


def test_png_by_suffix(drawn: HeadMap, tmp_path: Path) -> None:
    figures = torch.full((2, 4), 0.5)
    for path in (
        draw_head(drawn, "tiny", tmp_path / "head.png", BLOCK),
        draw_pattern_map(LAYERS, "tiny", tmp_path / "map.png"),
        draw_layers([0, 1], figures, figures, "tiny", tmp_path / "layers.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
