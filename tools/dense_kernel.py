"""Minimal dense causal flash attention in Triton: the baseline of ``kernel_account.py`` for our kernel.

Contiguous keys and values, no pages, no lists; compiled like our kernel, but never run.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK, NUM_WARPS, NUM_STAGES = 128, 8, 3
"""The fastest shape on Hopper for heads of 64 and 128."""


@triton.jit
def _step(
    b_query, p_key, p_value, b_out, b_sum, b_max, scale_log2, m_score,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    b_score = tl.dot(b_query, tl.trans(tl.load(p_key)))
    if CAUSAL:
        b_score = tl.where(m_score, b_score, -float("inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * scale_log2)
    b_weight = tl.exp2(b_score * scale_log2 - b_new_max[:, None])
    b_decay = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
    b_out = tl.dot(b_weight.to(b_query.dtype), tl.load(p_value), b_out * b_decay[:, None])
    return b_out, b_sum, b_new_max


@triton.jit
def dense_kernel(
    p_query,
    p_key,
    p_value,
    p_out,
    stride_row,
    stride_head,
    scale_log2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program computes BLOCK rows of one head: first the keys before them, BLOCK per step, then their own."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    o_key, o_dim = tl.arange(0, BLOCK), tl.arange(0, D)
    own = i_tile * BLOCK
    o_row = own + o_key
    o_query = i_head.to(tl.int64) * stride_head + (o_row[:, None] * stride_row + o_dim[None, :])
    b_query = tl.load(p_query + o_query)
    o_kv_head = (i_head // GROUP).to(tl.int64) * stride_head
    o_tile = o_key[:, None] * stride_row + o_dim[None, :]
    p_key_tile, p_value_tile = p_key + o_kv_head + o_tile, p_value + o_kv_head + o_tile
    b_out = tl.zeros([BLOCK, D], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    b_max = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    for first in range(0, own, BLOCK):
        o_step = first * stride_row
        b_out, b_sum, b_max = _step(
            b_query, p_key_tile + o_step, p_value_tile + o_step, b_out, b_sum, b_max, scale_log2, o_key, False
        )
    o_half = tl.arange(0, BLOCK // 2)
    o_tile = o_half[:, None] * stride_row + o_dim[None, :]
    p_key, p_value = p_key + o_kv_head, p_value + o_kv_head
    for first in range(own, own + BLOCK, BLOCK // 2):
        m_score = first + o_half[None, :] <= o_row[:, None]
        o_step = first * stride_row
        b_out, b_sum, b_max = _step(
            b_query, p_key + o_step + o_tile, p_value + o_step + o_tile, b_out, b_sum, b_max, scale_log2, m_score, True
        )
    tl.store(p_out + o_query, (b_out / b_sum[:, None]).to(p_out.dtype.element_ty))
