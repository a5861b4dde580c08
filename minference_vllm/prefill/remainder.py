"""The remainder: the keys that a tile leaves out still take part in its softmax, together as one key with one value.

Let ``U`` be the keys before a tile that its index does not name (of a sliding window those that all of its rows see),
and ``q0`` the mean of the tile's queries. With ``p_j`` the softmax of ``scale * q0.k_j`` over ``U``, the remainder is
the key ``kbar = sum p_j k_j``, the value ``vbar = sum p_j v_j`` and the bias
``log sum exp(scale * q0.k_j) - scale * q0.kbar``. A row ``q`` of the tile gives it the logit ``scale * q.kbar + bias``:
the log-sum-exp of its own logits over ``U`` to first order around ``q0``, and by Jensen's inequality never more.
Selected keys are chosen for their weights, so their mean value is not that of the keys left out (an attention sink has
a value near zero): without the remainder a row's output lacks what the many small weights have in common.

``U`` is sampled, one key in ``sample_step``: each of its keys has a small weight, and a few hundred give its mean. So
the cost does not grow with the prompt. The remainder is merged by log-sum-exp with what a kernel computed under the
index, so that kernels know nothing of it. ``reference.with_remainder`` is the definition.

Sizes: ``H`` query heads over KV heads of size ``D``, ``h`` of them at once, ``T`` query tiles, ``n`` sampled keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from minference_vllm.core.inputs import Inputs
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.core.tiling import Tiling
from minference_vllm.selection.probe_queries import cap_

SAMPLED_KEYS = 2048
"""At least so many keys of a sequence are sampled, all of them where there are no more, and less than twice as many."""


class Remainder(NamedTuple):
    """One key and value for every tile of some heads, float32."""

    key: torch.Tensor
    """``[T, h, D]``."""
    value: torch.Tensor
    """``[T, h, D]``."""
    bias: torch.Tensor
    """``[T, h]``: added to the scaled product; -inf where a tile leaves nothing out."""


def sample_step(seq_len: int) -> int:
    """One key in so many is sampled."""
    return max(1, seq_len // SAMPLED_KEYS)


def sampled_positions(seq_len: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 ``[n]``, ascending: one key of each ``sample_step`` neighbours, at ever other places among them."""
    step = sample_step(seq_len)
    first = torch.arange(seq_len // step, device=device)
    # The golden ratio's multiples, in 16 bits, fall evenly between 0 and 1.
    return first * step + first * 40503 % 65536 * step // 65536


def by_tile(rows: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """``[chunk, ...]`` -> ``[T, tile, ...]``, zeros where a tile's row lies outside the chunk."""
    before, after = tiling.context_len % tiling.tile, -tiling.seq_len % tiling.tile
    padded = rows.new_zeros(before + len(rows) + after, *rows.shape[1:])
    padded[before : before + len(rows)] = rows
    return padded.unflatten(0, (-1, tiling.tile))


def of_tiles(inputs: Inputs, index: SparseIndex, heads: slice) -> Remainder:
    """The remainder of every tile. Nothing waits for a GPU, and equal inputs give equal results.

    Args:
        heads: query heads wanted.
    """
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
        # No row sees them, and their pages may be another request's.
        for rows in (keys, values):
            rows.masked_fill_((positions <= tiling.context_len - tiling.window)[:, None], 0.0)
    counts = tiling.starts.diff()
    queries = by_tile(inputs.query[:, heads].float(), tiling).sum(1) / counts[:, None, None]  # [T, h, D]
    logits = cap_(torch.matmul(queries.transpose(0, 1), keys.transpose(1, 2)).mul_(inputs.scale), inputs.softcap)
    # Keys of the tile's own pages are named by the index, later ones come after its rows.
    present = index.names(positions, heads) | (positions >= tiling.starts[:-1, None])
    if tiling.window:
        present |= positions < tiling.starts[1:, None] - tiling.window
    total = logits.masked_fill_(present, -torch.inf).logsumexp(2)  # [h, T]
    weights = logits.sub_(total.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp_()
    key, value = (torch.matmul(weights, rows).transpose(0, 1) for rows in (keys, values))
    at_mean = cap_((queries * key).sum(2).mul_(inputs.scale), inputs.softcap)
    return Remainder(key, value, total.T - at_mean + math.log(sample_step(tiling.seq_len)))


def add(inputs: Inputs, index: SparseIndex, heads: Sequence[int], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Add what tiles leave out to the attention of some heads, in place.

    Args:
        index: what ``out`` was computed under.
        heads: query heads wanted, ascending.
        out: ``[chunk, H, D]``, attention under the index; becomes that with the remainder.
        lse: float32 ``[H, chunk]``, natural log-sum-exp of each row's scores under the index, a sink's included.
    """
    tiling = index.tiling
    first = tiling.context_len % tiling.tile
    tile = torch.arange(first, first + len(out), device=out.device) // tiling.tile
    for run in runs(heads):
        remainder = of_tiles(inputs, index, run)
        query = by_tile(inputs.query[:, run].float(), tiling)  # [T, tile, h, D]
        logits = cap_((query * remainder.key[:, None]).sum(3).mul_(inputs.scale), inputs.softcap)
        logits += remainder.bias[:, None]
        # Share of the remainder in the row's softmax; a row attends itself, so that its own log-sum-exp is finite.
        share = torch.sigmoid(logits.flatten(0, 1)[first : first + len(out)] - lse[run].T)[..., None]
        out[:, run] = torch.lerp(out[:, run].float(), remainder.value[tile], share).to(out.dtype)


def add_to_rows(inputs: Inputs, index: SparseIndex, rows: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """``add`` for all heads of some rows of the chunk (int64 ``[R]``): out ``[H, R, D]``, lse ``[H, R]``."""
    remainder = of_tiles(inputs, index, slice(0, inputs.num_heads))
    tile = torch.searchsorted(index.tiling.starts, rows + index.tiling.context_len, right=True) - 1
    logits = (inputs.query[rows].float() * remainder.key[tile]).sum(2).mul_(inputs.scale)
    logits = cap_(logits, inputs.softcap) + remainder.bias[tile]
    share = torch.sigmoid(logits.T - lse)[..., None]
    out.lerp_(remainder.value[tile].transpose(0, 1), share)


def runs(heads: Sequence[int]) -> Iterator[slice]:
    """Neighbouring heads. Slices, since a list as an index would be copied to a GPU, and waited for."""
    for _, run in itertools.groupby(enumerate(heads), key=lambda item: item[1] - item[0]):
        items = [head for _, head in run]
        yield slice(items[0], items[-1] + 1)
