"""Page means: they match the current cache and are not read more often than needed."""

from __future__ import annotations

import pytest
import torch

from minference_vllm import reference
from minference_vllm.core import page_means
from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import Layout, PagedCache

HEADS, SIZE, DIM, PAGES = 2, 32, 64, 12


def mean_keys(cache: PagedCache, pages: torch.Tensor, seq_len: int) -> torch.Tensor:
    return reference.page_means(cache.keys_by_head(pages)[:, :seq_len], SIZE).float()


def value_norms(cache: PagedCache, pages: torch.Tensor, seq_len: int) -> torch.Tensor:
    return cache.values_by_head(pages)[:, :seq_len].float().norm(dim=2)


def cache(layout: Layout, seed: int = 0) -> PagedCache:
    stored = torch.randn(PAGES, HEADS, SIZE, DIM, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return PagedCache(stored, stored.clone(), layout)


@pytest.mark.parametrize("layout", ["rows", "transposed", "amx"])
@pytest.mark.parametrize("seq_len", [1, 31, 32, 100, 5 * SIZE])
def test_means_of_shuffled_pages(layout: Layout, seq_len: int) -> None:
    paged, pages = cache(layout), torch.tensor([7, 2, 11, 0, 5])[: -(-seq_len // SIZE)]
    means = PageMeans()
    for found, right in (
        (means.of(paged, pages, seq_len), mean_keys(paged, pages, seq_len)),
        (means.value_norms_of(paged, pages, seq_len), value_norms(paged, pages, seq_len)),
    ):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_values_are_read_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(page_means, "unpack_values", lambda stored, layout: read.append(len(stored)) or stored)
    paged, pages, means = cache("rows"), torch.tensor([7, 2, 11]), PageMeans()
    means.of(paged, pages, 3 * SIZE)
    assert read == []
    means.value_norms_of(paged, pages[:2], 2 * SIZE)
    means.value_norms_of(paged, pages, 3 * SIZE)
    assert read == [2, 1]
    paged.value[2, :, 3] += 10.0
    means.forget(torch.tensor([2 * SIZE + 3]), SIZE)
    found = means.value_norms_of(paged, pages, 3 * SIZE)
    assert read == [2, 1, 1]
    torch.testing.assert_close(found, value_norms(paged, pages, 3 * SIZE))


def test_pages_are_read_again_after_they_were_written_and_not_before() -> None:
    paged, pages, means = cache("rows"), torch.tensor([7, 2, 11]), PageMeans()
    means.of(paged, pages[:2], 2 * SIZE)
    first = means.of(paged, pages, 3 * SIZE).clone()
    paged.key[11, :, 3] += 10.0
    paged.key[2, :, 3] += 10.0
    means.forget(torch.tensor([11 * SIZE + 3, -1]), SIZE)
    again = means.of(paged, pages, 3 * SIZE)
    assert torch.equal(again[:, :2], first[:, :2]), "a page that nobody named is not read again"
    assert not torch.equal(again[:, 2], first[:, 2])
    means.forget(torch.tensor([2 * SIZE]), SIZE)
    torch.testing.assert_close(means.of(paged, pages, 3 * SIZE), mean_keys(paged, pages, 3 * SIZE))


def test_a_partial_last_page_is_never_kept() -> None:
    paged, pages, means = cache("rows"), torch.tensor([7, 2]), PageMeans()
    means.of(paged, pages, SIZE + 5)
    paged.key[2, :, 5:] = 3.0
    torch.testing.assert_close(means.of(paged, pages, 2 * SIZE), mean_keys(paged, pages, 2 * SIZE))


def test_another_cache_starts_anew() -> None:
    means, pages = PageMeans(), torch.tensor([3, 4])
    first, other = cache("rows"), cache("rows", seed=1)
    means.of(first, pages, 2 * SIZE)
    torch.testing.assert_close(means.of(other, pages, 2 * SIZE), mean_keys(other, pages, 2 * SIZE))


@pytest.mark.parametrize("layout", ["rows", "transposed", "amx"])
@pytest.mark.parametrize("seq_len", [1, 31, 32, 100, 5 * SIZE])
def test_norms_of_values(layout: Layout, seq_len: int) -> None:
    paged, pages = cache(layout), torch.tensor([7, 2, 11, 0, 5])[: -(-seq_len // SIZE)]
    kept = PageMeans()
    for value in (1.0, 3.0):
        # Slots after the last token and earlier contents must have no effect.
        paged.value.mul_(value)
        kept.forget(torch.arange(PAGES * SIZE), SIZE)
        found = kept.value_norms_of(paged, pages, seq_len)
        right = paged.values_by_head(pages)[:, :seq_len].double().norm(dim=2)
        assert found.shape == (HEADS, seq_len) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=0)


def test_norms_grow_with_the_sequence_and_read_each_page_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(page_means, "unpack_values", lambda stored, layout: read.append(len(stored)) or stored)
    paged, pages, kept = cache("rows"), torch.tensor([7, 2, 11]), PageMeans()
    first = kept.value_norms_of(paged, pages[:2], SIZE + 5)
    found = kept.value_norms_of(paged, pages, 3 * SIZE)
    assert read == [1, 1, 2], "a whole page once, a partial one again when it is whole"
    assert torch.equal(found[:, : SIZE + 5], first)
