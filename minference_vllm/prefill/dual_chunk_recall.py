"""Attention recall of chunks with dual chunk attention: the share of the dense weights over all parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from minference_vllm.kernels.kernel import Kernel
from minference_vllm.prefill.dual_chunk import Part
from minference_vllm.prefill.recall import ROWS_AT_ONCE, Recall, RecallSums, audited_rows
from minference_vllm.selection.torch_scores import TorchScores


def audited_recall(parts: Sequence[Part], kernel: Kernel, samples: int, seed: int) -> Recall:
    """Recall of ``samples`` rows of every piece, see ``recall.audited_rows``. No host synchronisation.

    Args:
        parts: returned by ``attend_dual_chunk`` with this kernel.
    """
    found = []
    for _, group in itertools.groupby(parts, key=lambda part: part.rows):
        piece = list(group)
        rows = audited_rows(piece[0].inputs.query, samples, seed)
        found += [piece_recall(piece, kernel, some) for some in rows.split(ROWS_AT_ONCE)]
    return Recall(*(torch.cat(shares, 1) for shares in zip(*found, strict=True)))


def piece_recall(parts: Sequence[Part], kernel: Kernel, rows: torch.Tensor) -> Recall:
    """Recall of single rows of a piece.

    Args:
        parts: all parts of the piece.
        rows: int64 ``[R]``, rows of the piece, on the query's device.
    """
    sums = RecallSums()
    for part in parts:
        scores, (first, last) = kernel.scores(part.inputs), part.keys
        sums.add(scores.query, _pieces(scores, len(rows), last - first), part.index, rows, scores.scale)
    return sums.recall()


def _pieces(scores: TorchScores, rows: int, keys: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``TorchScores.audited_pieces`` of the first ``keys`` keys, without the pages that stand in for the rows' own."""
    first = 0
    for piece, norms in scores.audited_pieces(rows):
        if first < keys:
            yield piece[:, : keys - first], norms[:, : keys - first]
        first += piece.shape[1]
