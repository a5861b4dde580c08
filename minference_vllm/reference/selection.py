"""Blocks that patterns select by scores."""

from __future__ import annotations

import itertools

import torch

from minference_vllm.core.tiling import Tiling


def covering_blocks(tiling: Tiling, scores: torch.Tensor, tau: float) -> torch.Tensor:
    """bool ``[H, T, N]``: each tile's own blocks, and its best others until the selected scores sum to ``tau``."""
    own, reachable = tiling.own(), tiling.reachable()
    chosen = own.expand(scores.shape).clone()
    for head, tile in itertools.product(range(scores.shape[0]), range(tiling.num_tiles)):
        row = scores[head, tile].double()
        others = [block for block in range(tiling.num_key_blocks) if reachable[tile, block] and not own[tile, block]]
        for block in sorted(others, key=lambda block: -float(row[block])):
            if float(row[chosen[head, tile]].sum()) >= tau or not row[block]:
                break
            chosen[head, tile, block] = True
    return chosen


def peak_blocks(tiling: Tiling, scores: torch.Tensor, alpha: float, sink: int, window: int) -> torch.Tensor:
    """bool ``[H, T, N]``: blocks with at least ``alpha`` times the tile's highest score, with one of the first ``sink``
    tokens, or with one of the last ``window`` tokens of any of the tile's rows; and the tile's own."""
    size = tiling.block_size
    chosen = tiling.own().expand(scores.shape).clone()
    for tile, (first, end) in enumerate(itertools.pairwise(tiling.starts.tolist())):
        for block in range((end - 1) // size + 1):
            begin = block * size
            in_window = any(begin <= row and begin + size - 1 > row - window for row in range(first, end)) and window
            if begin < sink or in_window:
                chosen[:, tile, block] = True
            highest = scores[:, tile].amax(-1)
            chosen[:, tile, block] |= scores[:, tile, block] >= alpha * highest
    return chosen
