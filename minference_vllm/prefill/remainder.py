"""The remainder: the keys that a tile leaves out take part in its softmax together, as one key with one value.

Let ``U`` be the keys before a tile that its index does not name (with a sliding window: that all of its rows see),
and ``q0`` the mean of the tile's queries. With ``p_j`` the softmax of ``scale * q0.k_j`` over ``U``, the remainder is
the key ``kbar = sum p_j k_j``, the value ``vbar = sum p_j v_j`` and the bias
``log sum exp(scale * q0.k_j) - scale * q0.kbar``. For a row ``q`` of the tile its logit is ``scale * q.kbar + bias``:
the log-sum-exp of the row's own logits over ``U`` to first order around ``q0``, and by Jensen's inequality never more.
Keys are selected for their weights, so their mean value is not that of the keys left out (an attention sink has a value
near zero). Without the remainder a row's output lacks what the many small weights have in common.

``U`` is sampled, one key in ``sample_step``, so that the cost does not grow with the prompt: each key has a small
weight, and a few hundred suffice for the mean. Our own kernels take the remainder as one more key; the output of other
kernels is merged with it by log-sum-exp. ``reference.with_remainder`` is the definition.

Sizes: ``H`` query heads over KV heads of size ``D``, ``h`` of them at once, ``T`` query tiles, ``n`` sampled keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.remainder import Remainder, sample_step, sampled_positions
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.build import runs
from minference_vllm.selection.probe_queries import cap_


def by_tile(rows: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """``[chunk, ...]`` -> ``[T, tile, ...]``, zeros where a tile's row lies outside the chunk; a view if none does."""
    before, after = tiling.context_len % tiling.tile, -tiling.seq_len % tiling.tile
    if before or after:
        padded = rows.new_zeros(before + len(rows) + after, *rows.shape[1:])
        padded[before : before + len(rows)] = rows
        rows = padded
    return rows.unflatten(0, (-1, tiling.tile))


def of_heads(inputs: Inputs, index: SparseIndex, heads: Sequence[int]) -> Remainder:
    """The remainder of every tile for some heads; all others get none (a bias of -inf).

    Args:
        heads: query heads that have one, ascending.
    """
    found = [(run, of_tiles(inputs, index, run)) for _, run in runs(heads)]
    if len(found) == 1 and len(heads) == inputs.num_heads:
        return found[0][1]
    shape = (inputs.num_heads, index.num_tiles, inputs.cache.head_size)
    key, value = inputs.query.new_zeros(2, *shape, dtype=torch.float32)
    bias = key.new_full(shape[:2], -torch.inf)
    for run, part in found:
        key[run], value[run], bias[run] = part
    return Remainder(key, value, bias)


def of_tiles(inputs: Inputs, index: SparseIndex, heads: slice) -> Remainder:
    """The remainder of every tile for a slice of heads. Deterministic, and without a host synchronisation."""
    tiling, cache = index.tiling, inputs.cache
    positions = sampled_positions(tiling.seq_len, inputs.query.device)
    kv_heads = torch.arange(cache.num_kv_heads, device=positions.device)[:, None].expand(-1, len(positions))
    pages, slots = (
        part.expand(kv_heads.shape)
        for part in (inputs.pages[positions // cache.block_size], positions % cache.block_size)
    )
    keys, values = (
        rows.float().mul_(scale).repeat_interleave(inputs.group, 0)[heads]
        for rows, scale in zip(
            cache.gather_rows(pages, slots, kv_heads), (cache.key_scale, cache.value_scale), strict=True
        )
    )
    if tiling.window:
        # No row sees these keys, and their pages may belong to another request.
        for rows in (keys, values):
            rows.masked_fill_((positions <= tiling.context_len - tiling.window)[:, None], 0.0)
    queries = by_tile(inputs.query[:, heads], tiling).sum(1, dtype=torch.float32) / tiling.starts.diff()[:, None, None]
    queries = queries.transpose(0, 1)  # [h, T, D]
    logits = cap_(torch.matmul(queries, keys.transpose(1, 2)).mul_(inputs.scale), inputs.softcap)
    # The index has all keys of the tile's own pages; later ones come after its rows.
    present = index.names(positions, heads) | (positions >= tiling.starts[:-1, None])
    if tiling.window:
        present |= positions < tiling.starts[1:, None] - tiling.window
    total = logits.masked_fill_(present, -torch.inf).logsumexp(2)  # [h, T]
    weights = logits.sub_(total.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp_()
    key, value = torch.matmul(weights, keys), torch.matmul(weights, values)
    at_mean = cap_((queries * key).sum(2).mul_(inputs.scale), inputs.softcap)
    return Remainder(key, value, total - at_mean + math.log(sample_step(tiling.seq_len)))


def add(inputs: Inputs, index: SparseIndex, remainder: Remainder, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Add the remainder to attention that was computed without it, in place.

    Args:
        index: the index that ``out`` was computed with.
        out: ``[chunk, H, D]``, attention under the index; updated in place.
        lse: float32 ``[H, chunk]``, natural log-sum-exp of each row's scores under the index, including a sink.
    """
    tiling = index.tiling
    key, value, bias = (part.transpose(0, 1) for part in remainder)  # [T, H, ...]
    first = tiling.context_len % tiling.tile
    logits = (by_tile(inputs.query.float(), tiling) * key[:, None]).sum(3).mul_(inputs.scale)
    logits = cap_(logits, inputs.softcap).add_(bias[:, None]).flatten(0, 1)[first : first + len(out)]
    # Share of the remainder in the row's softmax. A row attends itself, so its own log-sum-exp is finite.
    share = torch.sigmoid(logits - lse.T)[..., None]
    tile = torch.arange(first, first + len(out), device=out.device) // tiling.tile
    out.copy_(torch.lerp(out.float(), value[tile], share))


def add_to_rows(inputs: Inputs, index: SparseIndex, rows: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """``add`` for some rows of the chunk (int64 ``[R]``), for all heads except those that sample keys: out
    ``[H, R, D]``, lse ``[H, R]``."""
    key, value, bias = of_tiles(inputs, index, slice(0, inputs.num_heads))
    tile = torch.searchsorted(index.tiling.starts, rows + index.tiling.context_len, right=True) - 1
    logits = (inputs.query[rows].float().transpose(0, 1) * key[:, tile]).sum(2).mul_(inputs.scale)
    logits = cap_(logits, inputs.softcap) + bias[:, tile]
    share = torch.sigmoid(logits - lse)
    share[list(index.sampled)] = 0.0
    out.lerp_(value[:, tile], share[..., None])
