"""A server under mixed load for a long time, killed with SIGKILL and restarted a few times (``make soak``).

The bundled model is served with a small KV cache and sparse prefill from 1,024 tokens on. Clients ask it for needles in
prompts of 200 tokens to 32K, new ones and ones with a shared prefix, streamed and not streamed; a fifth of the requests
are cancelled by closing the connection. Every answer is checked, and the memory of the server's processes and its
counters are monitored. The following problems are reported in the summary and give exit code 1:

* more than one wrong answer in a hundred that vLLM's own backend, asked at the end, gets right (the model itself errs
  once in 2,000, and four to nine times when sparse from 1,024 tokens on, where the default would be dense),
* a request or a client that hangs, or a connection that breaks while the server is running,
* a line in the server's log with an error, or about sparse prefill that did not happen,
* counters that contradict each other, or that do not change by exactly the chunks of a prompt that is served alone,
* requests or cache pages that remain after all clients have ended,
* memory that grows by more than ``--growth`` once the last server is warm,
* a run without cancelled requests, preemptions, prefix cache hits or sparse chunks, since it did not test them.

    python benchmarks/soak.py --minutes 30 --output benchmarks/results/soak_cpu.txt
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tasks
from soak_clients import ANSWER_TOKENS, CANCELLED_TOKENS, Clients, Request, Tally, ask
from soak_report import GROWTH_LIMIT, Report
from soak_server import CHUNK, MIN_CHUNK, MIN_CONTEXT, MODEL, Watched
from soak_watch import log_problems
from vllm_server import serve, signal_group

OUTPUT = Path(__file__).resolve().parents[1] / "soak_output"
PAGE = 128
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}
"""By default vLLM requires nearly all of the machine's memory to be free. oneDNN, and torch's layer above it, keep a
compiled kernel for each of the last thousand token counts of a step, also with vLLM's own backend: half a gigabyte in
all, in which a leak would go unnoticed."""
ROOM = 1.5
"""Chunks that fit into the cache beside the longest request, so that a second long one starts and is preempted."""
SHORT_LIFE = 0.08
"""Average share of the run after which a server is killed. The last one lives for the rest."""
LEAST_LIFE = 0.25
"""Minimum share of the run for the last server, since starting servers takes time, too."""
MOST_WRONG = 50
"""Maximum number of wrong answers that are repeated with vLLM's own backend."""


def main() -> None:
    args = parse_arguments()
    for caught in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(caught, lambda number, frame: sys.exit(128 + number))
    args.folder.mkdir(parents=True, exist_ok=True)
    load, begin, tally = os.getloadavg()[0], time.monotonic(), Tally()
    servers = list(run(args, tally, begin))
    try:
        dense_wrong = ask_densely(args, tally)
    except SystemExit as error:
        dense_wrong = 0
        tally.problem(f"vLLM's own backend was not asked: {str(error).splitlines()[0]}")
    minutes = (time.monotonic() - begin) / 60
    facts = {"load before": f"{load:.1f} on {os.cpu_count()} CPUs", "minutes": f"{minutes:.1f}"}
    if args.note:
        facts["note"] = args.note
    report = Report(tally, servers, dense_wrong, args.growth, args.longest, facts)
    text = report.text()
    print(text, end="", flush=True)
    if args.output:
        args.output.write_text(text)
    sys.exit(1 if report.problems else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long all of it takes, about")
    parser.add_argument("--clients", type=int, default=6, help="requests at a time")
    parser.add_argument("--longest", type=int, default=32000, help="prompt, in tokens")
    parser.add_argument("--kills", type=int, default=3, help="servers ended by SIGKILL before the last one")
    parser.add_argument("--growth", type=float, default=GROWTH_LIMIT, help="MiB per hour of memory that are allowed")
    parser.add_argument("--eager", action="store_true", help="without compiling the model: servers start sooner")
    parser.add_argument("--seed", type=int, default=1, help="of the requests")
    parser.add_argument("--folder", type=Path, default=OUTPUT, help="for the servers' logs and the samples of memory")
    parser.add_argument("--output", type=Path, help="write the summary here, too")
    parser.add_argument("--note", help="for the summary: what else ran on the machine, say")
    return parser.parse_args()


def run(args: argparse.Namespace, tally: Tally, begin: float) -> Iterator[Watched]:
    """One server after the other, all but the last one killed. Ends early after a problem that makes more useless."""
    seconds, rng = 60 * args.minutes, random.Random(args.seed)
    for number in range(args.kills):
        server, goes_on = live(number, seconds * SHORT_LIFE * rng.uniform(0.5, 1.5), None, args, tally)
        yield server
        if not goes_on:
            return
    yield live(args.kills, LEAST_LIFE * seconds, begin + seconds, args, tally)[0]


def live(
    number: int, seconds: float, end: float | None, args: argparse.Namespace, tally: Tally
) -> tuple[Watched, bool]:
    """One server under load for ``seconds``, then ended; False if the run must end.

    Args:
        end: of the run, for the last server: it lives until then, at least ``seconds``, and is ended by SIGTERM. None:
            the server is killed.
    """
    last = end is not None
    log = args.folder / f"server_{number}.log"
    variables = {"VLLM_PLUGINS": "minference", **VARIABLES}
    settings = json.dumps({"minference": {"min_context": MIN_CONTEXT, "min_chunk": MIN_CHUNK}})
    ours = [*flags(args), "--attention-backend", "minference", "--additional-config", settings]
    with serve(f"server {number}", MODEL, ours, log, sys.stderr, variables) as server:
        watched = Watched(server, tally, args.longest)
        watched.check_alone(seed=2 * number)
        if end is not None:
            seconds = max(seconds, end - time.monotonic())
        print(f"server {number}: {seconds:.0f} s of load", file=sys.stderr, flush=True)
        clients = Clients(server.url, MODEL, args.clients, args.longest, f"{args.seed} {number}", tally)
        goes_on = watched.watch_for(seconds)
        clients.stop(killed=not last)
        if not last:
            signal_group(server.process.pid, signal.SIGKILL)
        clients.join()
        if last and goes_on:
            watched.check_quiet()
            watched.check_alone(seed=2 * number + 1)
            watched.check_end()
    (args.folder / f"memory_{number}.json").write_text(json.dumps(watched.memory))
    for line in log_problems(log.read_text(errors="replace")):
        tally.problem(f"{log.name}: {line}")
    return watched, goes_on


def ask_densely(args: argparse.Namespace, tally: Tally) -> int:
    """The number of wrong answers that are also wrong with vLLM's own backend."""
    dense_wrong = 0
    if not tally.wrong:
        return dense_wrong
    rows = [json.dumps({"prompt": request.prompt, "answer": answer.text}) for request, answer in tally.wrong]
    (args.folder / "wrong.jsonl").write_text("\n".join(rows) + "\n")
    with serve("dense", MODEL, flags(args), args.folder / "dense.log", sys.stderr, VARIABLES) as server:
        for number, (request, _) in enumerate(tally.wrong):
            prompt = request.prompt
            again = Request(prompt, ANSWER_TOKENS, stream=False)
            # Wrong answers beyond that count as ours.
            if number < MOST_WRONG and not tasks.grade(ask(server.url, MODEL, again).text, prompt.answer):
                dense_wrong += 1
    return dense_wrong


def flags(args: argparse.Namespace) -> list[str]:
    """Flags of ``vllm serve`` for all backends."""
    # Imports torch, which would delay --help.
    from minference_vllm.commands.doctor import bfloat16_is_slow

    longest = args.longest + CANCELLED_TOKENS
    return [
        *("--max-model-len", str(longest), "--max-num-batched-tokens", str(CHUNK)),
        *("--block-size", str(PAGE), "--num-gpu-blocks-override", str(int(longest + ROOM * CHUNK) // PAGE)),
        # By default a request waits until its whole prompt fits, and hardly any is preempted.
        "--no-scheduler-reserve-full-isl",
        *("--dtype", "float32" if bfloat16_is_slow() else "bfloat16"),
        *(["--enforce-eager"] if args.eager else []),
    ]


if __name__ == "__main__":
    main()
