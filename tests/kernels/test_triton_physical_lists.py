"""The physical lists of an index, in Triton's interpreter, against the index itself.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from minference_vllm.core.inputs import Inputs
    from minference_vllm.core.sparse_index import SparseIndex

pytest.importorskip("triton")

CASES = {
    "pages of a step": (600, 300, 128, 128, 4, 1),
    "pages of two steps": (600, 300, 128, 64, 2, 1),
    "small pages, shared lists": (631, 300, 16, 128, 4, 4),
    "pages that no step divides": (640, 203, 48, 64, 4, 1),
    "more keys than are written at once, tiles of unlike length": (2300, 1900, 16, 64, 2, 1),
}
"""Length, context, page size, keys per step, query heads per KV head, heads per list."""


@pytest.mark.parametrize("name", list(CASES))
def test_every_key_of_a_tile_has_its_place_once(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted[name]
    assert found["wrong"] == []
    assert found["unlisted"] > 0 and found["columns"] > 0
    assert (found["left"] > 0) == (not name.startswith("pages of"))


@pytest.mark.parametrize("name", list(CASES))
def test_longest_tiles_come_first(interpreted: dict[str, Any], name: str) -> None:
    work, order = interpreted[name]["work"], interpreted[name]["order"]
    assert work == sorted(work, reverse=True)
    assert sorted(order) == list(range(len(order)))


def test_tiles_of_like_work_keep_their_order(interpreted: dict[str, Any]) -> None:
    """Tiles of one KV head stay adjacent, so that they read the same pages at the same time."""
    for found in interpreted.values():
        for (work, item), (next_work, next_item) in pairwise(zip(found["work"], found["order"], strict=True)):
            assert work > next_work or item < next_item


def test_other_strides_for_values_than_for_keys_are_refused() -> None:
    from minference_vllm.triton_kernels.physical_lists import physical_lists

    inputs, index = prepare(300, 100, 32, 1, 1)
    value = inputs.cache.value.transpose(1, 2).contiguous().transpose(1, 2)
    mixed = replace(inputs, cache=replace(inputs.cache, key=inputs.cache.key.contiguous(), value=value))
    with pytest.raises(ValueError, match=r"same strides, not \(2048, 1024, 32, 1\) and \(2048, 32, 64, 1\)"):
        physical_lists(mixed, index, 64)


def test_a_cache_whose_places_need_more_than_32_bits_is_refused() -> None:
    import torch

    from minference_vllm.core.paged_cache import PagedCache
    from minference_vllm.triton_kernels.physical_lists import physical_lists

    inputs, index = prepare(300, 100, 32, 1, 1)
    huge = torch.empty_strided(((1 << 20) + 1, 2, 32, 32), (1 << 15, 1 << 10, 32, 1), device="meta")
    with pytest.raises(ValueError, match="1048577 pages that lie 32768 elements apart is above 34359738368 elements"):
        physical_lists(replace(inputs, cache=PagedCache(huge, huge, "rows")), index, 64)


def test_the_widest_lists_stay_within_the_stated_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last 8K of a million tokens, 32 heads: lists of blocks and of columns with their maximum capacity."""
    import torch
    from live_bytes import LiveBytes

    from minference_vllm.core.inputs import Inputs
    from minference_vllm.core.paged_cache import PagedCache
    from minference_vllm.core.plan import Chunk
    from minference_vllm.core.sparse_index import SparseIndex
    from minference_vllm.core.tiling import Tiling
    from minference_vllm.selection.capacity import ADAPTIVE_BYTES
    from minference_vllm.triton_kernels import physical_lists

    monkeypatch.setattr(physical_lists, "launcher", lambda kernel, grid: lambda *arguments, **constants: None)
    length, chunk, page, lists = 1 << 20, 8192, 16, 32
    query = torch.empty(chunk, lists, 128, device="meta")
    stored = torch.empty(length // page, 8, page, 128, device="meta")
    with LiveBytes(query, stored) as memory:
        tiling = Tiling.of(length - chunk, length, page, 128, device="meta")
        size = lists, tiling.num_tiles
        width = ADAPTIVE_BYTES // (4 * lists * tiling.num_tiles)
        blocks, columns = (torch.empty(*size, width, dtype=torch.int32, device="meta") for _ in range(2))
        counts = [torch.empty(size, dtype=torch.int32, device="meta") for _ in range(2)]
        index = SparseIndex(tiling, blocks, counts[0], columns, counts[1])
        pages = torch.empty(length // page, dtype=torch.int64, device="meta")
        cache = PagedCache(stored, stored, "rows")
        inputs = Inputs(query, cache, pages, Chunk(0, 0, length - chunk, length), 1.0)
        found = physical_lists.physical_lists(inputs, index, 128)
    assert 4 * ADAPTIVE_BYTES < memory.peak <= 264 << 20
    assert found.max_singles == width + 128 + 2 * 128


def prepare(seq_len: int, context_len: int, block_size: int, group: int, shared: int) -> tuple[Inputs, SparseIndex]:
    """Inputs of two KV heads, and an index with dense tiles that have no list."""
    import torch
    from triton_inputs import shuffled

    from minference_vllm.core.inputs import Inputs
    from minference_vllm.core.tiling import Tiling, whole_tile
    from minference_vllm.patterns.kinds import AShape, BlockSparse, Dense, VerticalSlash
    from minference_vllm.selection.build import build_index
    from minference_vllm.selection.capacity import plan_capacity
    from minference_vllm.selection.torch_scores import TorchScores

    torch.manual_seed(0)
    heads, dim = 2 * group, 32
    query, keys = torch.randn(seq_len - context_len, heads, dim), torch.randn(seq_len, 2, dim)
    tiling = Tiling.of(context_len, seq_len, block_size, whole_tile(None, block_size))
    patterns = [VerticalSlash(vertical=300, slash=16), Dense(), BlockSparse(top_k=1), AShape(sink=16, local=64)] * heads
    patterns = patterns[: heads // shared]
    rows = Inputs.of_rows(query[:, ::shared], *(keys.transpose(0, 1),) * 2, 1.0, block_size)
    capacity = plan_capacity(patterns, context_len, seq_len, block_size, tiling.tile)
    index = build_index(tiling, patterns, TorchScores(rows), capacity)
    return shuffled(query, keys, keys, block_size, 1.0), replace(index, heads_per_list=shared)


def run_case(seq_len: int, context_len: int, block_size: int, block_n: int, group: int, shared: int) -> dict[str, Any]:
    from minference_vllm.triton_kernels.physical_lists import WORK, physical_lists

    inputs, index = prepare(seq_len, context_len, block_size, group, shared)
    found = physical_lists(inputs, index, block_n)
    page_stride, _, slot_stride, _ = inputs.cache.key.stride()
    pages = inputs.pages.tolist()

    def place(position: int) -> int:
        exact = pages[position // block_size] * page_stride + position % block_size * slot_stride
        assert exact % found.unit == 0
        return exact // found.unit

    assert found.table[: len(pages)].tolist() == [place(block * block_size) for block in range(len(pages))]
    starts, max_blocks, wrong, left = index.tiling.starts.tolist(), index.blocks.shape[2], [], 0
    lists, tiles = index.num_lists, index.num_tiles
    for row in range(lists * tiles):
        one, tile = divmod(row, tiles)
        own = (starts[tile + 1] - 1) // block_size - starts[tile] // block_size + 1
        before = int(index.num_blocks[one, tile]) - own
        listed = int(index.blocks[one, tile, 0]) >= 0
        blocks = index.blocks[one, tile, :before].tolist() if listed else list(range(before))
        keys = [block * block_size + slot for block in blocks for slot in range(block_size)]
        rest = keys[len(keys) // block_n * block_n :]
        left += len(rest)
        columns = index.columns[one, tile, : int(index.num_columns[one, tile])].tolist()
        if listed:
            places = found.listed[row * max_blocks :][:before].tolist()
            wrong += [(one, tile, "page")] * (places != [place(block * block_size) for block in blocks])
        # The last key fills up the last step.
        last = starts[tile + 1] - 1
        own_keys = [*range(starts[tile] // block_size * block_size, last + 1), *[last] * block_n]
        singles = [place(position) for position in columns + rest + own_keys]
        assert len(singles) <= found.max_singles
        wrong += [(one, tile, "single")] * (
            found.singles[row * found.max_singles :][: len(singles)].tolist() != singles
        )
    # Items are ordered by KV head, then by tile, then by the lists of the KV head.
    work = (index.num_blocks * block_size + index.num_columns).view(2, lists // 2, tiles).transpose(1, 2).flatten()
    order = found.order.tolist()
    return {
        "wrong": wrong,
        "left": left,
        "columns": int(index.num_columns.sum()),
        "unlisted": int((index.blocks[..., 0] < 0).sum()),
        "work": (work // WORK)[order].tolist(),
        "order": order,
    }


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401

    print(json.dumps({name: run_case(*case) for name, case in CASES.items()}))
