"""Different chunkings of a prompt: other rows are measured and other dimensions fitted, but the output is as close to
dense attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from synthetic import Structure, structured_qkv

from minference_vllm import reference, sparse_prefill
from minference_vllm.patterns.discovery import default_pattern

TOKENS, PAGE, DIM = 5000, 64, 64
HEADS = {
    "sink, columns and a window": Structure(local_width=300.0),
    "a far diagonal": Structure(columns=20, offset=1500, local_width=100.0),
    "topics": Structure(topic=5.0, segment=100),
}
CHUNKINGS = {
    "one": [TOKENS],
    "2,048": [2048, 2048, 904],
    "512": [512] * 9 + [392],
    "of any length": [700, 1301, 257, 1, 1999, 64, 678],
}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("name", list(HEADS))
def test_the_output_does_not_depend_on_the_chunks(name: str, platform: str) -> None:
    query, keys, values = structured_qkv(TOKENS, 2, 1, DIM, HEADS[name])
    mask = reference.causal_mask(0, TOKENS).expand(2, -1, -1)
    exact = reference.masked_attention(query, keys.transpose(0, 1), values.transpose(0, 1), mask, DIM**-0.5)
    pages = -(-TOKENS // PAGE)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    caches = []
    for rows in (keys, values):
        cache = rows.new_zeros(pages * PAGE, 1, DIM)
        cache[:TOKENS] = rows
        caches.append(cache.view(pages, PAGE, 1, DIM)[order.argsort()])
    errors = {}
    for chunking, sizes in CHUNKINGS.items():
        assert sum(sizes) == TOKENS
        found = [
            sparse_prefill(
                query[first:end], *caches, order[None].int(), torch.tensor([0, end - first]), torch.tensor([end]),
                default_pattern(platform),
            )
            for first, end in itertools.pairwise([0, *itertools.accumulate(sizes)])
        ]  # fmt: skip
        error = (torch.cat(found).double() - exact).norm(dim=2) / exact.norm(dim=2).mean()
        errors[chunking] = float(error.square().mean().sqrt())
    assert max(errors.values()) < 0.05
