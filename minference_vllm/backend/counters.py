"""Counters of what was served sparsely, at which density and recall, and why the rest was not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minference_vllm.core.plan import Plan


@dataclass
class Recall:
    """Audited recall of one head."""

    count: int = 0
    total: float = 0.0
    least: float = 1.0

    @property
    def mean(self) -> float:
        return self.total / self.count


@dataclass
class Counters:
    """Totals of one engine process since its start."""

    sparse_chunks: int = 0
    sparse_tokens: int = 0
    dense_chunks: Counter[str] = field(default_factory=Counter)
    """Prefill chunks left dense, by reason."""
    dense_pairs: float = 0.0
    """Pairs that dense attention would have computed there."""
    sparse_seconds: float = 0.0
    """Spent on sparse attention, estimates and index included, audits not."""
    audit_seconds: float = 0.0
    raised: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Chunks that ran with more keys because of the floor, by layer and head."""
    raised_to_dense: Counter[tuple[int, int]] = field(default_factory=Counter)
    _computed_pairs: Any = 0.0
    """A number that may live on the GPU, so that counting waits for nothing."""
    _overflowed: Any = 0
    """Likewise."""
    _recall: dict[tuple[int, int, int], tuple[int, Any, Any]] = field(default_factory=dict)
    """By layer, first head and number of heads (layers of a draft model may have the same number): audited chunks, and
    per head the sum and the least of their recall; likewise."""
    _last_line: float = 0.0
    _logged_pairs: float = 0.0
    """``dense_pairs`` at the last line."""

    def count_batch(self, plan: Plan) -> None:
        self.sparse_chunks += len(plan.sparse)
        self.sparse_tokens += sum(chunk.query_len for chunk in plan.sparse)
        self.dense_chunks.update(plan.dense_reasons)

    def count_layer(self, computed: Any, dense: float, overflowed: Any = 0) -> None:
        """Add one layer's work on one chunk; ``computed`` and ``overflowed`` are numbers or tensors of one element."""
        self._computed_pairs = self._computed_pairs + computed
        self._overflowed = self._overflowed + overflowed
        self.dense_pairs += dense

    def count_seconds(self, sparse: float, audit: float) -> None:
        self.sparse_seconds += sparse
        self.audit_seconds += audit

    def count_recall(self, layer: int, first_head: int, recall: Any) -> None:
        """Mean recall of one audited chunk, a tensor with a number per head from ``first_head`` on."""
        place = layer, first_head, len(recall)
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
        """Query-key pairs computed on the sparse path, over layers and heads. Reading it waits for the GPU."""
        return float(self._computed_pairs)

    @property
    def overflowed(self) -> int:
        """Query tiles of one head that ran densely because their selection had no room. Reading it waits likewise."""
        return int(self._overflowed)

    @property
    def recall(self) -> dict[tuple[int, int], Recall]:
        """By layer and head, of the chunks that were audited. Reading it waits likewise."""
        found: dict[tuple[int, int], Recall] = {}
        for (layer, first_head, _), (count, totals, leasts) in self._recall.items():
            for head, (total, least) in enumerate(zip(totals.tolist(), leasts.tolist(), strict=True), first_head):
                known = found.get((layer, head), Recall())
                found[layer, head] = Recall(known.count + count, known.total + total, min(known.least, least))
        return found

    @property
    def density(self) -> float:
        """Computed pairs as a share of the dense ones; 1 before any sparse chunk."""
        return _density(self.computed_pairs, self.dense_pairs)

    def report(self) -> dict[str, Any]:
        """Everything that was counted, ready for JSON; ``merged`` puts the reports of several processes together."""
        recall = self.recall
        heads = []
        for layer, head in sorted({*recall, *self.raised, *self.raised_to_dense}):
            found = recall.get((layer, head))
            heads.append(
                {
                    "layer": layer,
                    "head": head,
                    "audited_chunks": found.count if found else 0,
                    "recall": found.mean if found else None,
                    "least_recall": found.least if found else None,
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
            "heads": heads,
        }

    def line_when_due(self, interval: float, now: float | None = None) -> str | None:
        """One line of statistics, if there was sparse work since the last line and that is ``interval`` seconds old.
        Cheap where no line is due; reading the counters waits for a GPU."""
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
            f"minference: {self.sparse_chunks} prefill chunks ({self.sparse_tokens} tokens) sparse, "
            f"density {self.density:.4f}"
        )
        if recall := self.recall:
            mean = sum(found.total for found in recall.values()) / sum(found.count for found in recall.values())
            (layer, head), worst = min(recall.items(), key=lambda item: item[1].mean)
            line += f", recall {mean:.4f} (least {worst.mean:.4f}, layer {layer} head {head})"
        if self.raised or self.raised_to_dense:
            line += (
                f", below the floor {self.raised.total()} times given more keys, "
                f"{self.raised_to_dense.total()} times dense"
            )
        if self.overflowed:
            line += f"; {self.overflowed} tiles had no room for their selection and ran densely"
        if self.dense_chunks:
            line += "; dense: " + ", ".join(f"{count} ({reason})" for reason, count in self.dense_chunks.items())
        return line


def _density(computed: float, dense: float) -> float:
    return computed / dense if dense else 1.0


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of the processes that serve a model together: each has seen every chunk, with its own heads or layers.

    Args:
        reports: of ``Counters.report``, at least one.
    """
    first = max(reports, key=lambda report: int(report["sparse_chunks"]))
    totals = {
        name: sum(report[name] for report in reports) for name in ("computed_pairs", "dense_pairs", "overflowed_tiles")
    }
    density = _density(totals["computed_pairs"], totals["dense_pairs"])
    heads = sorted((head for report in reports for head in report["heads"]), key=lambda at: (at["layer"], at["head"]))
    return {**first, **totals, "density": density, "heads": heads}
