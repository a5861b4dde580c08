"""Compare ways to approximate the keys that a tile leaves out, on the heads of a real language model.

Every tile of 128 rows keeps its own keys and a given share of those before it, ranked by exact attention, so the ways
differ only in the treatment of the rest. A row has the error of the output: the root mean square over the tile's rows
relative to that of the exact output, mean over heads and tiles. ``docs/estimator.md`` has the results.

    python tools/get_smollm2.py
    python benchmarks/bench_left_out.py --csv benchmarks/results/left_out_cpu.csv
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from get_smollm2 import default_folder
from language_model import LanguageModel, dense
from record import emit

from minference_vllm.core.remainder import sampled_positions
from minference_vllm.offline.texts import load_text

TILE = 128


class Tile(NamedTuple):
    """One tile of one head. ``n`` keys up to the tile's last row."""

    query: torch.Tensor
    """``[TILE, D]``, scaled."""
    keys: torch.Tensor
    """``[n, D]``."""
    values: torch.Tensor
    weights: torch.Tensor
    """``[TILE, n]``, exact."""
    lse: torch.Tensor
    """``[TILE, 1]``: log of the softmax denominators."""
    kept: torch.Tensor
    """bool ``[n]``."""

    @property
    def mass(self) -> torch.Tensor:
        """``[TILE, 1]``: share of the weights that is kept."""
        return (self.weights * self.kept).sum(1, keepdim=True)

    @property
    def sparse(self) -> torch.Tensor:
        """``[TILE, D]``: the kept keys' part of the output, not renormalised."""
        return (self.weights * self.kept) @ self.values

    @property
    def exact(self) -> torch.Tensor:
        return self.weights @ self.values


def nothing(tile: Tile) -> torch.Tensor:
    return tile.sparse / tile.mass


def delta(tile: Tile, step: int) -> torch.Tensor:
    """The error of every ``step``-th row is added to the rows after it (Delta Attention, arXiv 2505.11254)."""
    found = nothing(tile)
    return found + (tile.exact - found)[::step].repeat_interleave(step, 0)


def stand_ins(tile: Tile, groups: list[torch.Tensor], query: torch.Tensor, step: int = 1) -> torch.Tensor:
    """One key for the left-out keys of each group, their mean weighted by the attention of ``query``
    (``prefill.remainder``)."""
    numerator, denominator = tile.sparse, tile.mass
    for group in groups:
        left_out = group[~tile.kept[group]]
        if not len(left_out):
            continue
        logits = tile.keys[left_out] @ query
        share = logits.softmax(0)
        key, value = share @ tile.keys[left_out], share @ tile.values[left_out]
        bias = logits.logsumexp(0) + math.log(step) - query @ key
        weight = (tile.query @ key + bias)[:, None].sub(tile.lse).exp()
        numerator, denominator = numerator + weight * value, denominator + weight
    return numerator / denominator


def sampled(tile: Tile, step: int) -> torch.Tensor:
    return stand_ins(tile, [sampled_positions(len(tile.keys), step=step)], tile.query.mean(0), step)


def best_value(tile: Tile) -> torch.Tensor:
    """The best that one key per tile could reach: exact missing weight of every row, and one value for all of it."""
    missing = (tile.weights * ~tile.kept).sum(0)
    value = missing @ tile.values / missing.sum().clamp_min(1e-20)
    return tile.sparse + (1 - tile.mass) * value


def everything(tile: Tile) -> torch.Tensor:
    return torch.arange(len(tile.keys))


WAYS: dict[str, Callable[[Tile], torch.Tensor]] = {
    "nothing": nothing,
    "delta, one row in 64": lambda tile: delta(tile, 64),
    "delta, one row in 16": lambda tile: delta(tile, 16),
    "page means": lambda tile: stand_ins(tile, list(everything(tile).split(TILE)), torch.zeros(tile.keys.shape[1])),
    "one key": lambda tile: stand_ins(tile, [everything(tile)], tile.query.mean(0)),
    "one key, of one key in 4": lambda tile: sampled(tile, 4),
    "one key, of one key in 16": lambda tile: sampled(tile, 16),
    "16 keys": lambda tile: stand_ins(tile, list(everything(tile).chunk(16)), tile.query.mean(0)),
    "best value": best_value,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(default_folder()))
    parser.add_argument("--text", default="opticks")
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 7, 13, 19, 25])
    parser.add_argument("--share", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3], help="of keys kept")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    name, text = load_text(args.text)
    ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text)["input_ids"][: args.tokens])
    model, errors = LanguageModel(args.model, args.tokens), defaultdict[tuple[str, float], list[float]](list)

    def attend(layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        if layer in args.layers:
            for head in range(len(query)):
                own = head * len(keys) // len(query)
                for begin in (args.tokens - part * TILE for part in (13, 7, 2)):
                    measure(query[head] * scale, keys[own], values[own], begin)
        return dense(layer, query, keys, values, scale)

    def measure(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, begin: int) -> None:
        query, keys, values = query[begin : begin + TILE], keys[: begin + TILE], values[: begin + TILE]
        logits = query @ keys.T
        logits[:, begin:].masked_fill_(torch.ones(TILE, TILE, dtype=torch.bool).triu(1), -torch.inf)
        weights, lse = logits.softmax(1), logits.logsumexp(1, keepdim=True)
        ranked = weights[:, :begin].amax(0).argsort(descending=True)
        for share in args.share:
            kept = torch.arange(len(keys)) >= begin
            kept[ranked[: int(share * begin)]] = True
            tile = Tile(query, keys, values, weights, lse, kept)
            for way, compute in WAYS.items():
                error = (compute(tile) - tile.exact).square().mean().sqrt()
                errors[way, share].append(float(error / tile.exact.square().mean().sqrt()))

    model.score(ids, torch.tensor([args.tokens - 1]), attend)
    for (way, share), found in errors.items():
        row = {"text": name, "tokens": args.tokens, "way": way, "share": share, "tiles": len(found)}
        emit(row | {"output_error": sum(found) / len(found)}, args.json, args.csv)


if __name__ == "__main__":
    main()
