"""The kinds of head patterns: which shape an attention head keeps, and its budgets.

A head's pattern is found offline and its positions online (MInference, arXiv 2407.02490). The selection of each kind is
implemented in its file in ``selection/``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_serializer
from pydantic.fields import FieldInfo

from minference_vllm.core.validation import cut, did_you_mean, shortened, value_problem

MAX_BUDGET = 1 << 24
ESTIMATION_BLOCK = 64
"""Block size, in tokens, in which MInference counts the budget of block-sparse heads."""

MAX_NUMBER = 4095
"""The highest layer or head number in a pattern file."""
NUMBERS = f"layers and heads are numbered 0 to {MAX_NUMBER}, without other signs, spaces or leading zeros"
MAX_STEP = 3
"""The step at which every pattern is dense, see ``at_step``."""

Budget = Annotated[int, Field(ge=0, le=MAX_BUDGET)]
Share = Annotated[float, Field(gt=0, lt=1)]


class _Pattern(BaseModel):
    # Strict: strings, booleans and floats such as 0.0 are not accepted as integers.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def named(self) -> dict[str, Any]:
        """The fields' values, without the kind and without options that are off."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {name: value for name, value in self if name != "kind" and (value or defaults[name])}

    @model_serializer
    def _written(self) -> dict[str, Any]:
        return {"kind": type(self).model_fields["kind"].default, **self.named()}

    def __str__(self) -> str:
        """The written form, which ``parse_written_pattern`` reads: ``a_shape(sink=1024, local=4096)``."""
        kind = str(type(self).model_fields["kind"].default)
        values = ", ".join(f"{name}={json.dumps(value)}" for name, value in self.named().items())
        return f"{kind}({values})" if values else kind

    def at_step(self, step: int) -> HeadPattern:
        """This pattern with more keys, for ``recall_floor``: step 0 is the pattern itself, each further step has more
        keys, ``MAX_STEP`` and above are dense.

        The steps between are ``low_rank``, which follows the attention of every row wherever it lies.
        """
        if step <= 0:
            return self  # type: ignore[return-value]  # every subclass below is one of HeadPattern
        return LowRank().at_step(step - 1) if step < MAX_STEP else Dense()

    @property
    def has_remainder(self) -> bool:
        """Whether the keys that a tile leaves out take part in its softmax as one key (``prefill/remainder.py``)."""
        return bool(getattr(self, "remainder", False))

    @property
    def samples(self) -> bool:
        """Whether columns may also represent keys that are left out (``SparseIndex.column_codes``)."""
        return False

    def without_sampling(self) -> HeadPattern:
        """The pattern for kernels that cannot count a key more than once."""
        return self  # type: ignore[return-value]

    def without_remainder(self) -> HeadPattern:
        """The pattern for kernels that cannot add the remainder."""
        return self.model_copy(update={"remainder": False}) if self.has_remainder else self  # type: ignore[return-value]


class Dense(_Pattern):
    """Every key up to the row itself."""

    kind: Literal["dense"] = "dense"

    def at_step(self, step: int) -> Dense:
        return self


class AShape(_Pattern):
    """The first ``sink`` tokens and the last ``local`` tokens of every row (StreamingLLM's shape)."""

    kind: Literal["a_shape"] = "a_shape"
    sink: Budget = 1024
    local: Budget = 4096
    remainder: bool = False


class TriShape(_Pattern):
    """A-shape, and the last ``last`` queries of each chunk attend everything (SCBench, arXiv 2412.10319)."""

    kind: Literal["tri_shape"] = "tri_shape"
    sink: Budget = 1024
    local: Budget = 4096
    last: Budget = 128
    remainder: bool = False


class VerticalSlash(_Pattern):
    """The ``vertical`` strongest columns, and ``slash`` tokens per row of the strongest diagonals, in whole pages, as
    the chunk's last 64 queries see them."""

    kind: Literal["vertical_slash"] = "vertical_slash"
    vertical: Budget = 1000
    slash: Budget = 6096
    remainder: bool = False


class BlockSparse(_Pattern):
    """The ``top_k`` strongest key blocks of 64 tokens for every query tile, by mean-pooled queries and keys."""

    kind: Literal["block_sparse"] = "block_sparse"
    top_k: Annotated[int, Field(ge=1, le=MAX_BUDGET // ESTIMATION_BLOCK)] = 100
    remainder: bool = False


class Coverage(_Pattern):
    """The fewest columns and diagonals whose mass, as the chunk's last 64 queries see it, reaches ``gamma``; at least
    ``min_budget`` tokens per row (after FlexPrefill, arXiv 2502.20766). A head that is not sparse comes out dense."""

    kind: Literal["coverage"] = "coverage"
    gamma: Share = 0.95
    min_budget: Budget = 3072
    remainder: bool = False


class Antidiagonal(_Pattern):
    """Per query tile, the fewest key blocks whose mass reaches ``tau``, scored along antidiagonals of every ``stride``
    tokens (XAttention, arXiv 2503.16428)."""

    kind: Literal["antidiagonal"] = "antidiagonal"
    stride: Annotated[int, Field(ge=2, le=64)] = 16
    tau: Share = 0.9
    remainder: bool = False


class PeakThreshold(_Pattern):
    """Per query tile, the key blocks whose pooled score is at least ``alpha`` times the tile's highest, the first
    ``sink`` and the last ``window`` tokens (FlashPrefill, arXiv 2603.06199)."""

    kind: Literal["peak_threshold"] = "peak_threshold"
    alpha: Share = 0.1
    sink: Budget = 256
    window: Budget = 512
    remainder: bool = False


class LowRank(_Pattern):
    """Per query tile, the single keys, and pages full of them, that some row of the tile looks at, by scores in up to
    ``rank`` dimensions (after Loki, arXiv 2406.02542). They hold a share ``gamma`` of the output (exact weights times
    the norms of values) of the chunk's last rows, and of sampled rows minus 2.5 standard errors. A head that is not
    sparse comes out dense.

    With ``remainder``, the keys that a tile leaves out take part in its softmax as one key. With ``queries``, that many
    representatives of each tile are scored instead of all of its rows, where they suffice. With ``noise``, a head
    samples its keys by their weights, regardless of ``gamma``, so that this is the error of outputs, relative to the
    sum of weights times norms of values (0: no sampling)."""

    kind: Literal["low_rank"] = "low_rank"
    rank: Annotated[int, Field(ge=16, le=128, multiple_of=16)] = 32
    gamma: Share = 0.95
    remainder: bool = False
    queries: Annotated[int, Field(ge=0, le=32, multiple_of=16)] = 0
    noise: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0

    @property
    def samples(self) -> bool:
        return self.noise > 0

    def without_sampling(self) -> LowRank:
        return self.model_copy(update={"noise": 0.0}) if self.noise else self

    def without_remainder(self) -> LowRank:
        """Halves the missing share, ``1 - gamma``, which gives no larger error (``docs/estimator.md``)."""
        if not self.remainder:
            return self.without_sampling()
        return self.model_copy(update={"remainder": False, "gamma": 1 - (1 - self.gamma) / 2, "noise": 0.0})

    def at_step(self, step: int) -> LowRank | Dense:
        """Each step divides the missing share, ``1 - gamma``, by 4."""
        if step >= MAX_STEP:
            return Dense()
        if step <= 0:
            return self
        return self.model_copy(update={"gamma": 1 - (1 - self.gamma) / 4**step, "noise": 0.0})


HeadPattern = Annotated[
    Dense | AShape | TriShape | VerticalSlash | BlockSparse | Coverage | Antidiagonal | PeakThreshold | LowRank,
    Field(discriminator="kind"),
]
FIELDS: dict[str, dict[str, FieldInfo]] = {
    str(kind.model_fields["kind"].default): kind.model_fields for kind in get_args(get_args(HeadPattern)[0])
}
"""The fields of every kind."""
KINDS = tuple(FIELDS)
_head_pattern: TypeAdapter[HeadPattern] = TypeAdapter(HeadPattern)


class PatternError(ValueError):
    """A pattern file that cannot be used; the message names the file, the place in it, and what is allowed."""


def parse_head_pattern(content: Any) -> HeadPattern:
    """One head's pattern from parsed JSON, ``{"kind": ..., ...}``.

    Raises:
        PatternError: unknown kind or field, or a budget out of range.
    """
    try:
        return _head_pattern.validate_python(content)
    except ValidationError as error:
        raise PatternError(f"pattern {shortened(content)}: {first_problem(error)}") from None


def parse_written_pattern(text: str) -> HeadPattern | None:
    """A pattern as ``str`` writes it, also without names: ``coverage(0.95, min_budget=3072)``; None: something else.

    Raises:
        PatternError: unknown kind or field, or a budget out of range.
    """
    call = re.fullmatch(r"(\w+)\((.*)\)", text)
    if call is None:
        return None
    kind, arguments = call.groups()
    names = [name for name in dict(parse_head_pattern({"kind": kind})) if name != "kind"]
    fields: dict[str, Any] = {"kind": kind}
    for number, argument in enumerate(arguments.split(",") if arguments.strip() else ()):
        name, given, value = (part.strip() for part in argument.rpartition("="))
        if not given:
            if number >= len(names):
                raise PatternError(
                    f"pattern {cut(text)!r}: {kind} takes {len(names)} values ({', '.join(names) or 'none'})"
                )
            name = names[number]
        if name in fields:
            raise PatternError(f"pattern {cut(text)!r}: {cut(name)} is given twice")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):  # a list in a list in a list ...
            raise PatternError(f"pattern {cut(text)!r}: {shortened(value)} is not a number") from None
    return parse_head_pattern(fields)


def first_problem(error: ValidationError, others: Mapping[str, Mapping[str, FieldInfo]] | None = None) -> str:
    """Message for the first error: its place in the content, what was found, and what is allowed.

    Args:
        others: fields of models that are not patterns, by their name at the top level of the content; those of the top
            level itself by the empty name.
    """
    item = error.errors(include_url=False)[0]
    kind, place = item["type"], [str(part) for part in item["loc"] if part != "[key]"]
    where = ".".join(map(cut, place))
    others = others or {}
    fields = FIELDS.get(place[-2], others.get(place[0], {})) if len(place) > 1 else others.get("", {})
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        found = dict(item["input"]).get("kind")
        named = f"{where}.kind".lstrip(".") + (f" = {shortened(found)}" if kind == "union_tag_invalid" else "")
        what = "unknown pattern kind" if kind == "union_tag_invalid" else "a pattern needs its kind"
        return f"{named}: {what}; allowed are {', '.join(KINDS)}{did_you_mean(str(found), KINDS)}"
    if kind == "extra_forbidden":
        known = [name for name in fields if name != "kind"]
        return f"{where}: unknown field; known ones are {', '.join(known) or 'none'}{did_you_mean(place[-1], known)}"
    if kind == "missing":
        return f"{where}: missing"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return f"{where} = {shortened(item['input'])}: must be an object"
    field = fields.get(place[-1]) if place else None
    # An invalid name has no place of its own. Half of a surrogate pair is valid neither in a name nor in a text.
    if kind == "invalid_key" or (kind == "string_unicode" and field is None):
        return f"{shortened(item['input'])} is no name of a field"
    if item["loc"][-1:] == ("[key]",):
        return f"{where}: {item['ctx']['error']}"
    return f"{where} = {value_problem(item, field)}"
