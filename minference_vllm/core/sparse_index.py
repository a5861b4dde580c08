"""``SparseIndex``: which keys each query tile of a chunk attends.

Sizes: ``H`` query heads, ``L`` lists per tile (as many, or fewer where heads share theirs), ``T`` query tiles, ``N``
key blocks of ``B`` tokens in the sequence, ``S`` its tokens. A key block is a page of the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from minference_vllm.core.tiling import Tiling


@dataclass(frozen=True)
class SparseIndex:
    """The keys that each query tile of one chunk attends, causally.

    Row ``i`` of a tile attends every key ``j <= i`` that lies in one of the tile's blocks or is one of its columns. No
    key is named twice. Every tile has the blocks that hold its own rows, so every row attends at least itself; but for
    an index that is not ``causal``.

    ``blocks``, ``num_blocks``, ``columns`` and ``num_columns`` are what MInference's kernels, and vLLM's
    ``sparse_attn_func``, call ``block_offset``, ``block_count``, ``column_index`` and ``column_count``; blocks are
    numbered here, and not given by their first token.
    """

    tiling: Tiling
    blocks: torch.Tensor
    """int32 ``[L, T, max_blocks]``: logical key blocks, ascending, the tile's own last; -1 past ``num_blocks``. Where
    already the first is -1 the tile attends every block up to its own, without a list."""
    num_blocks: torch.Tensor
    """int32 ``[L, T]``, of tiles without a list, too."""
    columns: torch.Tensor
    """int32 ``[L, T, max_columns]``: absolute positions of single keys, all before the tile; -1 past
    ``num_columns``."""
    num_columns: torch.Tensor
    """int32 ``[L, T]``."""
    overflowed: torch.Tensor | None = None
    """bool ``[L, T]``: tiles that wanted more than there was planned room for, and attend everything instead."""
    heads_per_list: int = 1
    """Neighbouring query heads that share each list: query head ``h`` has list ``h // heads_per_list``."""
    causal: bool = True
    """False: the chunk's own keys are left out, see ``without_own_keys``."""

    @property
    def num_lists(self) -> int:
        return self.blocks.shape[0]

    @property
    def num_heads(self) -> int:
        return self.num_lists * self.heads_per_list

    @property
    def num_tiles(self) -> int:
        return self.blocks.shape[1]

    def tile_mask(
        self, tiles: torch.Tensor, heads: slice = slice(None), first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """bool ``[H, R, last - first]``: which of the keys ``[first, last)`` the named tiles (int64 ``[R]``) have,
        future ones included. ``last``: default ``seq_len``."""
        last = self.tiling.seq_len if last is None else last
        first_block, last_block = first // self.tiling.block_size, -(-last // self.tiling.block_size)
        by_block = self.block_mask(tiles, heads, first_block, last_block)
        begin = first - first_block * self.tiling.block_size
        by_key = by_block.repeat_interleave(self.tiling.block_size, dim=-1)[..., begin : begin + last - first]
        return by_key | _marks(self.columns[self._lists(tiles, heads), tiles], first, last)

    def block_mask(self, tiles: torch.Tensor, heads: slice, first: int, last: int) -> torch.Tensor:
        """bool ``[H, R, last - first]``: which of the key blocks ``[first, last)`` the named tiles (int64 ``[R]``)
        have, their columns apart."""
        lists = self._lists(tiles, heads)
        blocks, some = self.blocks[lists, tiles], self.num_blocks[lists, tiles][..., None] > 0
        return _marks(blocks, first, last) | ((blocks[..., :1] < 0) & some)

    def _lists(self, tiles: torch.Tensor, heads: slice) -> torch.Tensor:
        return torch.arange(self.num_heads, device=tiles.device)[heads, None] // self.heads_per_list

    def to_mask(self) -> torch.Tensor:
        """bool ``[H, S - context_len, S]``: True where a row attends a key. For tests and plots: it is quadratic."""
        device = self.blocks.device
        rows = self.tiling.starts[1:] - self.tiling.starts[:-1]
        mask = self.tile_mask(torch.arange(self.num_tiles, device=device)).repeat_interleave(rows, dim=1)
        positions = torch.arange(self.tiling.context_len, self.tiling.seq_len, device=device)
        return mask & (torch.arange(self.tiling.seq_len, device=device) <= positions[:, None])

    def without_own_keys(self) -> SparseIndex:
        """The same for rows that attend, without a mask, a range of keys which they are no part of.

        The chunk's context, whole blocks, is that range; the keys of the chunk itself stood for nothing and are left
        out. A tile may then have no keys at all: kernels give it a log-sum-exp of -inf.
        """
        end = self.tiling.context_len
        context_blocks = end // self.tiling.block_size
        listed = (self.blocks >= 0) & (self.blocks < context_blocks)
        # Blocks ascend: those that stay are in front.
        num_blocks = torch.where(self.blocks[..., 0] < 0, context_blocks, listed.sum(-1)).to(torch.int32)
        columns = self.columns.masked_fill(self.columns >= end, -1).sort(dim=-1, descending=True).values
        return replace(
            self,
            blocks=self.blocks.masked_fill(~listed, -1),
            num_blocks=num_blocks,
            columns=columns,
            num_columns=(columns >= 0).sum(-1, dtype=torch.int32),
            causal=False,
        )

    def computed_pairs(self) -> torch.Tensor:
        """float64 ``[H]``: query-key pairs that the kernel works on (whole blocks; the causal half of the last)."""
        rows = (self.tiling.starts[1:] - self.tiling.starts[:-1]).double()
        if not self.causal:
            keys = self.num_blocks.double() * self.tiling.block_size + self.num_columns.double()
            return (keys * rows).sum(-1).repeat_interleave(self.heads_per_list)
        last_start = (self.tiling.starts[1:] - 1) // self.tiling.block_size * self.tiling.block_size
        in_last = (self.tiling.starts[1:] - last_start).double()
        keys = (self.num_blocks - 1).double() * self.tiling.block_size + in_last + self.num_columns.double()
        return ((keys - (rows - 1) / 2) * rows).sum(-1).repeat_interleave(self.heads_per_list)

    def dense_pairs(self) -> float:
        """Pairs of one head that dense attention computes."""
        rows = self.tiling.seq_len - self.tiling.context_len
        if not self.causal:
            return float(rows * self.tiling.context_len)
        return rows * (self.tiling.context_len + (rows + 1) / 2)

    def density(self) -> torch.Tensor:
        """float64 ``[H]``: computed pairs as a share of the dense ones."""
        return self.computed_pairs() / self.dense_pairs()


def _marks(positions: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """bool ``[H, R, last - first]``: the positions ``[first, last)`` that ``[H, R, K]`` names."""
    # All others are marked in one spare last place, which is cut off again.
    outside = (positions < first) | (positions >= last)
    places = positions.long().sub_(first).masked_fill_(outside, last - first)
    marks = torch.zeros(*positions.shape[:2], last - first + 1, dtype=torch.bool, device=positions.device)
    return marks.scatter_(-1, places, True)[..., :-1]
