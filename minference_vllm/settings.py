"""What a user may set, in one frozen model.

Order of precedence: ``--additional-config '{"minference": {...}}'``, then environment variables
``MINFERENCE_<FIELD>``, then the defaults below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

ENVIRONMENT_PREFIX = "MINFERENCE_"
RENAMED = {"engine": "kernel"}
"""Settings that had another name once: old -> new."""


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

    kernel: Literal["auto", "block_table", "native", "triton"] = "auto"
    """What runs attention under an index: ``native``, our kernels for x86 processors from AVX2 on;
    ``triton``, our kernel for GPUs; ``block_table``, vLLM's own kernel, on both; ``auto``, the faster of those that run
    here."""

    audit_rows: int = Field(default=4, ge=0, le=1024)
    """Rows per chunk and layer whose attention recall, and value recall, is taken, half of them drawn, half those most
    unlike the others; 0 turns the audit off."""

    audit_share: float = Field(default=0.01, ge=0.0, le=1.0)
    """How much of the time spent on sparse attention the audit may take (on GPUs: of its planned work); chunks and
    layers are left out to keep it. Without effect under a ``recall_floor``."""

    recall_floor: float | None = Field(default=None, gt=0.0, lt=1.0)
    """A head whose audited value recall falls below this gets more keys for the rest of the request, then all of them.
    Every chunk is then audited in every layer. None: recall is observed only."""

    log_interval: float = Field(default=10.0, ge=0.0)
    """Seconds between two lines of statistics in the log while sparse chunks are served; 0 turns them off."""

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
        variable = ENVIRONMENT_PREFIX + field.upper()
        if environment.get(variable):
            values[field] = environment[variable]
            places[field] = variable
    configured = additional_config.get("minference", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(configured, Mapping):
        raise SettingsError(
            f'additional_config["minference"] must be an object of settings, not {type(configured).__name__}'
        )
    for field, value in configured.items():
        values[field] = value
        places[field] = f'additional_config["minference"]["{field}"]'
    try:
        return Settings(**values)
    except ValidationError as error:
        known = ", ".join(Settings.model_fields)
        problems = []
        for item in error.errors():
            field = str(item["loc"][0])
            place = places.get(field, field)
            if field in RENAMED:
                problems.append(f"{place}: this setting is now named {RENAMED[field]!r}")
            elif item["type"] == "extra_forbidden":
                problems.append(f"{place}: unknown setting; known ones are {known}")
            else:
                problems.append(f"{place} = {item['input']!r}: {item['msg']}")
        raise SettingsError("minference settings: " + "; ".join(problems)) from None
