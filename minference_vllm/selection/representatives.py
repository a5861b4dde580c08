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

SPREAD = 3.0
"""Standard deviations from the mean query: what few of the rows exceed."""
SAMPLED_KEYS = 4096
"""Keys from which the size of each dimension is taken, at most about."""


def representatives(low: torch.Tensor, keys: torch.Tensor, tiling: Tiling, count: int) -> torch.Tensor:
    """Representative queries of every tile. Equal inputs give equal ones; nothing waits for a GPU.

    Args:
        low: float32 ``[h, chunk, r]``, queries in few dimensions, see ``projection.project_queries``.
        keys: int8 ``[h, S, r]``, see ``projection.quantize_keys``.
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
    step = max(1, keys.shape[1] // SAMPLED_KEYS)
    of_dim = keys[:, ::step].float().square_().mean(1).sqrt_().clamp_(min=1e-3)[:, None, None]
    apart = (rows - mean).mul_(there).mul_(of_dim)
    variances, vectors = torch.linalg.eigh(torch.matmul(apart.transpose(2, 3), apart) / size)
    # The largest variance comes last.
    deviations = vectors * variances.clamp_(min=0).sqrt_()[:, :, None] * SPREAD
    deviations = deviations[..., -(count - 2) // 2 :].transpose(2, 3) / of_dim
    distance = apart.square_().sum(3).masked_fill_(~there[..., 0], -1.0)
    unlike = distance.argmax(2)[..., None, None].expand(-1, -1, 1, low.shape[2])
    return torch.cat([mean, mean + deviations, mean - deviations, rows.gather(2, unlike)], 2).flatten(1, 2)
