"""The threshold of each head in one launch: ``threshold`` and ``sampling_threshold`` of
``measured_rows.CalibrationRows``.

The missed share is known at a few levels (``calibration.LEVELS``), and its square root is interpolated linearly between
them. The missed share grows faster than linearly and slower than exponentially: linear interpolation would list 3 %
more keys than needed, this 1 %. Thresholds err towards too low, and never reach the next level, at which too much is
missed. A head that misses too much at the lowest level is computed densely.

For heads that sample their keys, "missed" is the variance of a row's output. A key below the threshold adds the square
of its share times a weight that doubles with every bit (``score_bins.noise_by_threshold``), approximated as piecewise
linear between the knots of ``calibration.FIRST_KNOT``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minference_vllm.patterns.kinds import LowRank
from minference_vllm.selection.measured_rows import MOST_MISSED, MOST_NOISE, STANDARD_ERRORS, DrawnRows
from minference_vllm.selection.projection import BINS_PER_BIT
from minference_vllm.selection.score_bins import MAX_CODE
from minference_vllm.triton_kernels.calibration import FIRST_KNOT, LEVELS, NUM_LEVELS, RAMP
from minference_vllm.triton_kernels.launch import launcher

ROWS, NUM_WARPS = 64, 4
"""Rows per step, and warps."""
WIDTH = tl.constexpr(triton.next_power_of_2(NUM_LEVELS.value))
WEIGHTS = tl.constexpr((2.33, 10.65, 41.28, 166.54, 802.2))
"""Increase of a square's weight over each ramp below the threshold. The lines from 0 through the partial sums have the
mean of ``2 ** bits - 1`` on every ramp but the last, and end at the weight of keys with the minimum sampling
probability."""
NUM_RAMPS = tl.constexpr(len(WEIGHTS.value))
assert NUM_RAMPS.value * RAMP.value == MAX_CODE and round(sum(WEIGHTS.value)) == 2 ** (MAX_CODE // BINS_PER_BIT) - 1


@triton.jit
def _highest(b_missed, b_level, missable):
    """The highest bin below which at most ``missable`` is missed; 0 if there is none. ``b_missed`` and ``b_level``:
    float32 ``[WIDTH]``."""
    o_level = tl.arange(0, WIDTH)
    # NaN counts as too much.
    failing = tl.min(tl.where((b_missed <= missable) & (o_level < NUM_LEVELS), WIDTH, o_level), 0)
    m_below, m_above = o_level == failing - 1, o_level == tl.minimum(failing, NUM_LEVELS - 1)
    below, above = tl.sum(tl.where(m_below, b_level, 0.0), 0), tl.sum(tl.where(m_above, b_level, 0.0), 0)
    least, most = tl.sum(tl.where(m_below, b_missed, 0.0), 0), tl.sum(tl.where(m_above, b_missed, 0.0), 0)
    least, root = tl.sqrt(tl.maximum(least, 0.0)), tl.sqrt(tl.maximum(most, 0.0))
    found = below + (above - below) * (tl.sqrt(missable) - least) / tl.where(root > least, root - least, 1.0)
    # Nothing is known above the highest level. The next level must not be reached, not even by rounding.
    found = tl.where(failing < NUM_LEVELS, tl.where(most > missable, tl.minimum(found, above - 1.0), 0.0), below)
    return tl.where(failing > 0, found, 0.0).to(tl.int32)


@triton.jit(do_not_specialize=["num_sampled", "num_last", "num_rows", "num_parts"])
def threshold_kernel(
    p_levels, p_threshold, num_sampled, num_last, num_rows, num_parts, missable, row_missable, errors,
    ROWS: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """One program: the threshold of one head.

    ``p_levels`` is float32 ``[h, num_parts, 2 + NUM_LEVELS, num_rows]`` (``calibration.share_levels``): of the sampled
    rows, the chunk's last ones, and the outlier rows. ``p_threshold`` is int32 ``[h]``. If SQUARED, what may be missed
    is a variance.
    """
    i_slot = tl.program_id(0)
    p_levels += i_slot.to(tl.int64) * num_parts * (NUM_LEVELS + 2) * num_rows
    o_level = tl.arange(0, WIDTH)
    b_level = tl.zeros([WIDTH], dtype=tl.float32)
    for i_level in tl.static_range(NUM_LEVELS):
        level = FIRST_KNOT + RAMP * (i_level + 1.0) if SQUARED else LEVELS[i_level] + 0.0
        b_level = tl.where(o_level == i_level, level, b_level)
    b_sampled, b_squares = tl.zeros([WIDTH], dtype=tl.float32), tl.zeros([WIDTH], dtype=tl.float32)
    b_last, b_unlike = tl.zeros([WIDTH], dtype=tl.float32), tl.zeros([WIDTH], dtype=tl.float32)
    b_most = tl.zeros([WIDTH], dtype=tl.float32)
    for i_row in range(0, num_rows, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        m_row = o_row < num_rows
        m_sum = m_row[:, None] & (o_level < NUM_LEVELS)[None, :]
        b_max = tl.full([ROWS], -float("inf"), dtype=tl.float32)
        b_total, b_missed = tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS, WIDTH], dtype=tl.float32)
        for i_part in range(num_parts):
            p_part = p_levels + i_part * (NUM_LEVELS + 2) * num_rows
            b_their_max = tl.load(p_part + o_row, mask=m_row, other=0.0)
            b_new_max = tl.maximum(b_max, b_their_max)
            b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
            b_ours, b_theirs = tl.exp2(b_max - b_shift), tl.exp2(b_their_max - b_shift)
            b_total = b_total * b_ours + tl.load(p_part + num_rows + o_row, mask=m_row, other=1.0) * b_theirs
            if SQUARED:
                b_more = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
                for i_ramp in tl.static_range(NUM_RAMPS):
                    # Keys below the first knot count as if they had the minimum sampling probability.
                    o_sum = (tl.maximum(o_level - i_ramp, 0) + 2)[None, :] * num_rows + o_row[:, None]
                    b_more += WEIGHTS[i_ramp] * tl.load(p_part + o_sum, mask=m_sum, other=0.0)
                b_ours, b_theirs = b_ours * b_ours, b_theirs * b_theirs
            else:
                b_more = tl.load(p_part + (o_level + 2)[None, :] * num_rows + o_row[:, None], mask=m_sum, other=0.0)
            b_missed = b_missed * b_ours[:, None] + b_more * b_theirs[:, None]
            b_max = b_new_max
        # A row without any attention, because of NaN keys, makes the head dense.
        b_missed = b_missed / (b_total * b_total if SQUARED else b_total)[:, None]
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
    found = _highest(b_mean + errors * b_error, b_level, missable)
    found = tl.minimum(found, _highest(b_last / tl.maximum(num_last, 1), b_level, missable))
    num_unlike = num_rows - num_sampled - num_last
    found = tl.minimum(found, _highest(b_unlike / tl.maximum(num_unlike, 1), b_level, missable))
    found = tl.minimum(found, _highest(b_most, b_level, row_missable))
    tl.store(p_threshold + i_slot, found)


def thresholds(levels: torch.Tensor, drawn: DrawnRows, pattern: LowRank) -> torch.Tensor:
    """int32 ``[h]``: the lowest bin that must be selected so that every group of the measured rows keeps its share, or
    the bin below which keys may be sampled.

    Args:
        levels: float32 ``[h, parts, 2 + NUM_LEVELS, R]``, see ``calibration.share_levels``, of
            ``chunk_queries.measured_rows``; of squares if the pattern samples.
    """
    heads, parts, _, num_rows = levels.shape
    found = torch.empty(heads, dtype=torch.int32, device=levels.device)
    missable, most = 1 - pattern.gamma, min(1.0, MOST_MISSED * (1 - pattern.gamma))
    if pattern.samples:
        missable, most = pattern.noise**2, (MOST_NOISE * pattern.noise) ** 2
    launcher(threshold_kernel, (heads,))(
        levels, found, drawn.sampled, drawn.last, num_rows, parts, missable, most, STANDARD_ERRORS, ROWS=ROWS,
        SQUARED=pattern.samples, num_warps=NUM_WARPS,
    )  # fmt: skip
    return found
