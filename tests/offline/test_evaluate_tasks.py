"""Prompts of ``evaluate``: planted text is in the right place, and every answer occurs earlier."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from language_inputs import byte_tokenizer

from minference_vllm.offline.evaluate.tasks import LINES, NEEDLES, PAIRS, PLANTED, SAID, Answer, Passages, Prompt
from minference_vllm.offline.texts import load_text

TOKENS, CHUNK = 9000, 2048
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def passages() -> Passages:
    rng = random.Random(1)
    words = ["".join(rng.choices("mnopqr", k=rng.randrange(2, 8))) for _ in range(40)]
    return Passages(TOKENIZER, " ".join(rng.choices(words, k=5000)), "words")


@pytest.fixture(scope="module", params=range(3))
def prompt(request: pytest.FixtureRequest, passages: Passages) -> Prompt:
    return passages.planted(request.param, 3, TOKENS, CHUNK, list(PLANTED))


def words_of(prompt: Prompt, answer: Answer) -> tuple[str, str]:
    """The prompt up to an answer, and the answer."""
    end = answer.first + answer.tokens
    return TOKENIZER.decode(prompt.ids[: answer.first]), TOKENIZER.decode(prompt.ids[answer.first : end])


def of_task(prompt: Prompt, task: str) -> list[Answer]:
    return [answer for answer in prompt.answers if answer.task == task]


def test_a_passage_is_scored_in_its_second_half(passages: Passages) -> None:
    prompt = passages.plain(1, 2, 1000)
    room = len(passages.ids) - 1000
    assert prompt.ids.tolist() == passages.ids[room * 3 // 4 :][:1000] and prompt.questions == []
    assert [answer.first for answer in prompt.answers] == list(range(500, 1000))


def test_a_prompt_has_its_length_and_questions_behind_it(prompt: Prompt) -> None:
    assert prompt.questions[0].start == TOKENS and prompt.questions[-1].stop == len(prompt.ids)
    assert len(prompt.questions) == len(of_task(prompt, "needles")) == NEEDLES
    for question, answer in zip(prompt.questions, of_task(prompt, "needles"), strict=True):
        assert answer.first + answer.tokens == question.stop
        assert TOKENIZER.decode(prompt.ids[question.start :]).startswith("\nWhat is the special magic number for ")


def test_every_answer_was_said_before(prompt: Prompt) -> None:
    for answer in prompt.answers:
        before, code = words_of(prompt, answer)
        line = before.rsplit("\n", 1)[-1]
        if answer.task == "single":
            statement = f" {before.rsplit(' ', 1)[-1]}"
        else:
            statement = line if answer.task == "few_shot" else line.split("? ")[-1]
        times = SAID if answer.task in ("few_shot", "single") else 1
        assert before[: -len(statement)].count(statement + code) == times, answer


def test_ends_are_the_last_rows_of_every_chunk(prompt: Prompt) -> None:
    ends = [answer.first + answer.tokens for answer in of_task(prompt, "end")]
    assert ends == [2048, 4096, 6144, 8192, 9000]


@pytest.mark.parametrize(("task", "count"), [("inside", NEEDLES), ("few_shot", LINES), ("single", PAIRS)])
def test_the_others_are_asked_in_the_middle_of_a_chunk(task: str, count: int, prompt: Prompt) -> None:
    found = of_task(prompt, task)
    assert len(found) == count
    for answer in found:
        begin = answer.first // CHUNK * CHUNK
        share = (answer.first - begin) / (min(begin + CHUNK, TOKENS) - begin)
        # Pieces at the same place are consecutive.
        assert 0.2 < share < 0.95, answer


def test_a_task_plants_the_same_beside_others(passages: Passages) -> None:
    alone = passages.planted(0, 1, TOKENS, CHUNK, ["inside"])
    among = passages.planted(0, 1, TOKENS, CHUNK, list(PLANTED))
    codes = [[words_of(prompt, answer)[1] for answer in of_task(prompt, "inside")] for prompt in (alone, among)]
    assert codes[0] == codes[1]


def test_what_does_not_fit_is_refused(passages: Passages) -> None:
    with pytest.raises(ValueError, match="the prompt is too short for what these tasks plant"):
        passages.planted(0, 1, 1000, 512, list(PLANTED))
    with pytest.raises(ValueError, match=r"text 'words' has \d+ tokens, fewer than the 999999 of a prompt"):
        passages.plain(0, 1, 999999)


def test_texts(tmp_path: Path) -> None:
    label, text = load_text("pydoc")
    assert label.startswith("pydoc topics 3.") and len(text) > 100_000
    (tmp_path / "mine.txt").write_text("some words")
    assert load_text(str(tmp_path / "mine.txt")) == ("mine.txt", "some words")
    with pytest.raises(ValueError, match="text 'nowhere'"):
        load_text("nowhere")


class WholeWords:
    """A tokenizer that, like many, decodes a single word without its leading space."""

    def __init__(self, separator: str) -> None:
        self.separator, self.words = separator, [""]

    def __call__(self, text: str, **options: object) -> SimpleNamespace:
        words = re.findall(r"\S+|\n", text)
        self.words += [word for word in dict.fromkeys(words) if word not in self.words]
        return SimpleNamespace(input_ids=[self.words.index(word) for word in words])

    def decode(self, ids: Sequence[int]) -> str:
        return self.separator.join(self.words[token] for token in ids)


@pytest.mark.parametrize("separator", [" ", ""], ids=["words", "a text without spaces"])
def test_pieces_are_planted_whatever_the_tokenizer_makes_of_spaces(separator: str) -> None:
    passages = Passages(WholeWords(separator), "some words of a text " * 2000, "words")
    prompt = passages.planted(0, 1, 8192, 2048, list(PLANTED))
    assert prompt.questions[0].start == 8192
    inside = [answer for answer in prompt.answers if answer.task == "inside"]
    assert len(inside) == NEEDLES and inside[-1].first > 0.7 * 8192
