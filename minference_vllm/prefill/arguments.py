"""Checks of all arguments of ``sparse_prefill``, before anything is computed.

The kernels get raw addresses and sizes and do not check them again.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Sequence
from typing import Any, get_args

import torch

from minference_vllm.kernels.choose import DTYPES, KERNELS
from minference_vllm.patterns.kinds import HeadPattern

DEVICES = ("cpu", "cuda")
_PATTERN_CLASSES = get_args(get_args(HeadPattern)[0])


def check_arguments(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    patterns: HeadPattern | Sequence[HeadPattern] | None,
    scale: float | None,
    kernel: str,
    tile: int | None,
    out: torch.Tensor | None,
    return_index: bool,
) -> None:
    """Check the arguments of ``sparse_prefill``, each on its own and against each other.

    Raises:
        ValueError: for the first invalid argument; the message names it, what was found and what is allowed.
    """
    if not isinstance(kernel, str) or kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, not {_shown(kernel)}")
    if tile is not None and not (_is_a(tile, numbers.Integral) and tile >= 1):
        raise ValueError(f"tile must be an integer of at least 1 row, or None for the default, not {_shown(tile)}")
    # Kernels take it as float32. NaN fails both comparisons.
    if scale is not None and not (_is_a(scale, numbers.Real) and 0 < scale <= torch.finfo(torch.float32).max):
        raise ValueError(
            "scale must be a number above 0 that float32 holds, or None for head_size ** -0.5, not " + _shown(scale)
        )
    if not isinstance(return_index, bool):
        raise ValueError(f"return_index must be True or False, not {_shown(return_index)}")
    tensors = {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_table": block_table,
        "query_start_loc": query_start_loc,
        "seq_lens": seq_lens,
    }
    _check_kind(tensors if out is None else tensors | {"out": out})
    _check_shapes(query, key_cache, value_cache)
    if patterns is not None:
        _check_patterns(patterns, query.shape[1])
    if out is not None:
        _check_out(out, query, key_cache, value_cache)
    _check_requests(block_table, query_start_loc, seq_lens, len(query), *key_cache.shape[:2])


def _check_kind(tensors: dict[str, torch.Tensor]) -> None:
    """Check types, layouts, gradients, devices and integer dtypes of the tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, not {_shown(tensor)}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a strided tensor, not one of layout {tensor.layout}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires gradients, which are not computed here: call under torch.no_grad()")
    device = tensors["query"].device
    if device.type not in DEVICES:
        raise ValueError(f"query must be on one of {', '.join(DEVICES)}, not on {device}")
    for name, tensor in tensors.items():
        if name in ("query_start_loc", "seq_lens"):
            if tensor.device not in (device, torch.device("cpu")):
                raise ValueError(f"{name} must be on query's device, {device}, or on the CPU, not on {tensor.device}")
        elif tensor.device != device:
            raise ValueError(f"{name} must be on query's device, {device}, not on {tensor.device}")
    for name in ("block_table", "query_start_loc", "seq_lens"):
        if tensors[name].dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, not {tensors[name].dtype}")


def _check_shapes(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    if query.dim() != 3 or 0 in query.shape:
        raise ValueError(f"query must be [num_tokens, num_heads, head_size], each at least 1, not {tuple(query.shape)}")
    if key_cache.dim() != 4 or key_cache.shape != value_cache.shape or 0 in key_cache.shape:
        raise ValueError(
            "key_cache and value_cache must both be [num_blocks, block_size, num_kv_heads, head_size], each at least "
            f"1, not {tuple(key_cache.shape)} and {tuple(value_cache.shape)}"
        )
    if query.dtype not in DTYPES or key_cache.dtype != query.dtype or value_cache.dtype != query.dtype:
        raise ValueError(
            f"query and caches must share one of {', '.join(map(str, DTYPES))}, not "
            f"{query.dtype}, {key_cache.dtype}, {value_cache.dtype}"
        )
    _, heads, dim = query.shape
    _, _, kv_heads, cache_dim = key_cache.shape
    if dim != cache_dim or heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads of size {dim}, the cache {kv_heads} of size {cache_dim}: sizes must agree and "
            "query heads be a multiple of KV heads"
        )


def _check_patterns(patterns: HeadPattern | Sequence[HeadPattern], heads: int) -> None:
    kinds = ", ".join(kind.__name__ for kind in _PATTERN_CLASSES)
    if isinstance(patterns, _PATTERN_CLASSES):
        return
    if not isinstance(patterns, Sequence) or isinstance(patterns, str | bytes):
        raise ValueError(f"patterns must be one of {kinds}, or a list of one per head, not {_shown(patterns)}")
    for head, pattern in enumerate(patterns):
        if not isinstance(pattern, _PATTERN_CLASSES):
            raise ValueError(f"patterns[{head}] must be one of {kinds}, not {_shown(pattern)}")
    if len(patterns) != heads:
        raise ValueError(f"{len(patterns)} patterns for {heads} query heads; give one per head, or one for all")


def _check_out(out: torch.Tensor, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(
            f"out must be like query, {tuple(query.shape)} {query.dtype}, not {tuple(out.shape)} {out.dtype}"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out must have memory for every element, not be expanded (strides {out.stride()})")
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if out.data_ptr() == tensor.data_ptr():
            raise ValueError(f"out must have memory of its own, not {name}'s")


def _check_requests(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tokens: int,
    blocks: int,
    block_size: int,
) -> None:
    if query_start_loc.dim() != 1 or seq_lens.dim() != 1 or not len(seq_lens):
        raise ValueError(
            "query_start_loc must be [num_requests + 1] and seq_lens [num_requests], of at least 1 request, not "
            f"{tuple(query_start_loc.shape)} and {tuple(seq_lens.shape)}"
        )
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    if len(starts) != len(lengths) + 1 or block_table.dim() != 2 or block_table.shape[0] != len(lengths):
        raise ValueError(
            f"{len(lengths)} seq_lens need {len(lengths) + 1} query_start_loc entries and as many block_table rows as "
            f"requests; found {len(starts)} and {tuple(block_table.shape)}"
        )
    if starts[0] != 0 or starts[-1] != tokens or any(b < a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"query_start_loc must rise from 0 to {tokens} (the query rows), not {starts}")
    for request, length in enumerate(lengths):
        if starts[request] == starts[request + 1]:
            raise ValueError(f"request {request} has no new tokens")
        if length < starts[request + 1] - starts[request]:
            raise ValueError(f"seq_lens[{request}] = {length} is less than the request's new tokens")
        needed = -(-length // block_size)
        if needed > block_table.shape[1]:
            raise ValueError(f"request {request} needs {needed} blocks, block_table has {block_table.shape[1]} columns")
        used = block_table[request, :needed]
        if int(used.min()) < 0 or int(used.max()) >= blocks:
            raise ValueError(f"block_table[{request}] names blocks outside the cache's {blocks}")


def _is_a(value: Any, kind: type) -> bool:
    """Whether the value is a number of this kind. Booleans are not, though they are integers in Python."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """How a message shows an invalid value: itself if it is a number, a string or None, else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, str | numbers.Number):
        return repr(value)
    return f"a {type(value).__name__}"
