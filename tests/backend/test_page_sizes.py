"""Page sizes: vLLM may fix them after it creates its layers, and pass them to the builder only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cpu_layer import Layer
from layer_inputs import HEADS, KINDS, MIXED, SPARSE, assert_right
from native_inputs import needs_native


@needs_native
@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ({"kind": "a_shape", "sink": 16, "local": 100}, {"kernel": "native"}),
        ({"kind": "antidiagonal", "stride": 64, "tau": 0.4}, {}),
    ],
    ids=["native", "stride"],
)
def test_the_page_size_of_the_builder_decides(
    pattern: dict[str, Any], settings: dict[str, Any], make_cpu_layer: Callable[..., Layer]
) -> None:
    """With pages of 16 tokens, the initial value in vLLM's configuration, all of these would be refused."""
    layer = make_cpu_layer(MIXED, patterns=[pattern] * HEADS, settings=settings, page_before=16, page=128)
    assert layer.impl.sparse_layer.kernel.name == "native"
    output = layer.run(layer.impl, layer.metadata())
    assert [index.tiling.block_size for index in layer.indices] == [128] * len(SPARSE)
    assert_right(layer, output, SPARSE)


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        ({"kind": "antidiagonal", "stride": 64}, {}, "stride 64 must divide the page size.* 16"),
        (KINDS[0], {"kernel": "native"}, "page size 16 is not a multiple of 32"),
    ],
    ids=["stride", "native"],
)
def test_the_page_size_of_the_builder_is_refused(
    pattern: dict[str, Any], settings: dict[str, Any], message: str, make_cpu_layer: Callable[..., Layer]
) -> None:
    with pytest.raises(ValueError, match=message):
        make_cpu_layer([(0, 400)], patterns=[pattern] * HEADS, settings=settings, page_before=128, page=16)
