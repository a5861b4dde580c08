"""The language benchmark: sparse prefill in a whole model, what is scored, and its rows. No download."""

from __future__ import annotations

import csv
import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("vllm")  # its kernel serves what ours does not

import bench_language
from language_inputs import ANSWERS, FILLERS, NEEDLES, QUESTION, byte_tokenizer, lookup_model, random_model
from language_model import ChunkedPrefill, Heads, HeadSums, LanguageModel, Scores
from transformers import AutoModelForCausalLM

from minference_vllm import (
    AShape,
    Coverage,
    Dense,
    HeadPattern,
    PatternFile,
    Settings,
    SparseIndex,
    reference,
    sparse_prefill,
)
from minference_vllm.offline.evaluate.tasks import TASKS, Answer, Prompt

LENGTH, CHUNK = 1500, 512
WINDOW = AShape(sink=128, local=128)
NO_THRESHOLD = Settings(min_context=0)


def prefill(pattern: HeadPattern, settings: Settings = NO_THRESHOLD, rows: int = 0) -> ChunkedPrefill:
    return ChunkedPrefill(PatternFile(default=pattern), CHUNK, settings, rows)


def fillers(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FILLERS.start, FILLERS.stop, (length,), generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel(str(folder), LENGTH)


@pytest.fixture(scope="module")
def lookup(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(str(lookup_model(tmp_path_factory.mktemp("lookup"))), LENGTH)


def indices(pattern: HeadPattern) -> list[SparseIndex]:
    """Indices of every chunk, for a pattern that does not depend on queries and keys."""
    cache = torch.zeros(-(-LENGTH // 128), 128, 1, 32)
    found = []
    for begin in range(0, LENGTH, CHUNK):
        end = min(begin + CHUNK, LENGTH)
        where = torch.arange(len(cache))[None], torch.tensor([0, end - begin]), torch.tensor([end])
        query = torch.zeros(end - begin, 1, 32)
        found += sparse_prefill(query, cache, cache, *where, pattern, return_index=True)[1]
    return found


def whole_mask(pattern: HeadPattern) -> torch.Tensor:
    """bool ``[LENGTH, LENGTH]``: what every row of the prompt attends, chunk by chunk."""
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for index in indices(pattern):
        mask[index.tiling.context_len : index.tiling.seq_len, : index.tiling.seq_len] = index.to_mask()[0]
    return mask


@pytest.mark.parametrize("pattern", [Dense(), AShape(sink=2000), Coverage(gamma=0.99, min_budget=2000)], ids=str)
def test_full_selection_is_dense_attention(model: LanguageModel, pattern: HeadPattern) -> None:
    ids, wanted, sparse = fillers(LENGTH), torch.arange(1, LENGTH), prefill(pattern, rows=32)
    expected, found = model.score(ids, wanted), model.score(ids, wanted, sparse)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-4)
    assert sparse.density == 1.0
    heads = Heads.of([sparse.heads])
    assert len(heads.recall) == 2 * 4
    assert heads.recall.allclose(torch.ones(8).double()) and heads.value_recall.allclose(torch.ones(8).double())
    assert heads.error.max() < 1e-5


def test_the_dense_loss_is_that_of_the_model_without_us(model: LanguageModel, folder: Path) -> None:
    ids, wanted = fillers(LENGTH), torch.tensor([1, 700, LENGTH - 1])
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.inference_mode():
        logits = plain(ids[None]).logits[0, wanted - 1]
    found = model.score(ids, wanted)
    torch.testing.assert_close(
        found.loss, cross_entropy(logits, ids[wanted], reduction="none").double(), rtol=0, atol=1e-4
    )
    assert found.right.tolist() == (logits.argmax(-1) == ids[wanted]).tolist()


def test_what_a_layer_loses_reaches_the_next(model: LanguageModel, folder: Path) -> None:
    """Equals a model with the pattern's mask in every layer; for a window the mask is known in advance."""
    ids, wanted, sparse, mask = fillers(LENGTH), torch.arange(1, LENGTH), prefill(WINDOW), whole_mask(WINDOW)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    with torch.inference_mode():
        logits = plain(ids[None], attention_mask=mask[None, None]).logits[0, wanted - 1]
    expected = cross_entropy(logits, ids[wanted], reduction="none").double()
    found = model.score(ids, wanted, sparse).loss
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert sparse.density == pytest.approx(float(mask.sum()) / (LENGTH * (LENGTH + 1) / 2))
    assert (found - model.score(ids, wanted).loss).abs().max() > 0.1


def test_chunks_below_min_context_are_read_densely(model: LanguageModel) -> None:
    ids, wanted = fillers(LENGTH), torch.arange(1, LENGTH)
    sparse = prefill(WINDOW, Settings(min_context=CHUNK + 1))
    moved = (model.score(ids, wanted, sparse).loss - model.score(ids, wanted).loss).abs()
    # The token at the chunk's end is predicted by its last row.
    assert moved[:CHUNK].max() < 1e-4 < 0.1 < moved[CHUNK:].max()
    mask = whole_mask(WINDOW)
    pairs = CHUNK * (CHUNK + 1) / 2 + float(mask[CHUNK:].sum())
    assert sparse.density == pytest.approx(pairs / (LENGTH * (LENGTH + 1) / 2))


def test_a_pattern_that_loses_a_needle_is_seen(lookup: LanguageModel) -> None:
    ids, needle, place = fillers(LENGTH), 3, 1300
    ids[300], ids[place - 1], ids[place] = NEEDLES[needle], QUESTION, ANSWERS[needle]
    wanted, keeping = torch.tensor([place]), AShape(sink=384, local=128)
    for pattern, right in ((None, True), (Dense(), True), (keeping, True), (WINDOW, False)):
        found = lookup.score(ids, wanted, prefill(pattern)) if pattern else lookup.score(ids, wanted)
        assert found.right.tolist() == [right], pattern
        assert (float(found.loss) < 0.01) == right and (right or float(found.loss) > 5), pattern


def test_questions_behind_a_prompt_are_requests_of_their_own(model: LanguageModel) -> None:
    """Each answer has the same loss as when only its own question follows the prompt."""
    prompt, parts = fillers(900), [fillers(30, 1), fillers(20, 2), fillers(40, 3)]
    ids, borders = torch.cat([prompt, *parts]), [900, 930, 950, 990]
    questions = [range(begin, end) for begin, end in itertools.pairwise(borders)]
    wanted = torch.tensor([899, 929, 949, 989])
    found = model.score(ids, wanted, questions=questions).loss
    alone = [model.score(prompt, wanted[:1]).loss[0]]
    alone += [model.score(torch.cat([prompt, part]), torch.tensor([899 + len(part)])).loss[0] for part in parts]
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-4)
    # The sparse prefill covers the prompt only.
    sparse = prefill(WINDOW)
    model.score(ids, wanted, sparse, questions)
    assert sparse.pairs == 2 * 4 * 900 * 901 / 2


def test_heads_are_measured_against_exact_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(LENGTH, 4, 32, generator=generator)
    keys, values = torch.randn(2, 2, LENGTH, 32, generator=generator)
    index = indices(WINDOW)[-1]
    index = SparseIndex(**{**vars(index), "heads_per_list": 4})
    begin, rows = index.tiling.context_len, LENGTH - index.tiling.context_len
    mask, causal = index.to_mask(), torch.ones(4, rows, LENGTH).tril(begin).bool()
    out = reference.masked_attention(query[begin:], keys, values, mask, 0.3)
    exact = reference.masked_attention(query[begin:], keys, values, causal, 0.3)
    sums = HeadSums(4)
    sums.add(query[begin:], keys, values, 0.3, index, out.float(), count=rows)
    found = Heads.of([{0: sums}])
    for head in range(4):
        k, v = keys[head // 2].double(), values[head // 2].double()
        logits = query[begin:, head].double() @ k.T * 0.3
        weights = logits.masked_fill(~causal[head], -torch.inf).softmax(-1)
        distance = (v[None] - exact[:, head, None]).norm(dim=-1)
        moved = weights * distance
        kept = ((moved * mask[head]).sum(1) / moved.sum(1)).mean()
        assert float(found.recall[head]) == pytest.approx(float((weights * mask[head]).sum(1).mean()), abs=1e-5)
        assert float(found.value_recall[head]) == pytest.approx(float(kept), abs=1e-5)
        error = (out[:, head] - exact[:, head]).norm() / exact[:, head].norm()
        assert float(found.error[head]) == pytest.approx(float(error), abs=1e-5)


def test_positions_are_stretched_only_where_they_end(folder: Path) -> None:
    assert LanguageModel(str(folder), 8192).yarn == 1
    for tokens, factor in ((8193, 2), (16384, 2), (16385, 4), (32768, 4)):
        stretched = LanguageModel(str(folder), tokens)
        assert stretched.yarn == factor
        assert stretched.model.config.rope_parameters["rope_type"] == "yarn"
        assert stretched.model.config.rope_parameters["factor"] == factor


def test_a_model_with_windows_is_refused(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    MistralForCausalLM(MistralConfig(vocab_size=32, num_hidden_layers=1, sliding_window=64, **sizes)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="layer 0 uses sliding_window; only full causal attention is measured"):
        LanguageModel(str(tmp_path), 100)


def test_an_answer_is_right_when_all_of_it_is() -> None:
    places = [Answer("end", 4, 2), Answer("inside", 6, 1), Answer("end", 8, 2)]
    prompts = [Prompt(torch.arange(10), places, []), Prompt(torch.arange(10), places[:1], [])]
    assert bench_language.wanted(prompts[0]).tolist() == [4, 5, 6, 8, 9]
    first = Scores(torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([True, False, True, True, True]))
    second = Scores(torch.tensor([6.0, 7]).double(), torch.tensor([True, True]))
    found = bench_language.answers("end", prompts, [first, second])
    assert found.loss.tolist() == [1, 2, 4, 5, 6, 7] and found.right == [False, True, True]


TOKENS, LONG_CHUNK = 5000, 2048


@pytest.fixture(scope="module")
def rows(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Rows of the command line for a random byte-level model."""
    place = tmp_path_factory.mktemp("rows")
    byte_tokenizer().save_pretrained(folder)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(2, 8))) for _ in range(50)]
    (place / "words.txt").write_text(" ".join(rng.choices(words, k=4000)))
    options = {
        "--model": [folder], "--text": [place / "words.txt"], "--tokens": [TOKENS], "--chunk": [LONG_CHUNK],
        "--patterns": ["dense", "a_shape(128, 128)"], "--output": [place / "rows.csv"],
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        words = [str(word) for option, values in options.items() for word in (option, *values)]
        patch.setattr(sys, "argv", ["bench_language.py", *words])
        bench_language.main()
    with (place / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_there_is_a_row_for_every_pattern_and_task(rows: list[dict[str, str]]) -> None:
    expected = [(pattern, task) for pattern in ("dense", "a_shape(128, 128)") for task in [*TASKS, "heads"]]
    assert sorted((row["pattern"], row["task"]) for row in rows) == sorted(expected)
    answers = {"perplexity": TOKENS // 2, "needles": 8, "end": 3, "inside": 8, "few_shot": 12, "single": 16}
    for row in rows:
        assert (row["text"], row["yarn"], row["tokens"], row["chunk"]) == ("words.txt", "1", "5000", "2048")
        assert row["threads"] == "1" and "vllm" in row and row["command"].startswith("python bench_language.py --model")
        if row["task"] == "heads":
            assert row["dense"] == row["count"] == ""
        else:
            assert row["recall"] == "" and int(row["answers"]) == answers[row["task"]]
    counts = {row["task"]: row["count"] for row in rows}
    assert counts["perplexity"] == "2500" and counts["inside"] == counts["needles"] == "40" and counts["end"] == "15"


def test_rows_say_what_a_pattern_loses(rows: list[dict[str, str]]) -> None:
    for row in rows:
        sparse = row["pattern"] != "dense"
        assert (float(row["density"]) < 0.5) if sparse else row["density"] == "1.0"
        if row["task"] == "heads":
            assert (float(row["output_error"]) > 0.01) == sparse and (float(row["recall"]) < 0.9) == sparse
            head, *figures = row["worst_heads"].split("; ")[0].split()
            assert head in {f"{layer}.{number}" for layer in range(2) for number in range(4)} and len(figures) == 3
            continue
        difference = float(row["sparse"]) - float(row["dense"])
        assert float(row["difference"]) == pytest.approx(difference, abs=2e-5)
        assert (abs(difference) > 1e-3) == sparse
        assert 0 <= int(row["right_sparse"]) <= int(row["answers"])
        if not sparse:
            assert row["right_sparse"] == row["right_dense"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "500"], "a prompt of 500 tokens is read densely"),
        (["--passages", "0"], "--passages must be at least 1"),
        (["--patterns", "cover(1)"], "unknown pattern kind"),
        (["--text", "nowhere.txt"], "text 'nowhere.txt': not pydoc, opticks or a readable file"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    options: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_language.py", "--model", str(folder), *options])
    monkeypatch.setattr(bench_language, "measure", lambda *arguments: pytest.fail("something was measured"))
    with pytest.raises(SystemExit) as end:
        bench_language.main()
    assert message in capsys.readouterr().err + str(end.value)
