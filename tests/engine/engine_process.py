"""One vLLM engine in a process of its own: ``python engine_process.py REQUEST.json ANSWER.json``.

The request: ``llm`` (arguments of ``LLM``), ``max_tokens``, and ``batches``: prompts as token ids that are given to the
engine together, the patterns that each asks for (None: nothing), the folder of each one's LoRA adapter (None: none),
their priorities, the ``structured_outputs``, whether to reset the prefix cache first, and optionally the patterns that
the engine switches to (null: its own). With ``beams``, the number of them, the tokens are those of the best beam, and
nothing else is returned. The answer, for every batch and prompt: the greedy tokens, the lead of the best token over the
second best (in nats), and the number of cached prompt tokens; for every batch with ``patterns`` the counters of our
backend; the total number of drafted tokens; and the statistics of every worker that runs minference.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        # For vLLM's model runner V2: vLLM uses Triton where that has a driver.
        from triton.backends import backends

        backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(**{"skip_tokenizer_init": True, **request["llm"]})
    adapters: dict[str, Any] = {}
    options = {"temperature": 0, "max_tokens": request["max_tokens"], "detokenize": False, "logprobs": 2}
    answer: dict[str, Any] = {"tokens": [], "leads": [], "cached": [], "counted": []}
    for batch in request["batches"]:
        if "patterns" in batch:
            from minference_vllm.offline.evaluate.reader import use_patterns

            llm.collective_rpc(use_patterns, args=(batch["patterns"],))
        if batch.get("forget_prefixes"):
            llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
        if "beams" in batch:
            answer["tokens"].append(best_beams(llm, prompts, batch["beams"], request["max_tokens"]))
            continue
        asked = batch.get("asked") or [None] * len(batch["prompts"])
        more = dict(options)
        if "structured_outputs" in batch:
            more["structured_outputs"] = StructuredOutputsParams(**batch["structured_outputs"])
        sampling = [SamplingParams(**more, extra_args=name and {"minference": name}) for name in asked]
        outputs = llm.generate(
            prompts,
            sampling,
            use_tqdm=False,
            lora_request=[name and adapter(name, adapters) for name in batch["lora"]] if "lora" in batch else None,
            priority=batch.get("priority"),
        )
        completions = [output.outputs[0] for output in outputs]
        answer["tokens"].append([list(completion.token_ids) for completion in completions])
        answer["leads"].append([[lead(entry) for entry in completion.logprobs or []] for completion in completions])
        answer["cached"].append([output.num_cached_tokens or 0 for output in outputs])
        if "patterns" in batch:
            answer["counted"] += llm.collective_rpc("minference_stats")
    if "speculative_config" in request["llm"]:
        name = "vllm:spec_decode_num_draft_tokens"
        answer["drafts"] = sum(metric.value for metric in llm.get_metrics() if metric.name == name)
    if request["llm"].get("attention_backend") == "minference":
        answer["stats"] = llm.collective_rpc("minference_stats")
    return answer


def adapter(folder: str, known: dict[str, Any]) -> Any:
    from vllm.lora.request import LoRARequest

    if folder not in known:
        known[folder] = LoRARequest(Path(folder).name, len(known) + 1, folder)
    return known[folder]


def best_beams(llm: Any, prompts: list[Any], width: int, max_tokens: int) -> list[list[int]]:
    from vllm.sampling_params import BeamSearchParams

    outputs = llm.beam_search(prompts, BeamSearchParams(beam_width=width, max_tokens=max_tokens))
    best = [list(output.sequences[0].tokens) for output in outputs]
    return [tokens[len(prompt["prompt_token_ids"]) :] for tokens, prompt in zip(best, prompts, strict=True)]


def lead(position: dict[int, Any]) -> float:
    best, second = sorted((entry.logprob for entry in position.values()), reverse=True)[:2]
    return float(best - second)


# The engine's own processes import this file again: only the first one may start an engine.
if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
