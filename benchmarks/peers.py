"""Other people's kernels on the same layer, for ``bench_attention.py --peer``.

A peer gets the index that our kernel attended, converted to its format, and reports the keys that it attends as an
index of its own. Its output is checked against that index before it is timed. Only attention is timed, without the
estimate, the index and the conversion to its format.

``flex``: torch's FlexAttention, compiled. It only skips whole blocks, so a block that contains a column is computed
completely: the same keys as ours for patterns without columns, a multiple of them for the others.
``xformers``: ``memory_efficient_attention``, dense and causal: a dense kernel and an oracle independent of vLLM.
``vllm_sparse``: ``sparse_attn_func`` of vLLM's FlashAttention, on the index's own blocks and columns.
``minference``: the Triton kernel of Microsoft's ``minference`` package, on the same; whole prompts only.

Sizes: ``H`` query heads over ``HK`` KV heads, ``S`` tokens in the sequence, ``T`` query tiles, ``D`` head size.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.selection.compaction import compact_exact

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ROWS = 64
"""Query rows that share a list in MInference's kernels, and keys per block of theirs and of FlexAttention's."""
MINFERENCE_MODULE = "minference.ops.pit_sparse_flash_attention_v2"
MINFERENCE_KERNEL = "_triton_mixed_sparse_attention"


@dataclass(frozen=True)
class Size:
    """The parameters of a measurement that decide which peers can run."""

    device: str
    context: int
    chunk: int
    heads: int
    head_size: int
    block_size: int
    tile: int


@dataclass(frozen=True)
class Problem:
    """One chunk of one layer, and its index."""

    query: torch.Tensor
    """``[chunk, H, D]``."""
    keys: torch.Tensor
    """``[S, HK, D]``, like the values."""
    values: torch.Tensor
    index: SparseIndex
    """With one list per head, see ``one_list_per_head``."""
    scale: float


@dataclass(frozen=True)
class Peer:
    """A kernel that is ready to run."""

    computes: str
    """Description of what it attends, for the row."""
    index: SparseIndex
    """The keys that it attends."""
    attend: Callable[[], torch.Tensor]
    """Returns ``[chunk, H, D]``."""


def flex(problem: Problem) -> Peer:
    from torch.nn.attention.flex_attention import flex_attention

    index = columns_as_blocks(problem.index)
    by_head = [rows.transpose(0, 1)[None] for rows in (problem.query, problem.keys, problem.values)]
    mask = block_mask(index)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend() -> torch.Tensor:
        return compiled(*by_head, block_mask=mask, scale=problem.scale, enable_gqa=True)[0].transpose(0, 1)

    computes = "the index, its columns' blocks whole" if problem.index.num_columns.any() else "the index"
    return Peer(computes, index, attend)


def flex_reason(size: Size) -> str | None:
    if size.device == "cuda" and not installed("triton"):
        return "torch compiles it with triton, which is not installed (pip install triton)"
    if size.block_size % ROWS:
        return f"pages of {size.block_size} tokens are no multiple of {ROWS}"
    if (size.context - size.chunk) % size.tile:
        return f"its query tiles start at the chunk's first row, ours at multiples of {size.tile}"
    return None


def xformers(problem: Problem) -> Peer:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    kv_heads = problem.keys.shape[1]
    grouped = problem.query.unflatten(1, (kv_heads, -1))[None]  # [1, chunk, HK, H / HK, D]
    keys, values = (
        rows[None, :, :, None].expand(-1, -1, -1, grouped.shape[3], -1) for rows in (problem.keys, problem.values)
    )
    bias = LowerTriangularFromBottomRightMask()

    def attend() -> torch.Tensor:
        found = memory_efficient_attention(grouped, keys, values, attn_bias=bias, scale=problem.scale)
        return found[0].flatten(1, 2)

    return Peer("all keys", everything(problem.index), attend)


def xformers_reason(size: Size) -> str | None:
    if not installed("xformers"):
        return "it is not installed (pip install xformers)"
    return needs_gpu(size)


def vllm_sparse(problem: Problem) -> Peer:
    from vllm.vllm_flash_attn.flash_attn_interface import sparse_attn_func

    query, keys, values = (rows[None] for rows in (problem.query, problem.keys, problem.values))
    lists = lists_of_64_rows(problem.index)

    def attend() -> torch.Tensor:
        return sparse_attn_func(query, keys, values, *lists, softmax_scale=problem.scale, causal=True)[0]

    return Peer("the index", problem.index, attend)


def vllm_sparse_reason(size: Size) -> str | None:
    if not installed("vllm"):
        return "vLLM is not installed (pip install vllm)"
    try:
        importlib.import_module("vllm.vllm_flash_attn")
    except ImportError as error:
        return f"vLLM's FlashAttention does not load: {error}"
    if not hasattr(torch.ops._vllm_fa2_C, "fwd_sparse"):
        return "this vLLM's FlashAttention was built without its sparse kernel"
    if size.head_size != 128:
        return f"it was built for heads of size 128, not {size.head_size}"
    return needs_gpu(size) or lists_reason(size)


def minference(problem: Problem) -> Peer:
    kernel = getattr(importlib.import_module(MINFERENCE_MODULE), MINFERENCE_KERNEL)
    group = problem.query.shape[1] // problem.keys.shape[1]
    # It has no grouped query heads, so each one gets its own copy of the keys and values.
    query = problem.query.transpose(0, 1)[None]
    keys, values = (rows.transpose(0, 1).repeat_interleave(group, 0)[None] for rows in (problem.keys, problem.values))
    lengths = torch.tensor([problem.index.tiling.seq_len], dtype=torch.int32, device=query.device)
    lists = lists_of_64_rows(problem.index)

    def attend() -> torch.Tensor:
        return kernel(query, keys, values, lengths, *lists, problem.scale, ROWS, ROWS)[0].transpose(0, 1)

    return Peer("the index", problem.index, attend)


def minference_reason(size: Size) -> str | None:
    if not installed("minference"):
        return "it is not installed (pip install minference)"
    try:
        module = importlib.import_module(MINFERENCE_MODULE)
    except Exception as error:  # the import also loads its CUDA extension and a dozen other packages
        return f"it does not load: {type(error).__name__}: {error}"
    if not hasattr(module, MINFERENCE_KERNEL):
        return f"this version has no {MINFERENCE_KERNEL}"
    if size.head_size not in (16, 32, 64, 128):
        return f"it takes heads of size 16, 32, 64 or 128, not {size.head_size}"
    if size.chunk != size.context or size.context % ROWS:
        return f"it takes whole prompts of a multiple of {ROWS} tokens"
    if size.context * size.heads * size.head_size > 1 << 31:
        return "it addresses queries in 32 bits"
    return needs_gpu(size) or lists_reason(size)


class Kind(NamedTuple):
    """How to set up a peer, and the reason why it cannot run, if any."""

    prepare: Callable[[Problem], Peer]
    reason: Callable[[Size], str | None]


PEERS = {
    "flex": Kind(flex, flex_reason),
    "xformers": Kind(xformers, xformers_reason),
    "vllm_sparse": Kind(vllm_sparse, vllm_sparse_reason),
    "minference": Kind(minference, minference_reason),
}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def needs_gpu(size: Size) -> str | None:
    return None if size.device == "cuda" else "it runs on NVIDIA GPUs (--device cuda)"


def lists_reason(size: Size) -> str | None:
    """Why ``lists_of_64_rows`` cannot express an index of this size."""
    if size.block_size % ROWS:
        return f"pages of {size.block_size} tokens are no multiple of {ROWS}"
    if (size.context - size.chunk) % ROWS:
        return f"its {ROWS} query rows of one list would lie in two of our tiles: the chunk starts inside"
    return None


def one_list_per_head(index: SparseIndex) -> SparseIndex:
    """The same index with one list per head, since peers do not support lists that heads share."""
    if index.heads_per_list == 1:
        return index
    lists = {
        name: getattr(index, name).repeat_interleave(index.heads_per_list, 0)
        for name in ("blocks", "num_blocks", "columns", "num_columns")
    }
    return dataclasses.replace(index, **lists, overflowed=None, heads_per_list=1)


def everything(index: SparseIndex) -> SparseIndex:
    """Causal attention without a selection, over the index's tiles."""
    reach = ((index.tiling.starts[1:] - 1) // index.tiling.block_size + 1).to(torch.int32)
    num_blocks = reach.expand(index.num_heads, -1)
    return dataclasses.replace(index, blocks=no_list(index), num_blocks=num_blocks, **no_columns(index))


def columns_as_blocks(index: SparseIndex) -> SparseIndex:
    """The index with whole blocks in place of its columns."""
    total = -(-index.tiling.seq_len // index.tiling.block_size)
    # One extra block for padding entries.
    held = torch.zeros(*index.num_blocks.shape, total + 1, dtype=torch.bool, device=index.blocks.device)
    held.scatter_(2, torch.where(listed(index), listed_blocks(index), total).long(), True)
    held.scatter_(2, torch.where(index.columns < 0, total, index.columns // index.tiling.block_size).long(), True)
    blocks, num_blocks = compact_exact(held[..., :total])
    return dataclasses.replace(index, blocks=blocks, num_blocks=num_blocks, **no_columns(index))


def block_mask(index: SparseIndex) -> BlockMask:
    """FlexAttention's mask for an index without columns whose chunk starts at a tile boundary."""
    from torch.nn.attention.flex_attention import BlockMask

    context_len, size, total = (
        index.tiling.context_len,
        index.tiling.block_size,
        -(-index.tiling.seq_len // index.tiling.block_size),
    )
    blocks = listed_blocks(index)
    # Blocks that end before the tile need no mask. They come first in every list.
    whole = (listed(index) & ((blocks + 1) * size <= index.tiling.starts[:-1, None])).sum(-1, keepdim=True)
    blocks = pad(blocks, (0, total - blocks.shape[-1])).clamp(min=0)
    rest = blocks.gather(2, (torch.arange(total, device=blocks.device) + whole).clamp(max=total - 1))

    def causal(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key <= row + context_len

    num_whole = whole[..., 0].to(torch.int32)
    return BlockMask.from_kv_blocks(
        (index.num_blocks - num_whole)[None],
        rest[None],
        num_whole[None],
        blocks[None],
        BLOCK_SIZE=(index.tiling.tile, size),
        mask_mod=causal,
        seq_lengths=(index.tiling.seq_len - context_len, index.tiling.seq_len),
        compute_q_blocks=False,  # only needed for the backward pass
    )


class Lists(NamedTuple):
    """An index in the format of MInference's kernels, for a batch of one: lists of ``M`` groups of 64 query rows.

    All int32 and contiguous. The kernels apply the causal mask only to the last blocks of a list, which is therefore
    sorted, and not to columns. They read columns in groups of 64, also past the end of a list, so the width is a
    multiple of 64 and the padding consists of valid key positions.
    """

    block_count: torch.Tensor
    """``[1, H, M]``."""
    block_offset: torch.Tensor
    """``[1, H, M, widest]``: first key of each block of 64."""
    column_count: torch.Tensor
    """``[1, H, M]``."""
    column_index: torch.Tensor
    """``[1, H, M, widest]``: single keys."""


def lists_of_64_rows(index: SparseIndex) -> Lists:
    """See ``lists_reason`` for the supported sizes."""
    device = index.blocks.device
    first = torch.arange(index.tiling.context_len, index.tiling.seq_len, ROWS, device=device)
    tile = torch.searchsorted(index.tiling.starts, first, right=True) - 1
    within = torch.arange(0, index.tiling.block_size, ROWS, dtype=torch.int32, device=device)
    offsets = (listed_blocks(index).index_select(1, tile)[..., None] * index.tiling.block_size + within).flatten(2)
    # A tile may list blocks that begin after its first rows.
    named = listed(index).index_select(1, tile).repeat_interleave(len(within), 2) & (offsets <= first[:, None])
    block_count = named.sum(-1, dtype=torch.int32)
    columns = pad(index.columns, (0, -index.columns.shape[-1] % ROWS)).clamp(min=0)
    return Lists(
        block_count[None],
        offsets[None, ..., : int(block_count.max())].contiguous(),
        index.num_columns.index_select(1, tile)[None],
        columns.index_select(1, tile)[None],
    )


def listed_blocks(index: SparseIndex) -> torch.Tensor:
    """int32 ``[H, T, max(num_blocks)]``: the blocks of every tile, also of tiles that attend everything without a list.
    Entries outside of ``listed`` are meaningless."""
    width = int(index.num_blocks.max())
    every = torch.arange(width, dtype=torch.int32, device=index.blocks.device)
    return torch.where(index.blocks[..., :1] < 0, every, pad(index.blocks, (0, width - index.blocks.shape[-1])))


def listed(index: SparseIndex) -> torch.Tensor:
    """bool ``[H, T, max(num_blocks)]``: which entries of ``listed_blocks`` are valid."""
    return torch.arange(int(index.num_blocks.max()), device=index.blocks.device) < index.num_blocks[..., None]


def no_list(index: SparseIndex) -> torch.Tensor:
    """int32 ``[H, T, 1]``, all -1."""
    return torch.full_like(index.num_blocks, -1)[..., None]


def no_columns(index: SparseIndex) -> dict[str, torch.Tensor]:
    return {"columns": no_list(index), "num_columns": torch.zeros_like(index.num_columns)}
