"""FlashAttention 4's block-sparse path in torch, and chunks in pages of 128 for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.kernels.fa4.block_lists import BlockLists, own_page
from minference_vllm.patterns.kinds import AShape, BlockSparse, Dense, HeadPattern, TriShape, VerticalSlash
from minference_vllm.selection.build import build_index
from minference_vllm.selection.capacity import plan_capacity
from minference_vllm.selection.torch_scores import TorchScores

BLOCK = 128
PATTERNS: tuple[HeadPattern, ...] = (
    VerticalSlash(vertical=50, slash=32),
    Dense(),
    AShape(sink=16, local=64),
    BlockSparse(top_k=1),
    TriShape(sink=16, local=32, last=40),
    VerticalSlash(vertical=170, slash=0),
)
BLOCKS_ALONE: tuple[HeadPattern, ...] = (Dense(), AShape(sink=16, local=64), TriShape(sink=16, local=32, last=40)) * 2
"""Without single columns."""


def listed(lists: BlockLists, batch: int, head: int, block: int) -> list[tuple[int, bool]]:
    """Key blocks that a block of rows reads, and whether they are masked."""
    found = []
    for kind, masked in (("mask", True), ("full", False)):
        count = int(getattr(lists, f"{kind}_block_cnt")[batch, head, block])
        found += [(int(key), masked) for key in getattr(lists, f"{kind}_block_idx")[batch, head, block, :count]]
    return found


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lists: BlockLists,
    scale: float,
) -> None:
    """``kernels.fa4.attention.Attend``, as FlashAttention 4 documents it: listed blocks are read and no others, masked
    element by element where they are in the mask list, and not at all where they are full. Rows without keys give 0 and
    -inf. Values of masked keys are multiplied by their weights of zero, as tensor cores do: a NaN stays one."""
    batch, rows, heads, dim = query.shape
    tokens, kv_heads = key.shape[1:3]
    blocks = -(-rows // BLOCK)
    assert key.shape == value.shape == (batch, tokens, kv_heads, dim) and key.stride(-1) == value.stride(-1) == 1
    assert out.shape == query.shape and lse.shape == (batch, heads, rows) and lse.is_contiguous()
    assert query.dtype == key.dtype == value.dtype == out.dtype and lse.dtype == torch.float32
    assert heads % kv_heads == 0 and tokens % BLOCK == 0
    for name, part in vars(lists).items():
        assert part.dtype == torch.int32 and part.is_contiguous(), name
        assert part.shape[:3] == (batch, heads, blocks) and part.dim() == (4 if name.endswith("idx") else 3), name
    for i_batch, head, block in ((b, h, m) for b in range(batch) for h in range(heads) for m in range(blocks)):
        row = torch.arange(block * BLOCK, min((block + 1) * BLOCK, rows))
        scores, values = [torch.empty(len(row), 0, dtype=torch.float64)], [torch.empty(0, dim, dtype=torch.float64)]
        for key_block, masked in listed(lists, i_batch, head, block):
            assert 0 <= key_block < tokens // BLOCK
            place = torch.arange(key_block * BLOCK, (key_block + 1) * BLOCK)
            kv_head = head // (heads // kv_heads)
            score = query[i_batch, row, head].double() @ key[i_batch, place, kv_head].double().T * scale
            if masked:
                seen = own_page(i_batch, head, row[:, None].int(), place.int(), None, None)
                score = torch.where(seen, score, -torch.inf)
            scores.append(score)
            values.append(value[i_batch, place, kv_head].double())
        score = torch.cat(scores, 1)
        total = score.logsumexp(1) if score.shape[1] else score.new_full((len(row),), -torch.inf)
        weights = (score - total.clamp(min=-1e300)[:, None]).exp()
        out[i_batch, row, head] = (weights @ torch.cat(values)).to(out.dtype)
        lse[i_batch, head, row] = total.float()


@dataclass(frozen=True)
class Case:
    """A chunk of random content; its pages lie in random order, and all that the sequence does not own is NaN."""

    context: int
    length: int
    tile: int = BLOCK
    patterns: tuple[HeadPattern, ...] = PATTERNS
    kv_heads: int = 2
    dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    heads_first: bool = True
    """In memory: HND, else NHD."""
    shared: bool = False
    """Lists per KV head."""
    focused: bool = False
    """Every row attends the same few keys."""

    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[chunk, H, D]``, keys and values ``[HK, S, D]``."""
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(self.length - self.context, len(self.patterns), self.dim, generator=generator)
        keys, values = (torch.randn(self.kv_heads, self.length, self.dim, generator=generator) for _ in range(2))
        if self.focused:
            query[..., 0] += 8
            keys[:, 5 : self.context : 9, 0] += 8
        return query.to(self.dtype), keys.to(self.dtype), values.to(self.dtype)

    def inputs(self) -> Inputs:
        query, *rows = self.rows()
        count = -(-self.length // BLOCK)
        pages = torch.randperm(count + 2, generator=torch.Generator().manual_seed(1))[:count]
        position = torch.arange(self.length)
        memory = torch.full((count + 2, BLOCK, self.kv_heads, 2 * self.dim), torch.nan, dtype=self.dtype)
        memory[pages[position // BLOCK], position % BLOCK] = torch.cat([part.transpose(0, 1) for part in rows], -1)
        memory = memory.transpose(1, 2)
        memory = memory.contiguous() if self.heads_first else memory
        cache = PagedCache(memory[..., : self.dim], memory[..., self.dim :], "rows")
        return Inputs(query, cache, pages, Chunk(0, 0, self.context, self.length), self.dim**-0.5)

    def index(self) -> SparseIndex:
        """The index with planned sizes."""
        query, keys, values = self.rows()
        shares = len(self.patterns) // self.kv_heads if self.shared else 1
        patterns = self.patterns[: len(self.patterns) // shares]
        tiling = Tiling.of(self.context, self.length, BLOCK, self.tile)
        room = plan_capacity(patterns, self.context, self.length, BLOCK, self.tile, list_everything=True)
        scores = TorchScores(Inputs.of_rows(query[:, ::shares].float(), keys.float(), values.float(), 1.0, BLOCK))
        # Any patterns will do: the kernel sees only lists.
        return replace(build_index(tiling, patterns, scores, room), heads_per_list=shares)


CASES: dict[str, Case] = {
    "whole pages": Case(256, 768),
    "odd length": Case(256, 700),
    "chunk starts inside a page": Case(200, 640),
    "both, tokens outside of heads": Case(200, 555, heads_first=False),
    "one KV head": Case(130, 500, kv_heads=1),
    "a KV head per query head": Case(128, 300, kv_heads=6, heads_first=False),
    "tiles of two pages": Case(300, 900, tile=256),
    "tiles of two pages, chunk starts in a tile's second": Case(650, 1100, tile=256, heads_first=False),
    "tiles of two pages, the last one half of a tile": Case(512, 850, tile=256),
    "shared lists": Case(200, 600, shared=True),
    "shared lists, one KV head, tiles of two pages": Case(140, 640, kv_heads=1, tile=256, shared=True),
    "no columns": Case(256, 768, patterns=BLOCKS_ALONE),
    "no columns, odd length": Case(100, 600, patterns=BLOCKS_ALONE, heads_first=False),
    "less than a page": Case(0, 100),
    "one row": Case(384, 385),
    "the last row of a page": Case(383, 384),
    "float16, heads of 80": Case(140, 500, dim=80, dtype=torch.float16),
}
