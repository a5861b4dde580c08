"""Which shape each attention head keeps, and the file that says so for a model.

A head's pattern is found offline and its positions online (MInference, arXiv 2407.02490). ``formats`` reads and writes
the file, and the formats that others have published.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError, model_validator

MAX_BUDGET = 1 << 24
ESTIMATION_BLOCK = 64
"""Block size, in tokens, in which MInference counts the budget of block-sparse heads."""

MAX_NUMBER = 4095
"""The highest layer or head number in a pattern file."""

Budget = Annotated[int, Field(ge=0, le=MAX_BUDGET)]
Share = Annotated[float, Field(gt=0, lt=1)]


class _Pattern(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def __str__(self) -> str:
        """For people: ``a_shape(sink=1024, local=4096)``."""
        fields = dict(self)
        kind = str(fields.pop("kind"))
        return f"{kind}({', '.join(f'{name}={value}' for name, value in fields.items())})" if fields else kind


class Dense(_Pattern):
    """Every key up to the row itself."""

    kind: Literal["dense"] = "dense"


class AShape(_Pattern):
    """The first ``sink`` tokens and the last ``local`` tokens of every row (StreamingLLM's shape)."""

    kind: Literal["a_shape"] = "a_shape"
    sink: Budget = 1024
    local: Budget = 4096


class TriShape(_Pattern):
    """A-shape, and the last ``last`` queries of each chunk attend everything (SCBench, arXiv 2412.10319)."""

    kind: Literal["tri_shape"] = "tri_shape"
    sink: Budget = 1024
    local: Budget = 4096
    last: Budget = 128


class VerticalSlash(_Pattern):
    """The ``vertical`` strongest columns, and ``slash`` tokens per row of the strongest diagonals, in whole pages, as
    the chunk's last 64 queries see them."""

    kind: Literal["vertical_slash"] = "vertical_slash"
    vertical: Budget = 1000
    slash: Budget = 6096


class BlockSparse(_Pattern):
    """The ``top_k`` strongest key blocks of 64 tokens for every query tile, by mean-pooled queries and keys."""

    kind: Literal["block_sparse"] = "block_sparse"
    top_k: Annotated[int, Field(ge=1, le=MAX_BUDGET // ESTIMATION_BLOCK)] = 100


class Coverage(_Pattern):
    """The fewest columns and diagonals whose mass, as the chunk's last 64 queries see it, reaches ``gamma``; at least
    ``min_budget`` tokens per row (after FlexPrefill, arXiv 2502.20766). A head that is not sparse comes out dense."""

    kind: Literal["coverage"] = "coverage"
    gamma: Share = 0.95
    min_budget: Budget = 3072


class Antidiagonal(_Pattern):
    """Per query tile, the fewest key blocks whose mass reaches ``tau``, scored along antidiagonals of every ``stride``
    tokens (XAttention, arXiv 2503.16428)."""

    kind: Literal["antidiagonal"] = "antidiagonal"
    stride: Annotated[int, Field(ge=2, le=64)] = 16
    tau: Share = 0.9


class PeakThreshold(_Pattern):
    """Per query tile, the key blocks whose pooled score is at least ``alpha`` times the tile's highest, the first
    ``sink`` and the last ``window`` tokens (FlashPrefill, arXiv 2603.06199). With ``mean_correction`` every page that
    is left out stands in the softmax as its mean key and mean value."""

    kind: Literal["peak_threshold"] = "peak_threshold"
    alpha: Share = 0.1
    sink: Budget = 256
    window: Budget = 512
    mean_correction: StrictBool = False


class LowRank(_Pattern):
    """Per query tile, the single keys, and pages full of them, that some row of the tile looks at, scored in up to
    ``rank`` dimensions (after Loki, arXiv 2406.02542); as many as hold ``gamma`` of the exact attention of the chunk's
    last rows, and of sampled rows less three standard errors. A head that is not sparse comes out dense."""

    kind: Literal["low_rank"] = "low_rank"
    rank: Annotated[int, Field(ge=16, le=128, multiple_of=16)] = 32
    gamma: Share = 0.95


HeadPattern = Annotated[
    Dense | AShape | TriShape | VerticalSlash | BlockSparse | Coverage | Antidiagonal | PeakThreshold | LowRank,
    Field(discriminator="kind"),
]
KINDS = (
    "dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse", "coverage", "antidiagonal", "peak_threshold",
    "low_rank",
)  # fmt: skip
_head_pattern: TypeAdapter[HeadPattern] = TypeAdapter(HeadPattern)


MAX_LEVEL = 3
"""The level at which every pattern is dense."""


def at_level(pattern: HeadPattern, level: int) -> HeadPattern:
    """The pattern, strengthened: level 0 as it is, then with more keys each time, at ``MAX_LEVEL`` and above dense.

    More keys means ``low_rank``, which follows the attention wherever it lies, row by row, and then ``low_rank`` that
    may miss a quarter as much as before.
    """
    if level <= 0 or isinstance(pattern, Dense):
        return pattern
    if level >= MAX_LEVEL:
        return Dense()
    if isinstance(pattern, LowRank):
        return pattern.model_copy(update={"gamma": 1 - (1 - pattern.gamma) / 4**level})
    return at_level(LowRank(), level - 1)


class PatternError(ValueError):
    """A pattern file that cannot be used; the message names the file, the place in it, and what is allowed."""


class Measurement(BaseModel):
    """What a head's pattern was measured to do when it was found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recall: float
    """Mean share of the dense attention that lies on the selected keys."""
    density: float
    """Computed query-key pairs as a share of the dense ones, with what ``low_rank`` spends where it scores keys."""
    output_error: float
    """Of the attention output, relative to the dense output."""


class PatternFile(BaseModel):
    """The patterns of a model's heads. ``layers`` may be empty: every head then runs ``default``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str | None = None
    """The model these patterns were found on; None: any model."""
    provenance: str = ""
    """Where the patterns come from: the paper, a calibration command, a converted file."""
    default: HeadPattern = VerticalSlash()
    """What a head without an entry runs."""
    layers: dict[int, dict[int, HeadPattern]] = {}
    """Layer number -> query head number (global, before tensor parallelism) -> pattern."""
    measured: dict[int, dict[int, Measurement]] = {}
    """Layer number -> query head number -> what ``calibrate`` measured; for people, nothing runs by it."""

    @model_validator(mode="after")
    def _numbers_are_in_range(self) -> PatternFile:
        for layer, heads in self.layers.items():
            if any(not 0 <= number <= MAX_NUMBER for number in (layer, *heads)):
                raise ValueError(f"layer and head numbers start at 0 and end at {MAX_NUMBER} (layer {layer})")
        return self

    def check_model(self, num_layers: int, num_heads: int, source: str = "pattern file") -> None:
        """Raise PatternError when the file speaks of layers or heads that the model does not have.

        A file that covers fewer layers or heads than the model is also refused unless it covers none: half a file is
        nearly always the file of another model.
        """
        if not self.layers:
            return
        found_layers = max(self.layers) + 1
        if found_layers != num_layers:
            raise PatternError(f"{source} describes {found_layers} layers, the model has {num_layers}")
        for layer, heads in self.layers.items():
            if heads and max(heads) + 1 > num_heads:
                raise PatternError(
                    f"{source}, layer {layer}: describes head {max(heads)}, the model has heads 0 to {num_heads - 1}"
                )
        found_heads = max((max(heads) + 1 for heads in self.layers.values() if heads), default=num_heads)
        if found_heads != num_heads:
            raise PatternError(f"{source} describes {found_heads} heads per layer, the model has {num_heads}")

    def for_layer(self, layer: int, num_heads: int, first_head: int = 0) -> tuple[HeadPattern, ...]:
        """Patterns of heads ``first_head .. first_head + num_heads`` (a tensor-parallel rank's slice) of one layer."""
        heads = self.layers.get(layer, {})
        return tuple(heads.get(first_head + head, self.default) for head in range(num_heads))


def parse_head_pattern(content: Any) -> HeadPattern:
    """One head's pattern from parsed JSON, ``{"kind": ..., ...}``.

    Raises:
        PatternError: unknown kind or field, or a budget out of range.
    """
    try:
        return _head_pattern.validate_python(content)
    except ValidationError as error:
        raise PatternError(f"pattern {content!r}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """Where in the content the first thing is wrong, and what is allowed."""
    item = error.errors()[0]
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "union_tag_invalid":
        return f"{where}: unknown pattern kind; allowed are {', '.join(KINDS)}"
    return f"{where} = {item['input']!r}: {item['msg']}" if where else str(item["msg"])
