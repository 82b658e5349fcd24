"""Pixel centers, proposal anchors and box refinement."""

import pytest
import torch

from deformable_detr.model.geometry import pixel_centers, proposal_anchors, refine_boxes


def test_pixel_centers_are_relative_to_the_unpadded_image():
    centers = pixel_centers(((2, 4),), torch.tensor([[[0.5, 1.0]]]))
    assert centers[0, :4, 0].tolist() == [0.25, 0.75, 1.25, 1.75]
    assert centers[0, ::4, 1].tolist() == [0.25, 0.75]


def test_refine_boxes_accepts_points_and_boxes():
    start = torch.tensor([[0.3, 0.6, 0.2, 0.1]])
    assert torch.allclose(refine_boxes(torch.zeros(1, 4), start), start, atol=1e-6)
    assert refine_boxes(torch.zeros(1, 4), start[:, :2])[0].tolist() == pytest.approx([0.3, 0.6, 0.5, 0.5])


def test_proposal_anchors_double_per_level_and_skip_border_and_padding():
    mask = torch.zeros(1, 16 + 4, dtype=torch.bool)
    mask[0, 3] = True
    anchors, valid = proposal_anchors(((4, 4), (2, 2)), torch.ones(1, 2, 2), mask)
    boxes = anchors.sigmoid()
    assert boxes[0, 0].tolist() == pytest.approx([0.125, 0.125, 0.05, 0.05])
    assert boxes[0, 16].tolist() == pytest.approx([0.25, 0.25, 0.1, 0.1])
    assert valid[0].tolist() == [True] * 3 + [False] + [True] * 16
    assert anchors[0, 3].isinf().all()
    _, on_border = proposal_anchors(((1, 200),), torch.ones(1, 1, 2), None)
    assert on_border[0, 1].item() is False
    assert on_border[0, 2].item() is True


def test_anchors_as_large_as_the_image_are_not_valid():
    anchors, valid = proposal_anchors(((1, 1),) * 6, torch.ones(1, 6, 2), None)
    assert valid[0].tolist() == [True] * 5 + [False]
    assert anchors[0, 5].isinf().all()
