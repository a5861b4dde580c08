"""Reductions over columns of a product that stay within a thread.

Tensor cores distribute a row of their result over four threads: columns 0 and 1 to the first, 2 and 3 to the second,
and from column 8 on to the first again. A reduction over the columns of one thread needs no exchange between threads,
which would cost more than the reduction. Columns are therefore ordered by thread, or each thread keeps a partial result
until the end. On GPUs with another layout results are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

THREADS = tl.constexpr(4)


@triton.jit
def thread_of(o_column):
    """Which of the four threads holds a column."""
    return o_column // 2 % THREADS


@triton.jit
def place_of(o_column):
    """A column's place among those of its thread."""
    return o_column // (2 * THREADS) * 2 + o_column % 2


@triton.jit
def max_in_thread(b_product, GROUPS: tl.constexpr):
    """``[M, GROUPS * 4]`` of ``[M, N]``: the maximum of each of GROUPS equal parts of each thread's columns. The thread
    is the fastest index."""
    M: tl.constexpr = b_product.shape[0]
    PAIRS: tl.constexpr = b_product.shape[1] // (2 * THREADS * GROUPS)
    b_max = tl.max(tl.max(tl.reshape(b_product, [M, GROUPS, PAIRS, THREADS, 2]), 4), 2)
    return tl.reshape(b_max, [M, GROUPS * THREADS])


@triton.jit
def columns_of_threads(b_product):
    """Split ``[M, N]``, N from 16 to 128, into ``N // 4`` tensors ``[M, 4]`` with one column of each thread."""
    M: tl.constexpr = b_product.shape[0]
    PLACES: tl.constexpr = b_product.shape[1] // THREADS
    b_places = tl.permute(tl.reshape(b_product, [M, PLACES // 2, THREADS, 2]), (0, 2, 1, 3))
    columns = _halves(_halves((tl.reshape(b_places, [M, THREADS, PLACES]),)))
    if PLACES >= 8:
        columns = _halves(columns)
    if PLACES >= 16:
        columns = _halves(columns)
    if PLACES >= 32:
        columns = _halves(columns)
    found = ()
    for i in tl.static_range(len(columns)):
        found += (tl.reshape(columns[i], [M, THREADS]),)  # type: ignore[assignment]
    return found


@triton.jit
def _halves(parts):
    """Split each ``[M, 4, n]`` into the even and the odd places."""
    found = ()
    for i in tl.static_range(len(parts)):
        b_even, b_odd = tl.split(tl.reshape(parts[i], [parts[i].shape[0], THREADS, parts[i].shape[2] // 2, 2]))
        found += (b_even, b_odd)  # type: ignore[assignment]
    return found
