"""An evaluation from its prompts to the report: every prompt is read densely and under each pattern, one by one."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from minference_vllm.offline import engine
from minference_vllm.offline.evaluate import report, ruler
from minference_vllm.offline.evaluate.reader import Reader
from minference_vllm.offline.evaluate.report import Row
from minference_vllm.offline.evaluate.tasks import Passages, Prompt
from minference_vllm.offline.texts import load_text
from minference_vllm.patterns.discovery import total_query_heads
from minference_vllm.patterns.file import load_pattern_file
from minference_vllm.settings import load_settings

DENSE = "dense"
DEFAULT = "default"
"""Name of the patterns that the model would be served with."""
PLANTED = ("inside", "end", "few_shot", "single")
"""What is planted in the text and scored there, see ``tasks``; RULER asks for needles at the prompt's end."""
TEXT = "perplexity"


class EvaluationError(ValueError):
    """An evaluation that cannot run; the message says why and what is allowed."""


class Asked(NamedTuple):
    """A RULER sample in tokens."""

    sample: ruler.Sample
    ids: list[int]


class Prompts(NamedTuple):
    """The prompts of one length."""

    tokens: int
    scored: list[Prompt]
    timed: list[int]
    asked: list[Asked]

    def requests(self, repeats: int) -> int:
        """Number of requests per pattern."""
        return len(self.scored) + repeats + len(self.asked)


@dataclass
class Found:
    """The results of one pattern at one length."""

    loss: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """By task, the losses of each prompt's scored tokens: nats, float64."""
    right: dict[str, list[bool]] = field(default_factory=dict)
    """By task, whether every token of an answer was the most likely one."""
    seconds: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    """RULER's answers, in tokens."""
    computed_pairs: float = 0.0
    dense_pairs: float = 0.0

    @property
    def density(self) -> float:
        return self.computed_pairs / self.dense_pairs if self.dense_pairs else 1.0


def run(args: argparse.Namespace) -> int:
    """Evaluate, and write the report after every length.

    Returns:
        0; 1: a pattern lost more than ``--max-loss``.

    Raises:
        EvaluationError: options that cannot be used.
        EngineError: a model that vLLM cannot start.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    engine.prepare()
    from transformers import AutoTokenizer

    config = engine.model_config(args.model, args.engine_args)
    names = list(dict.fromkeys([DENSE, *(args.patterns or [DEFAULT])]))
    for name in names[1:]:
        if name != DEFAULT:
            heads = total_query_heads(config)
            load_pattern_file(name).check_model(config.get_total_num_hidden_layers(), heads, f"pattern {name!r}")
    lengths = usable_lengths(args, int(config.max_model_len))
    # Before the weights load, since the text may be too short.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    label, text = load_text(args.text)
    passages = Passages(tokenizer, text, label)
    missing = ruler.missing_packages()
    if missing:
        print(f"without RULER: {', '.join(missing)} not installed (pip install 'minference-vllm[evaluate]')")
    sets = [prompts(args, passages, tokens, not missing) for tokens in lengths]
    llm = engine.start(config, engine_options(args, max(lengths)), args.engine_args, "evaluate")
    reader = Reader(llm)
    # Try each once before any work: a pattern may not run on this model's pages.
    sources = {name: reader.use(None if name == DEFAULT else name) for name in names}
    header = report.Header(args.model, sources, label, args.chunk, args.settings, args.seed, sampled(args, missing))
    rows: list[Row] = []
    for found in sets:
        rows += measure(reader, found, names, args.repeats)
        report.write(args.output, header, rows)
    engine.stop(llm)
    print(report.summary(rows))
    print(f"report in {args.output}: {', '.join(sorted(path.name for path in args.output.glob('report.*')))}")
    return too_much_lost(rows, args.max_loss)


def usable_lengths(args: argparse.Namespace, limit: int) -> list[int]:
    """Lengths of prompts with their answers, in tokens.

    Args:
        limit: the model's maximum length.

    Raises:
        EvaluationError: at one of them nothing would run sparsely.
    """
    lengths = sorted({min(tokens, limit) for tokens in args.lengths})
    if max(args.lengths) > limit:
        print(f"--lengths above {limit}: cut to that, the longest sequence of the model")
    settings = load_settings({"minference": args.settings})
    for tokens in lengths:
        if tokens <= settings.min_context:
            lower = min(settings.min_context, tokens // 4)
            raise EvaluationError(
                f"a prompt of {tokens} tokens is served densely (min_context is {settings.min_context}): name longer "
                f"--lengths, or lower it with --settings '{{\"min_context\": {lower}}}'"
            )
    return lengths


def prompts(args: argparse.Namespace, passages: Passages, tokens: int, with_ruler: bool) -> Prompts:
    """Everything that is read at one length. One token is generated after a scored prompt."""
    scored = []
    for number in range(args.passages):
        scored.append(passages.plain(number, args.passages, tokens - 1))
        scored.append(passages.planted(number, args.passages, tokens - 1, args.chunk, PLANTED, args.seed))
    asked = []
    if with_ruler and args.samples and tokens >= ruler.MIN_TOKENS:
        tokenizer = passages.tokenizer
        for sample in ruler.samples(tokenizer, tokens, args.samples, args.seed):
            asked.append(Asked(sample, question_ids(tokenizer, sample, args.apply_chat_template)))
    return Prompts(tokens, scored, scored[0].ids.tolist(), asked)


def question_ids(tokenizer: Any, sample: ruler.Sample, chat: bool) -> list[int]:
    """A question with the beginning of its answer, as lm-eval joins them."""
    if not chat:
        return list(tokenizer(f"{sample.question} {sample.prefix}").input_ids)
    messages = [{"role": "user", "content": sample.question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text + sample.prefix, add_special_tokens=False).input_ids)


def sampled(args: argparse.Namespace, missing: Sequence[str]) -> str:
    """Description of RULER's samples, for the report."""
    if missing:
        return f"without RULER: {', '.join(missing)} not installed"
    import importlib.metadata

    chat = ", with the chat template" if args.apply_chat_template else ""
    return f"{args.samples} samples of each RULER task (lm-eval {importlib.metadata.version('lm_eval')}){chat}"


def engine_options(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """vLLM's arguments: one prompt at a time, in chunks of ``args.chunk`` tokens, without prefix caching."""
    return {
        "attention_backend": "minference",
        "additional_config": {"minference": {"log_interval": 0, **args.settings}},
        "enable_prefix_caching": False,
        "max_num_seqs": 1,
        "max_num_batched_tokens": args.chunk,
        "max_model_len": tokens,
    }


def measure(reader: Reader, asked: Prompts, names: Sequence[str], repeats: int) -> Iterator[Row]:
    """The rows of one length. Patterns take turns at every prompt, so that changes of machine speed affect all."""
    found = {name: Found() for name in names}

    def under_each(bar: tqdm[Any]) -> Iterator[Found]:
        for name in names:
            reader.use(None if name == DEFAULT else name)
            yield found[name]
            computed, dense = reader.pairs()
            found[name].computed_pairs += computed
            found[name].dense_pairs += dense
            bar.update()

    total = asked.requests(repeats) * len(names)
    with tqdm(total=total, desc=f"{asked.tokens} tokens", unit="prompt") as bar:
        for prompt in asked.scored:
            for one in under_each(bar):
                score(reader, prompt, one)
        for _ in range(repeats):
            for one in under_each(bar):
                one.seconds.append(reader.seconds(asked.timed))
        for sample, ids in asked.asked:
            for one in under_each(bar):
                one.answers.append(reader.answer(ids, ruler.GENERATED[sample.task]))
    for name in names[1:]:
        if not found[name].dense_pairs:
            raise EvaluationError(f"pattern {name!r}: no chunk ran sparsely (VLLM_LOGGING_LEVEL=INFO shows why)")
        yield from compare(reader.tokenizer, asked, name, found[DENSE], found[name])


def score(reader: Reader, prompt: Prompt, found: Found) -> None:
    """Read one prompt and keep the losses of its answers."""
    scored = reader.score(prompt.ids.tolist())
    for answer in prompt.answers:
        # The first token has no loss.
        place = slice(answer.first - 1, answer.first - 1 + answer.tokens)
        found.loss.setdefault(answer.task, []).append(scored.loss[place])
        found.right.setdefault(answer.task, []).append(bool(scored.right[place].all()))


def compare(tokenizer: Any, asked: Prompts, name: str, dense: Found, sparse: Found) -> Iterator[Row]:
    """One pattern's rows, compared with dense attention."""

    def row(task: str, unit: str, before: Sequence[float], after: Sequence[float], **more: Any) -> Row:
        difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
        count = len(difference)
        error = float(difference.std() / count**0.5) if count > 1 else None
        means = statistics.fmean(before), statistics.fmean(after), float(difference.mean())
        return Row(asked.tokens, name, task, unit, *means, error, count, density=sparse.density, **more)

    for task, losses in dense.loss.items():
        before, after = (torch.cat(parts).tolist() for parts in (losses, sparse.loss[task]))
        right = {} if task == TEXT else {"right_dense": sum(dense.right[task]), "right_sparse": sum(sparse.right[task])}
        yield row(task, "nats", before, after, **right)
    before, after = statistics.median(dense.seconds), statistics.median(sparse.seconds)
    yield Row(
        asked.tokens, name, "time to first token", "s", before, after, after - before, None, len(sparse.seconds),
        density=sparse.density,
    )  # fmt: skip
    if not asked.asked:
        return
    scores: dict[str, tuple[list[float], list[float]]] = {}
    same = []
    for (sample, _), *answers in zip(asked.asked, dense.answers, sparse.answers, strict=True):
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        for column, text in zip(scores.setdefault(sample.task, ([], [])), texts, strict=True):
            column.append(ruler.score(sample.expected, sample.prefix + text))
        same.append(agreement(*answers))
    for task, (before_, after_) in scores.items():
        yield row(task, "score", before_, after_)
    yield row("agreement", "share", [1.0] * len(same), same)


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the longer answer's tokens before the two differ."""
    longer = max(len(one), len(other))
    equal = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return equal / longer if longer else 1.0


def too_much_lost(rows: Sequence[Row], allowed: float | None) -> int:
    """Print which patterns lose more on the text than allowed, and return the exit code."""
    if allowed is None:
        return 0
    found = [row for row in rows if row.task == TEXT and row.difference > allowed]
    for row in found:
        print(
            f"{row.pattern} loses {row.difference:.4f} nats per token at {row.tokens} tokens; --max-loss is {allowed}"
        )
    return int(bool(found))
