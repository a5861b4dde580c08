"""Bad arguments of ``sparse_prefill``: each is a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prefill_checks import BFLOAT16, FLOAT16

from minference_vllm.kernels.native import attention as native
from minference_vllm.patterns.kinds import Dense
from minference_vllm.prefill.attend import sparse_prefill

NAMES = ("query", "key_cache", "value_cache", "block_table", "query_start_loc", "seq_lens")


def cut_heads(query: torch.Tensor) -> torch.Tensor:
    return query[:, :7]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    # what is wrong: (argument -> value or function of the good value, message)
    "engine": ({"engine": "cuda"}, "engine must be one of auto, block_table"),
    "query_flat": ({"query": lambda q: q.flatten(1)}, r"query must be \[num_tokens, num_heads, head_size\]"),
    "query_heads": ({"query": cut_heads, "patterns": [Dense()] * 7}, "query has 7 heads.*multiple of KV heads"),
    "query_head_size": ({"query": lambda q: q[..., :32]}, "query has 8 heads of size 32, the cache 2 of size 64"),
    "query_dtype": ({"query": lambda q: q.double()}, "query and caches must share one of .*bfloat16.* not .*float64"),
    "cache_dtype": ({"key_cache": lambda k: k.half()}, "query and caches must share one of"),
    "value_dtype": ({"value_cache": lambda v: v.half()}, "query and caches must share one of"),
    "cache_flat": ({"key_cache": lambda k: k.flatten(2)}, "key_cache and value_cache must both be"),
    "cache_shapes": ({"value_cache": lambda v: v[:-1]}, "key_cache and value_cache must both be"),
    "patterns_too_few": ({"patterns": [Dense()] * 7}, "7 patterns for 8 query heads"),
    "patterns_too_many": ({"patterns": [Dense()] * 9}, "9 patterns for 8 query heads"),
    "patterns_none": ({"patterns": []}, "0 patterns for 8 query heads"),
    "out_shape": ({"out": torch.empty(289, 8, 64, dtype=BFLOAT16)}, "out must be like query"),
    "out_dtype": ({"out": torch.empty(290, 8, 64)}, "out must be like query"),
    "starts_too_few": ({"query_start_loc": lambda s: s[:-1]}, "2 seq_lens need 3 query_start_loc entries"),
    "starts_not_at_0": ({"query_start_loc": torch.tensor([1, 200, 290])}, "query_start_loc must rise from 0 to 290"),
    "starts_end_early": ({"query_start_loc": torch.tensor([0, 200, 280])}, "query_start_loc must rise from 0 to 290"),
    "starts_fall": ({"query_start_loc": torch.tensor([0, 300, 290])}, "query_start_loc must rise"),
    "no_new_tokens": ({"query_start_loc": torch.tensor([0, 290, 290])}, "request 1 has no new tokens"),
    "seq_len_short": ({"seq_lens": torch.tensor([300, 89])}, r"seq_lens\[1\] = 89 is less than"),
    "seq_len_long": ({"seq_lens": torch.tensor([300, 900])}, "request 1 needs 29 blocks, block_table has"),
    "seq_len_0": (
        {"seq_lens": torch.tensor([300, 0]), "query_start_loc": torch.tensor([0, 290, 290])},
        "request 1 has no new tokens",
    ),
    "table_rows": ({"block_table": lambda t: t[:1]}, "as many block_table rows as requests"),
    "table_flat": ({"block_table": lambda t: t[0]}, "as many block_table rows as requests"),
    "table_negative": ({"block_table": lambda t: -1 - t}, r"block_table\[0\] names blocks outside the cache's"),
    "table_too_large": ({"block_table": lambda t: t + 1000}, r"block_table\[0\] names blocks outside the cache's"),
    "tile_0": ({"tile": 0}, "tile"),
    "tile_negative": ({"tile": -128}, "tile"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str, paged_batch: Callable[..., Any]) -> None:
    changes, message = BAD[name]
    batch = paged_batch(query_lens=[200, 90], context_lens=[100, 0])
    arguments: dict[str, Any] = {**dict(zip(NAMES, batch.arguments, strict=True)), "patterns": Dense()}
    for argument, change in changes.items():
        arguments[argument] = change(arguments[argument]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        sparse_prefill(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"head_size": 72}, {"head_size": 8}, {"block_size": 8}, {"block_size": 24}, {"block_size": 1}],
    ids=str,
)
@pytest.mark.parametrize("engine", ["auto", "block_table", "native"])
def test_sizes_that_no_engine_serves_are_refused(
    engine: str, arguments: dict[str, int], paged_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether or not this machine could run it.
    monkeypatch.setattr(native, "unavailable_reason", lambda dtype=None: None)
    batch = paged_batch(**arguments)
    with pytest.raises(ValueError, match=r"pages? .*|head size|heads of size"):
        sparse_prefill(*batch.arguments, Dense(), engine=engine)


@pytest.mark.parametrize("arguments", [{"dtype": FLOAT16}, {"block_size": 16}], ids=["float16", "pages_of_16"])
def test_native_says_why_it_cannot(arguments: dict[str, Any], paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(**arguments)
    with pytest.raises(ValueError, match=r"engine 'native' cannot run: .+"):
        sparse_prefill(*batch.arguments, Dense(), engine="native")
