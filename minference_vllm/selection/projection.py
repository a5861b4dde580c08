"""Queries and keys projected to few dimensions and quantized to int8, for approximate scores at a fraction of the cost.

The projection is the one that preserves the products of this chunk's queries with this sequence's keys best. It is
fitted for every head and chunk; nothing is trained or stored.

Sizes: ``h`` query heads, ``S`` tokens in the sequence, ``D`` head size, ``r`` rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from minference_vllm.core.sparse_index import CODES_PER_BIT

BINS_PER_BIT = CODES_PER_BIT
"""Score bins per factor of two of the softmax weight: 254 bins span 42 bits, or 29 nats."""
MAX_QUERY, MAX_KEY = 63, 127
"""Largest elements of quantized queries and keys: 2 * 63 * 255 fits 16 bits."""
MAX_PRODUCT = 24576
"""Largest product of a query and a key. The rest of the int16 range is for an ``approx_lse`` above it."""
MAX_KEY_NORM = 156
"""Norm of the longest quantized key. Close to the square root of ``MAX_PRODUCT``, which minimises rounding errors."""
MIN_RANGE = 40
"""Minimum score, in bits, that ``MAX_PRODUCT`` stands for, even if all scores are smaller."""
ITERATIONS = 5
"""Of the orthogonal iteration."""
NEARLY = 1e-10
"""Regularisation of ``orthonormal``: about the squared sine of the angle between a row and the span of those before it
below which the row is treated as dependent."""


class Projection(NamedTuple):
    """Products of centred keys and queries in ``r`` dimensions: ``(query @ to_query) @ ((key - mean) @ to_key)``."""

    to_query: torch.Tensor
    """float32 ``[h, D, r]``."""
    to_key: torch.Tensor
    """float32 ``[h, D, r]``."""
    mean: torch.Tensor
    """float32 ``[h, 1, D]``: mean key. Subtracting it changes no softmax."""
    key_size: torch.Tensor
    """float32 ``[h, 1, r]``: root mean square of the keys in each dimension."""


class QuantizedQK(NamedTuple):
    """Queries and keys in ``r`` dimensions as int8, whose products take a third of the time.

    The error of a product is at most a few thousandths of the largest product that the tile's queries could have.
    """

    query: torch.Tensor
    """int8 ``[h, T * n, r]``, at most ``MAX_QUERY`` in magnitude: all or some rows of every tile, padded to ``n``."""
    position: torch.Tensor
    """int32 ``[h, T * n]``: positions of the queries in the sequence."""
    count: torch.Tensor
    """int32 ``[h, T]``: number of valid queries of each tile; the rest is padding."""
    keys: torch.Tensor
    """int8 ``[h, S, r]``."""
    dequant_scale: torch.Tensor
    """int16 ``[h, T]``: bins per unit of a product, times ``2 ** 15``. All queries of a tile share it, so that their
    products can be compared as integers."""

    @classmethod
    def of(cls, low: torch.Tensor, position: torch.Tensor, count: torch.Tensor, keys: torch.Tensor) -> QuantizedQK:
        """Of ``TileQueries`` (``low`` is overwritten) and quantized keys."""
        query, dequant_scale = quantize_queries(low, count.shape[1])
        return cls(query, position, count, keys, dequant_scale)

    @property
    def per_tile(self) -> int:
        """``n``, the padded number of queries per tile."""
        return self.query.shape[1] // self.dequant_scale.shape[1]

    def bits(self) -> torch.Tensor:
        """float32 ``[h, T]``: bits per unit of the products of a tile's queries."""
        return self.dequant_scale.float().div_(BINS_PER_BIT << 15)


def fit(query: torch.Tensor, keys: torch.Tensor, rank: int) -> Projection:
    """Fit the ``rank`` dimensions that preserve the products of queries and keys best in the mean square.

    With ``A`` the second moment of the queries and ``K`` that of the centred keys, these are the leading eigenvectors
    ``Y`` of ``K A``, orthonormal in the inner product of ``A``: a query becomes ``Y' q``, a key ``Y' A k``. Orthogonal
    iteration finds them with matrix products and triangular solves. ``triton_kernels.fit`` does the same on GPUs.

    Args:
        query: ``[h, n, D]``. keys: ``[h, m, D]``.
        rank: at most ``D``.
    """
    return _Eigenspace.of(query, keys, rank).projection(rank)


def fit_within(
    query: torch.Tensor, keys: torch.Tensor, rank: int, error: float
) -> Iterator[tuple[list[int], Projection]]:
    """``fit`` with as few dimensions per head as the error allows, in steps of 16. Synchronises with a GPU.

    Args:
        error: allowed root mean square error of the products.

    Yields:
        Groups of heads with the same number of dimensions: their indices, ascending, and their projection.
    """
    space = _Eigenspace.of(query, keys, rank)
    of_ranks: dict[int, list[int]] = {}
    for place, lost in enumerate(space.lost()[:, 15:-1:16].tolist()):
        enough = (16 * step for step, rest in enumerate(lost, 1) if rest <= error**2)
        of_ranks.setdefault(next(enough, rank), []).append(place)
    for own, places in of_ranks.items():
        yield places, space.of_heads(places).projection(own)


def start_vectors(dim: int, rank: int, device: torch.device) -> torch.Tensor:
    """float64 ``[D, r]``: fixed start of the iteration, not orthogonal to any likely eigenvector."""
    places = torch.arange(1, dim + 1, dtype=torch.float64, device=device)
    return (places[:, None] * places[:rank] + places[:rank]).cos()


class _Eigenspace(NamedTuple):
    """Result of the iteration in ``fit``; float64 except for the mean."""

    mean: torch.Tensor
    """float32 ``[h, 1, D]``, of the keys."""
    to_query: torch.Tensor
    """``[h, D, r]``, ``Y``, the leading eigenvector first."""
    to_key: torch.Tensor
    """``[h, D, r]``, ``A Y``."""
    values: torch.Tensor
    """``[h, r]``, the eigenvalues: the mean square of what each dimension adds to products."""
    total: torch.Tensor
    """``[h, 1]``: the mean square of all products."""

    @classmethod
    def of(cls, query: torch.Tensor, keys: torch.Tensor, rank: int) -> _Eigenspace:
        query, keys = query.float(), keys.float()
        mean = keys.mean(1, keepdim=True)
        queries, spread = (((x.transpose(1, 2) @ x) / x.shape[1]).double() for x in (query, keys - mean))
        # Keeps both moments positive definite; anything smaller is rounding error of the float32 sums.
        for moments in (queries, spread):
            moments.diagonal(dim1=1, dim2=2).add_(_share_of_mean(moments.diagonal(dim1=1, dim2=2), 1e-6))
        # Vectors are rows: triangular solves from the left are several times as fast.
        to_key = start_vectors(query.shape[2], rank, query.device).T.expand(len(query), -1, -1)
        for _ in range(ITERATIONS):
            to_query = to_key @ spread
            to_query, to_key = orthonormal(to_query, to_query @ queries)
        values = (to_key * (to_key @ spread)).sum(2)
        total = (spread * queries).sum((1, 2))[:, None]
        return cls(mean, to_query.transpose(1, 2), to_key.transpose(1, 2), values, total)

    def lost(self) -> torch.Tensor:
        """``[h, r]``: mean square error of the products with the first 1, 2, ... ``r`` dimensions."""
        return self.total - self.values.cumsum(1)

    def of_heads(self, places: list[int]) -> _Eigenspace:
        return _Eigenspace(*(part[places] for part in self))

    def projection(self, rank: int) -> Projection:
        """In the first ``rank`` dimensions."""
        values = self.values[:, :rank].clamp(min=0)
        # Balance queries and keys in every dimension, which minimises rounding errors.
        size = (values + _share_of_mean(values, 1e-9)).pow(0.25)[:, None]
        to_query, to_key = self.to_query[:, :, :rank] * size, self.to_key[:, :, :rank] / size
        return Projection(to_query.float(), to_key.float(), self.mean, size.float())


def orthonormal(vectors: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormalise rows by Cholesky QR, in the inner product of a positive definite matrix ``A``.

    Args:
        vectors: float64 ``[h, r, D]``.
        images: float64 ``[h, r, D]``: ``vectors @ A``.

    Returns:
        The orthonormal rows and their images. Rows that depend (nearly) on those before them come out short.
    """
    size = (vectors * images).sum(2, keepdim=True).clamp_(min=0).sqrt_().clamp_(min=1e-150)
    vectors, images = vectors / size, images / size
    products = vectors @ images.transpose(1, 2)
    products.diagonal(dim1=1, dim2=2).add_(NEARLY)
    root = torch.linalg.cholesky_ex(products).L
    both = torch.linalg.solve_triangular(root, torch.cat([vectors, images], 2), upper=False)
    return both.split(vectors.shape[2], 2)


def _share_of_mean(values: torch.Tensor, share: float) -> torch.Tensor:
    """float64 ``[h, 1]``: a share of the mean of ``[h, n]``, always above zero."""
    return values.mean(1, keepdim=True) * share + 1e-30


def for_int8(projection: Projection, sample: torch.Tensor) -> Projection:
    """Rescale a projection so that keys have the size that ``quantize_keys`` expects, and pad it to a multiple of 16
    dimensions. ``sample``: ``[h, n, D]``, some of the keys."""
    keys = torch.matmul(sample.float() - projection.mean, projection.to_key)
    longest = keys.norm(dim=2).amax(1) / MAX_KEY_NORM
    unit = torch.maximum(longest, keys.abs().amax((1, 2)) / MAX_KEY).clamp_(min=1e-20)[:, None, None]
    parts = projection.to_query * unit, projection.to_key / unit, projection.key_size / unit
    to_query, to_key, key_size = (torch.nn.functional.pad(part, (0, -keys.shape[2] % 16)) for part in parts)
    return Projection(to_query, to_key, projection.mean, key_size)


def quantize_keys(keys: torch.Tensor, projection: Projection) -> torch.Tensor:
    """int8 ``[h, n, r]`` of keys ``[h, n, D]``. Keys longer than ``MAX_KEY_NORM`` are shortened to it."""
    low = torch.matmul(keys.float() - projection.mean, projection.to_key)
    low *= MAX_KEY_NORM / low.norm(dim=2, keepdim=True).clamp_(min=MAX_KEY_NORM)
    return low.round_().clamp_(-MAX_KEY, MAX_KEY).to(torch.int8)


def project_queries(query: torch.Tensor, projection: Projection, scale: float) -> torch.Tensor:
    """float32 ``[h, chunk, r]`` of queries ``[h, chunk, D]``; products with quantized keys are scores in bits."""
    to_query = projection.to_query * (scale / math.log(2))
    low = to_query.new_empty(*query.shape[:2], to_query.shape[2])
    for own, to_own, out in zip(query, to_query, low, strict=True):
        torch.matmul(own.float(), to_own, out=out)
    return low


def quantize_queries(low: torch.Tensor, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``QuantizedQK.query`` and ``dequant_scale`` of queries in few dimensions, float32 ``[h, T * n, r]``,
    overwritten."""
    most = (low.norm(dim=2) * MAX_KEY_NORM).clamp_(min=MIN_RANGE) / MAX_PRODUCT
    unit = torch.maximum(most, low.abs().amax(2) / MAX_QUERY).unflatten(1, (tiles, -1)).amax(2)
    dequant_scale = (unit * (BINS_PER_BIT << 15)).ceil_()
    low.unflatten(1, (tiles, -1)).mul_((BINS_PER_BIT << 15) / dequant_scale[..., None, None])
    return low.round_().to(torch.int8), dequant_scale.clamp_(max=(1 << 15) - 1).to(torch.int16)
