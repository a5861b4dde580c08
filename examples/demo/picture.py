"""Draw the attention of the demo model's retrieval head over one prompt, and the part that minference computes.

    python examples/demo/picture.py --tokens 32768 --out attention.png

The model runs again with transformers, in this process, to capture its queries and keys. The index is built as in the
backend: chunk by chunk, each from some of its own queries.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import tasks
import torch
from transformers import AutoTokenizer

from minference_vllm.offline.capture import PAGE, Layer, capture_layers, chunk_indices
from minference_vllm.offline.checkpoint import Checkpoint, planned_patterns
from minference_vllm.offline.plot import draw_head, head_map


def retrieval_head(layers: Sequence[Layer], first: int, last: int) -> tuple[int, int]:
    """Layer and head with the largest attention mass on keys ``first .. last`` in the prompt's last row."""
    best = (-1.0, 0, 0)
    for number, layer in enumerate(layers):
        group = layer.query.shape[0] // layer.keys.shape[0]
        keys = layer.keys.repeat_interleave(group, 0).float()
        scores = torch.einsum("hd,hsd->hs", layer.query[:, -1].float(), keys) * layer.scale
        mass = scores.softmax(-1)[:, first : last + 1].sum(-1)
        best = max(best, (float(mass.max()), number, int(mass.argmax())))
    return best[1], best[2]


def draw_retrieval_head(
    model_path: str, prompt: tasks.Prompt, path: Path, chunk_tokens: int, pattern_file: str | None = None
) -> Path:
    """Draw the head that retrieves the prompt's answer into ``path``.

    Args:
        chunk_tokens: the server's ``max_num_batched_tokens``.
        pattern_file: as in the setting ``patterns``.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer(prompt.text)["input_ids"]
    answer = tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]
    first = next(place for place in range(len(ids)) if ids[place : place + len(answer)] == answer)
    last = first + len(answer) - 1
    layers = capture_layers(model_path, torch.tensor([ids]))
    number, head = retrieval_head(layers, first, last)
    layer = layers[number]
    patterns, _, settings = planned_patterns(Checkpoint(model_path), pattern_file)
    heads = patterns.for_layer(number, layer.query.shape[0])
    indices = chunk_indices(layer, heads, chunk_tokens, settings)
    picture = head_map(layer.query[head], layer.keys_of(head), indices, head, layer.scale)
    title = f"{Path(model_path).name}, layer {number}, head {head}: {heads[head]}, {len(ids)} tokens"
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
