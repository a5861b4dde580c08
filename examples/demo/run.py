"""Serve the demo model twice, dense and with minference, and ask both servers the same question (``make demo``).

A secret code is hidden in a long text. Each server is a separate ``vllm serve`` with the same flags except for
``--attention-backend minference``. It is asked through the ``openai`` client and stopped again. Then one head's
attention is drawn, overlaid with the keys that were computed.

    python examples/demo/run.py --tokens 65536

``--json`` (or JSON=1) prints one JSON object as the last line on standard output, and all else on standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TextIO

import tasks
from openai import DefaultHttpxClient, OpenAI, OpenAIError
from vllm_server import log_tail, serve, shown

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "demo_output"
ANSWER_TOKENS = tasks.CODE_DIGITS + 2
WARM_UP_TOKENS = 512
DEPTH = 0.35
LONGEST_PICTURE = 32768
"""Tokens. Drawing a longer prompt would take longer than the rest of the demo."""
DENSITY_LINE = re.compile(r"minference: \d+ prefill chunks \(\d+ tokens\) sparse, density ([0-9.]+)")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Answer(NamedTuple):
    text: str
    ttft: float
    """Seconds from sending the request to the first streamed token."""
    prompt_tokens: int
    log: str = ""


def main() -> None:
    args = parse_arguments()
    # An interrupted or terminated demo stops its server too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    out = sys.stderr if args.json else sys.stdout
    OUTPUT.mkdir(exist_ok=True)
    prompt = tasks.needle(args.tokens, DEPTH, args.seed)
    print(f"prompt: {prompt.tokens} tokens, the code stands at {DEPTH:.0%} of the text", file=out, flush=True)

    flags = ["--max-num-batched-tokens", str(args.chunk), "--dtype", args.dtype or fast_dtype()]
    dense = ask_server("dense", args.model, prompt, flags, out)
    selected = [*flags, "--attention-backend", "minference"]
    # With such a short interval every step writes a line, and the last one has the whole prompt's density.
    settings: dict[str, object] = {"log_interval": 0.001}
    if args.patterns:
        settings["patterns"] = args.patterns
    selected += ["--additional-config", json.dumps({"minference": settings})]
    sparse = ask_server("minference", args.model, prompt, selected, out)

    densities = DENSITY_LINE.findall(sparse.log)
    density = float(densities[-1]) if densities else 1.0
    picture = None
    if args.picture:
        # Imports torch and transformers, which the servers do not need in this process.
        from picture import draw_retrieval_head

        drawn = prompt if prompt.tokens <= LONGEST_PICTURE else tasks.needle(LONGEST_PICTURE, DEPTH, args.seed)
        print(f"drawing the attention of one head over {drawn.tokens} tokens ...", file=out, flush=True)
        picture = draw_retrieval_head(args.model, drawn, OUTPUT / "attention.png", args.chunk, args.patterns)

    print(file=out)
    print(f"expected     {prompt.answer}", file=out)
    for name, answer in (("dense", dense), ("minference", sparse)):
        verdict = "right" if tasks.grade(answer.text, prompt.answer) else "WRONG"
        print(f"{name:12} {answer.text.strip():12} {verdict}   first token after {answer.ttft:.2f} s", file=out)
    print(f"speed-up     {dense.ttft / sparse.ttft:.2f}x", file=out)
    explained = "of the query-key pairs of sparse chunks were computed" if densities else "the prompt is too short"
    print(f"density      {density:.3f} {explained}", file=out)
    if picture:
        print(f"picture      {shown(picture)}", file=out)
    if args.json:
        result = {
            "prompt_tokens": sparse.prompt_tokens,
            "correct_dense": tasks.grade(dense.text, prompt.answer),
            "correct_sparse": tasks.grade(sparse.text, prompt.answer),
            "ttft_dense_s": round(dense.ttft, 4),
            "ttft_sparse_s": round(sparse.ttft, 4),
            "density": density,
        }
        print(json.dumps(result), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "model"), help="default: the bundled model")
    tokens = os.environ.get("TOKENS") or "32768"
    parser.add_argument("--tokens", type=int, default=tokens, help="length of the prompt (environment: TOKENS)")
    parser.add_argument("--chunk", type=int, default=2048, help="max_num_batched_tokens; 2048 is vLLM's own on CPUs")
    parser.add_argument("--dtype", help="as for vllm serve; default: float32 where that is much faster")
    parser.add_argument("--patterns", help="pattern file, as in the setting of that name")
    parser.add_argument("--seed", type=int, default=7, help="of the text and the code in it")
    parser.add_argument("--no-picture", dest="picture", action="store_false", help="draw nothing")
    json_wanted = os.environ.get("JSON", "") not in ("", "0")
    parser.add_argument("--json", action="store_true", default=json_wanted, help="(environment: JSON=1)")
    args = parser.parse_args()
    if not 256 <= args.tokens <= 131072 - ANSWER_TOKENS:
        parser.error(f"--tokens must be 256 to {131072 - ANSWER_TOKENS}, not {args.tokens}")
    return args


def fast_dtype() -> str:
    # Imports torch, which would delay --help.
    from minference_vllm.commands.doctor import bfloat16_is_slow

    return "float32" if bfloat16_is_slow() else "auto"


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def ask_server(name: str, model: str, prompt: tasks.Prompt, flags: list[str], out: TextIO) -> Answer:
    """Start a server with these flags, ask it for the code in the prompt, stop it."""
    log = OUTPUT / f"{name}.log"
    # For one request, compiling the model would cost more time at the start than it saves.
    flags = ["--max-model-len", str(prompt.tokens + ANSWER_TOKENS), "--enforce-eager", *flags]
    # Needed on CPUs only: GiB of KV cache.
    cache = {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib(model, prompt.tokens))}
    with serve(name, model, flags, log, out, cache) as server:
        try:
            answer = ask(name, server.url, prompt, out)
        except OpenAIError as error:
            sys.exit(f"{name}: {error}; {log_tail(log)}")
    # Read after the server has ended, when its log is complete.
    return answer._replace(log=ANSI.sub("", log.read_text(errors="replace")))


def ask(name: str, url: str, prompt: tasks.Prompt, out: TextIO) -> Answer:
    """The server's answer, streamed, after a short warm-up question."""
    # Ignores proxies in the environment, since the server is on this machine.
    client = OpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        timeout=1800.0,
        max_retries=0,
        http_client=DefaultHttpxClient(trust_env=False),
    )
    served = client.models.list().data[0].id
    warm_up = tasks.needle(WARM_UP_TOKENS, 0.5, seed=0).text
    client.completions.create(model=served, prompt=warm_up, max_tokens=ANSWER_TOKENS, temperature=0)
    print(f"{name}: asking ...", file=out, flush=True)
    begin = time.perf_counter()
    first, text, prompt_tokens = 0.0, "", 0
    stream = client.completions.create(
        model=served,
        prompt=prompt.text,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for part in stream:
        first = first or time.perf_counter() - begin
        text += part.choices[0].text if part.choices else ""
        prompt_tokens = part.usage.prompt_tokens if part.usage else prompt_tokens
    print(f"{name}: answered {text.strip()!r}, first token after {first:.2f} s", file=out, flush=True)
    return Answer(text, first, prompt_tokens)


def kv_cache_gib(model: str, tokens: int) -> int:
    """Whole GiB for the keys and values of two such prompts in float32; 8 for a model that is not a folder here."""
    config = Path(model) / "config.json"
    if not config.is_file():
        return 8
    shape = json.loads(config.read_text())
    heads = shape["num_attention_heads"]
    head_size = shape.get("head_dim") or shape["hidden_size"] // heads
    elements = 2 * shape["num_hidden_layers"] * (shape.get("num_key_value_heads") or heads) * head_size
    return max(1, math.ceil(2 * tokens * elements * 4 / (1 << 30)))


if __name__ == "__main__":
    main()
