"""Sine and learned position encodings."""

import torch

from deformable_detr.model.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine


def test_sine_positions_do_not_depend_on_padding():
    position = PositionEmbeddingSine(32)
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    padded = torch.ones(1, 10, 12, dtype=torch.bool)
    padded[:, :6, :8] = False
    small, large = position(mask, torch.float32), position(padded, torch.float32)
    assert torch.allclose(small, large[:, :, :6, :8], atol=1e-6)
    assert small.flatten(2).unique(dim=2).shape[2] == 48  # unique per pixel


def test_learned_positions_grow_beyond_table_size():
    position = PositionEmbeddingLearned(8, size=5)
    small = position(torch.zeros(1, 5, 5, dtype=torch.bool), torch.float32)
    large = position(torch.zeros(1, 7, 9, dtype=torch.bool), torch.float32)
    assert large.shape == (1, 8, 7, 9)
    assert torch.allclose(large[..., 0, 0], small[..., 0, 0])
    assert torch.allclose(large[..., -1, -1], small[..., -1, -1])
