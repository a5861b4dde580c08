"""Recall of sampled rows against its float64 definition, and the floor: planted failures are caught and repaired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from score_inputs import scores_of

from minference_vllm import reference
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.choose import choose
from minference_vllm.patterns.kinds import (
    MAX_STEP,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    TriShape,
    VerticalSlash,
)
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.recall import RaisedSteps, Recall, RecallCheck, sample_rows, sampled_recall
from minference_vllm.prefill.timing import Timing
from minference_vllm.selection.build import build_index

SIZES = {
    # name: (chunk, context, heads, KV heads, head size)
    "regular": (256, 0, 8, 2, 64),
    "odd_length": (301, 0, 8, 2, 64),
    "context_before_chunk": (131, 517, 8, 2, 64),
    "chunk_inside_a_page": (9, 291, 8, 2, 64),
    "one_row": (1, 299, 8, 2, 64),
    "one_token": (1, 0, 2, 2, 64),
    "gqa_1": (150, 75, 4, 4, 32),
    "gqa_7": (150, 75, 14, 2, 80),
}
KINDS: tuple[HeadPattern, ...] = (
    AShape(sink=16, local=40),
    VerticalSlash(vertical=40, slash=0),
    BlockSparse(top_k=1),
    Coverage(gamma=0.4, min_budget=0),
    TriShape(sink=0, local=1, last=20),
    AShape(sink=0, local=0),
    Dense(),
)


@pytest.mark.parametrize(("column_multiple", "piece"), [(1, 10_000), (32, 10_000), (1, 32), (1, 47)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sampled_recall_is_the_references(name: str, dtype: torch.dtype, column_multiple: int, piece: int) -> None:
    chunk, context, heads, kv_heads, dim = SIZES[name]
    generator = torch.Generator().manual_seed(2)
    query = (torch.randn(chunk, heads, dim, generator=generator) * 2).to(dtype)
    keys = torch.randn(kv_heads, context + chunk, dim, generator=generator).to(dtype)
    scale = dim**-0.5
    tiling = Tiling.of(context, context + chunk, 32, 64, column_multiple)
    patterns = [KINDS[head % len(KINDS)] for head in range(heads)]
    index = build_index(tiling, patterns, scores_of(query, keys, scale))
    rows = sample_rows(chunk, 16, seed=3)
    values = torch.randn(kv_heads, context + chunk, dim, generator=generator) * torch.rand(context + chunk, 1).exp()
    found = sampled_recall(
        query, zip(keys.split(piece, 1), values.norm(dim=2).split(piece, 1), strict=True), index, rows, scale
    )
    assert all(part.shape == (heads, len(rows)) and part.dtype == torch.float32 for part in found)
    exact = reference.attention_recall(query, keys, index.to_mask(), context, scale)[:, rows]
    by_value = reference.attention_recall(query, keys, index.to_mask(), context, scale, values)[:, rows]
    # The same in low precision: logits are rounded once, to the inputs' type.
    logits = (query[rows].transpose(0, 1) @ reference.repeat_heads(keys, heads).transpose(1, 2)).float() * scale
    causal = reference.causal_mask(context, context + chunk)[rows]
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    eager = (weights * index.to_mask()[:, rows]).sum(-1)
    budget = 2 * float((eager.double() - exact).abs().max()) + 1e-6
    assert float((found.mass.double() - exact).abs().max()) <= budget
    assert float((found.value.double() - by_value).abs().max()) <= 3 * budget, "norms differ by up to e"
    dense = [head for head, pattern in enumerate(patterns) if isinstance(pattern, Dense)]
    for part in found:
        assert torch.allclose(part[dense], torch.ones(len(dense), len(rows)), atol=1e-5)


# Which rows


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 64, 1000, 8191])
@pytest.mark.parametrize("samples", [1, 4, 64])
def test_sampled_rows_come_one_from_each_part_of_the_chunk(rows: int, samples: int) -> None:
    count = min(samples, rows)
    seen = set()
    for seed in range(50):
        found = sample_rows(rows, samples, seed)
        assert found.dtype == torch.int64 and found.shape == (count,)
        for part, row in enumerate(found.tolist()):
            # A part's borders may lie inside a row, which neighbouring parts may then both draw.
            assert part * rows // count <= row <= min(rows - 1, (part + 1) * rows / count)
        assert found.tolist() == sorted(found.tolist())
        assert rows % count or len(set(found.tolist())) == count
        assert torch.equal(found, sample_rows(rows, samples, seed)), "the same seed, other rows"
        seen.add(tuple(found.tolist()))
    if rows >= 64 * samples:
        assert len(seen) > 25, "seeds make no difference"


# The floor

TOKENS, CHUNK, DIM, FLOOR = 2048, 512, 64, 0.9


def far_columns() -> tuple[torch.Tensor, torch.Tensor]:
    """Query ``[CHUNK, D]`` and keys ``[TOKENS, D]`` of a head whose mass lies on 20 columns far before the chunk."""
    query, keys = torch.zeros(CHUNK, DIM), torch.zeros(TOKENS, DIM)
    query[:, 0] = 14.0
    keys[200:1200:50, 0] = 1.0
    return query, keys


def near() -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a head whose mass lies in the 100 or so keys before each row."""
    frequency = torch.randn(DIM // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 30
    angle = torch.arange(TOKENS, dtype=torch.float64)[:, None] * frequency
    both = torch.cat([angle.cos(), angle.sin()], 1).float()
    return both[-CHUNK:] * 16, both / (DIM // 2)


def flat() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(CHUNK, DIM), torch.zeros(TOKENS, DIM)


@dataclass
class Heads:
    """Heads of known shapes with patterns that fit them or not; counts the indices that were built."""

    shapes: Sequence[tuple[torch.Tensor, torch.Tensor]]
    built: list[list[HeadPattern]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.query = torch.stack([query for query, _ in self.shapes], 1)
        self.keys = torch.stack([keys for _, keys in self.shapes])
        self.norms = torch.ones(self.keys.shape[:2])

    def build(self, patterns: Sequence[HeadPattern]) -> SparseIndex:
        self.built.append(list(patterns))
        return build_index(Tiling.of(TOKENS - CHUNK, TOKENS, 32, 128), patterns, scores_of(self.query, self.keys))

    def recall_of(self, index: SparseIndex, rows: torch.Tensor) -> Recall:
        return sampled_recall(self.query, [(self.keys, self.norms)], index, rows, 1.0)

    def exact_recall(self, index: SparseIndex) -> list[float]:
        """Mean recall over all rows, per head."""
        found = reference.attention_recall(self.query, self.keys, index.to_mask(), TOKENS - CHUNK, 1.0)
        return found.mean(1).tolist()

    def run(self, check: RecallCheck, patterns: Sequence[HeadPattern]) -> SparseIndex:
        return check.run(patterns, self.build, self.recall_of)


def check(floor: float | None = FLOOR, steps: tuple[int, ...] = ()) -> RecallCheck:
    return RecallCheck(sample_rows(CHUNK, 4, 0), floor, steps)


MISFITS: list[HeadPattern] = [
    AShape(sink=64, local=64),
    TriShape(sink=64, local=64, last=32),
    VerticalSlash(vertical=0, slash=0),
    BlockSparse(top_k=1),
]


@pytest.mark.parametrize("pattern", MISFITS, ids=lambda pattern: pattern.kind)
def test_a_head_whose_mass_is_elsewhere_is_given_a_pattern_that_looks_for_it(pattern: HeadPattern) -> None:
    heads, checked = Heads([far_columns()]), check()
    assert heads.exact_recall(heads.build([pattern]))[0] < 0.3
    index = heads.run(checked, [pattern])
    assert checked.steps == (1,)
    assert heads.built[-1] == [pattern.at_step(1)]
    assert heads.exact_recall(index)[0] >= FLOOR
    assert float(index.density()) < 0.5
    assert checked.recall is not None and float(checked.recall.mass) == pytest.approx(
        heads.exact_recall(index)[0], abs=0.02
    )


def test_a_head_for_which_more_keys_are_not_enough_ends_dense() -> None:
    heads, checked = Heads([far_columns()]), check(floor=0.99999)
    index = heads.run(checked, [VerticalSlash(vertical=0, slash=0)])
    assert checked.steps == (MAX_STEP,)
    assert float(index.density()) == 1.0 and heads.exact_recall(index) == pytest.approx([1.0])
    assert len(heads.built) == MAX_STEP + 1


def test_a_head_that_is_not_sparse_ends_dense_at_once_or_by_itself() -> None:
    for pattern in (AShape(sink=64, local=64), VerticalSlash(vertical=60, slash=100), Coverage(min_budget=64)):
        heads, checked = Heads([flat()]), check()
        index = heads.run(checked, [pattern])
        assert float(index.density()) == 1.0, pattern
        assert checked.steps[0] == 0 if isinstance(pattern, Coverage) else checked.steps[0] > 0


def test_heads_above_the_floor_keep_their_patterns() -> None:
    fits = AShape(sink=0, local=256)
    heads, checked = Heads([near(), far_columns(), near(), flat()]), check()
    patterns = [fits, AShape(sink=64, local=64), AShape(sink=0, local=1), Dense()]
    index = heads.run(checked, patterns)
    assert checked.steps[0] == 0 and checked.steps[1] == 1 and checked.steps[3] == 0
    alone = Heads([near()])
    assert torch.equal(index.to_mask()[0], alone.build([fits]).to_mask()[0])
    assert min(heads.exact_recall(index)) >= FLOOR - 0.02


def test_without_a_floor_recall_is_observed_only() -> None:
    heads, checked = Heads([far_columns(), near()]), check(floor=None)
    patterns = [AShape(sink=64, local=64), AShape(sink=0, local=256)]
    heads.run(checked, patterns)
    assert heads.built == [patterns] and checked.steps == (0, 0)
    assert checked.recall is not None
    assert float(checked.recall.value[0]) < 0.2 and float(checked.recall.value[1]) > 0.9


def test_steps_are_where_the_next_chunk_begins() -> None:
    heads, checked = Heads([near(), far_columns(), flat()]), check(steps=(1, 1, MAX_STEP))
    patterns: list[HeadPattern] = [Coverage(min_budget=64), AShape(sink=64, local=64), AShape(sink=64, local=64)]
    heads.run(checked, patterns)
    assert heads.built == [[patterns[0].at_step(1), patterns[1].at_step(1), Dense()]]
    assert checked.steps == (1, 1, MAX_STEP), "steps never fall within a request"


# Through the backend's own path


def test_a_chunk_is_repaired_before_it_is_computed(paged_batch: Callable[..., Any]) -> None:
    """Flat attention under an A-shape: recall is far below the floor, and the output is dense attention."""
    batch = paged_batch(query_lens=[300], context_lens=[500])
    patterns, out, timing = [AShape(sink=16, local=16)] * 8, torch.empty_like(batch.query), Timing()
    checked = RecallCheck(sample_rows(300, 8, 0), floor=0.99)
    kernel = choose("auto", batch.query.dtype, batch.cache)
    index = attend_chunk(batch.inputs(), patterns, kernel, out, check=checked, timing=timing)
    assert index.density().tolist() == [1.0] * 8
    assert timing.audit > 0 and min(timing.estimate, timing.index, timing.attend) > 0
    mask = reference.causal_mask(500, 800).expand(8, -1, -1)
    exact = reference.masked_attention(batch.query, batch.keys(0), batch.values(0), mask, batch.scale)
    budget = 3 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    assert float((out.double() - exact).abs().max()) <= budget


def test_the_floor_sees_an_output_that_is_lost_beside_a_kept_sink() -> None:
    """Most of the weight lies on a sink without a value: recall holds, but most of the output is lost."""
    query, keys = torch.zeros(CHUNK, DIM), torch.zeros(TOKENS, DIM)
    query[:, 0], keys[0, 0] = 1.0, 14.0  # 0.95 of the weight
    keys[200:1200:50, 0] = 8.0
    heads, checked = Heads([(query, keys)]), check()
    heads.norms[0, 0] = 1e-3
    fits = AShape(sink=64, local=64)
    assert heads.exact_recall(heads.build([fits]))[0] > FLOOR
    heads.run(checked, [fits])
    assert checked.steps[0] > 0 and checked.recall is not None
    assert float(checked.recall.value) >= FLOOR


# From one chunk to the next

PAGES = torch.tensor([7, 3, 9, 4, 1])
SIZE = 32


def begins_at(position: int, pages: torch.Tensor = PAGES, first_key: int = 0) -> Inputs:
    """A chunk that begins, or ends, at this position: only what lies before it matters."""
    cache = PagedCache(*torch.zeros(2, 10, 1, SIZE, 16), "rows")
    place = position - first_key
    chunk = Chunk(0, 0, place, place)
    return Inputs(torch.zeros(0, 1, 16), cache, pages[first_key // SIZE :], chunk, 1.0, first_key=first_key)


def test_raised_steps_carry_on_to_the_requests_next_chunk() -> None:
    raised = RaisedSteps()
    raised.keep(2, begins_at(70), (0, 1, 2))
    assert raised.at(2, begins_at(70)) == (0, 1, 2)
    assert raised.at(2, begins_at(70)) == (0, 1, 2), "a chunk may be asked about twice"


@pytest.mark.parametrize(
    ("layer", "position", "pages", "other"),
    [
        (1, 70, PAGES, "layer"),
        (2, 71, PAGES, "position in the same page"),
        (2, 64, PAGES, "position at the border of the page"),
        (2, 0, PAGES, "request: it begins here"),
        (2, 70, torch.tensor([7, 3, 5, 4, 1]), "request: its tokens before 70 lie in another page"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_raised_steps_are_not_another_ones(layer: int, position: int, pages: torch.Tensor, other: str) -> None:
    raised = RaisedSteps()
    raised.keep(2, begins_at(70), (0, 1, 2))
    assert raised.at(layer, begins_at(position, pages)) == (), f"another {other}"


def test_raised_steps_are_found_by_the_position_in_the_request() -> None:
    """In a layer with a sliding window earlier keys are left out, so every chunk's first key differs."""
    raised = RaisedSteps()
    raised.keep(2, begins_at(140), (0, 1))
    assert raised.at(2, begins_at(140, first_key=64)) == (0, 1)
    assert raised.at(2, begins_at(140 + 64, torch.tensor([0, 0, *PAGES]), first_key=64)) == (), "140 tokens later"


def test_a_chunk_that_ends_with_its_page_is_found_again() -> None:
    raised = RaisedSteps()
    raised.keep(0, begins_at(64), (1,))
    assert raised.at(0, begins_at(64)) == (1,)
    shorter = begins_at(64, torch.tensor([7, 3]))
    assert raised.at(0, shorter) == (1,), "the page of token 63 decides, not the one behind it"


def test_what_was_not_raised_takes_no_room_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RaisedSteps, "CAPACITY", 3)
    raised = RaisedSteps()
    raised.keep(0, begins_at(32), (1,))
    for position in range(33, 60):
        raised.keep(0, begins_at(position), (0,))
    assert raised.at(0, begins_at(32)) == (1,)
    for position in (40, 41, 42):
        raised.keep(0, begins_at(position), (2,))
    assert raised.at(0, begins_at(32)) == ()
    assert [raised.at(0, begins_at(position)) for position in (40, 41, 42)] == [(2,)] * 3
