"""Everything that only a GPU can tell, in one go: tests, then benchmarks into ``benchmarks/results``.

Each command runs in a process of its own; one that fails does not keep the others from running. Rows are written as
they are measured, so a run that is interrupted keeps what it had. A table of what ran, and what did not and why, comes
last; the exit status is 1 when anything failed or was stopped.

    python tools/gpu_check.py [--quick] [--only STEP ...] [--longest 1048576]

tests        pytest -m gpu, without engines
sanitizer    a few of them under NVIDIA's compute-sanitizer: memcheck, and racecheck for the smallest
kernels      the static account
attention    one layer against FlashAttention and the peers that are installed (see benchmarks/peers.py): a row per
             context, chunk, pattern and kernel or peer
engine       pytest -m engine, vLLM on the GPU
ttft         whole engines, in the shape of Llama-3.1-8B's layers, up to a million tokens
plot         a picture of the attention rows

--quick, for a GPU that is lent for minutes: the layer's tests and attention at 32K and 128K, about 10 minutes; a step
whose minutes are over is stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peers import PEERS, Size, installed

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ATTENTION_ROWS = RESULTS / "attention_gpu.csv"
CONTEXTS = (32768, 65536, 131072, 262144, 524288, 1048576)
QUICK_CONTEXTS = (32768, 131072)
LONGEST_WHOLE = 262144
"""Tokens of the longest prompt that is also measured as one chunk."""
# The shape of Llama-3.1-8B, and the sizes of bench_attention.py's pages and tiles.
HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336
PAGE = TILE = 128
SHAPE = ["--heads", str(HEADS), "--kv-heads", str(KV_HEADS), "--head-size", str(HEAD_SIZE)]
# Guessed minutes of each step.
MINUTES = {"tests": 10, "sanitizer": 15, "kernels": 5, "attention": 45, "engine": 30, "ttft": 30, "plot": 1}
QUICK_MINUTES = {"tests": 3, "attention": 6, "plot": 1}
SANITIZER = "compute-sanitizer"
# By pytest's -k. Under a sanitizer a kernel takes 10 to 100 times as long.
SANITIZED = {
    "memcheck": "soft_caps or fp8 or (agrees_with_attention and cuda:triton and pages_of)",
    "racecheck": "soft_caps",
}


class Command(NamedTuple):
    title: str
    words: list[str]
    environment: tuple[tuple[str, str], ...] = ()
    """Variables beside those of this process."""


class Skipped(NamedTuple):
    title: str
    reason: str


Item = Command | Skipped


class Done(NamedTuple):
    title: str
    verdict: str
    seconds: float


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", *arguments]


def tests(quick: bool) -> Iterator[Item]:
    words = pytest("tests/gpu/test_layer_gpu.py") if quick else pytest("-m", "gpu and not engine")
    yield Command("tests of one layer", words)


def sanitizer() -> Iterator[Item]:
    program = shutil.which(SANITIZER)
    if program is None:
        yield Skipped("tests under a sanitizer", f"{SANITIZER} is not installed (it comes with the CUDA toolkit)")
        return
    for tool, chosen in SANITIZED.items():
        # Triton's compiler runs in processes of its own, which have no kernels to check.
        words = [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99"]
        tested = pytest(
            "-m", "gpu", "-k", chosen, "tests/gpu/test_layer_gpu.py", "tests/prefill/test_sparse_prefill.py"
        )
        # A tensor out of a pool has neighbours: reading past its end would go unseen.
        yield Command(f"tests under {tool}", [*words, *tested], (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))


def kernels() -> Iterator[Item]:
    words = [sys.executable, "tools/kernel_account.py", "--all", "--csv", str(RESULTS / "kernel_account.csv")]
    yield Command("static account", words)


def attention(contexts: Sequence[int], quick: bool) -> Iterator[Item]:
    """Chunks of 8K and 32K at the context's end, and the whole prompt; the quick ones without 32K."""
    script = [sys.executable, "benchmarks/bench_attention.py", "--device", "cuda", *SHAPE]
    script += ["--block-size", str(PAGE), "--tile", str(TILE), "--csv", str(ATTENTION_ROWS), "--kernel", "triton"]
    script += ["block_table"] if installed("vllm") else []
    missing: dict[Skipped, None] = {}
    for context in contexts:
        for chunk in sorted({8192, context} if quick else {8192, 32768, context}):
            if chunk == context > LONGEST_WHOLE or chunk > context:
                continue
            patterns = ["low_rank", "coverage", "vertical_slash"] + ["block_sparse", "a_shape"] * (
                chunk == 8192 and not quick
            )
            words = [*script, "--context", str(context), "--chunk", str(chunk), "--pattern", *patterns]
            size = Size("cuda", context, chunk, HEADS, HEAD_SIZE, PAGE, TILE)
            reasons = {name: peer.reason(size) for name, peer in PEERS.items()}
            missing |= {Skipped(f"peer {name}", reason): None for name, reason in reasons.items() if reason}
            able = [name for name, reason in reasons.items() if reason is None]
            words += ["--peer", *able] if able else []
            yield Command(f"attention: the last {chunk} of {context} tokens", words)
    # Named once, not for every size.
    yield from missing


def engine() -> Iterator[Item]:
    title = "tests of whole engines"
    yield Command(title, pytest("-m", "engine")) if installed("vllm") else no_vllm(title)


def ttft(longest: int) -> Iterator[Item]:
    """Four layers: their share of attention is the whole model's, their weights and caches fit beside each other."""
    title = "first token, dense and sparse"
    if not installed("vllm"):
        yield no_vllm(title)
        return
    script = [sys.executable, "benchmarks/bench_ttft.py", "--device", "cuda", "--compile", "--chunk", "8192", *SHAPE]
    script += ["--hidden", str(HIDDEN), "--intermediate", str(INTERMEDIATE), "--layers", "4"]
    script += ["--csv", str(RESULTS / "ttft_gpu.csv")]
    contexts = [context for context in (4096, *CONTEXTS) if context <= longest]
    # By arithmetic the longest take a minute for every dense prompt.
    often = [context for context in contexts if context <= LONGEST_WHOLE]
    for few, turns in ((often, 3), (contexts[len(often) :], 1)):
        if few:
            words = [*script, "--repeat", str(turns), "--context", *map(str, few)]
            yield Command(f"{title}, up to {few[-1]} tokens", words)


def plot() -> Iterator[Item]:
    title = "picture of the attention rows"
    if not installed("matplotlib"):
        yield Skipped(title, "matplotlib is not installed (pip install 'minference-vllm[plot]')")
    elif not ATTENTION_ROWS.exists():
        yield Skipped(title, "there are no rows")
    else:
        target = ATTENTION_ROWS.with_suffix(".png")
        yield Command(title, [sys.executable, "benchmarks/plot_speedup.py", str(ATTENTION_ROWS), "-o", str(target)])


def no_vllm(title: str) -> Skipped:
    return Skipped(title, "vLLM is not installed")


def items_of(step: str, quick: bool, longest: int) -> Iterator[Item]:
    """What a step runs and what it leaves out, asked for when its turn comes."""
    contexts = [context for context in (QUICK_CONTEXTS if quick else CONTEXTS) if context <= longest]
    if step == "tests":
        return tests(quick)
    if step == "attention":
        return attention(contexts, quick)
    if step == "ttft":
        return ttft(longest)
    return {"sanitizer": sanitizer, "kernels": kernels, "engine": engine, "plot": plot}[step]()


def run(command: Command, seconds: float | None = None) -> str:
    """How a command ended; after so many seconds it is stopped, with all processes that it started."""
    environment = os.environ | dict(command.environment)
    process = subprocess.Popen(command.words, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "stopped"
    finally:
        # Ctrl-C reaches this process alone, too: the other is in a session of its own.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if status == 0 else f"failed ({status})"


def announce(minutes: dict[str, int]) -> None:
    print(f"{torch.cuda.get_device_name()}: {', '.join(f'{step} {count} min' for step, count in minutes.items())};")
    print(f"about {sum(minutes.values())} min in all, a guess: no run has been timed yet. Rows: {RESULTS}", flush=True)


def check(minutes: dict[str, int], quick: bool, longest: int) -> Iterator[Done]:
    """Run the steps; in a quick run each has no more than its minutes."""
    for step, allowed in minutes.items():
        end = time.monotonic() + 60 * allowed
        for item in items_of(step, quick, longest):
            if isinstance(item, Skipped):
                yield Done(f"{item.title}: {item.reason}", "skipped", 0.0)
                continue
            begin = time.monotonic()
            if quick and begin >= end:
                yield Done(f"{item.title}: out of time", "stopped", 0.0)
                continue
            print(f"== {item.title}", flush=True)
            yield Done(item.title, run(item, end - begin if quick else None), time.monotonic() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about 10 minutes: few tests, 32K and 128K alone")
    parser.add_argument("--only", nargs="+", choices=list(MINUTES), help="these steps alone")
    parser.add_argument("--longest", type=int, default=CONTEXTS[-1], help="tokens of the longest context measured")
    args = parser.parse_args()
    minutes = QUICK_MINUTES if args.quick else MINUTES
    if args.only:
        minutes = {step: minutes.get(step, MINUTES[step]) for step in args.only}
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU; without one, `make test` and `make kernels` check what can be checked")
        return 1
    announce(minutes)
    done: list[Done] = []
    try:
        for one in check(minutes, args.quick, args.longest):
            done.append(one)
    except KeyboardInterrupt:
        done.append(Done("the rest", "stopped", 0.0))
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for title, verdict, seconds in done:
        print(f"{verdict:12s} {seconds:7.0f} s  {title}")
    return int(any(verdict.startswith(("failed", "stopped")) for _, verdict, _ in done))


if __name__ == "__main__":
    sys.exit(main())
