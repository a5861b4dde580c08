"""State of one engine process, made from its configuration: settings, patterns, counters."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any, Protocol

from minference_vllm.backend import dual_chunk_limits
from minference_vllm.backend.compat import add_worker_method, vllm_platform
from minference_vllm.backend.counters import Counters
from minference_vllm.backend.limits import check_model, check_page_size
from minference_vllm.backend.request_patterns import CANNOT_RUN, Asked, RequestRows, asked_by
from minference_vllm.core.inputs import Inputs
from minference_vllm.patterns.discovery import discover_patterns, total_query_heads
from minference_vllm.patterns.file import PatternFile
from minference_vllm.patterns.kinds import PatternError
from minference_vllm.prefill.dual_chunk import DualChunk
from minference_vllm.prefill.recall import RaisedSteps
from minference_vllm.settings import Settings, load_settings

logger = logging.getLogger("vllm.minference_vllm")

STATS_METHOD = "minference_stats"
"""Worker method that returns ``Counters.report``: ``LLM.collective_rpc("minference_stats")``."""
MAX_ASKED = 64
"""Maximum number of requested patterns that layers stay prepared for. Above it all are dropped, and prepared again on
use."""


class Recorder(Protocol):
    """Measures every sparse chunk while a model is calibrated (``offline/calibrate/recorder.py``)."""

    def record(self, layer: int, first_head: int, inputs: Inputs) -> None: ...

    def next_prompt(self, number: int) -> None: ...


class LayerGroup(Protocol):
    """A metadata builder of ours, through which the runtime prepares the builder's layers."""

    def prepare_layers(self) -> None: ...

    def prepare_asked(self, asked: Asked) -> bool: ...

    def forget_asked(self) -> None: ...


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
    """Set while a model is calibrated; every sparse chunk then runs densely."""
    layer_groups: list[weakref.ref[LayerGroup]] = field(default_factory=list)
    """In order of creation."""
    dual_chunk: DualChunk | None = None
    """Geometry of a model with dual chunk attention, else None."""
    sparse_groups: dict[str, bool] = field(default_factory=dict)
    """Groups of layers that can run sparsely, by the name of their first layer: whether they see prefill chunks in
    pieces, as groups with chunked local attention (Llama 4) do."""
    requests: RequestRows = field(default_factory=RequestRows)
    _asked: dict[str, str | None] = field(default_factory=dict)
    """By name of requested patterns: why such requests are served densely, or None if they are not."""

    def __post_init__(self) -> None:
        self.discovered = self.patterns, self.source
        """What the model is served with unless other patterns are asked for."""

    def counts_batches_of(self, group: str) -> bool:
        """Whether this group counts batches. Every group sees every batch, so only one counts, preferably one that sees
        whole chunks."""
        return group == min(self.sparse_groups, key=self.sparse_groups.__getitem__)

    def use(self, patterns: PatternFile, source: str) -> None:
        """Run other patterns from the next batch on, and reset the counters. Call it only between batches.

        Args:
            source: where they came from, for the log.

        Raises:
            ValueError: they cannot run on this model or its pages; the message says which and what is allowed.
        """
        self.patterns, self.source = patterns, source
        self.counters, self.raised = Counters(self.counters.name), RaisedSteps()
        for group in self._groups():
            group.prepare_layers()

    def add_group(self, group: LayerGroup) -> None:
        """Register a new builder, which has prepared its layers."""
        self.layer_groups.append(weakref.ref(group))
        self._forget_asked()

    def _forget_asked(self) -> None:
        self._asked.clear()
        for group in self._groups():
            group.forget_asked()

    def _groups(self) -> list[LayerGroup]:
        return [group for group in (reference() for reference in self.layer_groups) if group is not None]

    @contextlib.contextmanager
    def step(self, scheduled: Any) -> Iterator[None]:
        """Context in which the model runner executes a step.

        Args:
            scheduled: vLLM's ``SchedulerOutput``.
        """
        if len(self._asked) > MAX_ASKED:
            self._forget_asked()
        self.requests.begin(scheduled, self.patterns)
        try:
            yield
        finally:
            self.requests.end()

    def dense_reason(self, asked: Asked) -> str | None:
        """Why a request that asked for this is served densely. None: all layers are prepared to serve it."""
        if asked.dense is not None:
            return asked.dense
        if asked.name not in self._asked:
            self._asked[asked.name] = self._prepare(asked)
        return self._asked[asked.name]

    def _prepare(self, asked: Asked) -> str | None:
        try:
            # All groups: a request must run the same patterns in every layer.
            found = [group.prepare_asked(asked) for group in self._groups()]
        except (ValueError, RuntimeError) as error:
            logger.warning("minference: requests that ask for %s are served densely: %s", asked.name, error)
            return CANNOT_RUN
        return None if any(found) else CANNOT_RUN

    def check_request(self, params: Any, vllm_config: Any) -> Asked | None:
        """What a new request asks for (``asked_by``), validated.

        Args:
            params: vLLM's ``SamplingParams``.

        Raises:
            ValueError: there are no such patterns, or they cannot run on this model, its pages or its kernel.
        """
        asked = asked_by(params, self.patterns)
        if asked is None or asked.patterns is None:
            return asked
        model, page = vllm_config.model_config, vllm_config.cache_config.block_size
        asked.patterns.check_model(model.get_total_num_hidden_layers(), total_query_heads(model), asked.name)
        if page is not None:
            check_page_size(asked.patterns, asked.name, page)
        return asked

    def summary(self, kernels: str) -> str:
        """One line for the log: source of the patterns, non-default settings and kernels.

        Args:
            kernels: what attends sparse chunks, see ``kernels.choose.description``.
        """
        changed = self.settings.model_dump(exclude_defaults=True, exclude={"patterns"})
        settings = ", ".join(f"{name} = {value}" for name, value in changed.items()) or "default settings"
        return f"patterns from {self.source}; {settings}; {kernels}; sparse from {self.settings.min_context} tokens"


_runtimes: dict[tuple[int, str, str], tuple[Any, Runtime]] = {}


def runtime_for(vllm_config: Any) -> Runtime:
    """The runtime of a model in an engine, created and validated on first use.

    vLLM builds the language model of a multimodal model with a copy of the configuration, which names the same
    checkpoint and shares ``compilation_config``. The copy has the same runtime; a draft model has its own.

    Raises:
        ValueError: settings, pattern file or model cannot be used; the message says which and what is allowed.
    """
    engine, model = vllm_config.compilation_config, vllm_config.model_config
    # The runner type, since a model may be its own draft model.
    key = id(engine), model.model, model.runner_type
    known = _runtimes.get(key)
    if known is None:
        # Keeps ``compilation_config`` alive, so that its id is not reused.
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
    # Also runs in processes started by multiprocessing, which skip ``atexit``.
    Finalize(None, _log_the_rest, (runtime,), exitpriority=1)
    return runtime


def model_patterns(settings: Settings, model: Any) -> tuple[PatternFile, str]:
    """As ``discover_patterns``; also checks that the file fits this model."""
    platform = "cuda" if vllm_platform().is_cuda() else "cpu"
    patterns, source = discover_patterns(settings, model, platform)
    patterns.check_model(model.get_total_num_hidden_layers(), total_query_heads(model), source)
    return patterns, source


def draft_patterns(settings: Settings, model: Any) -> tuple[PatternFile, str]:
    """Patterns of a draft model: the setting ``patterns`` if it fits the draft as well, else what is discovered for the
    draft itself."""
    try:
        return model_patterns(settings, model)
    except PatternError:
        if settings.patterns is None:
            raise
    patterns, source = model_patterns(settings.model_copy(update={"patterns": None}), model)
    return patterns, f"{source}, since {settings.patterns} describes another model than the draft"


def _log_the_rest(runtime: Runtime) -> None:
    """Log the statistics of the last chunks when the process ends."""
    if runtime.settings.log_interval and runtime.counters.has_more_to_log:
        logger.info(runtime.counters.line())
