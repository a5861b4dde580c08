"""``SparseIndex``: which keys each query tile of a chunk attends.

Sizes: ``H`` query heads, ``L`` lists per tile (``H``, or fewer if heads share lists), ``T`` query tiles, ``N``
key blocks of ``B`` tokens in the sequence, ``S`` its tokens. A key block is a page of the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from minference_vllm.core.plan import dense_pairs
from minference_vllm.core.tiling import Tiling

CODES_PER_BIT = 6
"""See ``SparseIndex.column_codes``. Equal to ``projection.BINS_PER_BIT``."""


@dataclass(frozen=True)
class SparseIndex:
    """The keys that each query tile of one chunk attends, causally.

    Row ``i`` of a tile attends every key ``j <= i`` (with a window, also ``j > i - window``) that lies in one of the
    tile's blocks or is one of its columns. No key is listed twice. Every tile has the blocks that hold its own rows, so
    every row attends at least itself, unless the index is not ``causal``.

    ``blocks``, ``num_blocks``, ``columns`` and ``num_columns`` are what MInference's kernels, and vLLM's
    ``sparse_attn_func``, call ``block_offset``, ``block_count``, ``column_index`` and ``column_count``; here
    blocks are given by number, not by their first token.
    """

    tiling: Tiling
    blocks: torch.Tensor
    """int32 ``[L, T, max_blocks]``: logical key blocks, ascending, the tile's own last; -1 past ``num_blocks``. If
    the first entry is -1, the tile attends every block up to its own, without a list."""
    num_blocks: torch.Tensor
    """int32 ``[L, T]``, also set for tiles without a list."""
    columns: torch.Tensor
    """int32 ``[L, T, max_columns]``: absolute positions of single keys, all before the tile; -1 past
    ``num_columns``."""
    num_columns: torch.Tensor
    """int32 ``[L, T]``."""
    overflowed: torch.Tensor | None = None
    """bool ``[L, T]``: tiles that needed more than planned, and attend everything instead."""
    heads_per_list: int = 1
    """Neighbouring query heads that share each list: query head ``h`` has list ``h // heads_per_list``."""
    causal: bool = True
    """False: the chunk's own keys are left out, see ``without_own_keys``."""
    column_codes: torch.Tensor | None = None
    """uint8 ``[L, T, max_columns]``: a column counts ``2 ** (code / CODES_PER_BIT)`` times in every softmax, to
    represent similar keys that were not drawn (``score_bins.sampled_keys``); None: each counts once."""
    sampled: tuple[int, ...] = ()
    """Query heads, ascending, whose other keys are all represented by such columns."""

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
        """bool ``[H, R, last - first]``: which of the keys ``[first, last)`` the given tiles (int64 ``[R]``) have,
        including future keys and those before a row's window. ``last``: default ``seq_len``."""
        last = self.tiling.seq_len if last is None else last
        first_block, last_block = first // self.tiling.block_size, -(-last // self.tiling.block_size)
        by_block = self.block_mask(tiles, heads, first_block, last_block)
        begin = first - first_block * self.tiling.block_size
        by_key = by_block.repeat_interleave(self.tiling.block_size, dim=-1)[..., begin : begin + last - first]
        return by_key | _marks(self.columns[self._lists(tiles, heads), tiles], first, last)

    def tile_counts(
        self, tiles: torch.Tensor, heads: slice = slice(None), first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """float32 ``[H, R, last - first]``: how often the keys of ``tile_mask`` count; 0 for keys not attended."""
        counts = self.tile_mask(tiles, heads, first, last).float()
        if self.column_codes is not None:
            lists = self._lists(tiles, heads)
            often = torch.exp2(self.column_codes[lists, tiles] / CODES_PER_BIT)
            # Columns outside of the range go to a spare last entry, which is cut off again.
            places, width = self.columns[lists, tiles].long() - first, counts.shape[-1]
            places.masked_fill_((places < 0) | (places >= width), width)
            counts = torch.nn.functional.pad(counts, (0, 1)).scatter_(-1, places, often)[..., :-1]
        return counts

    def block_mask(self, tiles: torch.Tensor, heads: slice, first: int, last: int) -> torch.Tensor:
        """bool ``[H, R, last - first]``: which of the key blocks ``[first, last)`` the given tiles (int64 ``[R]``)
        have, not counting columns."""
        lists = self._lists(tiles, heads)
        blocks = self.blocks[lists, tiles]
        without_list = blocks[..., :1] < 0
        if not self.causal:  # a tile may have no block at all
            without_list &= self.num_blocks[lists, tiles][..., None] > 0
        return _marks(blocks, first, last) | without_list

    def names(self, positions: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """bool ``[H, T, n]``: which of some keys (int64 ``[n]``, ascending) each tile attends, future ones included."""
        tiles = torch.arange(self.num_tiles, device=positions.device)
        by_block = self.block_mask(tiles, heads, 0, self.tiling.num_key_blocks)[
            ..., positions // self.tiling.block_size
        ]
        columns = self.columns[self._lists(tiles, heads), tiles].long()
        places = torch.searchsorted(positions, columns).clamp_(max=len(positions) - 1)
        return by_block | _at(places.masked_fill_(positions[places] != columns, len(positions)), len(positions))

    def _lists(self, tiles: torch.Tensor, heads: slice) -> torch.Tensor:
        return torch.arange(self.num_heads, device=tiles.device)[heads, None] // self.heads_per_list

    def to_mask(self) -> torch.Tensor:
        """bool ``[H, S - context_len, S]``: True where a row attends a key. Quadratic: for tests and plots."""
        device = self.blocks.device
        rows = self.tiling.starts[1:] - self.tiling.starts[:-1]
        mask = self.tile_mask(torch.arange(self.num_tiles, device=device)).repeat_interleave(rows, dim=1)
        positions = torch.arange(self.tiling.context_len, self.tiling.seq_len, device=device)
        keys = torch.arange(self.tiling.seq_len, device=device)
        mask &= keys <= positions[:, None] if self.causal else keys < self.tiling.context_len
        return mask & (keys > positions[:, None] - self.tiling.window) if self.tiling.window else mask

    def without_own_keys(self) -> SparseIndex:
        """The index without the chunk's own keys and without a causal mask, for rows outside of their range of keys.

        The range is the chunk's context, whole blocks. The keys of the chunk itself are placeholders and are removed. A
        tile may then have no keys at all; kernels give it a log-sum-exp of -inf.
        """
        assert self.column_codes is None, "parts of dual chunk attention count every key once"
        end = self.tiling.context_len
        context_blocks = end // self.tiling.block_size
        listed = (self.blocks >= 0) & (self.blocks < context_blocks)
        # Blocks ascend, so those that stay are in front.
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
        """float64 ``[H]``: query-key pairs that the kernel computes: whole blocks, less the pairs that causality
        and the window mask."""
        tiling = self.tiling
        keys = torch.add(self.num_columns, self.num_blocks, alpha=tiling.block_size)
        pairs = torch.mv(keys.double(), tiling.rows)
        if self.causal:
            pairs -= tiling.future_pairs
            if tiling.window:
                pairs -= self._pairs_before_window(tiling.rows).sum(-1)
        return pairs if self.heads_per_list == 1 else pairs.repeat_interleave(self.heads_per_list)

    def _pairs_before_window(self, rows: torch.Tensor) -> torch.Tensor:
        """float64 ``[L, T]``: pairs of a row and a listed key of its tile that lies before the row's window.

        Args:
            rows: float64 ``[T]``, of each tile.
        """
        size = self.tiling.block_size
        # Start of the last row's window. A key ``n`` positions before it is not seen by the tile's last ``n`` rows.
        end = (self.tiling.starts[1:] - self.tiling.window)[:, None]

        def up_to(keys: torch.Tensor) -> torch.Tensor:
            """Pairs in the last ``keys`` keys before ``end``: 1 + 2 + ..., each at most the tile's rows."""
            rising = torch.minimum(keys.clamp(min=0).double(), rows[:, None])
            return rising * (rising + 1) / 2 + (keys.double() - rising).clamp(min=0) * rows[:, None]

        before = end - self.blocks * size
        in_blocks = (up_to(before) - up_to(before - size)).masked_fill_(self.blocks < 0, 0.0)
        of_columns = torch.minimum((end - self.columns).clamp(min=0).double(), rows[:, None])
        return in_blocks.sum(-1) + of_columns.masked_fill_(self.columns < 0, 0.0).sum(-1)

    def dense_pairs(self) -> float:
        """Pairs of one head that dense attention computes."""
        if not self.causal:
            return float((self.tiling.seq_len - self.tiling.context_len) * self.tiling.context_len)
        return dense_pairs(self.tiling.context_len, self.tiling.seq_len, self.tiling.window)

    def density(self) -> torch.Tensor:
        """float64 ``[H]``: computed pairs as a share of the dense ones."""
        return self.computed_pairs() / self.dense_pairs()


def _marks(positions: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """bool ``[H, R, last - first]``: True at the positions of ``[H, R, K]`` that lie in ``[first, last)``."""
    outside = (positions < first) | (positions >= last)
    return _at(positions.long().sub_(first).masked_fill_(outside, last - first), last - first)


def _at(places: torch.Tensor, count: int) -> torch.Tensor:
    """bool ``[H, R, count]``: True at the places in int64 ``[H, R, K]``; a place of ``count`` is ignored."""
    # Ignored places go to a spare last entry, which is cut off again.
    marks = torch.zeros(*places.shape[:2], count + 1, dtype=torch.bool, device=places.device)
    return marks.scatter_(-1, places, True)[..., :-1]
