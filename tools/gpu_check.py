"""Everything that only a GPU can tell, in one go: tests, then benchmarks into ``benchmarks/results``.

Each step runs in a process of its own; one that fails does not keep the others from running. A table of the steps comes
last, and the exit status is 1 when any failed.

    python tools/gpu_check.py [--only STEP ...] [--longest 1048576]

Steps: tests (pytest -m gpu without engines), kernels (the static account), attention (one layer against FlashAttention,
a row per context, chunk, engine and pattern), engine (pytest -m engine, vLLM on the GPU), ttft (whole engine).
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CONTEXTS = (32768, 65536, 131072, 262144, 524288, 1048576)
# The shape of Llama-3.1-8B.
SHAPE = ["--heads", "32", "--kv-heads", "8", "--head-size", "128"]
STEPS = ("tests", "kernels", "attention", "engine", "ttft")
HAS_VLLM = importlib.util.find_spec("vllm") is not None
Step = tuple[str, list[str]]


def attention(longest: int) -> list[Step]:
    """Chunks of 8K and 32K at the context's end and, up to 256K, the whole prompt."""
    script = [sys.executable, "benchmarks/bench_attention.py", "--device", "cuda", *SHAPE]
    script += ["--csv", str(RESULTS / "attention_gpu.csv"), "--engine", "triton"]
    script += ["block_table"] if HAS_VLLM else []
    steps = []
    for context in (length for length in CONTEXTS if length <= longest):
        for chunk in sorted({8192, 32768, context}):
            if chunk < context or context == chunk <= 262144:
                patterns = ["coverage", "vertical_slash"] + ["block_sparse", "a_shape"] * (chunk == 8192)
                size = ["--context", str(context), "--chunk", str(chunk), "--pattern", *patterns]
                steps.append((f"attention: the last {chunk} of {context} tokens", script + size))
    return steps


def ttft(longest: int) -> list[Step]:
    script = [sys.executable, "benchmarks/bench_ttft.py", "--device", "cuda", "--compile", "--chunk", "8192", *SHAPE]
    script += ["--hidden", "4096", "--layers", "4", "--csv", str(RESULTS / "ttft_gpu.csv")]
    contexts = [str(context) for context in (4096, 32768, 131072) if context <= longest]
    return [("first token, dense and sparse", [*script, "--context", *contexts])]


def steps_of(name: str, longest: int) -> list[Step]:
    pytest = [sys.executable, "-m", "pytest", "-q"]
    if name == "tests":
        return [("tests of one layer", [*pytest, "-m", "gpu and not engine"])]
    if name == "engine":
        return [("tests of whole engines", [*pytest, "-m", "engine"])]
    if name == "kernels":
        account = [sys.executable, "tools/kernel_account.py", "--all"]
        return [("static account", [*account, "--csv", str(RESULTS / "kernel_account.csv")])]
    return attention(longest) if name == "attention" else ttft(longest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--longest", type=int, default=CONTEXTS[-1], help="tokens of the longest context measured")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU; without one, `make test` and `make kernels` check what can be checked")
        return 1
    done = []
    for name in args.only:
        if name in ("engine", "ttft") and not HAS_VLLM:
            done.append((f"{name}: vLLM is not installed", "skipped", 0.0))
            continue
        for title, command in steps_of(name, args.longest):
            print(f"== {title}", flush=True)
            begin = time.perf_counter()
            status = subprocess.run(command, cwd=ROOT, check=False).returncode
            done.append((title, "ok" if status == 0 else f"failed ({status})", time.perf_counter() - begin))
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for title, verdict, seconds in done:
        print(f"{verdict:12s} {seconds:7.0f} s  {title}")
    return int(any(verdict.startswith("failed") for _, verdict, _ in done))


if __name__ == "__main__":
    sys.exit(main())
