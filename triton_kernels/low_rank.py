"""The score bins of ``low_rank``: of all rows of a tile here, of representatives in ``representative_bins.py``.

Products are computed once and never stored; what they are set against is in ``approx_lse.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.projection import QuantizedQK
from minference_vllm.triton_kernels import approx_lse, representative_bins
from minference_vllm.triton_kernels.approx_lse import NEVER, bits, codes
from minference_vllm.triton_kernels.in_thread import THREADS
from minference_vllm.triton_kernels.launch import launcher, major_capability
from minference_vllm.triton_kernels.representative_bins import LOCAL_BIN, as_bins, below


@triton.jit
def _nearest(
    b_key, p_query, p_lse, unit, first, i_down, num_queries, num_parts, RANK: tl.constexpr, R: tl.constexpr,
    PER_TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """How near each key comes to the one of BLOCK_M queries that rates it highest, in units: int32 ``[BLOCK_N]``."""
    o_down = i_down + tl.arange(0, BLOCK_M)
    o_query, m_query = first + o_down, o_down < PER_TILE
    b_query = codes(p_query, o_query, m_query, RANK, R)
    b_below = below(p_lse, o_query, m_query, unit, num_queries, num_parts)
    return tl.max(tl.dot(b_key, tl.trans(b_query), out_dtype=tl.int32) - b_below[None, :], 1)


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_tiles", "num_parts", "window"])
def tile_bins_kernel(
    p_query, p_key, p_scale, p_lse, p_bins, stride_bins, context_len, seq_len, num_tiles, num_parts, window,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, PER_TILE: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the bins of STRIP keys for one tile of one head.

    ``p_scale`` is int16 ``[h, T]``, ``p_lse`` float32 ``[h, num_parts, T * PER_TILE]``, ``p_bins`` uint8
    ``[h, T, stride_bins]``.
    """
    i_strip, i_tile, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = (context_len // TILE + i_tile) * TILE
    first_seen = tl.where(window > 0, tl.maximum(tl.maximum(own, context_len) - window + 1, 0), 0)
    begin, stop = i_strip * STRIP, tl.minimum((i_strip + 1) * STRIP, tl.minimum(own + TILE, seq_len))
    p_bins += (i_head * num_tiles + i_tile).to(tl.int64) * stride_bins
    if begin < stop:
        num_queries = num_tiles * PER_TILE
        p_query += i_head.to(tl.int64) * num_queries * RANK
        p_key += i_head.to(tl.int64) * seq_len * RANK
        p_lse += i_head.to(tl.int64) * num_parts * num_queries
        unit = bits(p_scale, i_head * num_tiles + i_tile, True)
        before, first = tl.minimum(stop, own), i_tile * PER_TILE
        for i_key in range(begin, before, BLOCK_N):
            o_key = i_key + tl.arange(0, BLOCK_N)
            b_key = codes(p_key, o_key, o_key < before, RANK, R)
            b_best = tl.full([BLOCK_N], -NEVER, dtype=tl.int32)
            for i_down in tl.static_range(0, PER_TILE, BLOCK_M):
                b_nearest = _nearest(
                    b_key, p_query, p_lse, unit, first, i_down, num_queries, num_parts, RANK, R, PER_TILE, BLOCK_M
                )  # fmt: skip
                b_best = tl.maximum(b_best, b_nearest)
            b_bin = tl.where(o_key >= first_seen, as_bins(b_best.to(tl.float32) * unit), 0.0)
            tl.store(p_bins + o_key, b_bin.to(tl.uint8), mask=o_key < before)
        for i_key in range(tl.maximum(begin, own), stop, BLOCK_N):
            o_key = i_key + tl.arange(0, BLOCK_N)
            tl.store(p_bins + o_key, tl.full([BLOCK_N], LOCAL_BIN, dtype=tl.uint8), mask=o_key < stop)
    # What comes after the tile.
    for i_key in range(tl.maximum(begin, stop), tl.minimum(begin + STRIP, seq_len), BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        tl.store(p_bins + o_key, tl.zeros([BLOCK_N], dtype=tl.uint8), mask=o_key < tl.minimum(begin + STRIP, seq_len))


BLOCK_M, BLOCK_N, STRIP, NUM_WARPS = 128, 64, 2048, 4
"""Queries and keys of one step, keys of one program."""
ALIGNED = 128
"""Bytes that bins of a tile begin at multiples of, so that they are read many at once."""


def launch_shape(rank: int, tile: int, per_tile: int, major: int = 9) -> tuple[dict[str, int], Any, dict[str, int]]:
    """Constants of ``approx_lse_kernel``, the kernel of bins, and its constants.

    Args:
        per_tile: see ``QuantizedQK``.
        major: compute capability.
    """
    # Tensor cores take 32 whole numbers at once.
    shape = {"RANK": rank, "R": max(32, triton.next_power_of_2(rank)), "TILE": tile, "PER_TILE": per_tile}
    of_lse = {"BLOCK_M": approx_lse.BLOCK_M, "num_warps": approx_lse.NUM_WARPS}
    tiles = representative_bins.QUERIES // per_tile
    if triton.next_power_of_2(per_tile) == per_tile > 1 and tiles >= THREADS.value:
        # Blackwell's registers would spill.
        keys = representative_bins.BLOCK_N // (2 if major == 10 else 1)
        of_bins = {"TILES": tiles, "STRIP": representative_bins.STRIP, "BLOCK_N": keys, "num_warps": NUM_WARPS}
        return shape | of_lse, representative_bins.representative_bins_kernel, shape | of_bins
    rows = min(BLOCK_M, max(16, triton.next_power_of_2(per_tile)))
    of_bins = {"STRIP": STRIP, "BLOCK_M": rows, "BLOCK_N": BLOCK_N, "num_warps": NUM_WARPS}
    return shape | of_lse, tile_bins_kernel, shape | of_bins


def tile_bins(quantized: QuantizedQK, tiling: Tiling) -> torch.Tensor:
    """``score_bins.tile_bins``, without waiting for the GPU.

    Returns:
        uint8 ``[h, T, S]``; the bins of every tile begin at a multiple of ``ALIGNED`` bytes.

    Raises:
        ValueError: the quantized have other types, or do not fit the tiling.
    """
    query, position, keys, dequant_scale = (part.contiguous() for part in quantized)
    heads, length, rank = keys.shape
    tiles, queries = tiling.num_tiles, query.shape[1]
    fits = query.shape == (heads, queries, rank) and position.shape == (heads, queries) and queries % tiles == 0
    if length != tiling.seq_len or not fits or dequant_scale.shape != (heads, tiles):
        raise ValueError(
            f"queries {list(query.shape)}, their positions {list(position.shape)} and scales "
            f"{list(dequant_scale.shape)}, and keys {list(keys.shape)} do not fit {tiles} tiles of a chunk of "
            f"{tiling.seq_len} tokens after {tiling.context_len}"
        )
    types = query.dtype, position.dtype, keys.dtype, dequant_scale.dtype
    if types != (torch.int8, torch.int32, torch.int8, torch.int16):
        raise ValueError(f"types must be int8, int32, int8 and int16, not {', '.join(map(str, types))}")
    lengths, per_tile = (tiling.context_len, tiling.seq_len), quantized.per_tile
    of_lse, bins_kernel, of_bins = launch_shape(rank, tiling.tile, per_tile, major_capability(query))
    parts = triton.cdiv(approx_lse.most_groups(length), approx_lse.GROUPS_PER_PART)
    lse = torch.empty(heads, parts, queries, device=query.device)
    programs = tiles * triton.cdiv(per_tile, of_lse["BLOCK_M"])
    launcher(approx_lse.approx_lse_kernel, (programs, heads, parts))(
        query, position, keys, dequant_scale, lse, *lengths, tiles, approx_lse.GROUPS_PER_PART, **of_lse
    )
    stride = triton.cdiv(length, ALIGNED) * ALIGNED
    bins = torch.empty(heads, tiles, stride, dtype=torch.uint8, device=query.device)
    groups = triton.cdiv(tiles, of_bins.get("TILES", 1))
    launcher(bins_kernel, (triton.cdiv(length, of_bins["STRIP"]), groups, heads))(
        query, keys, dequant_scale, lse, bins, stride, *lengths, tiles, parts, tiling.window, **of_bins
    )
    return bins[..., :length]
