"""Which rows the audit measures, and that it finds what the estimate missed."""

from __future__ import annotations

import pytest
import torch
from low_rank_inputs import CONTEXT, DIM, LENGTH, PAGE, neighbours

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import AShape
from minference_vllm.prefill import recall
from minference_vllm.prefill.recall import audited_rows, chunk_recall, sample_rows
from minference_vllm.selection.build import build_index
from minference_vllm.selection.torch_scores import TorchScores


@pytest.mark.parametrize(
    ("rows", "samples"), [(1, 4), (2, 4), (3, 1), (64, 4), (1000, 5), (1000, 64), (400, 64), (70, 64)]
)
def test_audited_rows_differ_and_half_of_them_are_unlike_the_others(rows: int, samples: int) -> None:
    query = torch.randn(rows, 3, 16, generator=torch.Generator().manual_seed(0))
    query[:, 2] *= 100.0  # must not decide alone
    query[rows // 3, 0] += 20.0
    for seed in range(20):
        found = audited_rows(query, samples, seed).tolist()
        count = min(rows, samples)
        assert len(set(found)) == len(found) == count and set(found) <= set(range(rows))
        assert found == audited_rows(query, samples, seed).tolist()
        assert count < 2 or rows // 3 in found
        assert count < 4 or rows - 1 in found


def test_the_draw_is_the_hosts_whatever_the_default_device() -> None:
    drawn = sample_rows(1000, 8, seed=1)
    with torch.device("meta"):
        assert torch.equal(sample_rows(1000, 8, seed=1), drawn)


def test_rows_are_the_same_however_many_heads_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(300, 5, 16, generator=torch.Generator().manual_seed(0))
    found = audited_rows(query, 8, seed=1)
    monkeypatch.setattr(recall, "PIECE_BYTES", 2 * 2 * 4 * 300 * 16)
    assert torch.equal(audited_rows(query, 8, seed=1), found)


def test_audited_rows_of_equal_or_broken_queries() -> None:
    for query in (torch.zeros(100, 2, 8), torch.full((100, 2, 8), torch.nan)):
        assert len(set(audited_rows(query, 8, 1).tolist())) == 8


@pytest.mark.parametrize("looking", [1, 8, 32])
def test_the_audit_sees_rows_that_lose_their_key(looking: int) -> None:
    """Some neighbouring rows in mid-chunk attend a far key, which a pattern of near keys leaves out."""
    for number in range(12):
        query, keys = neighbours(sink=False)
        needle, first = 100 + 151 * number, 130 + 67 * number
        keys[0, needle, 62], query[first : first + looking, 0, 62] = 20.0, 10.0
        pages = keys.view(1, -1, PAGE, DIM).transpose(0, 1)
        cache, chunk = PagedCache(pages, pages, "rows"), Chunk(0, 0, CONTEXT, LENGTH)
        scores = TorchScores(Inputs(query, cache, torch.arange(len(pages)), chunk, DIM**-0.5))
        index = build_index(Tiling.of(CONTEXT, LENGTH, PAGE, 128, 1), [AShape(sink=0, local=256)], scores)
        audited = chunk_recall(scores, index, audited_rows(query, 4, number)).value
        assert float(audited.min()) < 0.1 < 0.7 < float(audited.max())
