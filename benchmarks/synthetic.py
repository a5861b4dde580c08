"""Queries and keys whose attention has a known structure: a sink, heavy columns, a diagonal, blocks of one topic.

Random queries and keys give flat attention, in which every selection is as good as any other. Here the logits are
specified and then realised in bf16 vectors: one direction for the sink, one for the columns, rotating pairs of
dimensions for the part that depends only on the distance, and random directions for topics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Structure:
    """Logits (after the softmax scale) added for each kind of key."""

    sink: float = 8.0
    """The first 4 tokens."""
    column: float = 8.0
    columns: int = 200
    """Heavy single tokens, at random positions per KV head."""
    local: float = 7.0
    local_width: float = 3000.0
    """Keys near the row; the logit falls to 60 % at this distance."""
    offset: int = 0
    """Distance of that window before the row in tokens, for a diagonal of ``local_width``."""
    topic: float = 0.0
    """Keys of the row's own topic."""
    topics: int = 16
    segment: int = 512
    """Consecutive tokens of one topic. Segments have random topics."""
    noise: float = 0.5
    """Standard deviation of the remaining logits."""


def structured_qkv(
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    structure: Structure | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries ``[tokens, H, D]``, keys and values ``[tokens, HK, D]`` with the structure's attention.

    Half of the dimensions carry the rotating pairs of distance-dependent logits, two carry sink and columns, the rest
    is noise. All random numbers are drawn on torch's default device, and differ between CPU and GPU.
    """
    structure = structure or Structure()
    generator = torch.Generator(torch.empty(0).device).manual_seed(seed)
    half = head_size // 2
    pairs = half // 2
    position = torch.arange(tokens, dtype=torch.float64)
    # Random frequencies make mean(cos(w * distance)) a Gaussian of the distance, with only faint echoes further out.
    frequency = torch.randn(pairs, generator=generator, dtype=torch.float64) / structure.local_width
    angle = position[:, None] * frequency
    rotating_query = torch.cat([angle.cos(), angle.sin()], 1)
    shifted = angle + frequency * structure.offset
    rotating_key = structure.local / pairs * torch.cat([shifted.cos(), shifted.sin()], 1)

    rest = head_size - half - 2
    scale = head_size**0.5  # undone by the softmax scale
    queries = torch.empty(tokens, num_heads, head_size)
    keys = torch.empty(tokens, num_kv_heads, head_size)
    for head in range(num_heads):
        queries[:, head, :half] = rotating_query.float() * scale**0.5
        queries[:, head, half : half + 2] = scale**0.5
        queries[:, head, half + 2 :] = torch.randn(tokens, rest, generator=generator) * scale**0.5
    topic = torch.zeros(tokens, rest)
    if structure.topic:
        segments = torch.randint(structure.topics, (-(-tokens // structure.segment),), generator=generator)
        directions = torch.nn.functional.normalize(torch.randn(structure.topics, rest, generator=generator), dim=1)
        topic = directions[segments.repeat_interleave(structure.segment)[:tokens]]
        queries[:, :, half + 2 :] += structure.topic * scale**0.5 * topic[:, None]
    for head in range(num_kv_heads):
        keys[:, head, :half] = rotating_key.float() * scale**0.5
        keys[:, head, half : half + 2] = 0
        keys[: min(4, tokens), head, half] = structure.sink * scale**0.5
        heavy = torch.randperm(tokens, generator=generator)[: structure.columns]
        keys[heavy, head, half + 1] = structure.column * scale**0.5
        noise = torch.randn(tokens, rest, generator=generator) * (structure.noise / rest**0.5)
        keys[:, head, half + 2 :] = (noise + topic) * scale**0.5
    values = torch.randn(tokens, num_kv_heads, head_size, generator=generator)
    return queries.to(dtype), keys.to(dtype), values.to(dtype)


SHAPES = {
    "sink and local": Structure(column=0.0, columns=0, local=9.0, local_width=400.0),
    "columns": Structure(columns=200, column=9.0, local=5.0, local_width=300.0),
    "many columns": Structure(columns=2000, column=7.0, local=5.0, local_width=300.0),
    "far diagonal": Structure(column=0.0, columns=0, local=11.0, local_width=300.0, offset=5000),
    "topics": Structure(column=0.0, columns=0, local=3.0, local_width=300.0, topic=8.0),
    "flat": Structure(sink=0.0, column=0.0, columns=0, local=0.0),
}
"""Heads of one known shape each, for ``bench_quality.py``. ``flat`` is not sparse at all."""
