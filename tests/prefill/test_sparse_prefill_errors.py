"""Bad arguments of ``sparse_prefill``: each is a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from prefill_checks import BFLOAT16

from minference_vllm.kernels.native import library
from minference_vllm.patterns.kinds import AShape, Dense
from minference_vllm.prefill.api import sparse_prefill

NAMES = ("query", "key_cache", "value_cache", "block_table", "query_start_loc", "seq_lens")


def cut_heads(query: torch.Tensor) -> torch.Tensor:
    return query[:, :7]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    # what is wrong: (argument -> value or function of the good value, message)
    "kernel": ({"kernel": "cuda"}, "kernel must be one of auto, block_table"),
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
    # Tensors
    **{
        f"{name}_{kind}": ({name: change}, message.format(name=name))
        for name in NAMES
        for kind, change, message in (
            ("missing", None, "{name} must be a torch.Tensor, not None"),
            ("list", lambda t: t.tolist(), "{name} must be a torch.Tensor, not a list"),
            ("numpy", lambda t: t.float().numpy(), "{name} must be a torch.Tensor, not a ndarray"),
            ("sparse", lambda t: t.to_sparse(), "{name} must be a strided tensor, not one of layout torch.sparse_coo"),
        )
    },
    **{
        f"{name}_on_meta": ({name: lambda t: t.to("meta")}, rf"{name} must be on query's device, cpu,.* not on meta")
        for name in NAMES[1:]
    },
    "query_on_meta": ({"query": lambda q: q.to("meta")}, "query must be on one of cpu, cuda, not on meta"),
    "all_on_meta": ({name: lambda t: t.to("meta") for name in NAMES}, "query must be on one of cpu, cuda, not on meta"),
    **{
        f"{name}_{dtype}": ({name: lambda t, dtype=dtype: t.to(dtype)}, f"{name} must be int32 or int64, not {dtype}")
        for name in NAMES[3:]
        for dtype in (torch.float32, torch.float64, torch.bool, torch.int16, torch.uint8, torch.complex64)
    },
    **{
        f"{name}_with_gradients": (
            {name: lambda t: t.clone().requires_grad_()},
            f"{name} requires gradients, which are not computed here",
        )
        for name in NAMES[:3]
    },
    # Nothing to do
    **{
        f"query_without_{what}": ({"query": change}, r"query must be \[num_tokens, .*each at least 1, not \(")
        for what, change in (
            ("tokens", lambda q: q[:0]),
            ("heads", lambda q: q[:, :0]),
            ("elements", lambda q: q[..., :0]),
        )
    },
    **{
        f"cache_without_{what}": (
            {"key_cache": change, "value_cache": change},
            r"key_cache and value_cache must both be .*each at least 1, not \(",
        )
        for what, change in (
            ("blocks", lambda c: c[:0]),
            ("slots", lambda c: c[:, :0]),
            ("heads", lambda c: c[:, :, :0]),
            ("elements", lambda c: c[..., :0]),
        )
    },
    "no_heads_at_all": (
        {"query": lambda q: q[:, :0], **dict.fromkeys(NAMES[1:3], lambda c: c[:, :, :0]), "patterns": []},
        "query must be .*each at least 1",
    ),
    "no_requests": (
        {"query_start_loc": lambda s: s[:1], "seq_lens": lambda s: s[:0], "block_table": lambda t: t[:0]},
        "seq_lens .*of at least 1 request",
    ),
    "empty_batch": (
        {
            "query": lambda q: q[:0],
            "query_start_loc": lambda s: s[:1],
            "seq_lens": lambda s: s[:0],
            "block_table": lambda t: t[:0],
        },
        "query must be .*each at least 1",
    ),
    "starts_flat": ({"query_start_loc": lambda s: s[0]}, r"query_start_loc must be \[num_requests \+ 1\].* not \(\)"),
    "starts_as_column": ({"query_start_loc": lambda s: s[:, None]}, r"query_start_loc must be .* not \(3, 1\)"),
    "seq_lens_flat": ({"seq_lens": lambda s: s[0]}, r"seq_lens \[num_requests\].* not \(3,\) and \(\)"),
    "table_without_columns": ({"block_table": lambda t: t[:, :0]}, "needs 10 blocks, block_table has 0 columns"),
    # Patterns
    **{
        f"patterns_{name}": ({"patterns": value}, f"patterns must be one of Dense, AShape, .*, not {shown}")
        for name, value, shown in (
            ("string", "dense", "'dense'"),
            ("class", AShape, "the class AShape"),
            ("dictionary", {"kind": "dense"}, "a dict"),
            ("number", 3, "3"),
            ("generator", (Dense() for _ in range(8)), "a generator"),
        )
    },
    **{
        f"a_pattern_{name}": (
            {"patterns": [*[Dense()] * 5, value, *[Dense()] * 2]},
            rf"patterns\[5\] must be one of Dense, AShape, .*, not {shown}",
        )
        for name, value, shown in (
            ("string", "dense", "'dense'"),
            ("missing", None, "None"),
            ("class", AShape, "the class AShape"),
            ("dictionary", {"kind": "dense"}, "a dict"),
        )
    },
    # Numbers
    **{
        f"scale_{value!r}": ({"scale": value}, "scale must be a number above 0 that float32 holds, or None")
        for value in (
            float("nan"),
            float("inf"),
            -float("inf"),
            np.float32("nan"),
            0,
            0.0,
            -0.1,
            1e39,
            10**400,
            True,
            "0.1",
            [0.1],
        )
    },
    "scale_tensor": ({"scale": torch.tensor(0.1)}, "scale must be a number above 0 .*, not a Tensor"),
    **{
        f"tile_{value!r}": ({"tile": value}, "tile must be an integer of at least 1 row, or None for the default, not")
        for value in (0, -128, 1.5, 128.0, float("nan"), True, False, "128", [128], np.float64(128), np.int64(0))
    },
    # Names
    **{
        f"kernel_{name}": ({"kernel": value}, f"must be one of auto, block_table, fa4, native, triton, not {shown}")
        for name, value, shown in (
            ("missing", None, "None"),
            ("list", ["auto"], "a list"),
            ("tensor", torch.zeros(4), "a Tensor"),
            ("class", str, "the class str"),
            ("case", "Auto", "'Auto'"),
        )
    },
    "return_index": ({"return_index": "yes"}, "return_index must be True or False, not 'yes'"),
    # Outputs
    "out_list": ({"out": []}, "out must be a torch.Tensor, not a list"),
    "out_on_meta": (
        {"out": torch.empty(290, 8, 64, dtype=BFLOAT16, device="meta")},
        "out must be on query's device, cpu, not on meta",
    ),
    "out_with_gradients": (
        {"out": torch.empty(290, 8, 64, dtype=BFLOAT16, requires_grad=True)},
        "out requires gradients",
    ),
    "out_expanded": (
        {"out": torch.empty(1, 8, 64, dtype=BFLOAT16).expand(290, 8, 64)},
        "out must have memory for every element",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str, paged_batch: Callable[..., Any]) -> None:
    changes, message = BAD[name]
    batch = paged_batch(query_lens=[200, 90], context_lens=[100, 0])
    arguments: dict[str, Any] = {**dict(zip(NAMES, batch.arguments, strict=True)), "patterns": Dense()}
    for argument, change in changes.items():
        arguments[argument] = change(arguments[argument]) if isinstance(change, FunctionType) else change
    with pytest.raises(ValueError, match=message):
        sparse_prefill(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"head_size": 72}, {"head_size": 8}, {"block_size": 8}, {"block_size": 24}, {"block_size": 1}],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["auto", "block_table", "native"])
def test_sizes_that_no_kernel_serves_are_refused(
    kernel: str, arguments: dict[str, int], paged_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether or not this machine could run it.
    monkeypatch.setattr(library, "unavailable_reason", lambda dtype=None: None)
    batch = paged_batch(**arguments)
    with pytest.raises(ValueError, match=r"pages? .*|head size|heads of size"):
        sparse_prefill(*batch.arguments, Dense(), kernel=kernel)


@pytest.mark.parametrize("arguments", [{"head_size": 288}, {"block_size": 16}], ids=["heads_of_288", "pages_of_16"])
def test_native_says_why_it_cannot(arguments: dict[str, Any], paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(**arguments)
    with pytest.raises(ValueError, match=r"kernel 'native' cannot run: .+"):
        sparse_prefill(*batch.arguments, Dense(), kernel="native")


@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache"])
def test_outputs_in_another_arguments_memory_are_refused(name: str, paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(query_lens=[256], heads=2, block_size=32)
    tensor = getattr(batch, name)
    out = tensor.as_strided(batch.query.shape, batch.query.stride())
    with pytest.raises(ValueError, match=f"out must have memory of its own, not {name}'s"):
        sparse_prefill(*batch.arguments, Dense(), out=out)


def test_numbers_of_any_type_that_fits(paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch(query_lens=[200, 90], context_lens=[100, 0])
    expected = sparse_prefill(*batch.arguments, batch.patterns, scale=0.125, tile=64)
    for scale, tile in ((np.float32(0.125), np.int64(64)), (np.float64(0.125), np.uint8(64)), (Fraction(1, 8), 64)):
        assert torch.equal(sparse_prefill(*batch.arguments, batch.patterns, scale=scale, tile=tile), expected)
    long = [part.long() for part in batch.arguments[3:]]
    assert torch.equal(sparse_prefill(*batch.arguments[:3], *long, tuple(batch.patterns), 0.125, tile=64), expected)


def test_a_tile_larger_than_the_prompt_takes_all_of_it(kernel_name: str, served_batch: Callable[..., Any]) -> None:
    """However large: 2 ** 40 rows would not fit into memory, nor into the kernels' integers."""
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0], heads=18)
    patterns = [*batch.patterns[:8], *batch.adaptive_patterns[:10]]
    found, indices = sparse_prefill(*batch.arguments, patterns, kernel=kernel_name, tile=1 << 40, return_index=True)
    assert torch.equal(found, sparse_prefill(*batch.arguments, patterns, kernel=kernel_name, tile=320))
    assert [index.num_tiles for index in indices] == [1, 1]


def test_tensors_with_gradients_are_served_where_none_are_wanted(paged_batch: Callable[..., Any]) -> None:
    batch = paged_batch()
    expected = sparse_prefill(*batch.arguments, batch.patterns)
    batch.query.requires_grad_()
    with torch.no_grad():
        found = sparse_prefill(*batch.arguments, batch.patterns)
    assert torch.equal(found, expected) and not found.requires_grad
