"""Draw the attention of the demo model's retrieval head over one prompt, and what minference computes of it.

    python examples/demo/picture.py --tokens 32768 --out attention.png

The model runs once more with transformers, in this process, to get at its queries and keys. The index is built as the
backend builds it: chunk by chunk, each from its own last queries.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import tasks
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minference_vllm.attend import choose_tile
from minference_vllm.backend.runtime import discover_patterns
from minference_vllm.estimate import Estimates
from minference_vllm.index import SparseIndex, build_index
from minference_vllm.patterns import Dense, HeadPattern
from minference_vllm.plan import Chunk, dense_reason
from minference_vllm.plot import draw_head, head_map
from minference_vllm.settings import Settings
from minference_vllm.tiling import Tiling

PAGE = 128
"""vLLM's page size on CPUs."""


class Layer(NamedTuple):
    """Rotated queries ``[H, S, D]``, rotated keys and values ``[HK, S, D]`` of one attention layer."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float


def capture_layers(model_path: str, ids: torch.Tensor) -> list[Layer]:
    """Run the model over ``ids`` (``[1, S]``) and keep what each attention layer computes its scores from."""
    layers: list[Layer] = []

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layers.append(Layer(query[0], key[0], value[0], kwargs["scaling"]))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("capture", attention)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto", attn_implementation="capture")
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    return layers


def retrieval_head(layers: Sequence[Layer], first: int, last: int) -> tuple[int, int]:
    """Layer and head whose attention, in the prompt's last row, lies most on keys ``first .. last``."""
    best = (-1.0, 0, 0)
    for number, layer in enumerate(layers):
        group = layer.query.shape[0] // layer.keys.shape[0]
        keys = layer.keys.repeat_interleave(group, 0).float()
        scores = torch.einsum("hd,hsd->hs", layer.query[:, -1].float(), keys) * layer.scale
        mass = scores.softmax(-1)[:, first : last + 1].sum(-1)
        best = max(best, (float(mass.max()), number, int(mass.argmax())))
    return best[1], best[2]


def chunk_indices(
    layer: Layer, patterns: Sequence[HeadPattern], chunk_tokens: int, settings: Settings
) -> list[SparseIndex]:
    """The index of every prefill chunk of the prompt, as the backend makes them."""
    length = layer.keys.shape[1]
    return [
        chunk_index(layer, patterns, begin, min(begin + chunk_tokens, length), settings)
        for begin in range(0, length, chunk_tokens)
    ]


def chunk_index(layer: Layer, patterns: Sequence[HeadPattern], begin: int, end: int, settings: Settings) -> SparseIndex:
    """The index of the chunk of rows ``begin`` to ``end``; dense where the backend would leave it to vLLM."""
    if dense_reason(Chunk(0, begin, begin, end), settings.min_context, settings.min_chunk):
        patterns = [Dense()] * len(patterns)
    query, keys, scale = layer.query[:, begin:end].transpose(0, 1), layer.keys[:, :end], layer.scale
    tiling = Tiling.of(begin, end, PAGE, choose_tile(settings.tile, PAGE))
    return build_index(tiling, patterns, Estimates(query, keys, scale))


def draw_retrieval_head(
    model_path: str, prompt: tasks.Prompt, path: Path, chunk_tokens: int, pattern_file: str | None = None
) -> Path:
    """Write the picture of the head that looks the prompt's answer up.

    Args:
        chunk_tokens: the server's ``max_num_batched_tokens``.
        pattern_file: as the setting ``patterns``.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer(prompt.text)["input_ids"]
    answer = tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]
    first = next(place for place in range(len(ids)) if ids[place : place + len(answer)] == answer)
    last = first + len(answer) - 1
    layers = capture_layers(model_path, torch.tensor([ids]))
    number, head = retrieval_head(layers, first, last)
    layer = layers[number]
    num_heads, num_kv_heads = layer.query.shape[0], layer.keys.shape[0]
    settings = Settings(patterns=pattern_file)
    config = SimpleNamespace(model=model_path, hf_config=AutoConfig.from_pretrained(model_path))
    patterns = discover_patterns(settings, config)[0].for_layer(number, num_heads)
    indices = chunk_indices(layer, patterns, chunk_tokens, settings)
    picture = head_map(layer.query[head], layer.keys[head // (num_heads // num_kv_heads)], indices, head, layer.scale)
    pattern = patterns[head]
    budget = ", ".join(f"{name} {value}" for name, value in pattern if name != "kind")
    title = f"{Path(model_path).name}, layer {number}, head {head}: {pattern.kind} ({budget}), {len(ids)} tokens"
    return draw_head(picture, title, path, PAGE, {"the secret code": (first, last)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent / "model"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--depth", type=float, default=0.35, help="where the code stands, 0 to 1")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--chunk", type=int, default=2048, help="max_num_batched_tokens of the server")
    parser.add_argument("--patterns", help="pattern file, as in the setting of that name")
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    args = parser.parse_args()
    prompt = tasks.needle(args.tokens, args.depth, args.seed)
    print(draw_retrieval_head(args.model, prompt, args.out, args.chunk, args.patterns))


if __name__ == "__main__":
    main()
