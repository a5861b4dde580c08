"""How far down each head's bins are needed (``measured_rows.CalibrationRows.threshold``), in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minference_vllm.selection.measured_rows import MOST_MISSED, STANDARD_ERRORS, DrawnRows
from minference_vllm.triton_kernels.launch import launcher

ROWS, NUM_WARPS = 16, 4
"""Of one step."""


@triton.jit
def _lowest(b_missed, missable):
    """The highest bin down to which no more is missed than that; 0 where there is none."""
    return tl.max(tl.where(b_missed <= missable, tl.arange(0, 256), 0), 0)


@triton.jit(do_not_specialize=["num_sampled", "num_last", "num_rows"])
def threshold_kernel(
    p_mass, p_threshold, num_sampled, num_last, num_rows, missable, row_missable, errors,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the threshold of one head.

    ``p_mass`` is int32 ``[h, num_rows, 256]``: of rows that are a sample, of the chunk's last ones, and of unlike ones.
    ``p_threshold`` is int32 ``[h]``.
    """
    i_slot = tl.program_id(0)
    o_bin = tl.arange(0, 256)
    b_sampled, b_squares = tl.zeros([256], dtype=tl.float32), tl.zeros([256], dtype=tl.float32)
    b_last, b_unlike = tl.zeros([256], dtype=tl.float32), tl.zeros([256], dtype=tl.float32)
    b_most = tl.zeros([256], dtype=tl.float32)
    for i_row in range(0, num_rows, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        o_mass = (i_slot * num_rows + o_row)[:, None] * 256 + o_bin[None, :]
        m_row = o_row < num_rows
        b_mass = tl.load(p_mass + o_mass, mask=m_row[:, None], other=0)
        b_below = (tl.cumsum(b_mass, 1) - b_mass).to(tl.float32)
        # A row without any attention, of keys that are not numbers, makes the head dense.
        b_missed = b_below / tl.where(m_row, tl.sum(b_mass, 1), 1).to(tl.float32)[:, None]
        m_sampled, m_unlike = o_row < num_sampled, (o_row >= num_sampled + num_last) & m_row
        m_last = (o_row >= num_sampled) & (o_row < num_sampled + num_last)
        b_sample = tl.where(m_sampled[:, None], b_missed, 0.0)
        b_sampled += tl.sum(b_sample, 0)
        b_squares += tl.sum(b_sample * b_sample, 0)
        b_last += tl.sum(tl.where(m_last[:, None], b_missed, 0.0), 0)
        b_unlike += tl.sum(tl.where(m_unlike[:, None], b_missed, 0.0), 0)
        b_most = tl.maximum(b_most, tl.max(tl.where((m_last | m_unlike)[:, None], b_missed, 0.0), 0))
    b_mean = b_sampled / num_sampled
    b_error = tl.sqrt(tl.maximum(b_squares / num_sampled - b_mean * b_mean, 0.0) / num_sampled)
    found = _lowest(b_mean + errors * b_error, missable)
    found = tl.minimum(found, _lowest(b_last / tl.maximum(num_last, 1), missable))
    num_unlike = num_rows - num_sampled - num_last
    found = tl.minimum(found, _lowest(b_unlike / tl.maximum(num_unlike, 1), missable))
    found = tl.minimum(found, _lowest(b_most, row_missable))
    tl.store(p_threshold + i_slot, found)


def thresholds(mass: torch.Tensor, drawn: DrawnRows, gamma: float) -> torch.Tensor:
    """int32 ``[h]``: the bin down to which every group of the measured rows has its share.

    Args:
        mass: int32 ``[h, R, 256]``, of ``chunk_queries.measured_rows``.
    """
    found = torch.empty(len(mass), dtype=torch.int32, device=mass.device)
    missable = 1 - gamma
    launcher(threshold_kernel, (len(mass),))(
        mass, found, drawn.sampled, drawn.last, mass.shape[1], missable, min(1.0, MOST_MISSED * missable),
        STANDARD_ERRORS, ROWS=ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return found
