"""The score bins of ``low_rank``, from int8 queries and keys in few dimensions.

Products are computed once and never stored. ``approx_lse.py`` has the log-sum-exp that is subtracted from them,
``tile_bins.py`` the bins for all rows of a tile, and ``representative_bins.py`` those for representatives.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.projection import QuantizedQK
from minference_vllm.triton_kernels import approx_lse, representative_bins
from minference_vllm.triton_kernels import tile_bins as bins_by_tile
from minference_vllm.triton_kernels.in_thread import THREADS
from minference_vllm.triton_kernels.launch import launcher, major_capability

ALIGNED = 128
"""Alignment of a tile's bins in bytes, for vectorised loads."""


def launch_shape(
    rank: int, tile: int, per_tile: int, count: int = 0, major: int = 9
) -> tuple[dict[str, int], Any, dict[str, int]]:
    """Constants of ``approx_lse_kernel``, the kernel of bins, and its constants.

    Args:
        per_tile: see ``QuantizedQK``.
        count: number of queries of most tiles; 0: ``per_tile``.
        major: compute capability.
    """
    # Tensor cores take 32 int8 numbers at once.
    shape = {"RANK": rank, "R": max(32, triton.next_power_of_2(rank)), "TILE": tile, "PER_TILE": per_tile}
    of_lse = {"BLOCK_M": approx_lse.BLOCK_M, "num_warps": approx_lse.NUM_WARPS}
    rows = min(bins_by_tile.BLOCK_M, max(16, triton.next_power_of_2(per_tile)))
    of_bins = {"STRIP": bins_by_tile.STRIP, "BLOCK_M": rows, "BLOCK_N": bins_by_tile.BLOCK_N}
    of_bins |= {"num_warps": bins_by_tile.NUM_WARPS}
    tiles = representative_bins.QUERIES // max(count, 1)
    if triton.next_power_of_2(count) == count > 1 and tiles >= THREADS.value:
        # Blackwell would spill registers otherwise.
        keys = representative_bins.BLOCK_N // (2 if major == 10 else 1)
        of_bins |= {"KEYS_ALONE": of_bins["BLOCK_N"], "STRIP": representative_bins.STRIP, "BLOCK_N": keys}
        of_bins |= {"COUNT": count, "TILES": tiles}
        return shape | of_lse, representative_bins.representative_bins_kernel, shape | of_bins
    return shape | of_lse, bins_by_tile.tile_bins_kernel, shape | of_bins


def tile_bins(quantized: QuantizedQK, tiling: Tiling, count: int = 0) -> torch.Tensor:
    """``score_bins.tile_bins``, without a host synchronisation.

    Args:
        count: see ``launch_shape``.

    Returns:
        uint8 ``[h, T, S]``; the bins of every tile begin at a multiple of ``ALIGNED`` bytes.

    Raises:
        ValueError: ``quantized`` has other types, or does not fit the tiling.
    """
    query, position, there, keys, dequant_scale = (part.contiguous() for part in quantized)
    heads, length, rank = keys.shape
    tiles, queries = tiling.num_tiles, query.shape[1]
    fits = query.shape == (heads, queries, rank) and position.shape == (heads, queries) and queries % tiles == 0
    if length != tiling.seq_len or not fits or not there.shape == dequant_scale.shape == (heads, tiles):
        raise ValueError(
            f"queries {list(query.shape)}, their positions {list(position.shape)}, counts {list(there.shape)} and "
            f"scales {list(dequant_scale.shape)}, and keys {list(keys.shape)} do not fit {tiles} tiles of a chunk of "
            f"{tiling.seq_len} tokens after {tiling.context_len}"
        )
    types = query.dtype, position.dtype, there.dtype, keys.dtype, dequant_scale.dtype
    if types != (torch.int8, torch.int32, torch.int32, torch.int8, torch.int16):
        raise ValueError(f"types must be int8, int32, int32, int8 and int16, not {', '.join(map(str, types))}")
    lengths, per_tile = (tiling.context_len, tiling.seq_len), quantized.per_tile
    of_lse, bins_kernel, of_bins = launch_shape(rank, tiling.tile, per_tile, count, major_capability(query))
    parts = triton.cdiv(approx_lse.most_groups(length), approx_lse.GROUPS_PER_PART)
    lse = torch.empty(heads, parts, queries, device=query.device)
    programs = tiles * triton.cdiv(per_tile, of_lse["BLOCK_M"])
    launcher(approx_lse.approx_lse_kernel, (programs, heads, parts))(
        query, position, there, keys, dequant_scale, lse, *lengths, tiles, approx_lse.GROUPS_PER_PART, **of_lse
    )
    stride = triton.cdiv(length, ALIGNED) * ALIGNED
    bins = torch.empty(heads, tiles, stride, dtype=torch.uint8, device=query.device)
    groups = triton.cdiv(tiles, of_bins.get("TILES", 1))
    launcher(bins_kernel, (triton.cdiv(length, of_bins["STRIP"]), groups, heads))(
        query, there, keys, dequant_scale, lse, bins, stride, *lengths, tiles, parts, tiling.window, **of_bins
    )
    return bins[..., :length]
