"""Conversations over a growing text: answers on a cached prefix from sparse attention, against dense.

Each turn adds a passage with facts and asks for one fact of the text so far. The right answer then becomes part of the
conversation, so that all engines read the same. With vLLM's prefix cache only new tokens are computed, on the keys and
values of earlier turns, which with minference come from sparse attention. With ``--anew`` a third engine, ``minference
anew``, has no prefix cache and reads every turn from its first token.

The bundled model reads its own kind of text (``examples/demo/tasks.py``), other models a book with planted numbers.

    python benchmarks/bench_turns.py --anew --csv benchmarks/results/turns_cpu.csv
    python benchmarks/bench_turns.py --model CHECKPOINT --yarn 2 --first 3072 --more 1280 --csv ...
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tasks
from bench_answers import DEMO
from bench_peers_cpu import stretched
from engine_process import ENVIRONMENT, Engine, Timed, end_with_us, one_at_a_time
from record import emit

from minference_vllm.offline.evaluate.tasks import CITIES
from minference_vllm.offline.texts import load_text

FACTS = 4
"""Facts per passage."""
NAME = "special magic number"


class Turn(NamedTuple):
    new: list[int]
    """Tokens of the passage and of the question after it."""
    answer: str
    said: list[int]
    """Tokens of the right answer, which is added to the conversation."""


Talk = Callable[[int], Iterator[Turn]]
"""The turns of one conversation, by its number."""


def bundled_talk(tokenizer: Any, lengths: list[int]) -> Talk:
    """Secret codes in filler text."""

    def encode(words: list[str], first: bool = False) -> list[int]:
        return list(tokenizer(" ".join(words), add_special_tokens=first).input_ids)

    def turns(number: int) -> Iterator[Turn]:
        rng = random.Random(f"turns {number}")
        keys = tasks.random_keys(rng, FACTS * len(lengths))
        codes = [tasks.random_code(rng) for _ in keys]
        for turn, length in enumerate(lengths):
            facts = range(FACTS * turn, FACTS * (turn + 1))
            asked = rng.randrange(FACTS * (turn + 1))
            end = tasks.question("needle", keys[asked])
            passage, _ = tasks.document(
                rng, length - len(end), [tasks.statement("needle", keys[fact], codes[fact]) for fact in facts]
            )
            said = [*codes[asked], "."]
            yield Turn(encode(passage + end, turn == 0), " ".join(codes[asked]), encode(said))

    return turns


def book_talk(tokenizer: Any, lengths: list[int], count: int) -> Talk:
    """Numbers of cities, each in a sentence of its own in a book."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    book = encode(load_text("opticks")[1])

    def turns(number: int) -> Iterator[Turn]:
        rng = random.Random(f"turns {number}")
        place = (len(book) - sum(lengths)) * number // count
        cities = rng.sample(CITIES, FACTS * len(lengths))
        codes = [str(rng.randrange(10000, 100000)) for _ in cities]
        for turn, length in enumerate(lengths):
            asked = rng.randrange(FACTS * (turn + 1))
            end = encode(f"\nWhat is the {NAME} for {cities[asked]}? The {NAME} for {cities[asked]} is ")
            facts = [
                encode(f"\nThe {NAME} for {cities[fact]} is {codes[fact]}.\n")
                for fact in range(FACTS * turn, FACTS * (turn + 1))
            ]
            text = length - len(end) - sum(map(len, facts))
            cuts = [0, *sorted(rng.randrange(text) for _ in facts), text]
            new: list[int] = []
            for (begin, until), fact in zip(itertools.pairwise(cuts), [*facts, []], strict=True):
                new += book[place + begin : place + until] + fact
            place += text
            yield Turn(new + end, codes[asked], encode(f"{codes[asked]}.\n"))

    return turns


def start(args: argparse.Namespace, name: str, tokens: int, folder: Path) -> Engine:
    settings = {"min_context": args.min_context, "log_interval": 0} if name != "dense" else None
    others: dict[str, Any] = {"enable_prefix_caching": name != "minference anew"}
    if args.yarn:
        others["hf_overrides"] = stretched(args.model, args.yarn)
    options = one_at_a_time(args.model, args.dtype, tokens, args.chunk, settings, **others)
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": str(args.cache_gib)}
    engine = Engine(name, options, environment, folder / f"{name}.log")
    engine.start()
    return engine


class Answers:
    """The answers of one engine in one turn of all conversations."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.right = 0
        self.timed: list[Timed] = []

    def add(self, text: str, answer: str, timed: Timed) -> None:
        self.texts.append(text.split(".")[0].strip())
        self.right += tasks.grade(text, answer)
        self.timed.append(timed)

    @property
    def density(self) -> float:
        """Density of the sparse chunks; 1 if there were none."""
        dense = sum(timed.dense_pairs for timed in self.timed)
        return sum(timed.computed_pairs for timed in self.timed) / dense if dense else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"), help="the bundled model, or a checkpoint's folder")
    parser.add_argument("--first", type=int, default=12288, help="tokens of the first turn")
    parser.add_argument("--more", type=int, default=2048, help="tokens that each other turn adds")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--talks", type=int, default=12, help="conversations")
    parser.add_argument("--anew", action="store_true", help="a third engine, without a prefix cache")
    parser.add_argument("--yarn", type=float, default=0.0, help="factor of the model's context")
    parser.add_argument("--chunk", type=int, default=2048, help="max_num_batched_tokens")
    parser.add_argument("--min-context", type=int, default=1024, help="minference's setting")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--cache-gib", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    end_with_us()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    bundled = Path(args.model).resolve() == (DEMO / "model").resolve()
    lengths = [args.first] + [args.more] * (args.turns - 1)
    talk = bundled_talk(tokenizer, lengths) if bundled else book_talk(tokenizer, lengths, args.talks)
    room = math.ceil((sum(lengths) + 2 * args.answer_tokens * args.turns) / 128) * 128
    names = ["dense", "minference", *(["minference anew"] if args.anew else [])]
    found = [{name: Answers() for name in names} for _ in lengths]
    read = [0] * len(lengths)
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: start(args, name, room, Path(folder)) for name in names}
        try:
            for number in range(args.talks):
                ids: list[int] = []
                for turn, (new, answer, said) in enumerate(talk(number)):
                    ids = ids + new
                    read[turn] = len(ids)
                    for name, engine in engines.items():
                        timed = engine.ask(ids, args.answer_tokens - 1)
                        found[turn][name].add(tokenizer.decode(timed.tokens), answer, timed)
                    ids = ids + said
                right = ", ".join(f"{name} {sum(turn[name].right for turn in found)}" for name in names)
                print(f"right after {number + 1} conversations: {right}", file=sys.stderr, flush=True)
        finally:
            for engine in engines.values():
                engine.stop()
    for turn, answers in enumerate(found):
        dense = answers["dense"]
        for name in names[1:]:
            own = answers[name]
            emit(
                {
                    "model": "bundled" if bundled else Path(args.model).name,
                    "turn": turn + 1,
                    "tokens": read[turn],
                    "new_tokens": lengths[turn],
                    "engine": name,
                    "questions": args.talks,
                    "correct_dense": dense.right,
                    "correct_sparse": own.right,
                    "same_answer": sum(a == b for a, b in zip(dense.texts, own.texts, strict=True)),
                    "density": own.density,
                    "ttft_dense_s": statistics.median(timed.ttft for timed in dense.timed),
                    "ttft_sparse_s": statistics.median(timed.ttft for timed in own.timed),
                },
                args.json,
                args.csv,
            )


if __name__ == "__main__":
    main()
