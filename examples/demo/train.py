"""Train the demo model from scratch on the CPU and export it for vLLM: `python train.py --out DIR`.

A StableLM decoder of 2 million parameters learns to answer questions about a long text (see tasks.py).  It trains on
sequences of 96 to 2,048 tokens and is used on 64K and more.  Two things make up for the missing length:

* Position jumps: the position ids of a training sequence jump forward at random sentence ends, so that it spans up
  to 128K positions.
* Dilution: in a context that is r times longer, r times as many irrelevant keys share the softmax.  Adding log(r) to
  the attention logits of the distant irrelevant keys of a short sequence has the same effect.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from pathlib import Path
from typing import NamedTuple

import tasks
import torch
import torch.nn.functional as F
from network import BOS, EOS, MAX_POSITION, TOKEN_ID, Muon, build_model, export, forward
from torch import Tensor
from transformers import StableLmForCausalLM

WARMUP = 100  # steps
NEAR = 64  # keys this close to the query are never diluted: a longer context does not add keys there
TASKS = ("needle", "key-value", "variable")


class Stage(NamedTuple):
    """Steps of one kind.  The learning rates go linearly from `rate` to `end_rate` times their base values."""

    name: str
    steps: int
    length: int
    batch: int
    questions: int
    dilution: float  # the largest r
    rate: float
    end_rate: float
    tasks: tuple[str, ...] = TASKS  # in turn, for the sequences of a batch
    similar: float = 0.0  # share of the sequences whose keys have many words in common
    full: float = 0.0  # additional share of the sequences that are nothing but statements
    least_dilution: float = 1.0  # the smallest r


STAGES = [
    Stage("tiny", 300, 96, 64, 2, 1, 1.0, 1.0),
    Stage("short", 200, 256, 32, 5, 16, 1.0, 1.0),
    Stage("diluted", 600, 512, 16, 10, 128, 1.0, 0.7),
    Stage("similar keys", 300, 1024, 8, 16, 128, 0.7, 0.5, ("key-value", "needle", "key-value", "variable"), 0.5),
    Stage(
        "long", 300, 2048, 4, 40, 64, 0.5, 0.14, ("key-value", "needle", "key-value", "variable", "key-value"), 0.4, 0.5
    ),
    Stage(
        "hard",
        140,
        2048,
        4,
        40,
        128,
        0.25,
        0.01,
        ("key-value", "needle", "key-value", "variable", "key-value"),
        0.5,
        0.7,
        4.0,
    ),
    Stage(
        "harder",
        200,
        2048,
        4,
        40,
        256,
        0.4,
        0.01,
        ("key-value", "key-value", "key-value", "key-value", "needle", "key-value", "variable"),
        0.5,
        0.8,
        8.0,
    ),
]
MUON_RATE, ADAM_RATE = 0.02, 3e-3


class Batch(NamedTuple):
    ids: Tensor  # [batch, length]
    positions: Tensor  # [batch, length]
    groups: Tensor  # [batch, length]: which fact a token belongs to or asks for; 0: none
    targets: Tensor  # [batch, length]: next token where there is a loss, else -100
    dilution: Tensor  # [batch]: r
    kinds: list[str]  # the task of each row


def encode(words: list[str]) -> list[int]:
    return [TOKEN_ID[word.lower()] for word in words]


class Facts(NamedTuple):
    lines: list[list[str]]  # statements, in order
    groups: list[int]  # the fact (for variables: the chain) that each statement belongs to
    asks: list[tuple[tasks.Key, list[str], int]]  # what can be asked: key, reply, group


def make_keys(rng: random.Random, count: int, similar: bool) -> list[tasks.Key]:
    """Distinct keys; similar ones combine few adjectives with few nouns, as every word recurs in a long context."""
    if not similar:
        return tasks.random_keys(rng, count)
    rows = math.ceil(math.sqrt(1.3 * count) * math.exp(rng.uniform(-0.7, 0.7)))
    columns = math.ceil(1.3 * count / rows)
    adjectives, nouns = rng.sample(tasks.KEY_ADJECTIVES, rows), rng.sample(tasks.KEY_NOUNS, columns)
    return [(adjectives[i // columns], nouns[i % columns]) for i in rng.sample(range(rows * columns), count)]


def make_facts(rng: random.Random, task: str, room: int, questions: int, density: float, similar: bool) -> Facts:
    """Statements for a share `density` of a text of `room` words, but at least as many as there are questions."""
    share = room * density
    if task != "variable":
        count = max(questions, int(share / len(tasks.statement(task, ("", ""), [""] * tasks.CODE_DIGITS))))
        keys = make_keys(rng, count, similar)
        codes = [tasks.random_code(rng) for _ in keys]
        lines = [tasks.statement(task, key, code) for key, code in zip(keys, codes, strict=True)]
        groups = list(range(1, count + 1))
        return Facts(lines, groups, list(zip(keys, map(tasks.reply, codes), groups, strict=True)))
    hops = rng.choice([0, 1, 1, 2, 3])
    chains = max(math.ceil(questions / (hops + 1)), int(share / (9 + 7 * hops)))
    keys = make_keys(rng, chains * (hops + 1), similar)
    events, asks = [], []
    for group in range(1, chains + 1):
        names, code = keys[(group - 1) * (hops + 1) : group * (hops + 1)], tasks.random_code(rng)
        # Sorting random times along each chain interleaves the chains and keeps every chain in order.
        times = sorted(rng.random() for _ in names)
        values: list[list[str] | tasks.Key] = [code, *names[:-1]]
        for hop, (name, value) in enumerate(zip(names, values, strict=True)):
            events.append((times[hop], tasks.statement(task, name, value), group))
            asks.append((name, tasks.reply(code, names[:hop][::-1]), group))
    events.sort()
    return Facts([event[1] for event in events], [event[2] for event in events], asks)


def sample(
    rng: random.Random, task: str, length: int, questions: int, density: float, similar: bool = False
) -> tuple[list[int], list[int], list[int], int]:
    """One training sequence: ids, groups, targets (next token where there is a loss), and where the questions start."""
    longest = 12 + tasks.CODE_DIGITS + 2 + (9 if task == "variable" else 1)
    facts = make_facts(rng, task, length - 1 - questions * longest, questions, density, similar)
    tail: list[int] = []
    tail_groups: list[int] = []
    targets: list[int] = []
    for key, reply, group in rng.sample(facts.asks, questions):
        ask, answer = encode(tasks.question(task, key)), [*encode(reply), EOS]
        tail += ask + answer
        tail_groups += [group] * (len(ask) + len(answer))
        targets += [-100] * (len(ask) - 1) + answer + [-100]
    room = length - 1 - len(tail)
    words, starts = tasks.document(rng, room, facts.lines)
    groups = [0] * (room + 1)
    for start, line, group in zip(starts, facts.lines, facts.groups, strict=True):
        groups[1 + start : 1 + start + len(line)] = [group] * len(line)
    return [BOS, *encode(words), *tail], groups + tail_groups, [-100] * (room + 1) + targets, room


def jump_positions(rng: random.Random, ids: list[int], room: int) -> list[int]:
    """Positions that span up to MAX_POSITION, with jumps after full stops of the text in front of the questions."""
    length = len(ids)
    spare = int(math.exp(rng.uniform(math.log(length), math.log(MAX_POSITION)))) - length
    stops = [i + 1 for i in range(room) if ids[i] == TOKEN_ID["."]] or [1]
    jumps = sorted(rng.sample(stops, min(len(stops), rng.randint(1, 12))))
    cuts = sorted(rng.randint(0, spare) for _ in jumps)
    positions: list[int] = []
    offset = 0
    for jump, cut in zip(jumps, cuts, strict=True):
        positions += range(len(positions) + offset, jump + offset)
        offset = cut
    return positions + list(range(len(positions) + offset, length + offset))


def make_batch(rng: random.Random, stage: Stage) -> Batch:
    first = rng.randrange(len(stage.tasks))
    kinds = [stage.tasks[(first + i) % len(stage.tasks)] for i in range(stage.batch)]
    rows, positions, groups, targets, dilution = [], [], [], [], []
    for kind in kinds:
        similar = stage.similar > 0 and rng.random() < stage.similar
        density = rng.choice([0.0, rng.uniform(0.1, 0.9), rng.uniform(0.9, 1.0)])
        if stage.full > 0 and rng.random() < stage.full:
            density = 1.0
        ids, group, target, room = sample(rng, kind, stage.length, stage.questions, density, similar)
        rows.append(ids)
        positions.append(jump_positions(rng, ids, room))
        groups.append(group)
        targets.append(target)
        # Similar keys already stand for the near misses of a longer context.
        largest = stage.dilution / (8 if similar else 1)
        dilution.append(math.exp(rng.uniform(math.log(stage.least_dilution), math.log(largest))))
    return Batch(
        torch.tensor(rows),
        torch.tensor(positions),
        torch.tensor(groups),
        torch.tensor(targets),
        torch.tensor(dilution),
        kinds,
    )


def attention_bias(batch: Batch) -> Tensor:
    """[batch, 1, length, length]: -inf for the future, log r for distant keys of other facts, else 0."""
    length = batch.ids.shape[1]
    index = torch.arange(length)
    distance = index[:, None] - index
    # A group per token that equals no other group where it is 0, by giving the queries -1 there.
    queries = torch.where(batch.groups == 0, -1, batch.groups)
    same = queries[:, :, None] == batch.groups[:, None, :]
    same |= (distance <= NEAR) | (index == 0)  # <bos> stays single in any context
    bias = batch.dilution.log().bfloat16()[:, None, None] * ~same
    return bias.masked_fill_(distance < 0, -torch.inf)[:, None]


def exact(kinds: list[str], logits: Tensor, targets: Tensor, rows: Tensor) -> dict[str, list[int]]:
    """[correct, asked] whole answers per task; `rows` says to which sequence a target belongs."""
    counts = {task: [0, 0] for task in TASKS}
    good = True
    for row, target, guess in torch.stack((rows, targets, logits.argmax(-1)), dim=1).tolist():
        good &= guess == target
        if target == EOS:
            counts[kinds[row]][0] += good
            counts[kinds[row]][1] += 1
            good = True
    return counts


def train_step(model: StableLmForCausalLM, batch: Batch) -> tuple[Tensor, dict[str, list[int]]]:
    """Loss on the answers, and counts of right answers."""
    rows, columns = (batch.targets != -100).nonzero(as_tuple=True)
    tail = int(columns.min())
    with torch.autocast("cpu", torch.bfloat16):
        hidden = forward(model, batch.ids, batch.positions, attention_bias(batch), tail)
        logits = model.lm_head(hidden[rows, columns - tail]).float()
    targets = batch.targets[rows, columns]
    return F.cross_entropy(logits, targets), exact(batch.kinds, logits, targets, rows)


@torch.inference_mode()
def measure(model: StableLmForCausalLM, task: str, length: int, seed: int, questions: int = 32) -> list[int]:
    """[correct, asked] on a text of true length, with bf16 weights and all questions at its end.

    The text of key-value retrieval is nothing but records; the other tasks have few statements in much filler.
    """
    rng = random.Random(seed)
    ids, _, targets, _ = sample(rng, task, length, questions, float(task == "key-value"))
    ids, targets = torch.tensor([ids]), torch.tensor([targets])
    rows, columns = (targets != -100).nonzero(as_tuple=True)
    tail = int(columns.min())
    hidden = forward(model, ids, torch.arange(length)[None], None, tail)
    logits = model.lm_head(hidden[rows, columns - tail])
    return exact([task], logits, targets[rows, columns], rows)[task]


def learning_rate(step: int) -> tuple[Stage, float]:
    """The stage of a step (counted from 0) and the factor of its learning rates."""
    start = 0
    for stage in STAGES:
        if step < start + stage.steps:
            part = (step - start) / stage.steps
            return stage, (stage.rate + (stage.end_rate - stage.rate) * part) * min(1.0, (step + 1) / WARMUP)
        start += stage.steps
    raise ValueError(f"no stage has step {step}")


def train(out: Path, seed: int) -> StableLmForCausalLM:
    """Run all stages, or what is left of them after the last checkpoint in `out`."""
    torch.manual_seed(seed)
    model = build_model()
    inner = [p for p in model.model.layers.parameters() if p.dim() == 2]
    outer = [p for p in model.parameters() if not any(p is q for q in inner)]
    optimizers = {
        "muon": (Muon(inner, weight_decay=0.02), MUON_RATE),
        "adam": (torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0, fused=True), ADAM_RATE),
    }
    done, seconds = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        done, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for name, (optimizer, _) in optimizers.items():
            optimizer.load_state_dict(state[name])
    # After a resume, drop the log rows that are younger than the checkpoint.
    log = out / "training_log.csv"
    rows = [row for row in csv.reader(log.open())][1:] if log.exists() else []
    rows = [row for row in rows if int(row[0]) <= done]
    with log.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "stage", "loss", "accuracy", *TASKS, "cpu_seconds"])
        writer.writerows(rows)
    losses: list[float] = []
    counts = {task: [0, 0] for task in TASKS}
    for step in range(done, sum(stage.steps for stage in STAGES)):
        began = time.process_time()
        stage, rate = learning_rate(step)
        for optimizer, base in optimizers.values():
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate * base
        # Each step has its own generator, so that a resumed run sees the same data.
        loss, correct = train_step(model, make_batch(random.Random(seed * 1_000_003 + step), stage))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers.values():
            optimizer.step()
        seconds += time.process_time() - began
        losses.append(loss.item())
        for task, (good, asked) in correct.items():
            counts[task][0] += good
            counts[task][1] += asked
        if (step + 1) % 20 == 0:
            total = [sum(column) for column in zip(*counts.values(), strict=True)]
            shares = [f"{good / max(asked, 1):.3f}" for good, asked in (total, *counts.values())]
            row = [step + 1, stage.name, f"{sum(losses) / len(losses):.4f}", *shares, round(seconds)]
            with log.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            print(*row, flush=True)
            losses, counts = [], {task: [0, 0] for task in TASKS}
        if (step + 1) % 100 == 0 or step + 1 == sum(stage.steps for stage in STAGES):
            state = {"model": model.state_dict(), "step": step + 1, "seconds": seconds}
            state |= {name: optimizer.state_dict() for name, (optimizer, _) in optimizers.items()}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="for the checkpoint, the log and the model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768], help="measure these in the end")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    model = train(args.out, args.seed)
    export(model, args.out / "model")
    exported = StableLmForCausalLM.from_pretrained(args.out / "model", dtype=torch.bfloat16).eval()
    for length in args.lengths:
        for task in TASKS:
            good, asked = measure(exported, task, length, seed=args.seed + 1)
            print(f"{task} at {length} tokens: {good} of {asked}", flush=True)


if __name__ == "__main__":
    main()
