"""The kernel ``fa4`` against float64, with torch in FlashAttention 4's place and our kernel in Triton's interpreter.

As in ``test_triton_kernels.py`` this file is both the test and, run as a script, the process with the interpreter. The
lists passed to FlashAttention 4 are tested by themselves in ``test_fa4_lists.py``.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from fa4_inputs import CASES

pytest.importorskip("triton")

REMAINDER = ("whole pages", "both, tokens outside of heads", "tiles of two pages", "shared lists", "no columns")
SERVED = ("low_rank", "mixed")


@pytest.mark.parametrize("apart", [False, True], ids=["Hopper", "Blackwell"])
@pytest.mark.parametrize("name", CASES)
def test_attention_matches_the_reference(name: str, apart: bool, interpreted: dict[str, Any]) -> None:
    found = interpreted[f"{name}, apart={apart}"]
    assert found["error"] <= 2 * found["eager_error"] + 1e-6, found
    assert found["lse_error"] < 2e-3, found
    assert found["calls"] == (0 if name == "no columns" else 1), "our kernel runs where something is left for it"
    assert (found["columns"] > 0) == (not name.startswith(("no columns", "less"))), found


@pytest.mark.parametrize("name", REMAINDER)
def test_the_remainder_is_taken_by_our_kernel(name: str, interpreted: dict[str, Any]) -> None:
    found = interpreted[f"{name}, remainder"]
    assert found["tiles"] > 0 and found["error"] < found["budget"], found
    assert found["calls"] == 1


@pytest.mark.parametrize("name", SERVED)
def test_a_chunk_is_served(name: str, interpreted: dict[str, Any]) -> None:
    """Selection, planned sizes and the remainder, as serving runs them."""
    found = interpreted[f"{name}, served"]
    assert found["error"] < found["budget"], found
    assert found["density"] < 0.9 and found["columns"] > 0


def run_case(name: str, apart: bool) -> dict[str, Any]:
    import torch
    from fa4_inputs import block_sparse_attention

    from minference_vllm import reference
    from minference_vllm.kernels.fa4 import attention

    case = CASES[name]
    inputs, index = case.inputs(), case.index()
    out = torch.full_like(inputs.query, torch.nan)
    lse = torch.full((inputs.num_heads, len(out)), torch.nan)
    with CountedCalls() as counted:
        attention.run(inputs, index, out, lse, attend=block_sparse_attention, apart=apart)
    query, keys, values = case.rows()
    mask = index.to_mask()
    exact = reference.masked_attention(query, keys, values, mask, inputs.scale)
    keys, values = (reference.repeat_heads(part, inputs.num_heads) for part in (keys, values))
    scores = (query.transpose(0, 1) @ keys.transpose(1, 2) * inputs.scale).masked_fill(~mask, -torch.inf)
    eager = (scores.softmax(-1) @ values).transpose(0, 1)
    logits = query.double().transpose(0, 1) @ keys.double().transpose(1, 2) * inputs.scale
    return {
        "error": float((out.double() - exact).abs().max()),
        "eager_error": float((eager.double() - exact).abs().max()),
        "lse_error": float((lse.double() - logits.masked_fill(~mask, -torch.inf).logsumexp(-1)).abs().max()),
        "columns": int(index.num_columns.max()),
        "calls": counted.calls,
    }


def run_remainder_case(name: str) -> dict[str, Any]:
    import torch
    from fa4_inputs import block_sparse_attention

    from minference_vllm import reference
    from minference_vllm.core import remainder as core
    from minference_vllm.kernels.fa4 import attention
    from minference_vllm.prefill import remainder

    core.SAMPLED_KEYS = 50  # so that short sequences have steps too
    case = CASES[name]
    inputs, index = case.inputs(), case.index()
    heads = [0, 2, 3, 5]
    left_out = remainder.of_heads(inputs, index, heads)
    out = torch.full_like(inputs.query, torch.nan)
    with CountedCalls() as counted:
        attention.run(inputs, index, out, None, left_out, attend=block_sparse_attention, apart=False)
    exact = reference.with_remainder(
        *case.rows(), index.to_mask(), index.tiling, inputs.scale, heads, core.sampled_positions(case.length),
        core.sample_step(case.length),
    )  # fmt: skip
    return {
        "error": float((out.double() - exact).abs().max()),
        # FlashAttention 4 rounds its output; our kernel rounds weights and output.
        "budget": 3 * torch.finfo(out.dtype).eps * float(exact.abs().max()) + 1e-5,
        "tiles": int((left_out.bias > -torch.inf).sum()),
        "calls": counted.calls,
    }


def run_served_case(name: str) -> dict[str, Any]:
    from functools import partial

    import torch
    from fa4_inputs import Case, block_sparse_attention

    from minference_vllm import reference
    from minference_vllm.core import remainder as core
    from minference_vllm.kernels.fa4 import attention
    from minference_vllm.kernels.kernel import Kernel
    from minference_vllm.patterns.kinds import AShape, BlockSparse, Dense, LowRank, VerticalSlash
    from minference_vllm.prefill.attend import attend_chunk
    from minference_vllm.triton_kernels import remainder
    from minference_vllm.triton_kernels.scores import TritonScores

    core.SAMPLED_KEYS = 50
    mixed = (AShape(sink=16, local=64, remainder=True), VerticalSlash(vertical=30, slash=32, remainder=True))
    patterns = {
        "low_rank": (LowRank(rank=32, gamma=0.5, remainder=True),) * 4,
        "mixed": (*mixed, BlockSparse(top_k=1), Dense()),
    }[name]
    case = Case(200, 833, patterns=patterns, focused=True)
    run = partial(attention.run, attend=block_sparse_attention)
    kernel = Kernel(
        "fa4", run, TritonScores, planned=True, lists_everything=True, run_with_remainder=run,
        remainder=remainder.of_heads,
    )  # fmt: skip
    inputs = case.inputs()
    query, keys, values = case.rows()
    out = torch.full_like(query, torch.nan)
    index = attend_chunk(inputs, patterns, kernel, out)
    heads = [head for head, pattern in enumerate(patterns) if pattern.has_remainder]
    exact = reference.with_remainder(
        query, keys, values, index.to_mask(), index.tiling, inputs.scale, heads, core.sampled_positions(case.length),
        core.sample_step(case.length),
    )  # fmt: skip
    return {
        "error": float((out.double() - exact).abs().max()),
        "budget": 3 * torch.finfo(out.dtype).eps * float(exact.abs().max()) + 1e-5,
        "density": float(index.density().min()),
        "columns": int(index.num_columns.max()),
    }


class CountedCalls:
    """Context manager that counts the calls of our kernel."""

    def __enter__(self) -> CountedCalls:
        from minference_vllm.kernels.fa4 import attention

        self.calls, self._run = 0, attention.triton_attention.run
        attention.triton_attention.run = self._counting
        return self

    def _counting(self, *arguments: Any, **named: Any) -> None:
        self.calls += 1
        self._run(*arguments, **named)

    def __exit__(self, *error: Any) -> None:
        from minference_vllm.kernels.fa4 import attention

        attention.triton_attention.run = self._run


if __name__ == "__main__":
    import triton_interpreter  # noqa: F401 - mends the interpreter

    results: dict[str, Any] = {
        f"{name}, apart={apart}": run_case(name, apart) for name in CASES for apart in (False, True)
    }
    results |= {f"{name}, remainder": run_remainder_case(name) for name in REMAINDER}
    results |= {f"{name}, served": run_served_case(name) for name in SERVED}
    print(json.dumps(results))
