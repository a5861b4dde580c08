"""The reference against torch's own attention: the yardstick is measured once, too."""

from __future__ import annotations

import torch

from minference_vllm import reference


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(50, 6, 16, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 3, 80, 16, generator=generator, dtype=torch.float64)
    return query, keys, values


def test_masked_attention_is_torchs() -> None:
    query, keys, values = inputs()
    mask = torch.rand(6, 50, 80, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[:, :, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], mask[None], scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(reference.masked_attention(query, keys, values, mask, 0.2), expected[0].transpose(0, 1))


def test_recall_is_the_share_of_the_mass_that_is_kept() -> None:
    query, keys, _ = inputs()
    causal = reference.causal_mask(30, 80).expand(6, -1, -1)
    assert torch.allclose(reference.attention_recall(query, keys, causal, 30, 0.2), torch.ones(6, 50).double())
    half = causal.clone()
    half[..., :20] = False
    weights = (query.transpose(0, 1) @ reference.repeat_heads(keys, 6).transpose(1, 2) * 0.2).masked_fill(
        ~causal, -torch.inf
    )
    expected = 1 - weights.softmax(-1)[..., :20].sum(-1)
    assert torch.allclose(reference.attention_recall(query, keys, half, 30, 0.2), expected)


def test_sequences_are_gathered_through_the_block_table() -> None:
    cache = torch.arange(6 * 4 * 2 * 3).view(6, 4, 2, 3)
    found = reference.gather_sequence(cache, torch.tensor([5, 0, 2, 9]), 10)
    expected = torch.cat([cache[5], cache[0], cache[2][:2]]).double().transpose(0, 1)
    assert torch.equal(found, expected)
