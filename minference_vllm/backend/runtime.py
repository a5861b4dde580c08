"""What one engine process knows once its configuration is there: settings, patterns, counters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any, Protocol

import torch

from minference_vllm.backend import dual_chunk_limits
from minference_vllm.backend.compat import add_worker_method, vllm_platform
from minference_vllm.backend.counters import Counters
from minference_vllm.core.inputs import Inputs
from minference_vllm.kernels.choose import DTYPES
from minference_vllm.kernels.native import library
from minference_vllm.patterns.discovery import discover_patterns, total_query_heads
from minference_vllm.patterns.file import PatternFile
from minference_vllm.patterns.kinds import PatternError
from minference_vllm.prefill.dual_chunk import DualChunk
from minference_vllm.prefill.recall import RaisedSteps
from minference_vllm.selection.families import family_of
from minference_vllm.settings import Settings, load_settings

logger = logging.getLogger("vllm.minference_vllm")

STATS_METHOD = "minference_stats"
"""What workers are asked for their ``Counters.report`` by: ``LLM.collective_rpc("minference_stats")``."""


class Recorder(Protocol):
    """Measures every sparse chunk while a model is calibrated (``offline/calibrate/recorder.py``)."""

    def record(self, layer: int, first_head: int, inputs: Inputs) -> None: ...

    def next_prompt(self, number: int) -> None: ...


@dataclass
class Runtime:
    settings: Settings
    patterns: PatternFile
    source: str
    """Where the patterns came from and why, for the log."""
    counters: Counters = field(default_factory=Counters)
    is_draft: bool = False
    """Whether the model drafts tokens for another."""
    raised: RaisedSteps = field(default_factory=RaisedSteps)
    recorder: Recorder | None = None
    """While a model is calibrated; every sparse chunk then runs densely."""
    layer_groups: list[Callable[[], Callable[[], None] | None]] = field(default_factory=list)
    """Weak references to what finds the patterns of a group's layers anew, in the order in which groups were made."""
    dual_chunk: DualChunk | None = None
    """Of a model with dual chunk attention."""
    sparse_groups: dict[str, bool] = field(default_factory=dict)
    """Groups of layers that can run sparsely, by the name of their first layer: whether they see prefill chunks in
    pieces, as layers do that attend within chunks of the sequence (Llama 4)."""

    def __post_init__(self) -> None:
        self.discovered = self.patterns, self.source
        """What the model is served with where nobody asks for other patterns."""

    def counts_batches_of(self, group: str) -> bool:
        """Whether batches are counted by this group. Each group sees every batch, and one of them counts; one that sees
        whole chunks goes before one that sees pieces."""
        return group == min(self.sparse_groups, key=self.sparse_groups.__getitem__)

    def use(self, patterns: PatternFile, source: str) -> None:
        """Run other patterns from the next batch on, and count from zero; between batches only.

        Args:
            source: where they came from, for the log.

        Raises:
            ValueError: they cannot run on this model or its pages; the message says which and what is allowed.
        """
        self.patterns, self.source = patterns, source
        self.counters, self.raised = Counters(self.counters.name), RaisedSteps()
        for group in self.layer_groups:
            prepare = group()
            if prepare is not None:
                prepare()

    def summary(self, kernels: str) -> str:
        """One line for the log: where the patterns come from, and the settings that are not at their default.

        Args:
            kernels: what attends sparse chunks, see ``kernels.choose.description``.
        """
        changed = self.settings.model_dump(exclude_defaults=True, exclude={"patterns"})
        settings = ", ".join(f"{name} = {value}" for name, value in changed.items()) or "default settings"
        return f"patterns from {self.source}; {settings}; {kernels}; sparse from {self.settings.min_context} tokens"


_runtimes: dict[tuple[int, str, str], tuple[Any, Runtime]] = {}


def runtime_for(vllm_config: Any) -> Runtime:
    """The runtime of a model in an engine; made, and everything in it validated, on first use.

    vLLM builds the language model of a multimodal one under a copy of the configuration, which names the same
    checkpoint and shares ``compilation_config``. The copy has the same runtime; a draft model has one of its own.

    Raises:
        ValueError: settings, pattern file or model cannot be used; the message says which and what is allowed.
    """
    engine, model = vllm_config.compilation_config, vllm_config.model_config
    # A model may draft for itself.
    key = id(engine), model.model, model.runner_type
    known = _runtimes.get(key)
    if known is None:
        # The engine's part is kept beside the runtime so that its id stays its own.
        known = _runtimes[key] = (engine, _make_runtime(vllm_config))
        add_worker_method(STATS_METHOD, lambda worker: runtime_for(worker.vllm_config).counters.report())
    return known[1]


def _make_runtime(vllm_config: Any) -> Runtime:
    model = vllm_config.model_config
    check_model(model)
    settings = load_settings(vllm_config.additional_config)
    is_draft = model.runner_type == "draft"
    patterns, source = (draft_patterns if is_draft else model_patterns)(settings, model)
    dual_chunk = dual_chunk_limits.dual_chunk_of(model)
    if dual_chunk is not None:
        dual_chunk_limits.check_configuration(vllm_config, settings, patterns)
    counters = Counters("minference (draft model)" if is_draft else "minference")
    runtime = Runtime(settings, patterns, source, counters, is_draft, dual_chunk=dual_chunk)
    # Also runs in processes that multiprocessing starts, which end without ``atexit``.
    Finalize(None, _log_the_rest, (runtime,), exitpriority=1)
    return runtime


def model_patterns(settings: Settings, model: Any) -> tuple[PatternFile, str]:
    """As ``discover_patterns``; the file must be of this model."""
    platform = "cuda" if vllm_platform().is_cuda() else "cpu"
    patterns, source = discover_patterns(settings, model, platform)
    patterns.check_model(model.get_total_num_hidden_layers(), total_query_heads(model), source)
    return patterns, source


def draft_patterns(settings: Settings, model: Any) -> tuple[PatternFile, str]:
    """Those of a draft model: the setting ``patterns`` where it describes the draft as well, else what is found for the
    draft itself."""
    try:
        return model_patterns(settings, model)
    except PatternError:
        if settings.patterns is None:
            raise
    patterns, source = model_patterns(settings.model_copy(update={"patterns": None}), model)
    return patterns, f"{source}, since {settings.patterns} describes another model than the draft"


def _log_the_rest(runtime: Runtime) -> None:
    """The statistics of the last chunks, when the process ends."""
    if runtime.settings.log_interval and runtime.counters.has_more_to_log:
        logger.info(runtime.counters.line())


def check_model(model: Any) -> None:
    """Raise ValueError, with all reasons, where a model as a whole cannot be served."""
    reasons = unsupported_model_reasons(model)
    if reasons:
        raise ValueError(f"minference cannot serve {model.model}: " + "; ".join(reasons))


def unsupported_model_reasons(model: Any) -> list[str]:
    """Why a model as a whole cannot be served; empty when it can."""
    reasons = []
    if getattr(model, "use_mla", False):
        reasons.append("multi-head latent attention (MLA) keeps no keys per head; choose another attention backend")
    if model.runner_type not in ("generate", "draft"):
        reasons.append(f"{model.runner_type} models run no causal prefill; minference serves text generation")
    elif getattr(model, "is_encoder_decoder", False):
        reasons.append("encoder-decoder models are not supported; minference serves decoder-only models")
    if not total_query_heads(model):
        reasons.append("it has no attention heads, and with them nothing that an attention backend computes")
    if model.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        reasons.append(f"dtype {str(model.dtype).removeprefix('torch.')} is not supported; allowed are {allowed}")
    return reasons


def check_cpu_kernel(kernel: str, dtype: torch.dtype, head_size: int, dual_chunk: bool = False) -> None:
    """Raise ValueError when the kernel that the user named, or that the layer needs, cannot run on this CPU.

    Args:
        kernel: the setting of that name.
        dual_chunk: whether the layer has dual chunk attention.
    """
    reason = None
    if kernel == "triton":
        reason = "it needs an NVIDIA GPU"
    elif kernel == "native" or dual_chunk:
        reason = library.unsupported_reason(dtype, head_size)
        if reason and dual_chunk:
            raise ValueError(f"minference: dual chunk attention needs kernel 'native', which cannot run here: {reason}")
    if reason:
        raise ValueError(f"minference: kernel {kernel!r} cannot run here: {reason}; set kernel to 'auto'")


def check_page_size(runtime: Runtime, block_size: int) -> None:
    """Raise ValueError when a pattern cannot run on pages of this size."""
    file = runtime.patterns
    for pattern in {file.default, *(pattern for heads in file.layers.values() for pattern in heads.values())}:
        problem = family_of(pattern).page_size_problem(pattern, block_size)
        if problem:
            raise ValueError(f"minference: patterns from {runtime.source}: {problem}")


def attention_chunk_reasons(size: int | None, min_context: int) -> list[str]:
    """Why a layer that attends within chunks of the sequence runs densely; empty when it can run sparsely.

    Args:
        size: tokens of such a chunk; None: the layer attends everything before a row.
        min_context: the setting.
    """
    short = size is not None and size < min_context
    return [f"attention within chunks of {size} tokens, below min_context"] if short else []


def unsupported_layer_reasons(
    *,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    alibi_slopes: Any,
    sinks: Any,
    is_decoder: bool,
    kv_cache_dtype: str,
    dtype: torch.dtype,
    min_window: int | None = None,
) -> list[str]:
    """Why a single layer runs densely; empty when it can run sparsely.

    Args:
        min_window: the shortest sliding window, in tokens, that runs sparsely; None: none does.
    """
    reasons = []
    if not is_decoder:
        reasons.append("not causal self-attention")
    if sliding_window is not None and sliding_window >= 0:
        if min_window is None:
            reasons.append("sliding window")
        elif sliding_window < min_window:
            reasons.append(f"sliding window of {sliding_window} tokens, below min_context")
    if logits_soft_cap:
        reasons.append("soft cap on logits")
    if alibi_slopes is not None:
        reasons.append("ALiBi")
    if sinks is not None:
        reasons.append("attention sinks")
    if kv_cache_dtype not in ("auto", str(dtype).removeprefix("torch.")):
        reasons.append(f"KV cache of {kv_cache_dtype}")
    return reasons
