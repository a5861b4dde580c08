"""The remainder: the keys that a tile leaves out still take part in its softmax, together as one key with one value.

Let ``U`` be the keys before a tile that its index does not name (of a sliding window those that all of its rows see),
and ``q0`` the mean of the tile's queries. With ``p_j`` the softmax of ``scale * q0.k_j`` over ``U``, the remainder is
the key ``kbar = sum p_j k_j``, the value ``vbar = sum p_j v_j`` and the bias
``log sum exp(scale * q0.k_j) - scale * q0.kbar``. A row ``q`` of the tile gives it the logit ``scale * q.kbar + bias``:
the log-sum-exp of its own logits over ``U`` to first order around ``q0``, and by Jensen's inequality never more.
Selected keys are chosen for their weights, so their mean value is not that of the keys left out (an attention sink has
a value near zero): without the remainder a row's output lacks what the many small weights have in common.

That is the first order. To the second, in the ``r`` dimensions in which scores vary most, let ``y`` be how ``q``
differs from ``q0``, ``C`` the covariance of the keys of ``U`` under ``p_j`` and ``J`` theirs with the values. The row's
log-sum-exp gains ``y'Cy / 2``, and its value is ``vbar + y'J``: the next terms of the Taylor series of the softmax
over ``U``. Both are bounded, as rows may lie far from the mean: the first by ``MOST_SPREAD``, and ``y'J`` is divided by
``1 + y'Cy / 4``, which leaves it no longer than the values' standard deviation (Cauchy and Schwarz). Soft-capped scores
are no products of keys, and keep the first order.

``U`` is sampled, one key in ``sample_step``: each of its keys has a small weight, and a few hundred give its mean. So
the cost does not grow with the prompt. Our own kernels take it as one more key; with what other kernels computed under
the index it is merged by log-sum-exp. ``reference.with_remainder`` is the definition.

Sizes: ``H`` query heads over ``HK`` KV heads of size ``D``, ``h`` at once, ``T`` query tiles, ``n`` sampled keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import (
    MOST_SPREAD,
    NUM_DIMENSIONS,
    Dimensions,
    Remainder,
    SecondOrder,
    sample_step,
    sampled_positions,
)
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.build import runs
from minference_vllm.selection.probe_queries import cap_
from minference_vllm.selection.projection import fit

FIT_ROWS = 1024
"""Rows of a chunk, and keys, to which the dimensions are fitted, at most about."""


def by_tile(rows: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """``[chunk, ...]`` -> ``[T, tile, ...]``, zeros where a tile's row lies outside the chunk; a view if none does."""
    before, after = tiling.context_len % tiling.tile, -tiling.seq_len % tiling.tile
    if before or after:
        padded = rows.new_zeros(before + len(rows) + after, *rows.shape[1:])
        padded[before : before + len(rows)] = rows
        rows = padded
    return rows.unflatten(0, (-1, tiling.tile))


def mean_queries(inputs: Inputs, tiling: Tiling) -> torch.Tensor:
    """float32 ``[H, T, D]``: the mean query of every tile."""
    total = by_tile(inputs.query, tiling).sum(1, dtype=torch.float32)
    return (total / tiling.starts.diff()[:, None, None]).transpose(0, 1)


def sampled_rows(inputs: Inputs, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[HK, n, D]`` each: keys and values at some positions (int64 ``[n]``)."""
    cache = inputs.cache
    kv_heads = torch.arange(cache.num_kv_heads, device=positions.device)[:, None].expand(-1, len(positions))
    pages, slots = (
        part.expand(kv_heads.shape)
        for part in (inputs.pages[positions // cache.block_size], positions % cache.block_size)
    )
    keys, values = cache.gather_rows(pages, slots, kv_heads)
    return keys.float().mul_(cache.key_scale), values.float().mul_(cache.value_scale)


def dimensions(inputs: Inputs, tiling: Tiling) -> Dimensions | None:
    """The dimensions in which the chunk's scores differ most from those of their tiles' mean queries; None with a soft
    cap. Fitted to some rows and keys."""
    if inputs.softcap:
        return None
    means, group, dim = mean_queries(inputs, tiling), inputs.group, inputs.cache.head_size
    rows = torch.arange(0, len(inputs.query), -(-len(inputs.query) // FIT_ROWS), device=inputs.query.device)
    tile = torch.searchsorted(tiling.starts, rows + tiling.context_len, right=True) - 1
    differences = inputs.query[rows].float().transpose(0, 1) - means[:, tile]
    step = tiling.seq_len // FIT_ROWS
    positions = sampled_positions(tiling.seq_len, rows.device, max(1, step))
    positions = positions[positions > tiling.context_len - tiling.window] if tiling.window else positions
    keys, _ = sampled_rows(inputs, positions)
    rank = min(NUM_DIMENSIONS, dim)
    found = fit(differences.unflatten(0, (-1, group)).flatten(1, 2), keys, rank)
    to_query = found.to_query * inputs.scale
    query_mean = torch.matmul(means, to_query.repeat_interleave(group, 0))
    key_mean = torch.matmul(found.mean, found.to_key).squeeze(1)
    return Dimensions(*(part.contiguous() for part in (to_query, found.to_key, key_mean, query_mean)))


def of_heads(inputs: Inputs, index: SparseIndex, heads: Sequence[int], space: Dimensions | None = None) -> Remainder:
    """The remainder of every tile, and none for all other heads.

    Args:
        heads: query heads wanted, ascending.
        space: see ``dimensions``; None: to the first order.
    """
    found = [(run, of_tiles(inputs, index, run, space)) for _, run in runs(heads)]
    if len(found) == 1 and len(heads) == inputs.num_heads:
        return found[0][1]
    shape = inputs.num_heads, index.num_tiles, inputs.cache.head_size
    all_heads = Remainder.empty(*shape, inputs.query.device, space)
    for run, part in found:
        for into, of_some in zip(all_heads.parts(), part.parts(), strict=True):
            into[run] = of_some
    return all_heads


def of_tiles(inputs: Inputs, index: SparseIndex, heads: slice, space: Dimensions | None = None) -> Remainder:
    """The remainder of every tile, of some heads. Nothing waits for a GPU, and equal inputs give equal results."""
    tiling = index.tiling
    positions = sampled_positions(tiling.seq_len, inputs.query.device)
    keys, values = (rows.repeat_interleave(inputs.group, 0)[heads] for rows in sampled_rows(inputs, positions))
    if tiling.window:
        # No row sees them, and their pages may be another request's.
        for rows in (keys, values):
            rows.masked_fill_((positions <= tiling.context_len - tiling.window)[:, None], 0.0)
    queries = mean_queries(inputs, tiling)[heads]
    logits = cap_(torch.matmul(queries, keys.transpose(1, 2)).mul_(inputs.scale), inputs.softcap)
    # Keys of the tile's own pages are named by the index, later ones come after its rows.
    present = index.names(positions, heads) | (positions >= tiling.starts[:-1, None])
    if tiling.window:
        present |= positions < tiling.starts[1:, None] - tiling.window
    total = logits.masked_fill_(present, -torch.inf).logsumexp(2)  # [h, T]
    weights = logits.sub_(total.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp_()
    key, value = torch.matmul(weights, keys), torch.matmul(weights, values)
    at_mean = cap_((queries * key).sum(2).mul_(inputs.scale), inputs.softcap)
    bias = total - at_mean + math.log(sample_step(tiling.seq_len))
    if space is None:
        return Remainder(key, value, bias)
    to_key, middle = (part.repeat_interleave(inputs.group, 0)[heads] for part in (space.to_key, space.key_mean))
    low = torch.matmul(keys, to_key) - middle[:, None]
    mean = torch.matmul(weights, low)
    spread, slope = [], []
    for place in range(low.shape[2]):
        weighted = weights * low[:, None, :, place]
        spread.append(torch.matmul(weighted, low) - mean[..., place, None] * mean)
        slope.append(torch.matmul(weighted, values) - mean[..., place, None] * value)
    return Remainder(key, value, bias, SecondOrder(space, torch.stack(spread, 2), torch.stack(slope, 2)))


def add(inputs: Inputs, index: SparseIndex, remainder: Remainder, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Add the remainder to attention that was computed without it, in place.

    Args:
        index: what ``out`` was computed under.
        out: ``[chunk, H, D]``, attention under the index; becomes that with the remainder.
        lse: float32 ``[H, chunk]``, natural log-sum-exp of each row's scores under the index, a sink's included.
    """
    tiling = index.tiling
    first = tiling.context_len % tiling.tile
    rows, chunk = by_tile(inputs.query.float(), tiling), slice(first, first + len(out))
    logits = (rows * remainder.key.transpose(0, 1)[:, None]).sum(3).mul_(inputs.scale)
    logits = cap_(logits, inputs.softcap).add_(remainder.bias.T[:, None])
    # Share of the remainder in the row's softmax; a row attends itself, so that its own log-sum-exp is finite.
    tile = torch.arange(first, first + len(out), device=out.device) // tiling.tile
    logits, value = logits.flatten(0, 1)[chunk], remainder.value.transpose(0, 1)[tile]
    if remainder.second is not None:
        more, slopes = by_second_order(remainder.second, rows.permute(2, 0, 1, 3))  # [H, T, tile, ...]
        logits = logits + more.permute(1, 2, 0).flatten(0, 1)[chunk]
        value = value + slopes.permute(1, 2, 0, 3).flatten(0, 1)[chunk]
    share = torch.sigmoid(logits - lse.T)[..., None]
    out.copy_(torch.lerp(out.float(), value, share))


def by_second_order(second: SecondOrder, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the second order adds to the remainder's scores, float32 ``[H, T, n]``, and to its values, ``[H, T, n, D]``.

    Args:
        rows: float32 ``[H, T, n, D]``, some queries of each tile.
    """
    space = second.dimensions
    to_query = space.to_query.repeat_interleave(len(rows) // len(space.to_query), 0)
    low = torch.matmul(rows, to_query[:, None]) - space.query_mean[:, :, None]
    variance = (torch.matmul(low, second.spread) * low).sum(3)
    slopes = torch.matmul(low, second.slope) / (1 + 0.25 * variance)[..., None]
    return (0.5 * variance).clamp(max=MOST_SPREAD), slopes


def add_to_rows(
    inputs: Inputs,
    index: SparseIndex,
    rows: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    second_order: bool = False,
) -> None:
    """``add`` for all heads of some rows of the chunk (int64 ``[R]``): out ``[H, R, D]``, lse ``[H, R]``."""
    space = dimensions(inputs, index.tiling) if second_order else None
    key, value, bias, second = of_tiles(inputs, index, slice(0, inputs.num_heads), space)
    tile = torch.searchsorted(index.tiling.starts, rows + index.tiling.context_len, right=True) - 1
    queries = inputs.query[rows].float().transpose(0, 1)
    logits = (queries * key[:, tile]).sum(2).mul_(inputs.scale)
    logits, value = cap_(logits, inputs.softcap) + bias[:, tile], value[:, tile]
    if second is not None:
        space = second.dimensions
        space = space._replace(query_mean=space.query_mean[:, tile])
        second = SecondOrder(space, second.spread[:, tile], second.slope[:, tile])
        more, slopes = by_second_order(second, queries[:, :, None])
        logits, value = logits + more[..., 0], value + slopes[:, :, 0]
    out.lerp_(value, torch.sigmoid(logits - lse)[..., None])
