"""Representative queries: a few that stand for the rows of a tile where asking every row would cost too much.

A tile is represented by its mean query, by that plus and minus ``SPREAD`` standard deviations along each of the
directions in which its rows differ most, as keys tell them apart, and by its row most unlike the mean. On SmolLM2 a
selection by 16 of them needs about 1.6 times the keys of one by all 128 rows for the same error of the output
(``docs/estimator.md``).

Sizes: ``h`` query heads, ``T`` query tiles, ``S`` tokens in the sequence, ``r`` rank.
"""

from __future__ import annotations

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.projection import start_vectors

SPREAD = 3.0
"""Standard deviations from the mean query: what few of the rows exceed."""
ITERATIONS = 4
"""For the directions."""
LEAST_SIZE = 1e-3
"""Of keys in a dimension, in units of their int8 elements: one that tells no keys apart."""


def representatives(low: torch.Tensor, key_size: torch.Tensor, tiling: Tiling, count: int) -> torch.Tensor:
    """Representative queries of every tile. Equal inputs give equal ones; nothing waits for a GPU.

    Args:
        low: float32 ``[h, chunk, r]``, queries in few dimensions, see ``projection.project_queries``.
        key_size: float32 ``[h, 1, r]``, see ``projection.Projection``.
        count: of each tile, even, at most ``2 * r + 2``.

    Returns:
        float32 ``[h, T * count, r]``.
    """
    before, after = tiling.context_len % tiling.tile, -tiling.seq_len % tiling.tile
    rows = torch.nn.functional.pad(low, (0, 0, before, after)).unflatten(1, (-1, tiling.tile))
    places = torch.arange(rows.shape[1] * tiling.tile, device=low.device)
    there = ((places >= before) & (places < before + low.shape[1])).view(-1, tiling.tile, 1)
    size = tiling.starts.diff()[:, None, None]
    mean = rows.sum(2, keepdim=True) / size  # [h, T, 1, r]
    of_dim = key_size[:, None].clamp(min=LEAST_SIZE)
    apart = (rows - mean).mul_(there).mul_(of_dim)
    found = deviations(torch.matmul(apart.transpose(2, 3), apart) / size, (count - 2) // 2) / of_dim
    distance = apart.square_().sum(3).masked_fill_(~there[..., 0], -1.0)
    unlike = distance.argmax(2)[..., None, None].expand(-1, -1, 1, low.shape[2])
    return torch.cat([mean, mean + found, mean - found, rows.gather(2, unlike)], 2).flatten(1, 2)


def deviations(moment: torch.Tensor, count: int) -> torch.Tensor:
    """The directions of most variance, each ``SPREAD`` standard deviations long, by orthogonal iteration.

    Args:
        moment: float32 ``[..., r, r]``: the second moment of rows about their mean.

    Returns:
        float32 ``[..., count, r]``.
    """
    vectors = start_vectors(moment.shape[-1], count, moment.device).float()
    for _ in range(ITERATIONS):
        vectors = torch.linalg.qr(moment @ vectors).Q
    variance = (vectors * (moment @ vectors)).sum(-2, keepdim=True).clamp_(min=0)
    return (vectors * variance.sqrt_() * SPREAD).transpose(-1, -2)
