"""Our GPU classes inside CUDA releases of vLLM: all that vLLM's own Python code does with a backend, without a GPU.

Each case runs in its own process, in which vLLM is such a release (see ``faked_cuda``). As in
``test_triton_kernels.py`` this file is both the test and, run as a script, that process.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from contract_process import CudaVLLM, names, serve

pytestmark = pytest.mark.contract
STEP = 2.0**-8
"""Relative precision of bf16."""


def case_what_vllm_asks_the_backend() -> None:
    from contract_engine import Engine
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionCGSupport

    from minference_vllm.backend.cuda import MInferenceCUDABackend, MInferenceCUDAImpl

    engine = Engine(enforce_eager=False)
    (layer,) = engine.layers
    assert layer.attn_backend is MInferenceCUDABackend and type(layer.impl) is MInferenceCUDAImpl
    assert not layer.impl.dense_only and engine.builder.sparse_layers == [layer]
    assert engine.page == 128, "pages that our backend prefers"
    assert engine.graphs.min_cg_support is AttentionCGSupport.UNIFORM_BATCH
    assert engine.config.compilation_config.cudagraph_mode is CUDAGraphMode.FULL_AND_PIECEWISE
    validate = layer.attn_backend.validate_configuration
    asked = {
        "head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None, "use_mla": False,
        "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": current_platform.get_device_capability(), "attn_type": "decoder",
    }  # fmt: skip
    assert validate(**asked) == []
    if "use_adaptive_verification" in inspect.signature(validate).parameters:  # since 0.30
        (reason,) = validate(**asked, use_adaptive_verification=True)
        assert "query lens mismatch" in reason


def case_a_mixed_batch() -> None:
    from contract_engine import SPARSE, Engine

    from minference_vllm.backend.cuda import MInferenceCUDAMetadata

    engine = Engine()
    batch = engine.batch()
    metadata = engine.metadata(batch)
    (built,) = metadata.values()
    assert isinstance(built, MInferenceCUDAMetadata)
    assert [chunk.request for chunk, _ in built.sparse] == list(SPARSE)
    engine.check(batch, engine.run(batch, metadata), SPARSE, STEP)


def case_patterns_whose_budget_the_data_decide() -> None:
    from contract_engine import Engine

    kinds: list[dict[str, Any]] = [
        {"kind": "low_rank", "gamma": 0.1},
        {"kind": "antidiagonal", "stride": 16, "tau": 0.4},
        {"kind": "peak_threshold", "alpha": 0.9, "sink": 16, "window": 40},
        {"kind": "coverage", "gamma": 0.4, "min_budget": 0},
    ]
    engine = Engine(kinds, settings={"audit_share": 1.0})
    batch = engine.batch([(700, 160)])
    engine.check(batch, engine.run(batch, engine.metadata(batch)), [0], STEP)
    counters = engine.builder.runtime.counters
    assert counters.sparse_chunks == 1 and 0.0 < counters.density < 1.0


def case_batches_without_a_sparse_chunk() -> None:
    """They have vLLM's own metadata, also when captured in a CUDA graph."""
    from contract_engine import Engine
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    engine = Engine(enforce_eager=False)
    for requests in ([(200, 1), (300, 1)], [(0, 140)], [(700, 60), (3, 1)]):
        batch = engine.batch(requests)
        metadata = engine.metadata(batch)
        assert all(type(built) is FlashAttentionMetadata for built in metadata.values())
        engine.check(batch, engine.run(batch, metadata), [], STEP)
    decodes = engine.common(engine.batch([(200, 1), (300, 1)]))
    assert type(engine.builder.build_for_cudagraph_capture(decodes)) is FlashAttentionMetadata


def case_fp8_layers() -> None:
    from contract_engine import SPARSE, Engine, as_fp8

    engine = Engine(kv_cache_dtype="fp8")
    (layer,) = engine.layers
    assert layer.query_quant is not None, "this vLLM hands queries over in FP8"
    for name, scale in (("q", 0.25), ("k", 0.5), ("v", 0.125)):
        getattr(layer, f"_{name}_scale").fill_(scale)
        setattr(layer, f"_{name}_scale_float", scale)
    batch = engine.batch()
    outputs = engine.run(batch, engine.metadata(batch))
    engine.check(as_fp8(batch, 0.25, 0.5, 0.125), outputs, SPARSE, STEP)


def case_hybrid_pages() -> None:
    """Pages of models with state-space layers: 528 tokens, whose largest power-of-two divisor is 16."""
    from contract_engine import Engine

    engine = Engine(block_size=528, pages=16)
    assert engine.page == 528
    batch = engine.batch([(300, 1), (400, 300), (0, 160), (700, 500)])
    engine.check(batch, engine.run(batch, engine.metadata(batch)), [1, 2, 3], STEP)


def case_layers_that_share_a_cache() -> None:
    from contract_engine import SPARSE, Engine

    engine = Engine(layers=3, shared=2)
    assert len(engine.builder.sparse_layers) == 3, "one group of layers"
    batch = engine.batch()
    engine.check(batch, engine.run(batch, engine.metadata(batch)), SPARSE, STEP)


def case_fast_prefill_of_layers_that_share_a_cache() -> None:
    """vLLM derives a builder from ours for layers that only need the last tokens; its batches look like decodes."""
    from contract_engine import Engine
    from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend

    engine = Engine(layers=3, shared=2)
    backend = create_fast_prefill_custom_backend("FastPrefill", engine.layers[0].attn_backend)
    names = [layer.layer_name for layer in engine.layers[1:]]
    spec = engine.builder.kv_cache_spec
    builder = backend.get_builder_cls()(spec, names, engine.config, torch.device("cpu"))
    batch = engine.batch([(200, 1), (300, 200), (0, 160)])
    last = batch.query_start_loc[1:] - 1
    changes: dict[str, Any] = {"logits_indices_padded": last, "num_logits_indices": 3, "max_logits_per_req": 1}
    common = engine.common(batch)
    known = {field.name for field in dataclasses.fields(common)}
    common = dataclasses.replace(common, **{name: value for name, value in changes.items() if name in known})
    built = builder.build(0, common)
    assert built.num_logits_indices == 3 and built.max_query_len == 1
    assert not getattr(built, "sparse", ())


def case_cascade_attention() -> None:
    """Batches with a shared prefix take vLLM's own path, even if a request would be sparse."""
    from contract_engine import Engine
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    if "use_cascade" not in FlashAttentionMetadata.__dataclass_fields__:
        return  # gone since 0.32
    engine = Engine()
    batch = engine.batch([(384, 1), (384, 200)])
    pages = 256 // engine.page
    batch.block_table[1, :pages] = batch.block_table[0, :pages]
    engine.write(batch, 1)
    metadata = engine.metadata(batch, common_prefix=256)
    (built,) = metadata.values()
    assert type(built) is FlashAttentionMetadata and built.use_cascade
    engine.check(batch, engine.run(batch, metadata), [], STEP)
    metadata = engine.metadata(batch)
    engine.check(batch, engine.run(batch, metadata), [1], STEP)


def case_model_runner_v2() -> None:
    from contract_engine import SPARSE, Engine

    engine = Engine(layers=2)
    batch = engine.batch()
    metadata = engine.metadata_v2(batch)
    outputs = engine.run(batch, metadata)
    engine.check(batch, outputs, SPARSE, STEP)
    for found, v1 in zip(outputs, engine.run(batch, engine.metadata(batch)), strict=True):
        assert torch.equal(found, v1)


def case_another_group_of_layers_takes_the_metadata_over() -> None:
    from contract_engine import SPARSE, Engine

    engine = Engine()
    batch = engine.batch()
    (name,) = metadata = engine.metadata(batch)
    other = engine.batch(pages_from=4)
    assert not torch.equal(other.block_table, batch.block_table)
    updated = engine.builder.update_block_table(metadata[name], other.block_table, engine.slot_mapping(other))
    engine.check(other, engine.run(other, {name: updated}), SPARSE, STEP)


def case_over_the_triton_backend() -> None:
    """On GPUs for which vLLM has no FlashAttention. Without dense runs, since vLLM's own kernels need a GPU."""
    from contract_engine import Engine
    from vllm.v1.attention.backends import fa_utils

    from minference_vllm.backend.triton_attn import MInferenceTritonImpl, MInferenceTritonMetadata

    fa_utils.get_flash_attn_version = lambda **options: None
    engine = Engine()
    assert all(type(layer.impl) is MInferenceTritonImpl for layer in engine.layers) and engine.page == 128
    batch = engine.batch([(300, 200), (0, 160)])
    metadata = engine.metadata(batch)
    assert all(type(built) is MInferenceTritonMetadata for built in metadata.values())
    engine.check(batch, engine.run(batch, metadata), [0, 1], STEP)


def case_memory_is_taken_in_the_profiling_run() -> None:
    """There vLLM calls its layers without a cache or a batch."""
    from contract_engine import Engine

    from minference_vllm.backend import warmup

    engine = Engine(layers=3, shared=1, max_model_len=1024, pages=16, max_num_batched_tokens=256)
    caches = [layer.kv_cache for layer in engine.layers]
    taken: list[Any] = []
    serve = warmup.attend_chunk

    def watched(inputs: Any, *others: Any) -> None:
        taken.append((inputs.chunk.context_len, inputs.chunk.seq_len))
        serve(inputs, *others)

    warmup.attend_chunk = watched
    tokens = engine.batch([(0, 256)])
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment,method-assign]
    torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[assignment,method-assign]
    for layer, cache in zip(engine.layers, caches, strict=True):
        layer.kv_cache = torch.tensor([])  # vLLM's placeholder before the cache exists
        assert cache.numel()
    assert not any(bool(output.any()) for output in engine.run(tokens, None, padding=0))
    assert taken == [(768, 1024)], f"layers are alike, but took {taken}"
    for layer, cache in zip(engine.layers, caches, strict=True):
        layer.kv_cache = cache
    warmup._profiled.clear()
    engine.run(tokens, None, padding=0)
    assert len(taken) == 1, "with the cache in place nothing is measured"


def case_building_waits_for_no_gpu() -> None:
    """GPU tensors are on the meta device here, where reading them fails."""
    from contract_engine import SPARSE, Engine

    engine = Engine(enforce_eager=False)
    common = engine.common(engine.batch())
    on_gpu = ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    common = dataclasses.replace(common, **{name: getattr(common, name).to("meta") for name in on_gpu})
    built = engine.builder.build(0, common)
    assert [chunk.request for chunk, _ in built.sparse] == list(SPARSE)


def case_serving_waits_for_no_gpu() -> None:
    """The same for a layer with decodes and several prefills, including vLLM's own operations and FlashAttention."""
    from contract_engine import DIM, HEADS, KV_HEADS, SPARSE, Engine
    from device_account import DeviceAccount
    from vllm.v1.attention.backends import flash_attn

    engine = Engine()
    (layer,), batch = engine.layers, engine.batch()
    on_gpu = ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    common = engine.common(batch)
    common = dataclasses.replace(common, **{name: getattr(common, name).to("meta") for name in on_gpu})
    metadata = engine.builder.build(0, common)
    calls: list[Any] = []
    flash_attn.flash_attn_varlen_func = lambda **arguments: calls.append(arguments["cu_seqlens_q"].shape[0] - 1)
    tokens = len(batch.query) + 5
    query = torch.empty(tokens, HEADS, DIM, dtype=torch.bfloat16, device="meta")
    key = torch.empty(tokens, KV_HEADS, DIM, dtype=torch.bfloat16, device="meta")
    cache, output = layer.kv_cache.to("meta"), torch.empty_like(query)
    with DeviceAccount(pytest.MonkeyPatch()) as account:
        layer.impl.forward(layer, query, key, key, cache, metadata, output)
    assert len(engine.indices) == len(SPARSE) == account.launches["sparse_attention_kernel"]
    assert calls == [3, 1], "requests of the runs between sparse chunks"
    assert not account.waits and not account.pageable, (account.waits, account.pageable)


def case_warm_up_compiles_what_serving_runs() -> None:
    from contract_engine import SPARSE, Engine
    from launch_variants import Variants

    from minference_vllm.backend.warmup import warm_up

    for options in ({}, {"kv_cache_dtype": "fp8"}, {"block_size": 528, "pages": 16}):
        engine = Engine(**options)
        settings = engine.builder.runtime.settings
        with Variants() as compiled:
            warm_up(
                engine.builder.sparse_layers, engine.builder.kv_cache_spec, torch.bfloat16, settings,
                torch.device("cpu"),
            )  # fmt: skip
        batch = engine.batch()
        with Variants() as served:
            engine.run(batch, engine.metadata(batch))
        assert served.found and len(engine.indices) == len(SPARSE)
        unknown = [variant for variant in served.found if variant not in compiled.found]
        assert not unknown, f"{options}: {unknown}"


@pytest.mark.parametrize("case", names(globals()))
def test_in_a_cuda_release(case: str, cuda_vllm: CudaVLLM) -> None:
    cuda_vllm.run(case)


if __name__ == "__main__":
    serve(globals())
