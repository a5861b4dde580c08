"""Requests that ask for other patterns, inside CUDA releases of vLLM: in the front end, and in their batches.

As in ``test_cuda_contract.py`` this file is both the test and, run as a script, the process of a release.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from contract_process import CudaVLLM, names, serve

pytestmark = pytest.mark.contract
STEP = 2.0**-8
"""Relative precision of bf16."""
A_SHAPE = "a_shape(16, 100)"


def case_all_that_we_use_of_vllm_is_there() -> None:
    from minference_vllm.backend.vllm_parts import missing_parts, vllm_folder

    assert list(missing_parts(vllm_folder())) == []


def case_requests_are_checked_where_they_are_taken_in() -> None:
    from contract_engine import MODEL, Engine
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    prompt = {"prompt_token_ids": [1, 2, 3]}

    def take(value: Any, prompt: dict[str, Any] = prompt) -> Any:
        params = SamplingParams(extra_args={"minference": value, "somebody else's": 1})
        return processor.process_inputs("name", {"type": "token", **prompt}, params, supported_tasks=("generate",))

    processor = InputProcessor(Engine().config)
    assert take("default").cache_salt is None
    assert take("dense").cache_salt == " minference=dense"
    salts = [take(value, {**prompt, "cache_salt": "mine"}).cache_salt for value in ("default", A_SHAPE)]
    assert salts == ["mine", "mine minference=a_shape(sink=16, local=100)"]
    for value, message in (
        ("a_shap", "asks for 'a_shap'; allowed are default .* did you mean 'a_shape'"),
        (7, "asks for 7; allowed are default"),
        ("antidiagonal(48)", "antidiagonal stride 48 must divide the page size, here 128"),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            take(value)
    engine = object.__new__(AsyncLLM)
    engine.vllm_config = processor.vllm_config
    with pytest.raises(VLLMValidationError, match="asks for 'a_shap'"):  # before a streamed answer begins
        engine.generate("prompt", SamplingParams(extra_args={"minference": "a_shap"}), "name")
    assert inspect.isasyncgen(engine.generate("prompt", SamplingParams(extra_args={"minference": "dense"}), "name"))
    assert take("peak_threshold(remainder=true)").cache_salt is not None, "by kernel 'triton'"
    processor = InputProcessor(EngineArgs(model=str(MODEL), attention_backend="FLASH_ATTN").create_engine_config())
    assert take("a_shap").cache_salt is None, "another backend's engine is left alone"


def case_both_model_runners_tell_whose_rows_are_in_a_batch() -> None:
    """With stand-ins for the rest of the model runners: the requests of a mixed batch, in vLLM's order."""
    from types import SimpleNamespace

    from contract_engine import SPARSE, Engine
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker import gpu_model_runner as v1
    from vllm.v1.worker.gpu import model_runner as v2

    built: dict[str, Any] = {}

    def executes(prepare: str, metadata: str) -> Any:
        def execute_model(self: Any, scheduler_output: Any, *others: Any) -> None:
            getattr(self, prepare)(scheduler_output)
            built[metadata] = getattr(engine, metadata)(batch)

        return execute_model

    order = [f"request {row}" for row in range(7)]
    in_order = SimpleNamespace(req_ids=order)
    v1.GPUModelRunner.execute_model = executes("_prepare_inputs", "metadata")
    v1.GPUModelRunner._prepare_inputs = lambda self, *others: None
    v2.GPUModelRunner.execute_model = executes("prepare_inputs", "metadata_v2")
    v2.GPUModelRunner.prepare_inputs = lambda self, *others: in_order
    engine = Engine(layers=2)
    batch = engine.batch()
    runners = [object.__new__(found) for found in (v1.GPUModelRunner, v2.GPUModelRunner)]
    runners[0].input_batch = in_order
    dense, asked, _ = SPARSE
    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens = dict(zip(order, batch.query_start_loc.diff().tolist(), strict=True))
    step.scheduled_new_reqs = [
        NewRequestData(
            req_id=order[row], prompt_token_ids=None, mm_features=[], pooling_params=None, block_ids=(),
            sampling_params=SamplingParams(extra_args={"minference": value}), num_computed_tokens=0, lora_request=None,
        )
        for row, value in ((dense, "dense"), (asked, A_SHAPE))
    ]  # fmt: skip
    for runner in runners:
        runner.vllm_config = engine.config
        runner.execute_model(step, None)
        step.scheduled_new_reqs = []  # the next chunks
    for metadata in built.values():
        assert all([chunk.request for chunk, _ in found.sparse] == list(SPARSE[1:]) for found in metadata.values())
        engine.check(batch, engine.run(batch, metadata), SPARSE[1:], STEP)
    counters = engine.builder.runtime.counters
    assert counters.dense_chunks["the request asked for it"] == 2
    assert [work.chunks for work in counters.asked.values()] == [2]


@pytest.mark.parametrize("case", names(globals()))
def test_in_a_cuda_release(case: str, cuda_vllm: CudaVLLM) -> None:
    cuda_vllm.run(case)


if __name__ == "__main__":
    serve(globals())
