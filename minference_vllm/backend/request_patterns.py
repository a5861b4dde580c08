"""Patterns that single requests ask for in place of the server's: what they may name, and in which rows of a batch they
stand."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from minference_vllm.core.plan import PREFILL_FROM
from minference_vllm.core.validation import did_you_mean, shortened
from minference_vllm.patterns.file import PatternFile, named_patterns, shipped_pattern_files
from minference_vllm.patterns.kinds import PatternError

logger = init_logger(f"vllm.{__name__}")

KEY = "minference"
"""Of ``SamplingParams.extra_args``, which clients of the server fill by ``vllm_xargs``."""
SERVERS_OWN = "default"
MAX_LENGTH = 200
"""Characters of a value: what was found for it is kept."""

ASKED_DENSE = "the request asked for it"
UNKNOWN = "the request asked for patterns that there are not"
CANNOT_RUN = "the request asked for patterns that cannot run here"
UNTOLD = "which requests of the batch asked for other patterns could not be told"


@dataclass(frozen=True)
class Asked:
    """What one request asked for, where that is not what the server runs."""

    name: str
    """Of the patterns, in full: ``a_shape(sink=1024, local=4096)``."""
    patterns: PatternFile | None
    """None: they cannot be used."""
    dense: str | None = None
    """Why the request is served densely; None: by its patterns."""


def asked_by(params: Any, own: PatternFile) -> Asked | None:
    """What a request asked for, or None where it runs the server's patterns.

    Args:
        params: vLLM's ``SamplingParams``, or those of a request that samples nothing.
        own: the server's.

    Raises:
        PatternError: no patterns of that name, or a value that is no name; the message says what is allowed.
    """
    value = (getattr(params, "extra_args", None) or {}).get(KEY)
    if value is None or value == SERVERS_OWN:
        return None
    found = _named(value) if isinstance(value, str) and len(value) <= MAX_LENGTH else None
    if found is None:
        shipped = tuple(shipped_pattern_files())
        meant = did_you_mean(value, (SERVERS_OWN, *shipped)) if isinstance(value, str) else ""
        raise PatternError(
            f"minference: a request asks for {shortened(value)}; allowed are {SERVERS_OWN} (what the server runs), "
            f"{', '.join(shipped)}, or one pattern for all heads: low_rank(32, 0.95){meant}"
        )
    if (found.default, found.layers) == (own.default, own.layers):
        return None
    name = value if found.layers else str(found.default)
    return Asked(name, found, ASKED_DENSE if found.is_dense else None)


@functools.lru_cache(maxsize=256)
def _named(value: str) -> PatternFile | None:
    try:
        return named_patterns(value)
    except PatternError as error:
        raise PatternError(f"minference: a request asks for {error}") from None


class RequestRows:
    """What the requests of an engine asked for, and which rows of the batch of the running step they are.

    Its model runner tells: what is scheduled, then in which order the requests stand in the batch.
    """

    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}
        """By request, from its first step until it is finished."""
        self._lengths: Mapping[str, int] = {}
        """New tokens of every request in the running step; empty between steps."""
        self._order: Sequence[str] = ()

    def begin(self, step: Any, own: PatternFile) -> None:
        """A step begins.

        Args:
            step: vLLM's ``SchedulerOutput``.
            own: the server's patterns.
        """
        for request in step.finished_req_ids:
            self._asked.pop(request, None)
        for new in step.scheduled_new_reqs:
            self._asked.pop(new.req_id, None)
            try:
                asked = asked_by(new.sampling_params, own)
            except PatternError as error:
                # The front end refuses such requests; this one came in by another way.
                logger.warning_once("%s; it is served densely (counted from now on, not logged again)", error)
                asked = Asked("", None, UNKNOWN)
            if asked is not None:
                self._asked[new.req_id] = asked
        self._lengths, self._order = step.num_scheduled_tokens, ()

    def stand(self, order: Sequence[str]) -> None:
        """The requests of the step's batch, row by row."""
        self._order = tuple(order)

    def end(self) -> None:
        """The step is over."""
        self._lengths = {}

    def of_rows(self, query_lens: Sequence[int]) -> dict[int, Asked]:
        """What the requests in the rows of a batch asked for; without an entry: nothing.

        Where the rows are not those of the step, as in a micro-batch, and a request asked for something, every row is
        to be served densely: nobody gets fewer keys than it asked for.

        Args:
            query_lens: new tokens of each row; rows behind the last request have none.
        """
        if not any(request in self._asked for request in self._lengths):
            return {}
        told = [self._lengths.get(request, 0) for request in self._order]
        told += [0] * (len(query_lens) - len(told))
        if len(told) != len(query_lens) or not all(map(_alike, query_lens, told)):
            logger.warning_once("minference: batches run densely: %s (counted from now on, not logged again)", UNTOLD)
            return dict.fromkeys(range(len(query_lens)), Asked("", None, UNTOLD))
        return {row: self._asked[request] for row, request in enumerate(self._order) if request in self._asked}


def _alike(found: int, told: int) -> bool:
    """Whether a row may be the request; of drafted tokens vLLM may verify fewer than were scheduled."""
    return found == told or max(found, told) < PREFILL_FROM
