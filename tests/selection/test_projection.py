"""Errors of query-key products in few dimensions and int8."""

from __future__ import annotations

import pytest
import torch
from low_rank_inputs import as_quantized

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.projection import (
    MAX_KEY_NORM,
    MAX_PRODUCT,
    MAX_QUERY,
    MIN_RANGE,
    Projection,
    fit,
    fit_within,
    for_int8,
    orthonormal,
    quantize_keys,
    start_vectors,
)

# Dimensions


@pytest.mark.parametrize("case", ["random", "few directions", "zeros"])
def test_rows_become_orthonormal_or_short(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(0, -3, 64) if case == "random" else torch.arange(64).lt(5).float()
    query = torch.randn(2, 700, 64, generator=generator).mul(size * (case != "zeros")).double()
    moment = query.transpose(1, 2) @ query / 700
    vectors = start_vectors(64, 16, query.device).T.expand(2, -1, -1)
    found, images = orthonormal(vectors, vectors @ moment)
    torch.testing.assert_close(images, found @ moment)
    products, rank = found @ images.transpose(1, 2), {"random": 16, "few directions": 5, "zeros": 0}[case]
    torch.testing.assert_close(products[:, :rank, :rank], torch.eye(rank).double().expand(2, -1, -1), atol=1e-4, rtol=0)
    assert (products[:, rank:, rank:].abs() < 1e-4).all()


# Quantized queries and keys


@pytest.mark.parametrize("rank", [16, 32, 128])
@pytest.mark.parametrize("case", ["random", "along one dimension", "all the same", "tiny", "huge", "zeros", "outlier"])
def test_quantized_queries_and_keys_keep_the_products(case: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    query, keys = torch.randn(2, 50, rank, generator=generator) * 3, torch.randn(2, 400, rank, generator=generator)
    if case == "along one dimension":
        query[..., 1:], keys[..., 1:] = 0, 0
    elif case == "all the same":
        query, keys = torch.full_like(query, 2.0), torch.full_like(keys, -1.0)
    elif case == "tiny":
        query *= 1e-12
    elif case == "huge":
        query *= 1e6
    elif case == "zeros":
        query, keys = query * 0, keys * 0
    elif case == "outlier":
        keys[:, 7] *= 4
    # Tiles of ten rows; all products of a tile have the same unit.
    quantized = as_quantized(query, keys, Tiling.of(350, 400, 10, 10))
    assert quantized.query.abs().max() <= MAX_QUERY and quantized.dequant_scale.min() > 0
    products = quantized.query.double() @ quantized.keys.double().transpose(1, 2)
    assert products.abs().max() <= MAX_PRODUCT * 1.1 < 1 << 15
    if case == "huge":
        return  # scores of a million bits are taken for smaller ones
    exact = query.double() @ keys.double().transpose(1, 2)
    most = query.double().norm(dim=2) * keys.double().norm(dim=2).amax(1)[:, None]
    most = most.unflatten(1, (5, 10)).amax(2)
    error = products.unflatten(1, (5, 10)) * quantized.bits()[..., None, None] - exact.unflatten(1, (5, 10))
    error /= most.clamp(min=MIN_RANGE)[..., None, None]
    # If all elements are rounded the same way, their errors add up.
    assert error.abs().max() < 0.04 and (error.square().mean().sqrt() < 0.004 or case == "all the same")


def test_longer_keys_than_sampled_are_shortened() -> None:
    keys = torch.randn(1, 100, 32, generator=torch.Generator().manual_seed(0))
    same = torch.eye(32)[None]
    low_rank = for_int8(Projection(same, same, torch.zeros(1, 1, 32), torch.ones(1, 1, 32)), keys[:, :50])
    keys[:, 70] *= 50
    low = quantize_keys(keys, low_rank).double()
    assert low.norm(dim=2).max() < MAX_KEY_NORM * 1.02
    assert torch.nn.functional.cosine_similarity(low[0, 70], keys[0, 70].double(), dim=0) > 0.99


# The fit


def centred(scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.mean(-1, keepdim=True)


def products(projection: Projection, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    low_query = query.double() @ projection.to_query.double()
    low_keys = (keys.double() - projection.mean.double()) @ projection.to_key.double()
    return low_query @ low_keys.transpose(1, 2)


def spread_inputs(rows: int = 300, tokens: int = 900, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of two heads whose dimensions differ in size, and are mixed; keys have a large common part."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(0.5, -1.5, dim)
    mixed = torch.linalg.qr(torch.randn(2, dim, dim, generator=generator)).Q
    query = torch.randn(2, rows, dim, generator=generator) * sizes @ mixed
    keys = torch.randn(2, tokens, dim, generator=generator) * sizes.flip(0).add(0.1) @ mixed + 5
    return query, keys


def test_at_full_rank_nothing_is_lost() -> None:
    query, keys = spread_inputs()
    found = centred(products(fit(query, keys, 64), query, keys))
    exact = centred(query.double() @ keys.double().transpose(1, 2))
    assert float((found - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_no_other_dimensions_lose_less(rank: int) -> None:
    query, keys = spread_inputs()
    keys = keys.bfloat16()
    exact = query.double() @ (keys.double() - keys.double().mean(1, keepdim=True)).transpose(1, 2)
    error = (products(fit(query, keys, rank), query, keys) - exact).norm(dim=(1, 2))
    # Of all matrices of this rank, the truncated singular value decomposition is nearest.
    least = torch.linalg.svdvals(exact)[:, rank:].norm(dim=1)
    assert (error >= least * (1 - 1e-6)).all() and (error <= least * 1.05).all(), (error / least).tolist()


def test_no_more_dimensions_than_are_needed() -> None:
    query, keys = spread_inputs()
    exact = query.double() @ (keys.double() - keys.double().mean(1, keepdim=True)).transpose(1, 2)

    def error(rank: int) -> float:
        return float((products(fit(query, keys, rank), query, keys) - exact).square().mean((1, 2)).max() ** 0.5)

    def ranks(most: int, enough: float, heads: slice = slice(None)) -> list[int]:
        of_heads = [0] * len(query[heads])
        for places, projection in fit_within(query[heads], keys[heads], most, enough):
            for place, to_key in zip(places, projection.to_key, strict=True):
                of_heads[place] = to_key.shape[1]
        return of_heads

    for enough, most in ((1e9, 16), (error(16) * 1.01, 16), (error(32) * 1.01, 32), (error(48) * 0.99, 64), (0.0, 64)):
        found = ranks(64, enough)
        assert max(found) == most
        # Other heads do not change a head's rank.
        assert found == [rank for head in (0, 1) for rank in ranks(64, enough, slice(head, head + 1))]
    assert ranks(40, 0.0) == [40, 40] and ranks(16, 0.0) == [16, 16]


def test_heads_keep_their_order_whatever_dimensions_they_have() -> None:
    query, keys = spread_inputs()
    query = torch.cat([query * 100, query, query * 100])
    keys = torch.cat([keys] * 3)
    found = dict.fromkeys(range(6), 0)
    for places, projection in fit_within(query, keys, 64, 50.0):
        assert places == sorted(places) and len(projection.mean) == len(projection.to_query) == len(places)
        own = fit(query[places], keys[places], projection.to_key.shape[2])
        torch.testing.assert_close(own.to_query, projection.to_query)
        found |= dict.fromkeys(places, projection.to_key.shape[2])
    assert found[0] == found[4] and found[1] == found[5] and len(set(found.values())) > 1


@pytest.mark.parametrize("case", ["zeros", "constant keys", "one query", "few keys", "one dimension", "huge"])
def test_degenerate_inputs_stay_finite(case: str) -> None:
    query, keys = spread_inputs()
    if case == "zeros":
        query, keys = torch.zeros_like(query), torch.zeros_like(keys)
    elif case == "constant keys":
        keys = torch.ones_like(keys)
    elif case == "one query":
        query = query[:, :1]
    elif case == "few keys":
        keys = keys[:, :3]
    elif case == "one dimension":
        query, keys = query * (torch.arange(64) == 5), keys * (torch.arange(64) == 5)
    elif case == "huge":
        query, keys = query * 1e4, keys * 1e4
    projection = fit(query, keys, 16)
    assert all(torch.isfinite(part).all() for part in projection)
    if case in ("one query", "one dimension"):
        exact = centred(query.double() @ keys.double().transpose(1, 2))
        assert float((centred(products(projection, query, keys)) - exact).norm() / exact.norm()) < 1e-3
