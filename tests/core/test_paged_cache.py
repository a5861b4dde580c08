"""Page layouts: reading back is the inverse of a packing that is written out here, element by element."""

from __future__ import annotations

import pytest
import torch

from minference_vllm.core.paged_cache import Layout, PagedCache, unpack_keys, unpack_values
from minference_vllm.kernels.block_table import cpu_ops

LAYOUTS: tuple[Layout, ...] = ("rows", "transposed", "amx")
SIZE, DIM = 32, 48


def pack_keys(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[B, D]`` keys as rows -> the page as stored."""
    size, dim = rows.shape
    page = torch.empty(size * dim, dtype=rows.dtype)
    for token in range(size):
        for d in range(dim):
            place = {
                "rows": token * dim + d,
                "transposed": d * size + token,
                "amx": ((token // 16 * (dim // 2) + d // 2) * 16 + token % 16) * 2 + d % 2,
            }[layout]
            page[place] = rows[token, d]
    return page.view(size, dim)


def pack_values(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    size, dim = rows.shape
    page = torch.empty(size * dim, dtype=rows.dtype)
    for token in range(size):
        for d in range(dim):
            place = token * dim + d
            if layout == "amx":
                place = ((d // 16 * (size // 2) + token // 2) * 16 + d % 16) * 2 + token % 2
            page[place] = rows[token, d]
    return page.view(size, dim)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def packed_cache(blocks: int, heads: int, layout: Layout) -> tuple[PagedCache, torch.Tensor, torch.Tensor]:
    """A cache, and its keys and values as rows: ``[blocks, heads, B, D]``."""
    keys = numbered(blocks, heads, SIZE, DIM)
    values = -keys
    stored = torch.full((blocks, heads, 2 * SIZE, DIM), torch.nan)
    for block in range(blocks):
        for head in range(heads):
            stored[block, head, :SIZE] = pack_keys(keys[block, head], layout)
            stored[block, head, SIZE:] = pack_values(values[block, head], layout)
    # Keys and values of a page are adjacent, as in vLLM's cache, so neither is contiguous.
    return PagedCache(stored[:, :, :SIZE], stored[:, :, SIZE:], layout), keys, values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size, dim", [(32, 32), (16, 64), (64, 48)])
def test_unpacking_is_the_inverse_of_packing(layout: Layout, size: int, dim: int) -> None:
    rows = numbered(size, dim)
    assert torch.equal(unpack_keys(pack_keys(rows, layout), layout), rows)
    assert torch.equal(unpack_values(pack_values(rows, layout), layout), rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpacking_takes_leading_dimensions(layout: Layout) -> None:
    cache, keys, values = packed_cache(3, 2, layout)
    assert torch.equal(unpack_keys(cache.key, layout), keys)
    assert torch.equal(unpack_values(cache.value, layout), values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_by_head_follow_the_named_pages(layout: Layout) -> None:
    cache, keys, _ = packed_cache(4, 2, layout)
    pages = torch.tensor([2, 0, 3])
    found = cache.keys_by_head(pages)
    assert torch.equal(found, keys[pages].transpose(0, 1).reshape(2, 3 * SIZE, DIM))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pages", [[1], [2, 0, 3]])
def test_rows_by_head_lie_side_by_side(layout: Layout, pages: list[int]) -> None:
    """Kernels get their address."""
    cache, keys, values = packed_cache(4, 2, layout)
    found = cache.rows_by_head(torch.tensor(pages))
    for rows, expected in zip(found, (keys, values), strict=True):
        assert rows.is_contiguous()
        assert torch.equal(rows, expected[pages].transpose(0, 1).reshape(2, len(pages) * SIZE, DIM))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_rows_is_plain_indexing(layout: Layout) -> None:
    cache, keys, values = packed_cache(4, 2, layout)
    generator = torch.Generator().manual_seed(0)
    for shape in [(1,), (50,), (5, 7)]:
        pages, slots, heads = (torch.randint(0, end, shape, generator=generator) for end in (4, SIZE, 2))
        found_keys, found_values = cache.gather_rows(pages, slots, heads)
        assert torch.equal(found_keys, keys[pages, heads, slots])
        assert torch.equal(found_values, values[pages, heads, slots])


def test_sizes_are_read_from_the_tensors() -> None:
    cache, _, _ = packed_cache(1, 2, "rows")
    assert (cache.block_size, cache.num_kv_heads, cache.head_size) == (SIZE, 2, DIM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_the_kernels_layout_on_this_machine_is_known(dtype: torch.dtype, block_size: int, head_size: int) -> None:
    assert cpu_ops.layout_for(dtype, block_size, head_size) in LAYOUTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_cache_of_rows_packs_into_the_kernels_layout(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 64, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = PagedCache(rows.transpose(1, 2), rows.flip(0).transpose(1, 2), "rows")
    packed = torch.empty(3, 2, 2 * 64, 64, dtype=dtype)
    cpu_ops.pack(plain, packed)
    key, value = packed.chunk(2, dim=2)
    layout = cpu_ops.layout_for(dtype, 64, 64)
    assert layout is not None
    assert torch.equal(unpack_keys(key, layout), plain.key)
    assert torch.equal(unpack_values(value, layout), plain.value)
