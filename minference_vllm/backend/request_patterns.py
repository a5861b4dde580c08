"""Patterns that single requests ask for instead of the server's: allowed names, and the rows of these requests in a
batch."""

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
"""Key in ``SamplingParams.extra_args``, which clients of the server set through ``vllm_xargs``."""
SERVERS_OWN = "default"
MAX_LENGTH = 200
"""Maximum number of characters of a value, since parsed values are cached."""

ASKED_DENSE = "the request asked for it"
UNKNOWN = "the request asked for patterns that there are not"
CANNOT_RUN = "the request asked for patterns that cannot run here"
UNTOLD = "which requests of the batch asked for other patterns could not be told"


@dataclass(frozen=True)
class Asked:
    """What one request asked for, if it differs from what the server runs."""

    name: str
    """Name of the patterns, in full: ``a_shape(sink=1024, local=4096)``."""
    patterns: PatternFile | None
    """None: they cannot be used."""
    dense: str | None = None
    """Why the request is served densely; None: it is served by its patterns."""


def asked_by(params: Any, own: PatternFile) -> Asked | None:
    """What a request asked for, or None if it runs the server's patterns.

    Args:
        params: vLLM's ``SamplingParams``, or those of a request that samples nothing.
        own: the server's patterns.

    Raises:
        PatternError: there are no patterns of that name, or the value is not a name; the message says what is allowed.
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
    """What the requests of an engine asked for, and their rows in the batch of the running step.

    The model runner reports what is scheduled, then the order of the requests in the batch.
    """

    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}
        """By request id, from the request's first step until it is finished."""
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
                # The front end rejects such requests; this one bypassed it.
                logger.warning_once("%s; it is served densely (counted from now on, not logged again)", error)
                asked = Asked("", None, UNKNOWN)
            if asked is not None:
                self._asked[new.req_id] = asked
        self._lengths, self._order = step.num_scheduled_tokens, ()

    def stand(self, order: Sequence[str]) -> None:
        """Set the order of the requests in the step's batch."""
        self._order = tuple(order)

    def end(self) -> None:
        """The step is over."""
        self._lengths = {}

    def of_rows(self, query_lens: Sequence[int]) -> dict[int, Asked]:
        """What the requests of a batch asked for, by row; rows without an entry run the server's patterns.

        If the rows do not match the step's (as in a micro-batch) and a request asked for something, every row is served
        densely, so that no request gets fewer keys than it asked for.

        Args:
            query_lens: new tokens of each row; 0 in rows after the last request.
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
    """Whether a row may be the request: vLLM may verify fewer drafted tokens than it scheduled."""
    return found == told or max(found, told) < PREFILL_FROM
