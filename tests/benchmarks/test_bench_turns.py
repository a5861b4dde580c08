"""Conversations of ``bench_turns.py``: they have the requested length, and every answer occurs in the text."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from bench_answers import DEMO
from bench_turns import FACTS, Talk, book_talk, bundled_talk
from language_inputs import byte_tokenizer
from transformers import AutoTokenizer

LENGTHS = [900, 500, 500]


def held(talk: Talk, number: int) -> list[tuple[list[int], str, list[int]]]:
    return [tuple(turn) for turn in talk(number)]


def test_bundled_talk() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO / "model"))
    talk = bundled_talk(tokenizer, LENGTHS)
    turns = held(talk, 3)
    # Plus one for the token that the model expects first.
    assert [len(new) for new, _, _ in turns] == [901, 500, 500]
    text = ""
    for new, answer, said in turns:
        text += tokenizer.decode(new)
        assert f"is {answer} ." in text and tokenizer.decode(said) == f"{answer} ."
        text += tokenizer.decode(said)
    assert text.count("the secret code of") == (FACTS + 1) * len(LENGTHS)  # facts and questions
    assert turns == held(talk, 3) != held(talk, 4)


def test_book_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    monkeypatch.setattr("bench_turns.load_text", lambda name: (name, "All is well that ends well. " * 2000))
    lengths = [4 * length for length in LENGTHS]
    talk = book_talk(tokenizer, lengths, count=2)
    turns = held(talk, 1)
    assert [len(new) for new, _, _ in turns] == lengths
    text = ""
    for new, answer, said in turns:
        text += tokenizer.decode(new)
        assert f" is {answer}.\n" in text and text.endswith(" is ")
        text += tokenizer.decode(said)
    assert text.count("\nThe special magic number for") == FACTS * len(LENGTHS)
