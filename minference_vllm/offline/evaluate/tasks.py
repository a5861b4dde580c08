"""Texts, and prompts made of them whose answers are scored in place, so that one pass covers many questions.

``perplexity``  The text itself: every token of its second half.
``needles``     Sentences in the text ("The special magic number for Lisbon is 29093."), each asked for by a
                separate request that finds the prompt in the prefix cache and whose few tokens are computed densely:
                any loss comes from the prompt's keys and values.
``end``         A question about a needle, with its answer, as the last rows of each chunk: where prompts end.
``inside``      The same in the middle of a chunk, where no estimate looks by itself.
``few_shot``    Short lines ("Q: Lisbon? A: amber."), each several times in the text, and once more in the middle of a
                chunk, where its answer is scored.
``single``      Pairs of words, each several times in the text, and once more in the middle of a chunk, where the second
                word is scored: a single row that attends far back.

Planted pieces begin at a word of the text. Prompts depend on the chunk size, since places are counted from chunk ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Dublin", "Athens", "Vienna", "Prague", "Madrid", "Warsaw", "Tokyo", "Delhi",
    "Havana", "Nairobi", "Quito", "Sydney", "Boston", "Denver", "Toronto", "Geneva", "Naples", "Munich", "Bergen",
    "Kyoto", "Dakar", "Manila", "Seoul", "Hanoi", "Riga", "Sofia", "Tunis", "Zurich", "Milan", "Leeds", "Porto",
    "Basel", "Accra", "Amman", "Baku", "Bogota", "Brussels", "Budapest", "Caracas", "Chicago", "Dallas", "Florence",
    "Hamburg", "Houston", "Istanbul", "Jakarta", "Karachi", "Kiev", "Lagos", "London", "Lyon", "Moscow", "Paris",
    "Rome", "Seattle", "Vilnius",
)  # fmt: skip
WORDS = (
    "amber", "falcon", "copper", "river", "violet", "hammer", "silver", "garden", "marble", "tiger", "velvet", "anchor",
    "golden", "bridge", "crystal", "forest", "crimson", "castle", "orange", "lantern", "winter", "harbor", "iron",
    "pepper", "cotton", "dragon", "maple", "thunder", "paper", "island", "honey", "rocket", "desert", "piano", "silk",
    "walnut", "ocean", "candle", "cherry", "mirror", "button", "carpet", "engine", "flower", "guitar", "helmet",
    "jacket", "kitchen", "lemon",
)  # fmt: skip
NAMES = {"needles": "special magic number", "end": "secret access code", "inside": "lottery ticket number"}
"""What each task asks for, so that no needle of one is mistaken for another's."""
NEEDLES, LINES, PAIRS = 8, 12, 16
"""Number per task and prompt: needles or questions inside, repeated lines, pairs of words."""
LONGEST_WORD = 64
"""In tokens."""
SAID = 3
"""How often a line or a pair of words occurs in the text before it is asked for. Small models forget what occurs only
once, with dense attention, too."""


class Answer(NamedTuple):
    """Tokens of a prompt that are scored together."""

    task: str
    first: int
    """Position of its first token."""
    tokens: int


class Prompt(NamedTuple):
    ids: torch.Tensor
    """int64 ``[S]``, the questions at its end included."""
    answers: list[Answer]
    questions: list[range]
    """Separate requests after the prompt, see ``LanguageModel.score``."""


class Piece(NamedTuple):
    """Something planted in a text."""

    place: int
    """It begins at the first word of the text from this position on. The prompt's length: after the prompt."""
    last: bool
    """Whether it ends exactly at ``place`` instead."""
    task: str
    """Empty: its answer is not scored."""
    before: str
    answer: str
    after: str = ""


class Planner:
    """Places and contents of what one task plants; every task draws from its own cities, words and numbers."""

    def __init__(self, task: str, tokens: int, chunk: int, seed: int) -> None:
        self.task, self.tokens, self.chunk = task, tokens, min(chunk, tokens)
        self.rng = random.Random(f"{task} {tokens} {chunk} {seed}")

    def cities(self, count: int) -> list[str]:
        """From the task's own quarter of all cities, with a letter appended if there are too few."""
        own = list(CITIES[ASKED.index(self.task) :: len(ASKED)])
        names = own + [f"{city} {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for city in own]
        chosen = names[:count] if count > len(own) else self.rng.sample(own, count)
        self.rng.shuffle(chosen)
        return chosen

    def code(self) -> str:
        return str(self.rng.randrange(10000, 100000))

    def needle(self, city: str, code: str) -> tuple[str, str, str]:
        return f"\nThe {NAMES[self.task]} for {city} is ", code, ".\n"

    def question(self, city: str, code: str) -> tuple[str, str]:
        name = f"{NAMES[self.task]} for {city}"
        return f"\nWhat is the {name}? The {name} is ", code

    def words(self, third: int, count: int) -> list[str]:
        """From one third of all words."""
        return self.rng.sample(WORDS[third::3], count)

    def spread(self, count: int, first: float, last: float) -> list[int]:
        """A random position in each of ``count`` equal parts of the prompt from the share ``first`` to ``last``."""
        width = (last - first) * self.tokens / count
        return [int(first * self.tokens + (number + self.rng.random()) * width) for number in range(count)]

    def middle(self, place: int) -> int:
        """A random position in the middle half of the chunk that contains ``place``."""
        begin = place // self.chunk * self.chunk
        length = min(self.chunk, self.tokens - begin)
        return begin + int(length * self.rng.uniform(0.25, 0.75))

    def earlier(self, place: int) -> int:
        return int(place * self.rng.uniform(0.02, 0.8))


def plant_needles(plan: Planner) -> list[Piece]:
    pieces = []
    for place, city in zip(plan.spread(NEEDLES, 0.0, 0.95), plan.cities(NEEDLES), strict=True):
        code = plan.code()
        pieces.append(Piece(place, False, "", *plan.needle(city, code)))
        pieces.append(Piece(plan.tokens, False, plan.task, *plan.question(city, code)))
    return pieces


def plant_end(plan: Planner) -> list[Piece]:
    pieces = []
    ends = [*range(plan.chunk, plan.tokens, plan.chunk), plan.tokens]
    for end, city in zip(ends, plan.cities(len(ends)), strict=True):
        code = plan.code()
        pieces.append(Piece(plan.earlier(end), False, "", *plan.needle(city, code)))
        pieces.append(Piece(end, True, plan.task, *plan.question(city, code)))
    return pieces


def plant_inside(plan: Planner) -> list[Piece]:
    pieces = []
    for place, city in zip(plan.spread(NEEDLES, 0.1, 1.0), plan.cities(NEEDLES), strict=True):
        code, middle = plan.code(), plan.middle(place)
        pieces.append(Piece(plan.earlier(middle), False, "", *plan.needle(city, code)))
        pieces.append(Piece(middle, False, plan.task, *plan.question(city, code), ".\n"))
    return pieces


def plant_few_shot(plan: Planner) -> list[Piece]:
    pieces = []
    names, words = plan.cities(LINES), plan.words(0, LINES)
    for place, city, word in zip(plan.spread(LINES, 0.5, 1.0), names, words, strict=True):
        middle, line = plan.middle(place), (f"\nQ: {city}? A:", f" {word}", ".\n")
        pieces += [Piece(plan.earlier(middle), False, "", *line) for _ in range(SAID)]
        pieces.append(Piece(middle, False, plan.task, *line))
    return pieces


def plant_single(plan: Planner) -> list[Piece]:
    pieces = []
    first, second = plan.words(1, PAIRS), plan.words(2, PAIRS)
    for place, one, other in zip(plan.spread(PAIRS, 0.3, 1.0), first, second, strict=True):
        middle, pair = plan.middle(place), (f" {one}", f" {other}")
        pieces += [Piece(plan.earlier(middle), False, "", *pair) for _ in range(SAID)]
        pieces.append(Piece(middle, False, plan.task, *pair))
    return pieces


PLANTED: dict[str, Callable[[Planner], list[Piece]]] = {
    "needles": plant_needles,
    "end": plant_end,
    "inside": plant_inside,
    "few_shot": plant_few_shot,
    "single": plant_single,
}
ASKED = ("needles", "end", "inside", "few_shot")
"""Tasks that ask for cities."""
TASKS = ("perplexity", *PLANTED)


class Passages:
    """Parts of one text, as tokens."""

    def __init__(self, tokenizer: Any, text: str, label: str) -> None:
        self.tokenizer, self.label = tokenizer, label
        # Not verbose: tokenizers would warn of the text's length, but no model reads it as a whole.
        self.ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        self.begin = tokenizer("").input_ids
        """Special tokens that the model expects at the beginning."""
        self._anchor = self._encode("a")[-1:]

    def passage(self, number: int, of: int, tokens: int) -> list[int]:
        """Tokens of passage ``number``; passages begin evenly spread over the text.

        Raises:
            ValueError: the text is too short.
        """
        room = len(self.ids) - tokens
        if room < 0:
            raise ValueError(
                f"text {self.label!r} has {len(self.ids)} tokens, fewer than the {tokens} of a prompt; name a longer "
                "text or shorter prompts"
            )
        first = room * (2 * number + 1) // (2 * of)
        return list(self.ids[first : first + tokens])

    def plain(self, number: int, of: int, tokens: int) -> Prompt:
        """A passage whose second half is scored."""
        ids = self.begin + self.passage(number, of, tokens - len(self.begin))
        answers = [Answer("perplexity", place, 1) for place in range(tokens // 2, tokens)]
        return Prompt(torch.tensor(ids), answers, [])

    def planted(self, number: int, of: int, tokens: int, chunk: int, tasks: Sequence[str], seed: int = 0) -> Prompt:
        """A passage of ``tokens`` tokens with what some tasks plant in it; the questions of ``needles`` follow it.

        Args:
            seed: decides what is planted, and where.

        Raises:
            ValueError: the text is too short, or the prompt is too short for what is planted.
        """
        prompt = _Growing(list(self.begin), self.passage(number, of, tokens), self._starts_word)
        pieces = [
            piece for task in tasks for piece in PLANTED[task](Planner(task, tokens, chunk, number + 1000 * seed))
        ]
        encoded = [Encoded(piece.task, *map(self._encode, piece[3:])) for piece in pieces]
        ends: list[tuple[int, Encoded]] = []
        others: list[tuple[int, Encoded]] = []
        behind: list[Encoded] = []
        for piece, ids in zip(pieces, encoded, strict=True):
            if piece.last:
                ends.append((piece.place - ids.size, ids))
            elif piece.place < tokens:
                others.append((piece.place, ids))
            else:
                behind.append(ids)
        ends.sort(key=lambda item: item[0])
        others.sort(key=lambda item: item[0])
        for place, ids in others:
            # Pieces with an exact end take precedence; another piece that would overlap comes after.
            while ends and prompt.next_word(place) + ids.size > ends[0][0]:
                prompt.plant(*ends.pop(0), exactly=True)
            prompt.plant(place, ids)
        for place, ids in ends:
            prompt.plant(place, ids, exactly=True)
        prompt.fill(tokens)
        questions = []
        for ids in behind:
            begin = len(prompt.ids)
            prompt.append(ids)
            questions.append(range(begin, len(prompt.ids)))
        return Prompt(torch.tensor(prompt.ids), prompt.answers, questions)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def _starts_word(self, token: int) -> bool:
        # Decoded after another token: many tokenizers drop the space before a word that stands alone.
        before = self.tokenizer.decode(self._anchor)
        return bool(self.tokenizer.decode([*self._anchor, token])[len(before) :][:1].isspace())


class Encoded(NamedTuple):
    """A piece in tokens."""

    task: str
    before: list[int]
    answer: list[int]
    after: list[int]

    @property
    def size(self) -> int:
        return len(self.before) + len(self.answer) + len(self.after)


class _Growing:
    """A prompt under construction."""

    def __init__(self, ids: list[int], text: list[int], starts_word: Callable[[int], bool]) -> None:
        self.ids, self.text, self.starts_word = ids, text, starts_word
        self.taken = 0
        """Number of tokens of the text that are in the prompt."""
        self.answers: list[Answer] = []

    def next_word(self, place: int) -> int:
        """The first position, at or after ``place`` and the prompt's end, at which a word of the text would begin.

        If none begins within ``LONGEST_WORD`` tokens, as in a text without spaces, it is where the search began.
        """
        first = max(place, len(self.ids))
        begin = self.taken + first - len(self.ids)
        upcoming = self.text[begin : begin + LONGEST_WORD]
        return next((first + number for number, token in enumerate(upcoming) if self.starts_word(token)), first)

    def fill(self, length: int) -> None:
        """Append text up to a length."""
        missing = length - len(self.ids)
        if missing < 0:
            raise ValueError("the prompt is too short for what these tasks plant; take longer prompts or larger chunks")
        self.ids += self.text[self.taken : self.taken + missing]
        self.taken += missing

    def append(self, piece: Encoded) -> None:
        if piece.task:
            self.answers.append(Answer(piece.task, len(self.ids) + len(piece.before), len(piece.answer)))
        self.ids += piece.before + piece.answer + piece.after

    def plant(self, place: int, piece: Encoded, exactly: bool = False) -> None:
        self.fill(place if exactly else self.next_word(place))
        self.append(piece)
