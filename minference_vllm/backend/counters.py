"""Counters of sparse work, with its density and recall, and of the reasons for dense chunks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minference_vllm.core.plan import Plan

MAX_NAMES = 32
"""Maximum number of requested patterns with counters of their own; the rest are counted as ``OTHERS``."""
OTHERS = "others"


@dataclass
class HeadRecall:
    """Audited recall of one head, see ``prefill.recall``."""

    chunks: int
    recall: float
    """Mean over the audited chunks."""
    least_recall: float
    """Minimum over the audited chunks."""
    value_recall: float
    least_value_recall: float


@dataclass
class AskedWork:
    """Sparse chunks of requests that asked for the same patterns, see ``Counters``."""

    chunks: int = 0
    tokens: int = 0
    dense_pairs: float = 0.0
    computed_pairs: Any = 0.0
    """May live on the GPU."""

    def report(self) -> dict[str, Any]:
        computed = float(self.computed_pairs)
        return {
            "sparse_chunks": self.chunks,
            "sparse_tokens": self.tokens,
            "computed_pairs": computed,
            "dense_pairs": self.dense_pairs,
            "density": _density(computed, self.dense_pairs),
        }


@dataclass
class Counters:
    """Totals of one engine process since its start."""

    name: str = "minference"
    """Prefix of the log lines."""
    sparse_chunks: int = 0
    sparse_tokens: int = 0
    dense_chunks: Counter[str] = field(default_factory=Counter)
    """Prefill chunks left dense, by reason."""
    dense_pairs: float = 0.0
    """Query-key pairs that dense attention would have computed for the sparse chunks."""
    sparse_seconds: float = 0.0
    """Time of sparse attention, including estimates and index, without audits."""
    audit_seconds: float = 0.0
    raised: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Chunks that ran with more keys because of ``recall_floor``, by layer and head."""
    raised_to_dense: Counter[tuple[int, int]] = field(default_factory=Counter)
    asked: dict[str, AskedWork] = field(default_factory=dict)
    """Work for requests that asked for other patterns than the server's, by name of these. Included in the totals."""
    _computed_pairs: Any = 0.0
    """May be a tensor on the GPU, so that counting needs no host synchronisation."""
    _overflowed: Any = 0
    """Likewise."""
    _recall: dict[tuple[int, int, int], tuple[int, Any, Any]] = field(default_factory=dict)
    """By layer, first head and number of heads (layers of a draft model may have the same number): number of audited
    chunks, and sum and minimum of their recall and value recall, ``[2, heads]`` each. May live on the GPU."""
    _last_line: float = 0.0
    _logged_pairs: float = 0.0
    """``dense_pairs`` at the last line."""

    def count_batch(self, plan: Plan) -> None:
        self.sparse_chunks += len(plan.sparse)
        self.sparse_tokens += sum(chunk.query_len for chunk in plan.sparse)
        self.dense_chunks.update(plan.dense_reasons)
        for chunk in plan.sparse:
            if chunk.patterns is not None:
                work = self._asked(chunk.patterns)
                work.chunks, work.tokens = work.chunks + 1, work.tokens + chunk.query_len

    def count_layer(self, computed: Any, dense: float, overflowed: Any = 0, name: str | None = None) -> None:
        """Add one layer's work on one chunk.

        Args:
            computed, overflowed: numbers or tensors of one element.
            name: name of the patterns that the chunk's request asked for.
        """
        self._computed_pairs = self._computed_pairs + computed
        self._overflowed = self._overflowed + overflowed
        self.dense_pairs += dense
        if name is not None:
            work = self._asked(name)
            work.computed_pairs, work.dense_pairs = work.computed_pairs + computed, work.dense_pairs + dense

    def _asked(self, name: str) -> AskedWork:
        # Clients choose the names: without a limit they could fill memory, and Prometheus.
        known = name in self.asked or len(self.asked) < MAX_NAMES
        return self.asked.setdefault(name if known else OTHERS, AskedWork())

    def count_seconds(self, sparse: float, audit: float) -> None:
        self.sparse_seconds += sparse
        self.audit_seconds += audit

    def count_recall(self, layer: int, first_head: int, recall: Any) -> None:
        """Add the mean recall and value recall of one audited chunk, a tensor ``[2, heads]`` from ``first_head`` on."""
        place = layer, first_head, recall.shape[1]
        count, total, least = self._recall.get(place, (0, 0.0, recall))
        self._recall[place] = count + 1, total + recall, least.minimum(recall)

    def count_raised(self, layer: int, head: int, dense: bool) -> None:
        (self.raised_to_dense if dense else self.raised)[layer, head] += 1

    @property
    def has_more_to_log(self) -> bool:
        """Whether there was sparse work since the last line."""
        return self.dense_pairs != self._logged_pairs

    @property
    def computed_pairs(self) -> float:
        """Query-key pairs computed on the sparse path, over layers and heads. Needs a host synchronisation."""
        return float(self._computed_pairs)

    @property
    def overflowed(self) -> int:
        """Query tiles, per head, that ran densely because their selection exceeded the planned capacity. Needs a host
        synchronisation."""
        return int(self._overflowed)

    @property
    def recall(self) -> dict[tuple[int, int], HeadRecall]:
        """Recall of the audited chunks, by layer and head. Needs a host synchronisation."""
        sums: dict[tuple[int, int], list[tuple[int, Any, Any]]] = {}
        for (layer, first_head, heads), (count, totals, leasts) in self._recall.items():
            for head in range(heads):
                found = count, totals[:, head].tolist(), leasts[:, head].tolist()
                sums.setdefault((layer, first_head + head), []).append(found)
        return {place: _head_recall(parts) for place, parts in sums.items()}

    @property
    def density(self) -> float:
        """Computed pairs as a share of the dense pairs; 1 before any sparse chunk."""
        return _density(self.computed_pairs, self.dense_pairs)

    def report(self) -> dict[str, Any]:
        """All counters, ready for JSON; ``merged`` combines the reports of several processes."""
        recall = self.recall
        heads = []
        for layer, head in sorted({*recall, *self.raised, *self.raised_to_dense}):
            found = recall.get((layer, head))
            heads.append(
                {
                    "layer": layer,
                    "head": head,
                    "audited_chunks": found.chunks if found else 0,
                    "recall": found.recall if found else None,
                    "least_recall": found.least_recall if found else None,
                    "value_recall": found.value_recall if found else None,
                    "least_value_recall": found.least_value_recall if found else None,
                    "chunks_with_more_keys": self.raised[layer, head],
                    "chunks_run_densely": self.raised_to_dense[layer, head],
                }
            )
        return {
            "sparse_chunks": self.sparse_chunks,
            "sparse_tokens": self.sparse_tokens,
            "dense_chunks": dict(self.dense_chunks),
            "computed_pairs": self.computed_pairs,
            "dense_pairs": self.dense_pairs,
            "density": self.density,
            "overflowed_tiles": self.overflowed,
            "asked_by_requests": {name: work.report() for name, work in self.asked.items()},
            "heads": heads,
        }

    def line_when_due(self, interval: float, now: float | None = None) -> str | None:
        """One line of statistics if there was sparse work since the last line, which is at least ``interval`` seconds
        old. Only a line that is due needs a host synchronisation."""
        if not interval or not self.has_more_to_log:
            return None
        now = time.monotonic() if now is None else now
        if now - self._last_line < interval:
            return None
        self._last_line = now
        return self.line()

    def line(self) -> str:
        """One line of statistics."""
        self._logged_pairs = self.dense_pairs
        line = (
            f"{self.name}: {self.sparse_chunks} prefill chunks ({self.sparse_tokens} tokens) sparse, "
            f"density {self.density:.4f}"
        )
        if recall := self.recall:
            chunks = sum(found.chunks for found in recall.values())
            mean, by_value = (
                sum(getattr(found, name) * found.chunks for found in recall.values()) / chunks
                for name in ("recall", "value_recall")
            )
            (layer, head), worst = min(recall.items(), key=lambda item: item[1].value_recall)
            line += f", recall {mean:.4f}, value recall {by_value:.4f}"
            line += f" (least {worst.value_recall:.4f}, layer {layer} head {head})"
        if self.raised or self.raised_to_dense:
            line += (
                f", below the floor {self.raised.total()} times given more keys, "
                f"{self.raised_to_dense.total()} times dense"
            )
        if self.overflowed:
            line += f"; {self.overflowed} tiles had no room for their selection and ran densely"
        if self.asked:
            works = ((name, work.chunks, work.report()["density"]) for name, work in self.asked.items())
            line += "; of these, as requests asked: "
            line += ", ".join(f"{chunks} by {name} (density {density:.4f})" for name, chunks, density in works)
        if self.dense_chunks:
            line += "; dense: " + ", ".join(f"{count} ({reason})" for reason, count in self.dense_chunks.items())
        return line


def _head_recall(parts: Sequence[tuple[int, Any, Any]]) -> HeadRecall:
    """Combine parts: number of chunks, sums and minima of recall and value recall."""
    chunks = sum(count for count, _, _ in parts)
    means = [sum(totals[place] for _, totals, _ in parts) / chunks for place in range(2)]
    least = [min(leasts[place] for _, _, leasts in parts) for place in range(2)]
    return HeadRecall(chunks, means[0], least[0], means[1], least[1])


def _density(computed: float, dense: float) -> float:
    return computed / dense if dense else 1.0


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the reports of processes that serve a model together: each saw every chunk, with its own heads or layers.

    Args:
        reports: results of ``Counters.report``, at least one.
    """
    first = max(reports, key=lambda report: int(report["sparse_chunks"]))
    totals = _summed(reports, "computed_pairs", "dense_pairs", "overflowed_tiles")
    density = _density(totals["computed_pairs"], totals["dense_pairs"])
    asked = {}
    for name, work in first["asked_by_requests"].items():
        parts = [report["asked_by_requests"][name] for report in reports if name in report["asked_by_requests"]]
        pairs = _summed(parts, "computed_pairs", "dense_pairs")
        asked[name] = {**work, **pairs, "density": _density(pairs["computed_pairs"], pairs["dense_pairs"])}
    heads = sorted((head for report in reports for head in report["heads"]), key=lambda at: (at["layer"], at["head"]))
    return {**first, **totals, "density": density, "asked_by_requests": asked, "heads": heads}


def added(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add the reports of data-parallel engines: each saw its own chunks, with all heads and layers.

    Args:
        reports: results of ``merged``, at least one.
    """
    totals = _summed(reports, "sparse_chunks", "sparse_tokens", "computed_pairs", "dense_pairs", "overflowed_tiles")
    dense = sum((Counter(report["dense_chunks"]) for report in reports), Counter[str]())
    asked = {}
    for name in {name: None for report in reports for name in report["asked_by_requests"]}:
        parts = [report["asked_by_requests"][name] for report in reports if name in report["asked_by_requests"]]
        pairs = _summed(parts, "sparse_chunks", "sparse_tokens", "computed_pairs", "dense_pairs")
        asked[name] = {**pairs, "density": _density(pairs["computed_pairs"], pairs["dense_pairs"])}
    by_head: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for report in reports:
        for head in report["heads"]:
            by_head.setdefault((head["layer"], head["head"]), []).append(head)
    return {
        **totals,
        "dense_chunks": dict(dense),
        "density": _density(totals["computed_pairs"], totals["dense_pairs"]),
        "asked_by_requests": asked,
        "heads": [_added_head(by_head[place]) for place in sorted(by_head)],
    }


def _added_head(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = _summed(parts, "audited_chunks", "chunks_with_more_keys", "chunks_run_densely")
    audited = [part for part in parts if part["audited_chunks"]]
    if not audited:
        return {**parts[0], **counts}
    chunks = counts["audited_chunks"]
    means = {
        name: sum(part[name] * part["audited_chunks"] for part in audited) / chunks
        for name in ("recall", "value_recall")
    }
    least = {name: min(part[name] for part in audited) for name in ("least_recall", "least_value_recall")}
    return {**parts[0], **counts, **means, **least}


def _summed(reports: Sequence[dict[str, Any]], *names: str) -> dict[str, Any]:
    return {name: sum(report[name] for report in reports) for name in names}
