"""GPU work of one sparse chunk in one layer: operations, launches, copies from the host, and no synchronisation.

Counted without a GPU, see ``device_account``: 32 heads over 8, an 8K chunk, pages of 128, in a layer that is not the
first to see the chunk. The limits are the measured counts of the time of writing. Changes may only lower them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from device_account import DeviceAccount
from live_bytes import LiveBytes

from minference_vllm.backend.runtime import Runtime
from minference_vllm.backend.serving import SparseLayer, serve_chunk
from minference_vllm.core.inputs import Inputs
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk
from minference_vllm.kernels.autotune import Budget, Trial
from minference_vllm.kernels.block_table import flash
from minference_vllm.kernels.choose import candidates, choose, description
from minference_vllm.kernels.fa4 import limits
from minference_vllm.patterns.discovery import default_pattern
from minference_vllm.patterns.file import PatternFile
from minference_vllm.patterns.kinds import (
    Antidiagonal,
    AShape,
    BlockSparse,
    Coverage,
    Dense,
    HeadPattern,
    PeakThreshold,
    TriShape,
    VerticalSlash,
)
from minference_vllm.prefill import kernel_trial
from minference_vllm.prefill.attend import attend_chunk
from minference_vllm.prefill.recall import RecallCheck, audited_rows
from minference_vllm.selection import spread
from minference_vllm.selection.capacity import MEMORY_LIMIT
from minference_vllm.settings import Settings

pytest.importorskip("triton")
HEADS, KV_HEADS, DIM, PAGE, CHUNK = 32, 8, 128, 128, 8192
LENGTHS = (1 << 15, 1 << 17, 1 << 20)
MIXTURES: dict[str, list[HeadPattern]] = {
    "dense": [Dense()] * HEADS,
    "a_shape": [AShape()] * HEADS,
    "vertical_slash": [VerticalSlash()] * HEADS,
    "block_sparse": [BlockSparse()] * HEADS,
    "coverage": [Coverage()] * HEADS,
    "antidiagonal": [Antidiagonal()] * HEADS,
    "peak_threshold": [PeakThreshold()] * HEADS,
    "remainder": [AShape(remainder=True)] * HEADS,
    "default_cuda": [default_pattern("cuda")] * HEADS,
    "default_cpu": [default_pattern()] * HEADS,
    "mixed": [VerticalSlash(), BlockSparse(), TriShape(), AShape()] * (HEADS // 4),
}
LIMITS: dict[str, tuple[tuple[int, int], ...]] = {
    "dense": ((47, 2), (47, 2), (78, 2)),
    "a_shape": ((67, 2), (67, 2), (118, 2)),
    "vertical_slash": ((176, 4), (176, 4), (981, 14)),
    "block_sparse": ((244, 3), (244, 3), (520, 7)),
    "coverage": ((555, 6), (555, 6), (2985, 24)),
    "antidiagonal": ((135, 6), (135, 6), (675, 24)),
    "peak_threshold": ((543, 4), (543, 4), (3431, 13)),
    "remainder": ((67, 4), (67, 4), (118, 4)),
    "default_cpu": ((17, 13), (19, 23), (47, 163)),
    "default_cuda": ((17, 13), (19, 23), (47, 163)),
    "mixed": ((533, 5), (533, 5), (851, 8)),
}
"""Operations and launches of a layer, at each of ``LENGTHS``."""
AUDIT_LIMITS = (287, 863, 6191)
"""Operations that an audit of 4 rows adds."""
CASES = [(name, *case) for name, limits in LIMITS.items() for case in zip(LENGTHS, limits, strict=True)]


class Serving:
    """Serves chunks of one size in layers of one runtime, and counts their GPU work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seq_len: int, **settings: Any) -> None:
        self.account = DeviceAccount(monkeypatch)
        self.runtime = Runtime(Settings(**settings), PatternFile(), "a test")
        memory = torch.empty(4, KV_HEADS, PAGE, 2 * DIM, dtype=torch.bfloat16, device="meta")
        self.cache = PagedCache(memory[..., :DIM], memory[..., DIM:], "rows")
        query = torch.empty(CHUNK, HEADS, DIM, dtype=torch.bfloat16, device="meta")
        table = torch.empty(seq_len // PAGE, dtype=torch.int64, device="meta")
        self.inputs = Inputs.of(query, self.cache, table, Chunk(0, 0, seq_len - CHUNK, seq_len), DIM**-0.5)
        self.out = torch.empty_like(query)
        # The first layer creates what all layers share.
        serve_chunk(self.runtime, self.layer(MIXTURES["mixed"]), self.inputs, self.out)

    def layer(self, patterns: Sequence[HeadPattern], number: int = 0) -> SparseLayer:
        kernel = choose(self.runtime.settings.kernel, torch.bfloat16, self.cache)
        return SparseLayer(number, 0, tuple(patterns), kernel)

    def serve(self, patterns: Sequence[HeadPattern], number: int = 0) -> tuple[int, int]:
        """Serve a chunk in a layer; returns its operations and launches."""
        with self.account as account:
            ops, launches = account.ops.total(), account.launches.total()
            serve_chunk(self.runtime, self.layer(patterns, number), self.inputs, self.out)
            assert not account.waits, f"waits for the GPU: {dict(account.waits)}"
            assert not account.pageable, f"copies from ordinary memory, which wait: {dict(account.pageable)}"
            return account.ops.total() - ops, account.launches.total() - launches


@pytest.mark.parametrize(("name", "seq_len", "limit"), CASES)
def test_a_layer_stays_within_its_account(
    name: str, seq_len: int, limit: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(monkeypatch, seq_len, audit_rows=0)
    serving.serve(MIXTURES[name])  # creates what later layers reuse
    ops, launches = serving.serve(MIXTURES[name])
    assert ops <= limit[0] and launches <= limit[1], f"{ops} operations, {launches} launches"


@pytest.mark.parametrize(("seq_len", "limit"), list(zip(LENGTHS, AUDIT_LIMITS, strict=True)))
def test_an_audit_stays_within_its_account(seq_len: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawn rows are copied to the GPU without a synchronisation, and nothing is copied back."""
    counted = []
    for rows in (0, 4):
        with monkeypatch.context() as patch:
            serving = Serving(patch, seq_len, audit_rows=rows, audit_share=1.0)
            pinned = serving.account.pinned
            counted.append(serving.serve(MIXTURES["a_shape"])[0])
            assert serving.account.pinned - pinned == (rows > 0)
    assert counted[1] - counted[0] <= limit, f"{counted[1] - counted[0]} operations"


@pytest.mark.parametrize(
    "name", ["coverage", "vertical_slash", "antidiagonal", "peak_threshold", "default_cuda", "mixed"]
)
@pytest.mark.parametrize("seq_len", LENGTHS)
def test_chunks_of_any_length_fit_into_what_is_taken_at_the_start(
    name: str, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short chunks score more heads at once; ``backend/warmup.py`` allocates as much as is planned for them."""
    serving = Serving(monkeypatch, seq_len, audit_rows=0)
    for chunk in (256, 1024, 4096):
        query = serving.inputs.query[:chunk]
        inputs = dataclasses.replace(serving.inputs, query=query, chunk=Chunk(0, 0, seq_len - chunk, seq_len))
        layer = serving.layer(MIXTURES[name])
        with LiveBytes(serving.inputs.query, inputs.pages, serving.cache.key, serving.out) as memory:
            check = RecallCheck(audited_rows(query, 4, seed=0))
            attend_chunk(inputs, layer.patterns, layer.kernel, serving.out[:chunk], check=check)
        assert memory.peak <= MEMORY_LIMIT, f"{memory.peak >> 20} MiB for {chunk} rows"


def test_layers_of_many_pattern_files_copy_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer groups its heads differently; the data about its heads is copied to the GPU only once."""
    serving = Serving(monkeypatch, 1 << 15, audit_rows=0)
    layers = 40
    for turn in range(2):
        pinned = serving.account.pinned
        for layer in range(layers):
            # Each layer assigns the two patterns to different heads.
            patterns = [VerticalSlash(slash=2048 + 1024 * ((layer + 1) >> (head % 6) & 1)) for head in range(HEADS)]
            serving.serve(patterns, layer)
        assert serving.account.pinned == pinned or turn == 0


@pytest.mark.parametrize("name", ["a_shape", "vertical_slash"])
def test_the_block_table_kernel_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(q), torch.empty(q.shape[1], len(q), device="meta")

    monkeypatch.setattr(flash, "_flash_attention", lambda: attend)
    Serving(monkeypatch, 1 << 15, audit_rows=0, kernel="block_table").serve(MIXTURES[name])


def pretend_flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> None:
    from minference_vllm.kernels.fa4 import attention

    monkeypatch.setattr(limits, "unavailable_reason", lambda: None)
    monkeypatch.setattr(attention, "flash_attention_4", lambda: lambda *arguments: None)


@pytest.mark.parametrize("major", [9, 10])
@pytest.mark.parametrize("name", ["dense", "a_shape", "vertical_slash", "remainder", "default_cuda", "mixed"])
def test_the_kernel_fa4_waits_for_nothing(name: str, major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from minference_vllm.kernels.fa4 import attention

    pretend_flash_attention_4(monkeypatch)
    monkeypatch.setattr(attention, "major_capability", lambda tensor: major)
    serving = Serving(monkeypatch, 1 << 15, audit_rows=0, kernel="fa4")
    serving.serve(MIXTURES[name])
    # A chunk that begins and ends inside a page.
    chunk = Chunk(0, 0, serving.inputs.chunk.context_len - 50, serving.inputs.chunk.seq_len - 50)
    serving.inputs = dataclasses.replace(serving.inputs, chunk=chunk)
    serving.serve(MIXTURES[name])


def test_auto_considers_fa4_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_flash_attention_4(monkeypatch)
    memory = torch.empty(4, KV_HEADS, PAGE, 2 * DIM, dtype=torch.bfloat16, device="meta")
    cache = PagedCache(memory[..., :DIM], memory[..., DIM:], "rows")
    small = dataclasses.replace(cache, key=cache.key[:, :, :64], value=cache.value[:, :, :64])
    with DeviceAccount(monkeypatch):
        kernels = candidates("auto", torch.bfloat16, cache)
        assert [kernel.name for kernel in kernels] == ["triton", "block_table", "fa4"]
        found = description(kernels[2], "auto", torch.bfloat16, cache)
        assert found == "vLLM's FlashAttention 4, block-sparse, and our Triton kernels (kernel 'fa4')"
        assert [kernel.name for kernel in candidates("auto", torch.bfloat16, cache, own=True)] == ["triton"]
        assert [kernel.name for kernel in candidates("auto", torch.bfloat16, small)] == ["triton", "block_table"]
        assert choose("fa4", torch.bfloat16, cache, with_lse=True).name == "fa4"
        monkeypatch.setattr(limits, "unavailable_reason", lambda: "no cutlass")
        assert len(candidates("auto", torch.bfloat16, cache)) == 2
        with pytest.raises(ValueError, match="kernel 'fa4' cannot run: no cutlass"):
            choose("fa4", torch.bfloat16, cache)


@pytest.mark.parametrize("name", ["default_cuda", "a_shape", "antidiagonal", "mixed"])
@pytest.mark.parametrize("page", [16, PAGE])
def test_timing_kernels_takes_no_more_than_was_taken_for_it(
    name: str, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On top of serving such a chunk; ``backend/warmup.py`` allocates both while vLLM measures memory."""

    def attend(q: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(q), torch.empty(q.shape[1], len(q), device="meta")

    monkeypatch.setattr(flash, "_flash_attention", lambda: attend)
    pretend_flash_attention_4(monkeypatch)
    monkeypatch.setattr(spread.torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(spread.torch, "rand", lambda *size, device, **options: torch.empty(size, device=device))
    seq_len = kernel_trial.SEQ_LEN
    with DeviceAccount(monkeypatch):
        memory = torch.empty(4, KV_HEADS, page, 2 * DIM, dtype=torch.bfloat16, device="meta")
        cache = PagedCache(memory[..., :DIM], memory[..., DIM:], "rows")
        query = torch.empty(CHUNK, HEADS, DIM, dtype=torch.bfloat16, device="meta")
        table = torch.empty(seq_len // page, dtype=torch.int64, device="meta")
        inputs = Inputs.of(query, cache, table, Chunk(0, 0, seq_len - CHUNK, seq_len), DIM**-0.5)
        kernels = candidates("auto", torch.bfloat16, cache)
        assert len(kernels) == (3 if page == limits.BLOCK else 2)
        taken = []
        for kernel in kernels:
            with LiveBytes(query, inputs.pages, memory) as served:
                attend_chunk(inputs, kernel.served(MIXTURES[name]), kernel, torch.empty_like(query))
            taken.append(served.peak)

        def clock(run: Any) -> float:
            run()
            return 1.0

        trial = Trial([kernel.name for kernel in kernels], clock, Budget(1e9))
        with LiveBytes(query, inputs.pages, memory) as timed:
            kernel_trial.run_trial(trial, kernels, inputs, MIXTURES[name], None)
    assert not trial.failed and len(trial.medians) == len(kernel_trial.DENSITIES)
    assert timed.peak + kernel_trial.PAGE_BYTES <= max(taken) + kernel_trial.MEMORY, f"{timed.peak >> 20} MiB, {taken}"


@pytest.mark.parametrize(
    ("waits", "pageable", "work"),
    [
        ("_local_scalar_dense", "", lambda on_gpu: int(on_gpu.sum())),
        ("_local_scalar_dense", "", lambda on_gpu: bool(on_gpu.any())),
        ("_to_copy", "", lambda on_gpu: on_gpu.to("cpu")),
        ("", "tensor", lambda on_gpu: torch.tensor([1, 2], device="meta")),
        ("", "_to_copy", lambda on_gpu: torch.arange(2, device="cpu").to("meta", non_blocking=True)),
        ("", "copy_", lambda on_gpu: on_gpu.copy_(torch.zeros(4, device="cpu"))),
        ("", "index", lambda on_gpu: on_gpu[[0, 2]]),
    ],
)
def test_the_account_sees_waits_and_copies(
    waits: str, pageable: str, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = torch.empty(4, device="meta")
    with DeviceAccount(monkeypatch) as account:
        work(on_gpu)
    assert list(account.waits) == [waits] * bool(waits) and list(account.pageable) == [pageable] * bool(pageable)
