"""Initialization and sampling of the deformable attention module."""

import math

import pytest
import torch
from torch import nn

from deformable_detr.model.attention import DeformableAttention


@pytest.mark.parametrize("heads", [1, 3, 6, 8])
def test_initial_directions_are_evenly_spaced_for_any_number_of_heads(heads):
    attention = DeformableAttention(dim=heads * 8, heads=heads, levels=2, points=3)
    attention.reset_parameters()
    offsets = attention.sampling_offsets.bias.detach().view(heads, 2, 3, 2)
    for m in range(heads):
        angle = math.atan2(offsets[m, 0, 0, 1], offsets[m, 0, 0, 0]) % (2 * math.pi)
        assert angle == pytest.approx(2 * math.pi * m / heads, abs=1e-5)
        assert offsets[m, 1, :, :].abs().amax(-1).tolist() == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_samples_at_the_reference_point(coordinates):
    """With zero offsets, a value map of x coordinates returns the x of the reference point."""
    attention = DeformableAttention(dim=8, heads=2, levels=1, points=4)
    attention.reset_parameters()
    for projection in (attention.value_proj, attention.output_proj):
        nn.init.eye_(projection.weight)
    nn.init.zeros_(attention.sampling_offsets.bias)
    h, w = 4, 10
    memory = ((torch.arange(w) + 0.5) / w).expand(h, w).reshape(1, h * w, 1).expand(-1, -1, 8).contiguous()
    reference = torch.tensor([[[0.25, 0.5], [0.7, 0.3]]])
    if coordinates == 4:
        reference = torch.cat((reference, torch.full((1, 2, 2), 0.2)), dim=-1)
    out, _ = attention(torch.randn(1, 2, 8), reference[:, :, None], memory, ((h, w),))
    assert torch.allclose(out[0, :, 0], torch.tensor([0.25, 0.7]), atol=1e-6)


def test_padding_contributes_zero():
    attention = DeformableAttention(dim=8, heads=2, levels=1, points=1)
    attention.reset_parameters()
    memory, reference = torch.randn(1, 9, 8), torch.full((1, 5, 1, 2), 0.5)
    query = torch.randn(1, 5, 8)
    masked, _ = attention(query, reference, memory, ((3, 3),), torch.ones(1, 9, dtype=torch.bool))
    unmasked, _ = attention(query, reference, memory, ((3, 3),), torch.zeros(1, 9, dtype=torch.bool))
    assert torch.equal(masked, torch.zeros_like(masked))
    assert unmasked.abs().sum() > 0
