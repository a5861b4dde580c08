"""Architectures of current models, a few small layers of each, in whole engines on CPUs.

Each is served by vLLM's own backend and by ours, by the default pattern and with all keys selected. The table in
docs/models.md says what these tests say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_decoders
import tiny_hybrids
import tiny_image_readers
from engine_answers import assert_same_tokens

from minference_vllm.commands.cli import main

LENGTHS = (3000, 300, 1501)
SPARSE_TOKENS = 3000 + 1501
"""In steps of 1,024 tokens no chunk of the first and the last prompt is too short."""
MIN_CONTEXT = 512
EVERYTHING = "a_shape(0, 100000)"
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 1024,
}


@dataclass(frozen=True)
class Architecture:
    build: Callable[..., Path]
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``build``."""
    others: dict[str, str] = field(default_factory=dict)
    """Layers -> what runs there instead of patterns, as printed by ``inspect``."""
    sparse: str = "0-3"
    """Layers that run sparsely."""
    dtype: str = "float32"
    llm: dict[str, Any] = field(default_factory=dict)
    """More arguments of ``LLM``."""
    torchvision: bool = False
    """Whether vLLM imports it for this model."""


def short(window: int) -> str:
    return f"dense: sliding window of {window} tokens, below min_context"


LINEAR = {"0, 2": "no patterns: linear attention"}
ARCHITECTURES = {
    # On CPUs vLLM's gated delta nets support bfloat16 only.
    "qwen3_next": Architecture(tiny_hybrids.qwen3_next, others=LINEAR, sparse="1, 3", dtype="bfloat16"),
    "gemma4": Architecture(tiny_decoders.gemma4, {"window": 128}, {"0-4 by 2": short(128)}, "1-5 by 2"),
    "llama4": Architecture(tiny_decoders.llama4, {"chunk": 1024}),
    "granite_hybrid": Architecture(tiny_hybrids.granite_hybrid, others=LINEAR, sparse="1, 3"),
    "qwen3_5": Architecture(tiny_hybrids.qwen3_5, others=LINEAR, sparse="1, 3", dtype="bfloat16", torchvision=True),
    "lfm2": Architecture(tiny_hybrids.lfm2, others={"0, 2": "no patterns: conv"}, sparse="1, 3"),
    "gemma2": Architecture(tiny_decoders.gemma2, {"window": 1000}),
    "gpt_oss": Architecture(tiny_decoders.gpt_oss, {"window": 128}, {"0, 2": short(128)}, "1, 3"),
    "gemma3": Architecture(tiny_decoders.gemma3, {"window": 128}, {"0, 2": short(128)}, "1, 3"),
    "gemma3n": Architecture(tiny_decoders.gemma3n, {"window": 128}, {"0-4 by 2": short(128)}, "1-5 by 2"),
    "glm4": Architecture(tiny_decoders.glm4),
    "phi3": Architecture(tiny_decoders.phi3, {"window": 128}, {"0-3": short(128)}, ""),
    "phi3_128k": Architecture(tiny_decoders.phi3, {"window": 262_144}),
    "phi4": Architecture(tiny_decoders.phi4),
    "mistral": Architecture(tiny_decoders.mistral, {"window": 1000}),
    "qwen3": Architecture(tiny_decoders.qwen3),
    "qwen2_vl": Architecture(tiny_image_readers.qwen2_vl, llm=tiny_image_readers.TEXT_ALONE, torchvision=True),
    "qwen2_5_vl": Architecture(tiny_image_readers.qwen2_5_vl, llm=tiny_image_readers.TEXT_ALONE, torchvision=True),
    "llava": Architecture(tiny_image_readers.llava, llm=tiny_image_readers.TEXT_ALONE, torchvision=True),
}
ORDINARY = ("gemma4", "llama4")
"""Those with the most distinct features; Gemma 2 and gpt-oss are also in ``test_engine_features.py``."""


@dataclass
class Served:
    architecture: Architecture
    folder: Path
    stock: Any
    ours: Any
    """Two batches: with the default pattern, and with all keys selected."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.architectures] * (name not in ORDINARY)) for name in ARCHITECTURES],
)
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    run_engine: Callable[..., Any],
    prompt: Callable[..., list[int]],
) -> Served:
    architecture = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp("models")
    model = architecture.build(folder / request.param, **architecture.arguments)
    # The engine runs in this process, so that all requests are queued before the first step.
    changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if architecture.torchvision:
        changes |= tiny_image_readers.torchvision_environment(folder / "stand_in")
    options = {**OPTIONS, "dtype": architecture.dtype, **architecture.llm}
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    stock = run_engine(model, [{"prompts": prompts}], options, max_tokens=12, **changes)
    # Recall is never below this floor. A floor makes every layer audit every chunk, which shows that it ran sparsely.
    settings = {"min_context": MIN_CONTEXT, "log_interval": 0.001, "recall_floor": 1e-6}
    options |= {"attention_backend": "minference", "additional_config": {"minference": settings}}
    batches = [{"prompts": prompts, "patterns": None}, {"prompts": prompts, "patterns": EVERYTHING}]
    return Served(architecture, model, stock, run_engine(model, batches, options, max_tokens=12, **changes))


def numbers(spans: str) -> set[int]:
    """``0-3, 7`` and ``0-24 by 2``, as ``inspect`` writes them."""
    found: set[int] = set()
    for first, last, step in re.findall(r"(\d+)(?:-(\d+))?(?: by (\d+))?", spans):
        found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


def of_batch(answer: Any, number: int) -> Any:
    return replace(answer, tokens=[answer.tokens[number]], leads=[answer.leads[number]])


def first_leads(answer: Any) -> list[float]:
    """Leads of every prompt's first token, which depends on the prompt only."""
    return [leads[0] for leads in answer.leads[0]]


def test_full_selection_gives_the_tokens_of_vllms_own_backend(served: Served) -> None:
    full, exact = of_batch(served.ours, 1), served.architecture.dtype == "float32"
    assert len({token for tokens in served.stock.tokens[0] for token in tokens}) > 5, "the answers say nothing"
    assert_same_tokens(full, served.stock, tie=0.005 if exact else 0.15, at_least=30 if exact else 20)
    if exact:
        assert first_leads(full) == pytest.approx(first_leads(served.stock), abs=1e-3)
    assert served.ours.counted[1]["density"] == 1.0


def test_the_default_pattern_runs_sparsely_where_it_can(served: Served) -> None:
    stats, answer = served.ours.counted[0], of_batch(served.ours, 0)
    assert {head["layer"] for head in stats["heads"]} == numbers(served.architecture.sparse)
    if not served.architecture.sparse:
        assert stats["sparse_tokens"] == 0 and answer.tokens == served.stock.tokens
        return
    assert stats["sparse_tokens"] == SPARSE_TOKENS, "each token counts once, whatever the number of KV-cache groups"
    assert stats["density"] < 0.99 and min(head["recall"] for head in stats["heads"]) > 0.8
    # Drawn keys represent the others so well that bf16 may hide the difference.
    if served.architecture.dtype == "float32":
        assert first_leads(answer) != pytest.approx(first_leads(served.stock), abs=1e-5), "nothing was left out"


def test_inspect_says_what_the_engine_did(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINFERENCE_MIN_CONTEXT", str(MIN_CONTEXT))
    assert main(["inspect", str(served.folder)]) == 0
    # Columns of the table are separated by two or more spaces, which names of models and sources do not contain.
    table = [re.split(r" {2,}", line) for line in capsys.readouterr().out.split("\n\n")[1].splitlines()[1:]]
    others = {layers: text for layers, _, text in table if text.startswith(("dense", "no patterns"))}
    assert others == served.architecture.others
    sparse = [layers for layers, _, text in table if text.startswith("low_rank")]
    assert set().union(*map(numbers, sparse)) == numbers(served.architecture.sparse)
    logged = set(re.findall(r"minference: some layers run (densely: .*)", served.ours.log))
    assert {line.replace("densely", "dense") for line in logged} == {
        text for text in others.values() if text.startswith("dense")
    }
