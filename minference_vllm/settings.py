"""The settings of the backend, one frozen pydantic model.

Order of precedence: ``--additional-config '{"minference": {...}}'``, then environment variables
``MINFERENCE_<FIELD>``, then the defaults below.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from minference_vllm.core.validation import cut, did_you_mean, nearest, value_problem

KEY = "minference"
"""Our key in ``additional_config``."""
ENVIRONMENT_PREFIX = "MINFERENCE_"
PATTERNS_ARE = "the path of a pattern file, the name of a shipped one, or a pattern for all heads: low_rank(32, 0.95)"
INSTALLERS = "MINFERENCE_CPU"
"""An environment variable that is not a setting: ``tools/install_engine.py`` reads it."""
RENAMED = {"engine": "kernel"}
"""Renamed settings: old name -> new name."""


class Settings(BaseModel):
    """Settings of the backend. Unknown fields are refused with the list of known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patterns: str | None = None
    """Pattern file: a path, or the name of one shipped in ``pattern_configs`` (``a_shape``, ``block_sparse`` ...); or
    one pattern for all heads, ``low_rank(32, 0.95)``.
    None: the checkpoint's own ``sparse_attention_config.json`` if it has one, else a shipped file for the model, else
    ``low_rank``."""

    min_context: int = Field(default=8192, ge=0, le=1 << 24)
    """A prefill chunk whose last token lies below this position (in tokens) is computed densely, and so is every chunk
    in a layer whose sliding window is shorter."""

    min_chunk: int = Field(default=256, ge=1, le=1 << 24)
    """A chunk with fewer new tokens than this is computed densely: its index would cost more than it saves."""

    tile: int | None = Field(default=None, ge=32, le=4096)
    """Query rows that share one selection of keys, rounded up to whole pages. None: 128."""

    kernel: Literal["auto", "block_table", "fa4", "native", "triton"] = "auto"
    """The attention kernel: ``native``, our kernels for x86 processors from AVX2 on; ``triton``, our kernels for GPUs;
    ``fa4``, vLLM's FlashAttention 4 together with them; ``block_table``, vLLM's own kernel on both platforms; ``auto``,
    the fastest one that runs here, which GPUs find by timing them when the engine starts."""

    audit_rows: int = Field(default=4, ge=0, le=1024)
    """Rows per chunk and layer whose recall and value recall are measured, half of them random, half outliers; 0 turns
    the audit off."""

    audit_share: float = Field(default=0.01, ge=0.0, le=1.0)
    """Maximum share of the sparse attention's time that the audit may take (on GPUs: of its planned work). Chunks and
    layers are skipped to stay within it. No effect with a ``recall_floor``."""

    recall_floor: float | None = Field(default=None, gt=0.0, lt=1.0)
    """A head whose audited value recall falls below this gets more keys for the rest of the request, then all of them.
    Every chunk is then audited in every layer. None: recall is observed only."""

    log_interval: float = Field(default=10.0, ge=0.0)
    """Seconds between two lines of statistics in the log while sparse chunks are served; 0 turns them off."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_setting_is_true_or_false(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("no setting is true or false")
        return value

    @field_validator("patterns", mode="before")
    @classmethod
    def _patterns_are_named(cls, patterns: Any) -> Any:
        if patterns is None or isinstance(patterns, str):
            return patterns
        raise ValueError(f"must be {PATTERNS_ARE}")

    @field_validator("recall_floor")
    @classmethod
    def _a_floor_needs_an_audit(cls, floor: float | None, info: ValidationInfo) -> float | None:
        if floor is not None and info.data.get("audit_rows") == 0:
            raise ValueError("a floor needs audit_rows of at least 1")
        return floor


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it, its place, and what is allowed."""


def load_settings(additional_config: Any = None, environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from vLLM's ``additional_config`` and the environment.

    Args:
        additional_config: ``vllm_config.additional_config``; only its key ``minference`` is read.
        environment: defaults to ``os.environ``.

    Raises:
        SettingsError: unknown field, wrong type or a value out of range, with the place it came from.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for field in (*Settings.model_fields, *RENAMED):
        variable = _variable(field)
        if environment.get(variable):
            values[field] = environment[variable]
            places[field] = variable
    others = additional_config if isinstance(additional_config, Mapping) else {}
    configured = others.get(KEY, {})
    if not isinstance(configured, Mapping):
        raise SettingsError(
            f'additional_config["{KEY}"] must be an object of settings, not {type(configured).__name__}'
        )
    for field, value in configured.items():
        values[field] = value
        places[field] = f'additional_config["{KEY}"]["{cut(str(field))}"]'
    known = Settings.model_fields
    problems = [*_misspelt_variables(environment), *_misspelt_keys(others)]
    for field in (field for field in values if field not in known):
        if field in RENAMED:
            problems.append(f"{places[field]}: this setting is now named {RENAMED[field]!r}")
        else:
            names = f"{', '.join(known)}{did_you_mean(str(field), known)}"
            problems.append(f"{places[field]}: unknown setting; known ones are {names}")
    try:
        settings = Settings(**{field: value for field, value in values.items() if field in known})
    except ValidationError as error:
        for item in error.errors():
            field = str(item["loc"][0])
            problems.append(f"{places[field]} = {value_problem(item, known[field])}")
    if problems:
        raise SettingsError("minference settings: " + "; ".join(problems))
    return settings


def _variable(field: str) -> str:
    return ENVIRONMENT_PREFIX + field.upper()


def _misspelt_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with variables whose names are like those of settings. Others with our prefix are logged only:
    Kubernetes sets ``MINFERENCE_PORT`` and the like for a service of that name."""
    fields = (*Settings.model_fields, *RENAMED)
    known = list(map(_variable, fields))
    given = {variable for variable, value in environment.items() if value}
    for variable in sorted(given - {*known, INSTALLERS}):
        if variable.upper().startswith(ENVIRONMENT_PREFIX):
            field = nearest(variable[len(ENVIRONMENT_PREFIX) :], fields)
            meant = field and _variable(field)
            if meant is None:
                _warn_of_variable(cut(variable), ", ".join(map(_variable, Settings.model_fields)))
        else:
            # "INFERENCE_KERNEL" may well be somebody else's.
            meant = nearest(variable, known, alike=0.9) if variable[:1] in "Mm" else None
        if meant:
            yield f"{cut(variable)}: unknown variable; did you mean {meant}?"


@functools.cache
def _warn_of_variable(variable: str, known: str) -> None:
    logging.getLogger("vllm.minference_vllm").warning("%s is no setting of minference; those are %s", variable, known)


def _misspelt_keys(additional_config: Mapping[Any, Any]) -> Iterator[str]:
    """What is wrong with keys beside ours that are like it, or like what belongs below it."""
    for key in additional_config.keys() - {KEY, "inference"}:  # a word of its own
        if nearest(str(key), [KEY], alike=0.8):
            yield f'additional_config["{cut(str(key))}"]: unknown; did you mean "{KEY}"?'
        elif key in Settings.model_fields:
            yield f'additional_config["{key}"]: settings of minference stand in additional_config["{KEY}"]'
