"""Run everything that needs a GPU: tests, then benchmarks with rows in ``benchmarks/results``.

Each command runs in its own process, and a failure does not stop the others. Rows are written as they are measured, so
an interrupted run keeps them. At the end it prints what ran and what was skipped and why, a comparison of the
measurements with the goals (``gpu_goals.py``), and the kernels that ``auto`` chose when engines were started. The exit
status is 1 if anything failed or was stopped.

    python tools/gpu_check.py [--quick] [--only STEP ...] [--longest 1048576]

tests        pytest -m gpu, without engines
sanitizer    a few of them under NVIDIA's compute-sanitizer: memcheck, and racecheck for the smallest
kernels      the static account
choice       the kernel that the setting auto chooses, for layers of several kinds (time_kernels.py)
attention    one layer against FlashAttention and the peers that are installed (see benchmarks/peers.py): a row per
             context, chunk, pattern and kernel or peer
engine       pytest -m engine, vLLM on the GPU
ttft         whole engines, in the shape of Llama-3.1-8B's layers, up to a million tokens
plot         a picture of the attention rows

--quick, for a GPU that is available for minutes: the layer's tests, the kernel of auto, and attention at 32K and 128K,
about 10 minutes; a step that exceeds its minutes is stopped.

--rehearse, without a GPU: the same commands on the CPU (``rehearsal.py``) with small sizes, to check everything except
the GPU itself. Tests are only collected, except for those of racecheck, which run; first tokens come from vLLM's CPU
engine. The figures are meaningless; rows go to a folder that is removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gpu_goals
import torch
from peers import PEERS, Size, installed

from minference_vllm.kernels import choice_cache
from minference_vllm.prefill import kernel_trial

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ATTENTION_ROWS, TTFT_ROWS = "attention_gpu.csv", "ttft_gpu.csv"
CONTEXTS = (32768, 65536, 131072, 262144, 524288, 1048576)
QUICK_CONTEXTS = (32768, 131072)
LONGEST_WHOLE = 262144
"""Tokens of the longest prompt that is also measured as a single chunk."""
# The shape of Llama-3.1-8B, and the sizes of bench_attention.py's pages and tiles.
HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336
PAGE = TILE = 128
SHAPE = ["--heads", str(HEADS), "--kv-heads", str(KV_HEADS), "--head-size", str(HEAD_SIZE)]
# Guessed minutes of each step.
MINUTES = {
    "tests": 10, "sanitizer": 15, "kernels": 5, "choice": 2, "attention": 45, "engine": 30, "ttft": 30, "plot": 1,
}  # fmt: skip
QUICK_MINUTES = {"tests": 3, "choice": 1, "attention": 5, "plot": 1}
SANITIZER = "compute-sanitizer"
# Options of a rehearsal.
SMALL = {
    "--heads": "2", "--kv-heads": "1", "--head-size": "64", "--hidden": "128", "--intermediate": "256", "--layers": "1",
    "--repeat": "1",
}  # fmt: skip
TOKENS = ("--context", "--chunk")
REHEARSED_SHARE = 256
"""Factor by which a rehearsal divides context and chunk lengths."""
# Expressions for pytest's -k. Under a sanitizer a kernel takes 10 to 100 times as long.
SANITIZED = {
    "memcheck": "soft_caps or fp8 or (agrees_with_attention and cuda:triton and pages_of)",
    "racecheck": "soft_caps",
}


class Command(NamedTuple):
    title: str
    words: list[str]
    environment: tuple[tuple[str, str], ...] = ()
    """Variables in addition to those of this process."""


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


def sanitizer(program: str | None) -> Iterator[Item]:
    if program is None:
        yield Skipped("tests under a sanitizer", f"{SANITIZER} is not installed (it comes with the CUDA toolkit)")
        return
    for tool, chosen in SANITIZED.items():
        # Triton's compiler runs in separate processes, which have no kernels to check.
        words = [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99"]
        tested = pytest(
            "-m", "gpu", "-k", chosen, "tests/gpu/test_layer_gpu.py", "tests/prefill/test_sparse_prefill.py"
        )
        # In a memory pool, tensors have neighbours, and reads past the end of one would go unnoticed.
        yield Command(f"tests under {tool}", [*words, *tested], (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))


def kernels(results: Path) -> Iterator[Item]:
    words = [sys.executable, "tools/kernel_account.py", "--all", "--csv", str(results / "kernel_account.csv")]
    yield Command("static account", words)


def choice() -> Iterator[Item]:
    title = "the kernel of the setting auto"
    sizes = ["--context", str(kernel_trial.SEQ_LEN), "--chunk", str(kernel_trial.CHUNK_LEN)]
    words = [sys.executable, "tools/time_kernels.py", *SHAPE, *sizes]
    yield Command(title, words) if installed("vllm") else no_vllm(title)


def attention(contexts: Sequence[int], quick: bool, results: Path = RESULTS) -> Iterator[Item]:
    """Chunks of 8K and 32K at the end of the context, and the whole prompt; a quick run leaves out 32K."""
    script = [sys.executable, "benchmarks/bench_attention.py", "--device", "cuda", *SHAPE]
    script += ["--block-size", str(PAGE), "--tile", str(TILE), "--csv", str(results / ATTENTION_ROWS)]
    script += ["--kernel", "triton", *(["block_table"] if installed("vllm") else [])]
    missing: dict[Skipped, None] = {}
    for context in contexts:
        for chunk in sorted({8192, context} if quick else {8192, 32768, context}):
            if chunk == context > LONGEST_WHOLE or chunk > context:
                continue
            patterns = ["default_cuda", "default_cpu", "coverage", "vertical_slash"] + ["block_sparse", "a_shape"] * (
                chunk == 8192 and not quick
            )
            words = [*script, "--context", str(context), "--chunk", str(chunk), "--pattern", *patterns]
            size = Size("cuda", context, chunk, HEADS, HEAD_SIZE, PAGE, TILE)
            reasons = {name: peer.reason(size) for name, peer in PEERS.items()}
            missing |= {Skipped(f"peer {name}", reason): None for name, reason in reasons.items() if reason}
            able = [name for name, reason in reasons.items() if reason is None]
            words += ["--peer", *able] if able else []
            yield Command(f"attention: the last {chunk} of {context} tokens", words)
    # Reported once, not for every size.
    yield from missing


def engine() -> Iterator[Item]:
    title, those = "tests of whole engines", "engine and not architectures and not features and not versions"
    yield Command(title, pytest("-m", those)) if installed("vllm") else no_vllm(title)


def ttft(longest: int, results: Path) -> Iterator[Item]:
    """Four layers have the same share of attention as the whole model, and their weights and caches fit together."""
    title = "first token, dense and sparse"
    if not installed("vllm"):
        yield no_vllm(title)
        return
    script = [sys.executable, "benchmarks/bench_ttft.py", "--device", "cuda", "--compile", "--chunk", "8192", *SHAPE]
    script += ["--hidden", str(HIDDEN), "--intermediate", str(INTERMEDIATE), "--layers", "4"]
    script += ["--csv", str(results / TTFT_ROWS)]
    contexts = [context for context in (4096, *CONTEXTS) if context <= longest]
    # Estimate: each of the longest dense prompts takes a minute.
    often = [context for context in contexts if context <= LONGEST_WHOLE]
    for few, turns in ((often, 3), (contexts[len(often) :], 1)):
        if few:
            words = [*script, "--repeat", str(turns), "--context", *map(str, few)]
            yield Command(f"{title}, up to {few[-1]} tokens", words)


def plot(results: Path) -> Iterator[Item]:
    title, rows = "picture of the attention rows", results / ATTENTION_ROWS
    if not installed("matplotlib"):
        yield Skipped(title, "matplotlib is not installed (pip install 'minference-vllm[plot]')")
    elif not rows.exists():
        yield Skipped(title, "there are no rows")
    else:
        target = rows.with_suffix(".png")
        yield Command(title, [sys.executable, "benchmarks/plot_speedup.py", str(rows), "-o", str(target)])


def no_vllm(title: str) -> Skipped:
    return Skipped(title, "vLLM is not installed")


def items_of(step: str, quick: bool, longest: int, results: Path = RESULTS, rehearse: bool = False) -> Iterator[Item]:
    """The commands of a step and what it skips, evaluated when the step starts."""
    wanted = QUICK_CONTEXTS if quick or rehearse else CONTEXTS
    contexts = [context for context in (wanted[:1] if quick and rehearse else wanted) if context <= longest]
    items = {
        "tests": lambda: tests(quick),
        "sanitizer": lambda: sanitizer(shutil.which(SANITIZER) or (SANITIZER if rehearse else None)),
        "kernels": lambda: kernels(results),
        "choice": choice,
        "attention": lambda: attention(contexts, quick, results),
        "engine": engine,
        "ttft": lambda: ttft(longest, results),
        "plot": lambda: plot(results),
    }[step]()
    return map(rehearsed, items) if rehearse else items


def rehearsed(item: Item) -> Item:
    """A command with small sizes for the CPU, without peers, which are compiled for a GPU."""
    if isinstance(item, Skipped):
        return item
    words, option = [], ""
    for word in item.words:
        option = word if word.startswith("-") else option
        if option == "--peer":
            continue
        if option in SMALL and word.isdigit():
            word = SMALL[option]
        elif option in TOKENS and word.isdigit():
            word = str(int(word) // REHEARSED_SHARE)
        words.append(word)
    # A sanitizer and its options come before the tests.
    script, *options = words[words.index(sys.executable) + 1 :]
    on_cpu = [sys.executable, "tools/rehearsal.py", script, *options]
    if script == "-m":
        # The tests of racecheck run, in the interpreter; the others are only collected.
        runs = SANITIZED["racecheck"] in options
        words = on_cpu if runs else [*(words if "engine" in options else on_cpu), "--collect-only", "-qq"]
    elif script.endswith("bench_ttft.py"):
        changed = {"cuda": "cpu", "--compile": "--json"}
        words = [changed.get(word, word) for word in words]
    elif script.endswith("kernel_account.py"):
        words = [sys.executable, script, "--arch", "90", *(word for word in options if word != "--all")]
    elif script.endswith("plot_speedup.py"):
        words = [sys.executable, script, *options]
    else:
        words = on_cpu
    paths = [str(ROOT / "tests" / "inputs"), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return item._replace(words=words, environment=(*item.environment, ("PYTHONPATH", os.pathsep.join(paths))))


def run(command: Command, seconds: float | None = None) -> str:
    """Run a command and return its outcome. After ``seconds`` it is stopped with all processes that it started."""
    environment = os.environ | dict(command.environment)
    process = subprocess.Popen(command.words, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "stopped"
    finally:
        # Also on Ctrl-C, which the command does not receive: it runs in its own session.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if status == 0 else f"failed ({status})"


def announce(gpu: str, minutes: dict[str, int], results: Path) -> None:
    print(f"{gpu}: {', '.join(f'{step} {count} min' for step, count in minutes.items())};")
    print(f"about {sum(minutes.values())} min in all, a guess: no run has been timed yet. Rows: {results}", flush=True)


def check(
    minutes: dict[str, int], quick: bool, longest: int, results: Path = RESULTS, rehearse: bool = False
) -> Iterator[Done]:
    """Run the steps; in a quick run each is limited to its minutes."""
    for step, allowed in minutes.items():
        end = time.monotonic() + 60 * allowed
        for item in items_of(step, quick, longest, results, rehearse):
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
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: every command on the CPU, in small")
    parser.add_argument("--only", nargs="+", choices=list(MINUTES), help="these steps alone")
    parser.add_argument("--longest", type=int, default=CONTEXTS[-1], help="tokens of the longest context measured")
    args = parser.parse_args()
    minutes = QUICK_MINUTES if args.quick else MINUTES
    if args.only:
        minutes = {step: minutes.get(step, MINUTES[step]) for step in args.only}
    if args.rehearse:
        with tempfile.TemporaryDirectory() as folder:
            return run_all("a rehearsal without a GPU", minutes, args, Path(folder))
    if not torch.cuda.is_available():
        print(
            "gpu-check needs an NVIDIA GPU; without one, `make test` and `make kernels` check what can be checked, and "
            "ARGS=--rehearse runs its commands in small"
        )
        return 1
    return run_all(torch.cuda.get_device_name(), minutes, args, RESULTS)


def kept_choices() -> Iterator[str]:
    """A line for each kernel that the setting ``auto`` chose on this GPU when an engine was started."""
    for key, found in choice_cache.stored(choice_cache.default_folder()):
        if key.get("gpu") == torch.cuda.get_device_name():
            words = kernel_trial.result_in_words(found, key.get("chunk_len", 0), key.get("seq_len", 0))
            yield f"auto chose {words}; layers of {key.get('layer')}; vllm {key.get('vllm')}, torch {key.get('torch')}"


def run_all(gpu: str, minutes: dict[str, int], args: argparse.Namespace, results: Path) -> int:
    """Run the steps and print the tables; returns the exit status."""
    announce(gpu, minutes, results)
    done: list[Done] = []
    try:
        for one in check(minutes, args.quick, args.longest, results, args.rehearse):
            done.append(one)
    except KeyboardInterrupt:
        done.append(Done("the rest", "stopped", 0.0))
    print(f"\n{gpu}, torch {torch.__version__}")
    for title, verdict, seconds in done:
        print(f"{verdict:12s} {seconds:7.0f} s  {title}")
    share = REHEARSED_SHARE if args.rehearse else 1
    print("", *gpu_goals.table(results / ATTENTION_ROWS, results / TTFT_ROWS, share), sep="\n")
    if not args.rehearse:
        print("", *kept_choices(), sep="\n")
    return int(any(verdict.startswith(("failed", "stopped")) for _, verdict, _ in done))


if __name__ == "__main__":
    sys.exit(main())
