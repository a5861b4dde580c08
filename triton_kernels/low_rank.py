"""The score bins of ``low_rank``, of all rows of a tile; ``representative_bins.py`` has those of representatives.

Products are computed twice, once for what each row's scores are measured by and once for the bins, and never stored.
Exponential units would be the bottleneck: there is one exponential per row and ``PEAK_KEYS`` keys, and none per key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minference_vllm.core.tiling import Tiling
from minference_vllm.selection import score_bins
from minference_vllm.selection.projection import QuantizedQK
from minference_vllm.triton_kernels import representative_bins
from minference_vllm.triton_kernels.column_diagonal import add_scores, combined
from minference_vllm.triton_kernels.launch import launcher, major_capability
from minference_vllm.triton_kernels.representative_bins import LOCAL_BIN, PEAK_KEYS, as_bins, bits, codes


@triton.jit
def _rows(p_rows, o_row, m_row, RANK: tl.constexpr, R: tl.constexpr):
    """``codes`` as bf16, which holds them exactly."""
    return codes(p_rows, o_row, m_row, RANK, R).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _peaks(b_score):
    """The largest score of each PEAK_KEYS: ``[BLOCK_M, STEP / PEAK_KEYS]``."""
    STEP: tl.constexpr = b_score.shape[1]
    return tl.max(tl.reshape(b_score, [b_score.shape[0], STEP // PEAK_KEYS, PEAK_KEYS]), 2)


# Lengths differ from chunk to chunk and are not specialised on, or serving would stop to compile now and then.
@triton.jit(do_not_specialize=["context_len", "seq_len", "num_queries"])
def peak_lse_kernel(
    p_query,
    p_key,
    p_scale,
    p_lse,
    context_len,
    seq_len,
    num_queries,
    keys_per_part,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: for BLOCK_M queries of one head, the log-sum-exp over one part of the sequence of the largest score
    of each PEAK_KEYS keys, in bits.

    ``p_lse`` is float32 ``[h, parts, num_queries]``. Parts are multiples of STEP, and STEP of PEAK_KEYS.
    """
    i_block, i_head, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < num_queries
    p_query += i_head.to(tl.int64) * num_queries * RANK
    p_key += i_head.to(tl.int64) * seq_len * RANK
    b_query = _rows(p_query, o_row, m_row, RANK, R)
    b_bits = bits(p_scale + i_head.to(tl.int64) * num_queries, o_row, m_row)
    o_last = context_len + o_row
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    begin = i_part * keys_per_part
    end = tl.minimum(begin + keys_per_part, tl.minimum(tl.max(o_last, 0) + 1, seq_len))
    # The keys that all queries see, and those that some do.
    border = tl.maximum(begin, tl.minimum(end, tl.min(o_last, 0) + 1) // STEP * STEP)
    for i_key in range(begin, border, STEP):
        o_key = i_key + tl.arange(0, STEP)
        b_score = tl.dot(b_query, tl.trans(_rows(p_key, o_key, o_key < end, RANK, R))) * b_bits[:, None]
        b_sum, b_max = add_scores(b_sum, b_max, _peaks(b_score))
    for i_key in range(border, end, STEP):
        o_key = i_key + tl.arange(0, STEP)
        b_score = tl.dot(b_query, tl.trans(_rows(p_key, o_key, o_key < end, RANK, R))) * b_bits[:, None]
        b_score = tl.where(o_key[None, :] <= o_last[:, None], b_score, -float("inf"))
        b_sum, b_max = add_scores(b_sum, b_max, _peaks(b_score))
    p_lse += (i_head * tl.num_programs(2) + i_part).to(tl.int64) * num_queries
    tl.store(p_lse + o_row, b_max + tl.log2(b_sum), mask=m_row)


@triton.jit
def _tile_rows(
    p_query, p_scale, p_lse, first, i_down, count, num_queries, num_parts, RANK: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Queries ``first + i_down`` and on of a tile's ``count``, ``[BLOCK_M, R]``, what their products count for, and
    their lse."""
    o_down = i_down + tl.arange(0, BLOCK_M)
    o_row = first + o_down
    m_row = (o_down < count) & (o_row >= 0) & (o_row < num_queries)
    # Rows that are not there come near no key.
    b_lse = tl.where(m_row, combined(p_lse + o_row, num_queries, num_parts, m_row), float("inf"))
    return _rows(p_query, o_row, m_row, RANK, R), bits(p_scale, o_row, m_row), b_lse


@triton.jit
def _nearest(b_key, b_query, b_bits, b_lse):
    """How near each key comes to the row that rates it highest: ``[BLOCK_N]``."""
    return tl.max(tl.dot(b_key, tl.trans(b_query)) * b_bits[None, :] - b_lse[None, :], 1)


@triton.jit(do_not_specialize=["context_len", "seq_len", "num_queries", "num_tiles", "num_parts", "window"])
def tile_bins_kernel(
    p_query,
    p_key,
    p_scale,
    p_lse,
    p_bins,
    stride_bins,
    context_len,
    seq_len,
    num_queries,
    num_tiles,
    num_parts,
    window,
    RANK: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: the bins of STRIP keys for one tile of one head.

    ``p_lse`` is float32 ``[h, num_parts, num_queries]``, ``p_bins`` uint8 ``[h, T, stride_bins]``.
    """
    i_strip, i_tile, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = (context_len // TILE + i_tile) * TILE
    first_seen = tl.where(window > 0, tl.maximum(tl.maximum(own, context_len) - window + 1, 0), 0)
    begin, stop = i_strip * STRIP, tl.minimum((i_strip + 1) * STRIP, tl.minimum(own + TILE, seq_len))
    p_bins += (i_head * num_tiles + i_tile).to(tl.int64) * stride_bins
    if begin < stop:
        p_query += i_head.to(tl.int64) * num_queries * RANK
        p_key += i_head.to(tl.int64) * seq_len * RANK
        p_scale += i_head.to(tl.int64) * num_queries
        p_lse += i_head.to(tl.int64) * num_parts * num_queries
        before = tl.minimum(stop, own)
        first = own - context_len
        b_query, b_bits, b_lse = _tile_rows(
            p_query, p_scale, p_lse, first, 0, TILE, num_queries, num_parts, RANK, R, BLOCK_M
        )  # fmt: skip
        for i_key in range(begin, before, BLOCK_N):
            o_key = i_key + tl.arange(0, BLOCK_N)
            b_key = _rows(p_key, o_key, o_key < before, RANK, R)
            b_best = _nearest(b_key, b_query, b_bits, b_lse)
            for i_down in range(BLOCK_M, TILE, BLOCK_M):
                b_more, b_their_bits, b_their_lse = _tile_rows(
                    p_query, p_scale, p_lse, first, i_down, TILE, num_queries, num_parts, RANK, R, BLOCK_M
                )  # fmt: skip
                b_best = tl.maximum(b_best, _nearest(b_key, b_more, b_their_bits, b_their_lse))
            b_bin = tl.where(o_key >= first_seen, as_bins(b_best), 0.0)
            tl.store(p_bins + o_key, b_bin.to(tl.uint8), mask=o_key < before)
        for i_key in range(tl.maximum(begin, own), stop, BLOCK_N):
            o_key = i_key + tl.arange(0, BLOCK_N)
            tl.store(p_bins + o_key, tl.full([BLOCK_N], LOCAL_BIN, dtype=tl.uint8), mask=o_key < stop)
    # What comes after the tile.
    for i_key in range(tl.maximum(begin, stop), tl.minimum(begin + STRIP, seq_len), BLOCK_N):
        o_key = i_key + tl.arange(0, BLOCK_N)
        tl.store(p_bins + o_key, tl.zeros([BLOCK_N], dtype=tl.uint8), mask=o_key < tl.minimum(begin + STRIP, seq_len))


BLOCK_M, STEP, BLOCK_N, NUM_WARPS = 64, 128, 64, 4
KEYS_PER_PART, STRIP = 8192, 2048
"""Keys of one program, of either kernel."""
ALIGNED = 128
"""Bytes that bins of a tile begin at multiples of, so that they are read many at once."""


def launch_shape(rank: int, tile: int, per_tile: int, major: int = 9) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the kernel of denominators, and of the one of bins.

    Args:
        per_tile: see ``QuantizedQK``.
        major: compute capability.
    """
    # Tensor cores take 32 whole numbers at once.
    shape = {"RANK": rank, "R": max(32 if per_tile else 16, triton.next_power_of_2(rank)), "num_warps": NUM_WARPS}
    if not per_tile:
        # A wide tile comes in several steps.
        rows = {"TILE": tile, "STRIP": STRIP, "BLOCK_M": max(16, min(128, triton.next_power_of_2(tile)))}
        return shape | {"BLOCK_M": BLOCK_M, "STEP": STEP}, shape | rows | {"BLOCK_N": BLOCK_N}
    shape |= {"TILE": tile, "PER_TILE": per_tile}
    wide = {"TILES": representative_bins.QUERIES // per_tile, "STRIP": representative_bins.STRIP}
    # Blackwell's registers would spill.
    wide["BLOCK_N"] = representative_bins.BLOCK_N // 2 if major == 10 else representative_bins.BLOCK_N
    return shape | {"BLOCK_M": representative_bins.BLOCK_M}, shape | wide


def tile_bins(quantized: QuantizedQK, tiling: Tiling) -> torch.Tensor:
    """``score_bins.tile_bins``, without waiting for the GPU, of all keys.

    Returns:
        uint8 ``[h, T, S]``; the bins of every tile begin at a multiple of ``ALIGNED`` bytes.

    Raises:
        ValueError: the quantized have other types, or do not fit the tiling.
    """
    query, keys, dequant_scale = (part.contiguous() for part in quantized[:3])
    heads, length, rank = keys.shape
    tiles, per_tile = tiling.num_tiles, quantized.per_tile
    queries = tiles * per_tile or length - tiling.context_len
    if length != tiling.seq_len or query.shape != (heads, queries, rank) or dequant_scale.shape != (heads, queries):
        raise ValueError(
            f"queries {list(query.shape)}, their scales {list(dequant_scale.shape)} and keys {list(keys.shape)} do not "
            f"fit a chunk of {tiling.seq_len} tokens after {tiling.context_len}"
        )
    types = query.dtype, keys.dtype, dequant_scale.dtype
    if types != (torch.int8, torch.int8, torch.int16):
        raise ValueError(f"types must be int8, int8 and int16, not {', '.join(map(str, types))}")
    lengths = tiling.context_len, tiling.seq_len, queries
    of_rows, of_tiles = launch_shape(rank, tiling.tile, per_tile, major_capability(query))
    if per_tile:
        of_lse, of_bins = representative_bins.representative_lse_kernel, representative_bins.representative_bins_kernel
        per_part, groups = representative_bins.GROUPS_PER_PART, triton.cdiv(tiles, of_tiles["TILES"])
        parts = triton.cdiv(length, per_part * score_bins.PEAK_KEYS * score_bins.SAMPLED_GROUPS)
    else:
        of_lse, of_bins, per_part = peak_lse_kernel, tile_bins_kernel, KEYS_PER_PART
        parts, groups = triton.cdiv(length, per_part), tiles
    lse = torch.empty(heads, parts, queries, device=query.device)
    launcher(of_lse, (triton.cdiv(queries, of_rows["BLOCK_M"]), heads, parts))(
        query, keys, dequant_scale, lse, *lengths, per_part, **of_rows
    )
    stride = triton.cdiv(length, ALIGNED) * ALIGNED
    bins = torch.empty(heads, tiles, stride, dtype=torch.uint8, device=query.device)
    launcher(of_bins, (triton.cdiv(length, of_tiles["STRIP"]), groups, heads))(
        query, keys, dequant_scale, lse, bins, stride, *lengths, tiles, parts, tiling.window, **of_tiles
    )
    return bins[..., :length]
