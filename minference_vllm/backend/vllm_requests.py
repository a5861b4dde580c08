"""Single requests, which vLLM does not show to a backend: check them in vLLM's front end, and track them in the steps
of its model runners. All private parts of vLLM that this needs are named in this file."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minference_vllm.backend.after_import import after_import
from minference_vllm.backend.compat import selects_minference

if TYPE_CHECKING:
    from minference_vllm.backend.request_patterns import Asked

FRONT_END, SERVER = "vllm.v1.engine.input_processor", "vllm.v1.engine.async_llm"
RUNNERS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "vllm.v1.worker.gpu_model_runner": ("_prepare_inputs", lambda runner, returned: runner.input_batch),
    "vllm.v1.worker.gpu.model_runner": ("prepare_inputs", lambda runner, returned: returned),
}
"""By module of vLLM's model runners, V1 and V2, which the CPU runners subclass: the method after which the order of
requests in a step's batch is known, and a function of the runner and the method's result that finds the batch."""


def check_new_requests() -> None:
    """Check what new requests ask for, in every process that accepts requests, for engines that run minference.
    Idempotent."""
    after_import(FRONT_END, _check_new_requests)
    after_import(SERVER, _check_before_streaming)


def _check_new_requests() -> None:
    processor = sys.modules[FRONT_END].InputProcessor
    make, process = processor.__init__, processor.process_inputs

    @functools.wraps(make)
    def make_ready(self: Any, *args: Any, **kwargs: Any) -> None:
        from minference_vllm.backend.runtime import runtime_for

        make(self, *args, **kwargs)
        if selects_minference(self.vllm_config):
            runtime_for(self.vllm_config)  # now: it may query the Hugging Face hub, which should not delay a request

    @functools.wraps(process)
    def process_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        asked = checked(request.sampling_params, self.vllm_config)
        if asked is not None:
            # Keys and values depend on the patterns of the layers below: prefix caching may share pages only between
            # requests that ask for the same patterns.
            request.cache_salt = f"{request.cache_salt or ''} minference={asked.name}"
        return request

    processor.__init__, processor.process_inputs = make_ready, process_and_check


def _check_before_streaming() -> None:
    """``AsyncLLM`` processes a request only when its first token is awaited. By then a streamed response has begun, and
    its HTTP status can no longer report an error."""
    engine = sys.modules[SERVER].AsyncLLM
    generate = engine.generate

    @functools.wraps(generate)
    def check_and_generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        checked(sampling_params, self.vllm_config)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    engine.generate = check_and_generate


def checked(params: Any, vllm_config: Any) -> Asked | None:
    """What a new request asks for; None if it runs the server's patterns, and in engines with other backends.

    Args:
        params: vLLM's ``SamplingParams``, or what it uses instead of them.

    Raises:
        VLLMValidationError: the request asks for something that is not allowed; vLLM's server responds with status 400.
    """
    if not getattr(params, "extra_args", None) or not selects_minference(vllm_config):
        return None
    from vllm.exceptions import VLLMValidationError

    from minference_vllm.backend.runtime import runtime_for

    try:
        return runtime_for(vllm_config).check_request(params, vllm_config)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def follow_requests() -> None:
    """Make the model runners of this process report the requests of each step's batch, for engines that run minference.
    Idempotent."""
    for module, function in _FOLLOW.items():
        after_import(module, function)


def _follow_requests(module: str) -> None:
    runner = sys.modules[module].GPUModelRunner
    name, where = RUNNERS[module]
    execute, prepare = runner.execute_model, getattr(runner, name)

    @functools.wraps(execute)
    def execute_and_tell(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        from minference_vllm.backend.runtime import runtime_for

        if not selects_minference(self.vllm_config):
            return execute(self, scheduler_output, *args, **kwargs)
        with runtime_for(self.vllm_config).step(scheduler_output):
            return execute(self, scheduler_output, *args, **kwargs)

    @functools.wraps(prepare)
    def prepare_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        from minference_vllm.backend.runtime import runtime_for

        returned = prepare(self, *args, **kwargs)
        if selects_minference(self.vllm_config):
            runtime_for(self.vllm_config).requests.stand(where(self, returned).req_ids)
        return returned

    runner.execute_model = execute_and_tell
    setattr(runner, name, prepare_and_tell)


_FOLLOW = {module: functools.partial(_follow_requests, module) for module in RUNNERS}
"""One function object per module, so that ``after_import`` can tell repeated calls."""
