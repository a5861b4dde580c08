"""Run prompts through a model in vLLM under one pattern after another: losses, answers and times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from minference_vllm.backend.counters import merged
from minference_vllm.backend.runtime import STATS_METHOD


class Scored(NamedTuple):
    """For every token of a prompt except the first; float64 and bool ``[S - 1]``."""

    loss: torch.Tensor
    """Negative log-likelihood, nats."""
    right: torch.Tensor
    """Whether the token was the most likely one."""


def use_patterns(worker: Any, patterns: str | None) -> str:
    """Switch to other patterns, None for those that the model is served with; runs in an engine's process.

    Returns:
        where they came from.
    """
    from minference_vllm.backend.runtime import runtime_for
    from minference_vllm.patterns.file import load_pattern_file

    runtime = runtime_for(worker.vllm_config)
    runtime.use(*(runtime.discovered if patterns is None else (load_pattern_file(patterns), patterns)))
    return runtime.source


class Reader:
    """Runs one prompt at a time, and counts the computed share of attention since ``use``."""

    def __init__(self, llm: Any) -> None:
        """
        Args:
            llm: vLLM's ``LLM``, with our backend and without prefix caching.
        """
        self.llm = llm
        self.tokenizer = llm.get_tokenizer()

    def use(self, patterns: str | None) -> str:
        """See ``use_patterns``."""
        (source, *_) = self.llm.collective_rpc(use_patterns, args=(patterns,))
        return str(source)

    def pairs(self) -> tuple[float, float]:
        """Query-key pairs in chunks on the sparse path since ``use``: computed, and of dense attention."""
        stats = merged(self.llm.collective_rpc(STATS_METHOD))
        return stats["computed_pairs"], stats["dense_pairs"]

    def score(self, ids: Sequence[int]) -> Scored:
        output = self._generate(ids, 1, prompt_logprobs=0)
        found = [entry[token] for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        loss = torch.tensor([-one.logprob for one in found], dtype=torch.float64)
        return Scored(loss, torch.tensor([one.rank == 1 for one in found]))

    def answer(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Greedy decoding until the model stops, at most ``tokens`` tokens."""
        return list(self._generate(ids, tokens).outputs[0].token_ids)

    def seconds(self, ids: Sequence[int]) -> float:
        """Time to first token."""
        begin = time.perf_counter()
        self._generate(ids, 1)
        return time.perf_counter() - begin

    def _generate(self, ids: Sequence[int], tokens: int, **options: Any) -> Any:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, detokenize=False, **options)
        (output,) = self.llm.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
        return output
