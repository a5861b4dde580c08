"""Tilings, queries and keys in few dimensions, and heads that need scores and that do not, for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.measured_rows import MOST_MISSED, MOST_NOISE, STANDARD_ERRORS, CalibrationRows
from minference_vllm.selection.projection import Projection, QuantizedQK, for_int8, project_queries, quantize_keys
from minference_vllm.selection.tile_queries import TileQueries, all_rows

CONTEXT, CHUNK, DIM, PAGE = 3072, 1024, 64, 32
LENGTH = CONTEXT + CHUNK

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
    "long": (6250, 6500, 16, 48),
}


def random_quantized(heads: int, tiling: Tiling, rank: int, sharpness: float, queries: int = 0) -> QuantizedQK:
    """Random keys, and up to ``queries`` random queries of every tile (0: all its rows)."""
    length, chunk = tiling.seq_len, tiling.seq_len - tiling.context_len
    generator = torch.Generator().manual_seed(length + rank)
    query = torch.randn(heads, queries * tiling.num_tiles or chunk, rank, generator=generator) * sharpness
    keys = torch.randn(heads, length, rank, generator=generator)
    return as_quantized(query, keys, tiling, queries, few=queries // 2)


def as_quantized(
    query: torch.Tensor, keys: torch.Tensor, tiling: Tiling, queries: int = 0, few: int = 0
) -> QuantizedQK:
    """Quantize keys ``[h, S, r]`` and up to ``queries`` queries of every tile, which see all of it (0: all its rows).
    Products are in bits.

    Args:
        query: ``[h, T * queries, r]``, or ``[h, chunk, r]``.
        few: every third tile has all of its queries, the others ``few`` or half of that; 0: every tile has all.
    """
    if not queries:
        rows = all_rows(query, tiling)
    else:
        seen = (tiling.starts[1:].int() - 1).repeat_interleave(queries).repeat(len(query), 1)
        kinds = torch.tensor([queries, few or queries, few // 2 or queries], dtype=torch.int32)
        count = kinds[torch.arange(len(query) * tiling.num_tiles) % 3].view(len(query), -1)
        rows = TileQueries(query, seen, count)
    same = torch.eye(query.shape[2]).expand(len(query), -1, -1)
    none = torch.zeros(len(query), 1, query.shape[2])
    projection = for_int8(Projection(same, same, none, none + 1), keys)
    low = project_queries(rows.low, projection, math.log(2))
    return QuantizedQK.of(low, rows.position, rows.count, quantize_keys(keys, projection))


def lookups(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row attends one key of its own, anywhere before it; queries ``[CHUNK, 1, DIM]``, keys ``[1, S, DIM]``."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.nn.functional.normalize(torch.randn(LENGTH, DIM // 2, generator=generator), dim=1)
    target = (torch.rand(CHUNK, generator=generator) * torch.arange(CONTEXT, LENGTH)).long()
    noise = torch.randn(LENGTH + CHUNK, DIM // 2, generator=generator) * 0.05
    query = torch.cat([20 * keys[target], noise[:CHUNK]], 1)
    return query[:, None].bfloat16(), torch.cat([keys, noise[CHUNK:]], 1)[None].bfloat16()


def neighbours(sink: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row attends the 150 keys before it, and with ``sink`` the first key."""
    place = torch.arange(LENGTH, dtype=torch.float32)[:, None] / LENGTH * 3.0
    angle = place * torch.randn(DIM // 2 - 1, generator=torch.Generator().manual_seed(0)) * 20
    keys = torch.cat([angle.cos(), angle.sin(), torch.zeros(LENGTH, 2)], 1)
    query = keys[CONTEXT:] * 3
    if sink:
        keys[0], query[:, -1] = 0, 1
        keys[0, -1] = 90
    return query[:, None], keys[None]


def missed_below(mass: torch.Tensor) -> torch.Tensor:
    """The share of each row's attention that lies below each bin; as ``mass``, ``[..., 256]``."""
    mass = mass.double()
    return (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True)


def threshold_of_levels(sample: CalibrationRows, mass: torch.Tensor, gamma: float) -> torch.Tensor:
    """``CalibrationRows.threshold`` if the missed share is known only at the kernel's levels, with its square root
    interpolated linearly between them."""
    from minference_vllm.triton_kernels.calibration import LEVELS

    missed = missed_below(mass)[..., list(LEVELS.value)]
    return _between_levels(sample, missed, LEVELS.value, 1 - gamma, min(1.0, MOST_MISSED * (1 - gamma)))


def noise_threshold_of_levels(sample: CalibrationRows, squares: torch.Tensor, noise: float) -> torch.Tensor:
    """``CalibrationRows.sampling_threshold`` likewise, of squares by the kernel's ramps."""
    from minference_vllm.triton_kernels.calibration import NUM_LEVELS
    from minference_vllm.triton_kernels.thresholds import WEIGHTS

    below, variance = squares.double() @ ramps().T, 0.0
    levels = torch.arange(NUM_LEVELS.value)
    for ramp, weight in enumerate(WEIGHTS.value):
        variance = variance + weight * below[..., (levels - ramp).clamp(min=0)]
    assert isinstance(variance, torch.Tensor)
    return _between_levels(sample, variance, knots().tolist(), noise**2, (MOST_NOISE * noise) ** 2)


def knots() -> torch.Tensor:
    """int64 ``[NUM_LEVELS]``: where the ramps of squares end."""
    from minference_vllm.triton_kernels.calibration import FIRST_KNOT, NUM_LEVELS, RAMP

    return FIRST_KNOT.value + RAMP.value * torch.arange(1, NUM_LEVELS.value + 1)


def ramps() -> torch.Tensor:
    """float64 ``[NUM_LEVELS, 256]``: how much of each bin's squares each level sums."""
    from minference_vllm.triton_kernels.calibration import RAMP

    return ((knots()[:, None] - torch.arange(256)).double() / RAMP.value).clamp(0, 1)


def _between_levels(
    sample: CalibrationRows, missed: torch.Tensor, levels: Sequence[int], missable: float, most_missable: float
) -> torch.Tensor:
    """int32 ``[h]``: the highest bin at which no group of rows misses more than ``missable``, and no single row more
    than ``most_missable``; ``missed``: float64 ``[h, R, L]``."""
    spread, *others = (
        missed.gather(1, places[..., None].expand(-1, -1, len(levels))) for places in (sample.spread, *sample.others)
    )
    errors = STANDARD_ERRORS / spread.shape[1] ** 0.5 * spread.std(1, correction=0)
    criteria = [spread.mean(1) + errors, *(group.mean(1) for group in others)]
    if others:
        criteria.append(torch.cat(others, 1).amax(1) * missable / most_missable)
    found = []
    for of_head in torch.stack(criteria, 1).tolist():
        bins = []
        for at in of_head:
            holding = next((place for place, one in enumerate(at) if one > missable), len(levels))
            if 0 < holding < len(levels):
                least, most, wanted = (max(0.0, one) ** 0.5 for one in (at[holding - 1], at[holding], missable))
                part = (wanted - least) / (most - least)
                step = levels[holding] - levels[holding - 1]
                bins.append(min(int(levels[holding - 1] + part * step), levels[holding] - 1))
            else:
                bins.append(levels[-1] if holding else 0)
        found.append(min(bins))
    return torch.tensor(found, dtype=torch.int32)
