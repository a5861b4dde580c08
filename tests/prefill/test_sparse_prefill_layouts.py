"""``sparse_prefill`` on tensors of any memory layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prefill_checks import BFLOAT16, FLOAT32, check

from minference_vllm.prefill.api import sparse_prefill


def heads_before_slots(cache: torch.Tensor) -> torch.Tensor:
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def with_gaps(cache: torch.Tensor) -> torch.Tensor:
    """Every dimension but the last has gaps between its elements, filled with NaN."""
    blocks, size, heads, dim = cache.shape
    wide = torch.full((blocks, 2 * size, heads + 1, dim + 16), torch.nan, dtype=cache.dtype)
    view = wide[:, ::2, 1:, 8 : 8 + dim]
    view.copy_(cache)
    return view


def dimensions_before_slots(cache: torch.Tensor) -> torch.Tensor:
    return cache.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


STRIDES = {
    "heads_before_slots": heads_before_slots,
    "gaps": with_gaps,
    "dimensions_before_slots": dimensions_before_slots,
}


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("layout", STRIDES)
def test_caches_of_any_strides(
    layout: str, dtype: torch.dtype, kernel_name: str, served_batch: Callable[..., Any], skip_unless_served: Any
) -> None:
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0], dtype=dtype)
    batch.key_cache, batch.value_cache = STRIDES[layout](batch.key_cache), STRIDES[layout](batch.value_cache)
    skip_unless_served(kernel_name, batch)
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name, return_index=True)
    check(batch, out, indices)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_keys_and_values_side_by_side_in_one_tensor(
    dtype: torch.dtype, kernel_name: str, served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0], dtype=dtype)
    both = torch.cat([batch.key_cache, batch.value_cache], -1)
    batch.key_cache, batch.value_cache = both[..., :64], both[..., 64:]
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name, return_index=True)
    check(batch, out, indices)


def test_keys_and_values_of_different_strides(served_batch: Callable[..., Any], kernel_name: str) -> None:
    batch = served_batch(query_lens=[200], context_lens=[100])
    batch.value_cache = heads_before_slots(batch.value_cache)
    if kernel_name == "triton":
        with pytest.raises(ValueError, match="keys and values must lie at the same strides"):
            sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name)
        return
    kernel = "auto" if kernel_name == "native" else kernel_name
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel, return_index=True)
    check(batch, out, indices)


def test_queries_and_outputs_may_be_views(kernel_name: str, served_batch: Callable[..., Any]) -> None:
    """Queries as a slice of a fused QKV projection, outputs as a slice of a wider buffer."""
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0])
    fused = torch.full((290, 12, 64), torch.nan, dtype=BFLOAT16)
    fused[:, :8] = batch.query
    wide = torch.full((290, 10, 80), torch.nan, dtype=BFLOAT16)
    out = wide[:, 1:9, 8:72]
    batch.query = fused[:, :8]
    _, indices = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name, out=out, return_index=True)
    check(batch, out, indices)
    out.fill_(torch.nan)
    assert torch.isnan(wide).all(), "something was written beside the output"


def test_queries_and_outputs_with_the_head_dimension_outside(
    kernel_name: str, served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0])
    batch.query = batch.query.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    out = torch.full((64, 290, 8), torch.nan, dtype=BFLOAT16).permute(1, 2, 0)
    _, indices = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name, out=out, return_index=True)
    check(batch, out, indices)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_block_tables_and_lengths_of_any_integer_type_and_stride(
    dtype: torch.dtype, kernel_name: str, served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[200, 90], context_lens=[100, 0])
    wide = torch.full((2, 3 * batch.block_table.shape[1]), -7, dtype=dtype)
    wide[:, ::3] = batch.block_table
    batch.block_table = wide[:, ::3]
    batch.query_start_loc, batch.seq_lens = batch.query_start_loc.to(dtype), batch.seq_lens.to(dtype)
    out, indices = sparse_prefill(*batch.arguments, batch.patterns, kernel=kernel_name, return_index=True)
    check(batch, out, indices)
