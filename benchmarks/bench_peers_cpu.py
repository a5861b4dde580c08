"""Time to first token and answers on the same prompts of vLLM's dense CPU engine, minference, and OpenVINO GenAI, dense
and with its two kinds of sparse prefill.

All engines use the same cores, one at a time, while the others are stopped. A prompt ends with a question about its
text: questions of ``examples/demo/tasks.py`` for the bundled model, a number planted in a book for other models. A
prompt counts as right if the engine writes the answer. OpenVINO has an environment of its own:

    python3.11 -m venv openvino-env
    openvino-env/bin/pip install torch openvino-genai "optimum-intel[openvino]" "transformers<5.6"
    python benchmarks/bench_peers_cpu.py --openvino openvino-env/bin/python --csv benchmarks/results/peers_cpu.csv

OpenVINO uses all cores. vLLM does so with ``VLLM_CPU_OMP_THREADS_BIND=0-1`` (for two cores) in the environment; by
default it leaves one to its other processes. vLLM reads prompts in chunks of ``--chunk`` tokens; OpenVINO's sparse
prefill requires the whole prompt in one step. Both use ``--dtype`` for weights, products and cache (by default OpenVINO
would keep its cache in 8 bits).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tasks
from bench_answers import DEMO, TASKS
from engine_process import ENVIRONMENT, Engine, end_with_us, one_at_a_time
from language_model import yarn
from record import emit

from minference_vllm.offline.evaluate.tasks import Passages
from minference_vllm.offline.texts import load_text

OPENVINO = Path(__file__).with_name("openvino_engine.py")
PRECISION = {"bfloat16": "bf16", "float32": "f32"}
MODES = ("dense", "XATTENTION", "TRISHAPE")


class Question(NamedTuple):
    ids: list[int]
    answer: str


class Answer(NamedTuple):
    ttft: float
    """Seconds."""
    tokens: list[int]


Ask = Callable[[list[int], int], Answer]


def book_questions(tokenizer: Any, tokens: int, count: int) -> list[Question]:
    """Questions for a number planted in a passage of a book, asked at the end."""
    passages = Passages(tokenizer, load_text("opticks")[1], "opticks")
    found = []
    for number in range(count):
        prompt = passages.planted(number, count, tokens, tokens, ["end"])
        (answer,) = prompt.answers
        expected = prompt.ids[answer.first : answer.first + answer.tokens].tolist()
        found.append(Question(prompt.ids[: answer.first].tolist(), tokenizer.decode(expected)))
    return found


def bundled_questions(tokenizer: Any, task: str, tokens: int, count: int) -> list[Question]:
    prompts = [TASKS[task].questions(tokens, 1, 1000 + number)[0] for number in range(count)]
    return [Question(tokenizer(prompt.text).input_ids, prompt.answer) for prompt in prompts]


class OpenVino:
    """One OpenVINO engine in its own process."""

    def __init__(self, args: argparse.Namespace, model: Path, mode: str, tokens: int, log: Path) -> None:
        self.log = log
        values = [str(model), mode, PRECISION[args.dtype], str(tokens), str(args.cache_gib)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [args.openvino, str(OPENVINO), "serve", *values],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.version = str(self._read()["version"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            sys.exit(f"OpenVINO ended; the end of its log:\n{tail}")
        read: dict[str, Any] = json.loads(line)
        return read

    def ask(self, ids: list[int], tokens: int) -> Answer:
        assert self.process.stdin is not None
        print(json.dumps({"ids": ids, "tokens": tokens}), file=self.process.stdin, flush=True)
        read = self._read()
        return Answer(read["ttft"], read["tokens"][:tokens])

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def vllm_engine(args: argparse.Namespace, name: str, tokens: int, folder: Path) -> Engine:
    settings = {"min_context": args.min_context, "log_interval": 0} if name == "minference" else None
    others = {"hf_overrides": stretched(args.model, args.yarn)} if args.yarn else {}
    options = one_at_a_time(args.model, args.dtype, tokens, args.chunk, settings, **others)
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": str(args.cache_gib)}
    return Engine(name, options, environment, folder / f"{name}.log")


def stretched(model: str, factor: float) -> dict[str, Any]:
    """The entries of a checkpoint's configuration for ``factor`` times its context."""
    config = json.loads((Path(model) / "config.json").read_text())
    parameters = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    return yarn(parameters, config["max_position_embeddings"], factor)


def exported(args: argparse.Namespace, folder: Path) -> Path:
    """Export the model to OpenVINO's format; returns the folder."""
    source, target = Path(args.model), folder / "openvino"
    if args.yarn:
        changed = folder / "checkpoint"
        changed.mkdir()
        for file in source.iterdir():
            (changed / file.name).symlink_to(file.resolve())
        config = json.loads((source / "config.json").read_text()) | stretched(args.model, args.yarn)
        (changed / "config.json").unlink()
        (changed / "config.json").write_text(json.dumps(config))
        source = changed
    command = [args.openvino, str(OPENVINO), "export", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"OpenVINO cannot read the model:\n{done.stderr[-2000:]}")
    return target


def engines(args: argparse.Namespace, tokens: int, folder: Path) -> Iterator[tuple[str, str, Ask]]:
    """Name, version ("" for those of this environment) and ask function; each is stopped before the next starts."""
    for name in [name for name in ("vllm", "minference") if name in args.engines]:
        engine = vllm_engine(args, name, tokens, folder)
        try:
            engine.start()

            def ask(ids: list[int], count: int, engine: Engine = engine) -> Answer:
                timed = engine.ask(ids, count - 1)
                return Answer(timed.ttft, timed.tokens)

            yield name, "", ask
        finally:
            engine.stop()
    modes = [mode for mode in MODES if f"openvino {mode}" in args.engines]
    model = exported(args, folder) if modes else folder
    for mode in modes:
        peer = OpenVino(args, model, mode, tokens, folder / f"{mode}.log")
        try:
            yield f"openvino {mode}", peer.version, peer.ask
        finally:
            peer.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ["vllm", "minference", *(f"openvino {mode}" for mode in MODES)]
    parser.add_argument("--engines", nargs="+", choices=everything, default=everything)
    parser.add_argument("--openvino", default="python", help="Python of an environment that has openvino-genai")
    parser.add_argument("--model", default=str(DEMO / "model"), help="the bundled model, or a checkpoint's folder")
    parser.add_argument("--tokens", type=int, default=32768, help="of a prompt")
    parser.add_argument("--yarn", type=float, default=0.0, help="factor of the model's context")
    parser.add_argument("--task", choices=["needle", "key-value"], default="key-value", help="of the bundled model")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=2048, help="vLLM's max_num_batched_tokens")
    parser.add_argument("--min-context", type=int, default=8192, help="minference's setting")
    parser.add_argument("--dtype", choices=list(PRECISION), default="bfloat16")
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--cache-gib", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--csv", default=None, help="append rows to this file")
    args = parser.parse_args()
    end_with_us()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    bundled = Path(args.model).resolve() == (DEMO / "model").resolve()
    task = args.task if bundled else "book"
    questions = (
        bundled_questions(tokenizer, task, args.tokens, args.prompts)
        if bundled
        else book_questions(tokenizer, args.tokens, args.prompts)
    )
    room = math.ceil((max(len(question.ids) for question in questions) + args.answer_tokens + 1) / 128) * 128
    dense: dict[str, list[list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, version, ask in engines(args, room, Path(folder)):
            ask(questions[0].ids[: min(2048, args.tokens)], 2)  # warm-up
            answers = [ask(question.ids, args.answer_tokens) for question in questions]
            texts = [tokenizer.decode(answer.tokens) for answer in answers]
            right = [tasks.grade(text, question.answer) for text, question in zip(texts, questions, strict=True)]
            product = name.split()[0].replace("minference", "vllm")
            base = dense.setdefault(product, [answer.tokens for answer in answers])
            emit(
                {
                    "model": "bundled" if bundled else Path(args.model).name,
                    "task": task,
                    "tokens": args.tokens,
                    "dtype": args.dtype,
                    "engine": name,
                    "bind": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ""),
                    "ttft_s": statistics.median(answer.ttft for answer in answers),
                    "ttft_min_s": min(answer.ttft for answer in answers),
                    "ttft_max_s": max(answer.ttft for answer in answers),
                    "prompts": len(answers),
                    "right": sum(right),
                    "as_dense": sum(a.tokens == b for a, b in zip(answers, base, strict=True)),
                    "openvino": version,
                },
                args.json,
                args.csv,
            )


if __name__ == "__main__":
    main()
