"""Where tiles begin."""

from __future__ import annotations

import pytest

from minference_vllm.core.tiling import Tiling


def test_a_tile_is_whole_pages() -> None:
    with pytest.raises(ValueError, match="tile must be a multiple of the page size 32, not 48"):
        Tiling.of(0, 100, 32, 48)


def tile_starts(context_len: int, seq_len: int, tile: int) -> list[int]:
    return [int(start) for start in Tiling.of(context_len, seq_len, tile, tile).starts]


@pytest.mark.parametrize(
    ("context", "seq_len", "tile", "starts"),
    [
        (0, 256, 128, [0, 128, 256]),
        (0, 257, 128, [0, 128, 256, 257]),
        (0, 255, 128, [0, 128, 255]),
        (0, 1, 128, [0, 1]),
        (128, 384, 128, [128, 256, 384]),
        (127, 129, 128, [127, 128, 129]),
        (129, 255, 128, [129, 255]),
        (130, 400, 128, [130, 256, 384, 400]),
        (1000, 1001, 32, [1000, 1001]),
    ],
)
def test_tiles_begin_at_multiples_of_their_size(context: int, seq_len: int, tile: int, starts: list[int]) -> None:
    assert tile_starts(context, seq_len, tile) == starts


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 100, 256, 299])
def test_a_prompt_cut_in_two_has_the_same_borders(cut: int) -> None:
    whole, tile = tile_starts(0, 300, 32), 32
    pieces = tile_starts(0, cut, tile)[:-1] + tile_starts(cut, 300, tile)
    assert set(pieces) == set(whole) | {cut}
    assert pieces == sorted(set(pieces))
