"""OpenVINO GenAI for ``bench_peers_cpu.py``, run in an environment of its own; imports nothing of this project.

    python openvino_engine.py export CHECKPOINT FOLDER    converts the model to OpenVINO's format
    python openvino_engine.py serve FOLDER MODE PRECISION TOKENS CACHE_GIB

``serve`` reads one JSON object per line, ``{"ids": [...], "tokens": 6}``, and answers ``{"ttft": seconds, "tokens":
[...]}``: greedy tokens, and the time to the first. The whole prompt is read in one step, as OpenVINO's sparse
prefill requires. ``MODE`` is dense, XATTENTION or TRISHAPE, both with OpenVINO's own settings.
"""

from __future__ import annotations

import json
import os
import sys
import time


def export(checkpoint: str, folder: str) -> None:
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    OVModelForCausalLM.from_pretrained(checkpoint, export=True, load_in_8bit=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def serve(folder: str, mode: str, precision: str, tokens: int, cache_gib: int) -> None:
    # Only answers go to stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import numpy
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = tokens
    scheduler.max_num_seqs = 1
    scheduler.cache_size = cache_gib
    scheduler.dynamic_split_fuse = False
    scheduler.enable_prefix_caching = False
    if mode != "dense":
        scheduler.use_sparse_attention = True
        scheduler.sparse_attention_config = genai.SparseAttentionConfig(mode=getattr(genai.SparseAttentionMode, mode))
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": os.cpu_count(),
    }
    # Prompts and answers are token ids; the pipeline's own tokenizer is not used.
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
    print(json.dumps({"version": openvino.__version__}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        work = json.loads(line)
        config = genai.GenerationConfig(max_new_tokens=work["tokens"], ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(numpy.array([work["ids"]], dtype=numpy.int64))
        begin = time.perf_counter()
        handle = pipeline.add_request(number, ids, config)
        found: list[int] = []
        first = 0.0
        while len(found) < work["tokens"]:
            pipeline.step()
            while handle.can_read():
                for output in handle.read().values():
                    found += output.generated_ids
            if found and not first:
                first = time.perf_counter() - begin
        print(json.dumps({"ttft": first, "tokens": [int(token) for token in found]}), file=answers, flush=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "export":
        export(*rest)
    else:
        serve(rest[0], rest[1], rest[2], int(rest[3]), int(rest[4]))
