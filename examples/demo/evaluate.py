"""Measure how often vLLM answers correctly with the demo model: one row per task and length.

    python evaluate.py --model model --lengths 8192 32768 --tasks needle key-value variable --questions 20

Every question is a prompt of its own, at temperature 0.  `seconds` is the mean wall time of a whole request; with
--first-token it is the mean time to the first token (the answer is then generated in a second request).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path

import tasks

ANSWER_TOKENS = tasks.CODE_DIGITS + 2  # digits, full stop, <eos>


def make_prompt(
    task: str, length: int, number: int, questions: int, seed: int, hops: int, density: float
) -> tasks.Prompt:
    """Prompt `number` of `questions`; needles and records are spread evenly over all depths."""
    seed = seed * 1_000_003 + number
    depth = number / max(1, questions - 1)
    if task == "needle":
        return tasks.needle(length, depth, seed)
    if task == "key-value":
        return tasks.key_value(length, seed, density, depth)
    return tasks.variable_tracking(length, seed, hops=hops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="prompt lengths in tokens")
    parser.add_argument(
        "--tasks", nargs="+", default=["needle", "key-value", "variable"], choices=["needle", "key-value", "variable"]
    )
    parser.add_argument("--questions", type=int, default=20, help="prompts per task and length")
    parser.add_argument("--hops", type=int, default=1, help="copies in a chain of variables")
    parser.add_argument("--density", type=float, default=0.25, help="share of the text that is key-value records")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--attention-backend", help="vLLM attention backend, for example CUSTOM (default: vLLM's own)")
    parser.add_argument("--prefix-caching", action="store_true", help="vLLM's prefix caching (default: off)")
    parser.add_argument("--first-token", action="store_true", help="time the first token instead of the whole answer")
    parser.add_argument("--batched-tokens", type=int, help="max_num_batched_tokens: the chunk size of the prefill")
    parser.add_argument("--kv-cache-gib", type=int, default=4, help="KV cache of the CPU backend")
    parser.add_argument("--json", type=Path, help="write the rows here, with the answers")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    args = parser.parse_args()

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(args.kv_cache_gib))  # read when vllm is imported
    from vllm import LLM, SamplingParams

    options: dict[str, object] = {}
    if args.attention_backend:
        options["attention_backend"] = args.attention_backend
    if args.batched_tokens:
        options["max_num_batched_tokens"] = args.batched_tokens
    # One prompt at a time, so that the times are those of single requests.
    llm = LLM(
        args.model,
        dtype="bfloat16",
        max_model_len=max(args.lengths) + 16,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=args.prefix_caching,
        seed=0,
        **options,
    )
    first = SamplingParams(temperature=0, max_tokens=1)
    whole = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS + 3 * args.hops)
    llm.generate(tasks.needle(256, 0.5, 0).text, whole, use_tqdm=False)  # warm-up

    rows = []
    details = []
    for length in args.lengths:
        for task in args.tasks:
            correct = 0
            seconds = 0.0
            for number in range(args.questions):
                prompt = make_prompt(task, length, number, args.questions, args.seed, args.hops, args.density)
                began = time.perf_counter()
                output = llm.generate(prompt.text, first if args.first_token else whole, use_tqdm=False)[0]
                seconds += time.perf_counter() - began
                if args.first_token:
                    output = llm.generate(prompt.text, whole, use_tqdm=False)[0]
                answer = output.outputs[0].text
                tokens = len(output.prompt_token_ids)
                if tokens != prompt.tokens:
                    sys.exit(f"a prompt of {prompt.tokens} words became {tokens} tokens: another tokenizer?")
                good = tasks.grade(answer, prompt.answer)
                correct += good
                details.append(
                    {
                        "task": task,
                        "length": length,
                        "number": number,
                        "expected": prompt.answer,
                        "answer": answer.strip(),
                        "correct": good,
                    }
                )
            row = {
                "task": task,
                "length": length,
                "correct": correct,
                "total": args.questions,
                "accuracy": round(correct / args.questions, 4),
                "seconds": round(seconds / args.questions, 3),
                "density": args.density if task == "key-value" else "",
                "backend": args.attention_backend or "default",
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            # After every row, so that an interrupted run leaves what it has measured.
            if args.json:
                args.json.write_text(json.dumps({"rows": rows, "answers": details}, indent=1) + "\n")
            if args.csv:
                with args.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, fieldnames=list(row))
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
