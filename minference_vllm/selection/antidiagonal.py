"""``antidiagonal``: the fewest key blocks that hold a share of a tile's attention, scored along antidiagonals
(XAttention, arXiv 2503.16428).

Sizes: ``h`` query heads, ``H`` query heads over ``HK`` KV heads of size ``D``, ``T`` query tiles, ``N`` key blocks,
``S`` tokens in the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minference_vllm.core.tiling import Tiling
from minference_vllm.patterns.kinds import Antidiagonal
from minference_vllm.selection.compaction import Capacity, Selection
from minference_vllm.selection.family import Family, Room
from minference_vllm.selection.probe_queries import logits
from minference_vllm.selection.scores import Scores


def squares_per_block(block_size: int, stride: int) -> int:
    """How many squares of ``stride`` tokens a block has along each edge.

    Raises:
        ValueError: ``stride`` does not divide the block size.
    """
    if block_size % stride:
        raise ValueError(f"antidiagonal stride must divide the page size {block_size}, not {stride}")
    return block_size // stride


def antidiagonal_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    heads: Sequence[int],
    tiling: Tiling,
    stride: int,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention mass of blocks, seen along every ``stride``-th antidiagonal (XAttention, arXiv 2503.16428).

    ``stride`` neighbouring queries and ``stride`` neighbouring keys, the keys in reverse order, make one long query and
    one long key; their product is the mean logit of an antidiagonal, which every column of that square crosses, and for
    an even stride every diagonal of odd distance (one of even distance passes between two of its cells, so that its
    neighbours must speak for it). Softmax over the squares a row of squares can see, then mean over a tile and sum over
    a block.
    Squares lie at multiples of ``stride`` in the prompt; tokens outside the chunk, or past its end, count as zeros.

    Args:
        query: ``[chunk, H, D]``.
        keys: ``[HK, S, D]``.
        heads: query heads wanted.
        stride: divides the block size.
        softcap: see ``Inputs``; of the mean logits.

    Returns:
        float32 ``[h, T, N]``, zero where no key of a block is in a tile's reach.

    Raises:
        ValueError: ``stride`` does not divide the block size.
    """
    per_block = squares_per_block(tiling.block_size, stride)
    group = query.shape[1] // keys.shape[0]
    length, dim = keys.shape[1], query.shape[2]
    first = tiling.context_len // stride
    squares = -(-length // stride)
    before, after = tiling.context_len - first * stride, squares * stride - length
    square_rows = torch.arange(first, squares, device=query.device)
    # The tile of a square of rows is that of its last row in the chunk: tiles, too, lie at multiples of the stride.
    last_rows = (square_rows * stride + stride - 1).clamp(max=length - 1)
    tile_of_square = torch.searchsorted(tiling.starts, last_rows, right=True) - 1
    # Of a square that lies across a border of the window all counts.
    hidden = torch.arange(squares, device=query.device) > square_rows[:, None]
    if tiling.window:
        oldest = (square_rows * stride - tiling.window + 1).clamp(min=0) // stride
        hidden |= torch.arange(squares, device=query.device) < oldest[:, None]
    missing = tiling.num_key_blocks * per_block - squares
    result = torch.zeros(len(heads), tiling.num_tiles, tiling.num_key_blocks, device=query.device)
    long_keys: dict[int, torch.Tensor] = {}
    for slot, head in enumerate(heads):
        kv_head = head // group
        if kv_head not in long_keys:
            padded = torch.nn.functional.pad(keys[kv_head], (0, 0, 0, after))
            long_keys = {kv_head: padded.view(squares, stride, dim).flip(1).reshape(squares, -1)}
        rows = torch.nn.functional.pad(query[:, head], (0, 0, before, after)).view(-1, stride * dim)
        weights = logits(rows, long_keys[kv_head], scale / stride, softcap)
        weights = weights.masked_fill_(hidden, -torch.inf).softmax(-1)
        by_block = torch.nn.functional.pad(weights, (0, missing)).view(len(rows), -1, per_block).sum(-1)
        result[slot].index_add_(0, tile_of_square, by_block)
    squares_of_tile = torch.zeros(tiling.num_tiles, device=query.device)
    squares_of_tile.index_add_(0, tile_of_square, torch.ones_like(tile_of_square, dtype=torch.float32))
    return result.div_(squares_of_tile.clamp_(min=1)[:, None])


def covering_blocks(tiling: Tiling, scores: torch.Tensor, tau: float) -> torch.Tensor:
    """bool ``[h, T, N]``: each tile's own blocks, and the fewest others with which its scores reach ``tau``.

    Args:
        scores: float ``[h, T, N]``, each tile's summing to 1 over the blocks in its reach.
    """
    own = tiling.own()
    missing = tau - (scores * own).sum(-1, keepdim=True)
    best = scores.masked_fill(own | ~tiling.reachable(), 0.0).sort(-1, descending=True)
    before = best.values.cumsum(-1) - best.values
    needed = (before < missing) & (best.values > 0)
    return torch.zeros_like(needed).scatter_(-1, best.indices, needed) | own


class AntidiagonalFamily(Family[Antidiagonal]):
    pattern = Antidiagonal
    colour = "#CC79A7"

    def select(
        self, pattern: Antidiagonal, heads: Sequence[int], tiling: Tiling, scores: Scores, capacity: Capacity
    ) -> Selection:
        return Selection(covering_blocks(tiling, scores.antidiagonal(heads, tiling, pattern.stride), pattern.tau))

    def room(self, pattern: Antidiagonal, block_size: int, adaptive: int) -> Room:
        return Room(adaptive, 0)

    def kernel_sizes(self, pattern: Antidiagonal) -> tuple[int, ...]:
        return (pattern.stride,)

    def page_size_problem(self, pattern: Antidiagonal, block_size: int) -> str | None:
        if block_size % pattern.stride == 0:
            return None
        return f"antidiagonal stride {pattern.stride} must divide the page size, here {block_size}"


FAMILY = AntidiagonalFamily()
