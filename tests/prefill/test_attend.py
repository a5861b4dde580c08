"""Features that a kernel does not support are refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from minference_vllm.kernels.choose import choose
from minference_vllm.patterns.kinds import Dense
from minference_vllm.prefill.attend import attend_chunk, unknown_to


@pytest.mark.parametrize(
    "asked", [{"softcap": 30.0}, {"sinks": torch.zeros(8)}, {"window": 40}], ids=["softcap", "sinks", "window"]
)
def test_features_need_a_kernel_that_knows_them(
    kernel_name: str, asked: dict[str, Any], served_batch: Callable[..., Any]
) -> None:
    batch = served_batch(query_lens=[100], context_lens=[0])
    kernel = choose(kernel_name, batch.query.dtype, batch.cache)
    inputs = replace(batch.inputs(), **asked)
    if unknown_to(kernel, inputs) is None:
        pytest.skip("it knows them")
    named = {"softcap": "soft cap", "sinks": "attention sinks", "window": "sliding windows"}[next(iter(asked))]
    with pytest.raises(ValueError, match=f"kernel '{kernel_name}' knows no {named}"):
        attend_chunk(inputs, [Dense()] * 8, kernel, torch.empty_like(batch.query))
