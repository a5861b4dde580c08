"""Draw a model's patterns, and what they do to one prompt.

Without a prompt: the pattern map, one cell per layer and head. With one, the model runs over it and there is also a
picture of density and recall per layer, and one of the attention of each chosen head with the selected keys beside it.
Density and recall of layers are those that a server logs, of the chunks that run sparsely (of all where none does); a
head is drawn over the whole prompt.
Pictures are named after the file given with -o: for attention.png they are attention_patterns.png,
attention_layers.png and attention_layer2_head5.png. The suffix, .png or .svg, chooses the format.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minference_vllm.commands.options import positive
from minference_vllm.patterns.kinds import HeadPattern
from minference_vllm.settings import Settings

if TYPE_CHECKING:
    from minference_vllm.offline.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="FILE", type=Path, help="text to read; UTF-8")
    prompt.add_argument("--tokens", metavar="N", type=positive, help="read a generated key-value prompt of this length")
    parser.add_argument(
        "--head",
        metavar="LAYER:HEAD",
        type=_head,
        action="append",
        help="head to draw, may be repeated (default: the one with the lowest recall)",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=_picture, default=Path("attention.png"), help="(default: %(default)s)"
    )
    parser.add_argument("--patterns", metavar="FILE", help="pattern file, as in the setting of that name")
    parser.add_argument(
        "--min-context", metavar="N", type=int, help="as in the setting of that name: shorter prompts are dense"
    )
    parser.add_argument(
        "--chunk",
        metavar="N",
        type=positive,
        default=2048,
        help="the server's max_num_batched_tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", help="where the model runs, as torch names it (default: %(default)s)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="as vLLM's option of that name")


def _head(text: str) -> tuple[int, int]:
    layer, colon, head = text.partition(":")
    if not (colon and layer.isdecimal() and head.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be LAYER:HEAD, as 2:5, not {text!r}")
    return int(layer), int(head)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png or .svg, not {text!r}")
    return path


def run(args: argparse.Namespace) -> int:
    from minference_vllm.backend.limits import check_model
    from minference_vllm.offline.checkpoint import Checkpoint, planned_patterns
    from minference_vllm.offline.plot import draw_pattern_map

    checkpoint = Checkpoint(args.model, args.trust_remote_code)
    check_model(checkpoint)
    _check_device(args.device)
    patterns, source, settings = planned_patterns(checkpoint, args.patterns)
    if args.min_context is not None:
        settings = settings.model_copy(update={"min_context": args.min_context})
    inside = "attention within chunks of the sequence, which is not drawn"
    fixed = dict.fromkeys(checkpoint.chunked_layers(), inside) | checkpoint.fixed_layers(settings)
    _check_heads(args.head or [], checkpoint, fixed)
    layers = checkpoint.get_total_num_hidden_layers()
    every = [patterns.for_layer(layer, checkpoint.num_heads) for layer in range(layers)]
    title = f"{args.model}\npatterns: {source}"
    print(draw_pattern_map(every, title, _named(args.output, "patterns"), fixed))
    if args.prompt or args.tokens:
        _draw_prompt(args, every, settings, fixed)
    return 0


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device!r}: {error}") from None


def _check_heads(heads: Sequence[tuple[int, int]], checkpoint: Checkpoint, fixed: Mapping[int, str]) -> None:
    layers = checkpoint.get_total_num_hidden_layers()
    for layer, head in heads:
        if layer >= layers or head >= checkpoint.num_heads:
            raise ValueError(
                f"no head {layer}:{head}; the model has layers 0 to {layers - 1}, heads 0 to {checkpoint.num_heads - 1}"
            )
        if layer in fixed:
            raise ValueError(f"head {layer}:{head} runs no pattern; {fixed[layer]}")


def _named(out: Path, what: str) -> Path:
    return out.with_stem(f"{out.stem}_{what}")


def _prompt_ids(args: argparse.Namespace) -> list[int]:
    from transformers import AutoTokenizer

    from minference_vllm.offline.calibrate.run import key_value_prompt, without_middle

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if args.prompt:
        text = args.prompt.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError(f"{args.prompt} is empty")
        return list(tokenizer(text)["input_ids"])
    return without_middle(list(tokenizer(key_value_prompt(8 * args.tokens))["input_ids"]), args.tokens)


def _draw_prompt(
    args: argparse.Namespace, patterns: Sequence[Sequence[HeadPattern]], settings: Settings, fixed: Mapping[int, str]
) -> None:
    """Run the model over the prompt; draw density and recall of all layers, and the attention of the chosen heads."""
    import torch

    from minference_vllm.offline.capture import PAGE, Layer, chunk_indices, measure, sparse_chunks, visit_layers
    from minference_vllm.offline.plot import HeadMap, draw_head, draw_layers, head_map

    ids = _prompt_ids(args)
    if len(ids) < settings.min_context:
        print(
            f"the prompt has {len(ids)} tokens, fewer than min_context ({settings.min_context}): all of it is dense; "
            "--min-context 0 shows what the patterns would do",
            file=sys.stderr,
        )
    measured: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    maps: dict[tuple[int, int], HeadMap] = {}
    lowest = 2.0

    def visit(number: int, layer: Layer) -> None:
        nonlocal lowest
        if number in fixed:
            return
        indices = chunk_indices(layer, patterns[number], args.chunk, settings)
        measured[number] = measure(layer, sparse_chunks(indices, settings) or indices)
        recall = measured[number][1]
        heads = [head for chosen, head in args.head or () if chosen == number]
        if not args.head and float(recall.min()) < lowest:
            # The head with the lowest recall so far is mapped now: queries and keys are not kept for later.
            lowest = float(recall.min())
            heads = [int(recall.argmin())]
            maps.clear()
        for head in heads:
            maps[number, head] = head_map(
                layer.query[head], layer.keys_of(head), indices, head, layer.scale, softcap=layer.softcap
            )

    visit_layers(args.model, torch.tensor([ids]), visit, args.device, args.trust_remote_code)
    if not measured:
        raise ValueError("no layer of this model runs a pattern")
    name = f"{args.model}, {len(ids)} tokens in chunks of {args.chunk}"
    density, recall = (torch.stack(figures) for figures in zip(*measured.values(), strict=True))
    print(draw_layers(list(measured), density, recall, name, _named(args.output, "layers")))
    for (number, head), picture in maps.items():
        title = f"{name}, layer {number}, head {head}: {patterns[number][head]}"
        print(draw_head(picture, title, _named(args.output, f"layer{number}_head{head}"), PAGE))
