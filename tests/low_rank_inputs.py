"""Tilings, and queries and keys in few dimensions, for tests."""

from __future__ import annotations

import math

import torch

from minference_vllm.projection import Factors, Projection, in_units, whole_keys, whole_queries

TILINGS = {
    # name: (context, sequence, page, tile)
    "regular": (512, 1024, 128, 128),
    "odd_length": (0, 517, 32, 128),
    "starts_inside_a_tile": (333, 700, 32, 128),
    "starts_inside_a_page": (205, 300, 32, 64),
    "one_row": (300, 301, 32, 32),
    "one_token": (0, 1, 32, 32),
    "first_tile": (0, 90, 128, 128),
    "large_tile": (700, 1500, 64, 512),
    "pages_of_16": (100, 250, 16, 48),
}


def random_factors(heads: int, chunk: int, length: int, rank: int, sharpness: float) -> Factors:
    generator = torch.Generator().manual_seed(length + rank)
    query = torch.randn(heads, chunk, rank, generator=generator) * sharpness
    return as_factors(query, torch.randn(heads, length, rank, generator=generator))


def as_factors(query: torch.Tensor, keys: torch.Tensor) -> Factors:
    """Of queries ``[h, chunk, r]`` and keys ``[h, S, r]`` whose products are in bits."""
    same = torch.eye(query.shape[2]).expand(len(query), -1, -1)
    projection = in_units(Projection(same, same, torch.zeros(len(query), 1, query.shape[2])), keys)
    whole, step = whole_queries(query, projection, math.log(2))
    return Factors(whole, whole_keys(keys, projection), step)
