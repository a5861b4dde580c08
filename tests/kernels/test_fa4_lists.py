"""The block lists that the kernel ``fa4`` passes to FlashAttention 4, and the inputs that it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fa4_inputs import BLOCK, CASES, Case, listed

from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.sparse_index import SparseIndex
from minference_vllm.kernels.choose import candidates, choose
from minference_vllm.kernels.fa4 import limits
from minference_vllm.kernels.fa4.block_lists import BlockLists, block_lists, own_page, without_blocks
from minference_vllm.kernels.fa4.cache_as_sequence import CacheAsSequence


def converted(case: Case) -> tuple[SparseIndex, BlockLists, dict[int, int]]:
    """The index, its lists, and the logical block of each block number in them."""
    inputs, index = case.inputs(), case.index()
    step = CacheAsSequence.of(inputs.cache).page_step
    logical = {int(page) * step: number for number, page in enumerate(inputs.pages)}
    return index, block_lists(index, inputs.pages, step), logical


def attended(case: Case, lists: BlockLists, logical: dict[int, int]) -> torch.Tensor:
    """bool ``[H, chunk, S]``: the pairs that FlashAttention 4 computes, each at most once."""
    heads, first = len(case.patterns), case.context // BLOCK
    blocks = -(-case.length // BLOCK)
    times = torch.zeros(heads, (blocks - first) * BLOCK, blocks * BLOCK, dtype=torch.int64)
    row = torch.arange(BLOCK)[:, None]
    for head in range(heads):
        for block in range(blocks - first):
            for number, masked in listed(lists, 0, head, block):
                key = logical[number] * BLOCK
                place = number * BLOCK + torch.arange(BLOCK)
                seen = own_page(0, head, row + block * BLOCK, place, None, None) if masked else torch.tensor(1)
                times[head, block * BLOCK : (block + 1) * BLOCK, key : key + BLOCK] += seen
    assert int(times.max()) <= 1
    begin = case.context % BLOCK
    return times[:, begin : begin + case.length - case.context, : case.length] > 0


@pytest.mark.parametrize("name", CASES)
def test_the_pairs_are_the_indexs_own(name: str) -> None:
    case = CASES[name]
    index, lists, logical = converted(case)
    wanted = replace(index, columns=index.columns.new_full((*index.columns.shape[:2], 1), -1)).to_mask()
    if case.length % BLOCK:  # the last page is our kernel's
        wanted[..., case.length // BLOCK * BLOCK :] = False
    assert torch.equal(attended(case, lists, logical), wanted)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_is_the_columns_and_own_pages(name: str) -> None:
    index = CASES[name].index()
    rest = without_blocks(index)
    assert torch.equal(rest.columns, index.columns)
    # The kernel only reads pages before the tile's own.
    starts, size = index.tiling.starts, BLOCK
    own = (starts[1:] - 1) // size - starts[:-1] // size + 1
    assert torch.equal(rest.num_blocks, own.int().expand_as(rest.num_blocks)) and rest.num_blocks.is_contiguous()
    assert int(rest.blocks.min()) >= 0, "a list is there, and is not read"


@pytest.mark.parametrize("name", CASES)
def test_the_index_stays_as_it_is(name: str) -> None:
    index = CASES[name].index()
    before = index.blocks.clone()
    block_lists(index, CASES[name].inputs().pages, 1)
    assert torch.equal(index.blocks, before)


def test_a_page_may_serve_several_blocks() -> None:
    """As when kernels are timed: the mask must not depend on which block a page holds."""
    case = Case(256, 768)
    inputs, index = case.inputs(), case.index()
    lists = block_lists(index, torch.zeros_like(inputs.pages), 1)
    assert (lists.mask_block_cnt == 1).all()
    assert torch.equal(lists.full_block_cnt[0], index.num_blocks - 1)


@pytest.mark.parametrize("heads_first", [False, True])
def test_a_cache_is_a_view(heads_first: bool) -> None:
    """Every key and value is where the block number says, without a copy."""
    inputs = Case(0, 500, kv_heads=3, patterns=Case(0, 1).patterns, heads_first=heads_first).inputs()
    cache, sequence = inputs.cache, CacheAsSequence.of(inputs.cache)
    for whole, view in ((cache.key, sequence.key), (cache.value, sequence.value)):
        assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        for page in range(len(whole)):
            for head in range(3):
                first = page * sequence.page_step * BLOCK
                found = view[0, first : first + BLOCK, head]
                torch.testing.assert_close(found, whole[page, head], equal_nan=True)


def test_keys_and_values_of_a_page_side_by_side() -> None:
    """``[num_blocks, 2, B, HK, D]``: pages lie two units apart."""
    memory = torch.randn(5, 2, BLOCK, 2, 16).bfloat16()
    cache = PagedCache(memory[:, 0].transpose(1, 2), memory[:, 1].transpose(1, 2), "rows")
    sequence = CacheAsSequence.of(cache)
    assert sequence.page_step == 2
    assert torch.equal(sequence.value[0, 8 * BLOCK :].transpose(0, 1), cache.value[4])


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


REFUSED = [
    # queries' type, keys, values, reason
    (torch.float32, zeros(4, 2, 128, 8, dtype=torch.float32), None, "bf16 or fp16"),
    (torch.bfloat16, zeros(4, 2, 128, 8, dtype=torch.float8_e4m3fn), None, "a cache in torch.float8_e4m3fn"),
    (torch.float16, zeros(4, 2, 16, 8), None, "pages of 16 tokens; it takes pages of 128 (vLLM's --block-size 128)"),
    (torch.float16, zeros(4, 2, 256, 8), None, "pages of 256 tokens"),
    (torch.float16, zeros(4, 2, 128, 20), None, "heads of size 20"),
    (torch.float16, zeros(4, 2, 128, 192), None, "heads of size 192 are no multiple of 8 up to 128"),
    (torch.float16, zeros(4, 2, 128, 8), zeros(4, 2, 128, 16)[..., :8], "differ in strides"),
    (torch.float16, zeros(4, 3000).as_strided((4, 2, 128, 8), (3000, 1024, 8, 1)), None, "is no multiple of 128"),
    (torch.float16, zeros(4, 128, 2, 12)[..., :8].transpose(1, 2), None, "not aligned to 16 bytes"),
    (torch.float16, zeros(4, 2, 128, 16)[..., 4:12], None, "not aligned to 16 bytes"),
    (torch.float16, torch.empty(1 << 24, 1, 128, 8, dtype=torch.float16, device="meta"), None, "numbered in 32 bits"),
]


@pytest.mark.parametrize(("dtype", "key", "value", "reason"), REFUSED, ids=[case[3] for case in REFUSED])
def test_caches_that_cannot_be_read_are_refused(
    dtype: torch.dtype, key: torch.Tensor, value: torch.Tensor | None, reason: str
) -> None:
    cache = PagedCache(key, key if value is None else value, "rows")
    assert reason in str(limits.unsupported_cache_reason(dtype, cache))
    assert reason in str(limits.unsupported_reason(dtype, cache))
    if key.dtype == dtype:
        with pytest.raises(ValueError, match="kernel 'fa4' cannot run: "):
            CacheAsSequence.of(cache)
    with pytest.raises(ValueError, match="kernel 'fa4' cannot run: "):
        choose("fa4", dtype, cache)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_other_gpus_are_refused(capability: tuple[int, int]) -> None:
    major, minor = capability
    reason = limits.unsupported_gpu_reason(capability)
    assert reason == f"a GPU of compute capability {major}.{minor}; it takes 9.x and 10.x"


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_hopper_and_blackwell_are_served(capability: tuple[int, int]) -> None:
    assert limits.unsupported_gpu_reason(capability) is None


def test_it_needs_a_gpu() -> None:
    cache = Case(0, 300).inputs().cache
    with pytest.raises(ValueError, match="kernel 'fa4' cannot run: it needs tensors on an NVIDIA GPU"):
        choose("fa4", torch.bfloat16, cache)
    assert [kernel.name for kernel in candidates("auto", torch.bfloat16, cache)] != ["fa4"]


def test_a_vllm_without_it_is_refused() -> None:
    limits.unavailable_reason.cache_clear()
    assert "vLLM's FlashAttention 4 cannot be loaded (" in str(limits.unavailable_reason())
