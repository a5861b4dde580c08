"""What a kernel does not know is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from minference_vllm.kernels.choose import choose
from minference_vllm.patterns.kinds import Dense
from minference_vllm.prefill.attend import attend_chunk


@pytest.mark.parametrize("asked", [{"softcap": 30.0}, {"sinks": torch.zeros(8)}], ids=["softcap", "sinks"])
def test_soft_caps_and_sinks_need_a_kernel_that_knows_them(
    kernel_name: str, asked: dict[str, Any], served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[100], context_lens=[0])
    kernel = choose(kernel_name, batch.query.dtype, batch.cache)
    if kernel.fused:
        pytest.skip("it knows them")
    inputs = replace(batch.inputs(), **asked)
    with pytest.raises(ValueError, match=f"kernel '{kernel_name}' knows no soft cap, no sinks and no FP8 caches"):
        attend_chunk(inputs, [Dense()] * 8, kernel, torch.empty_like(batch.query))
