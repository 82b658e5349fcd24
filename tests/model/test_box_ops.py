import pytest
import torch
import torchvision
from torchvision.ops import box_convert

from deformable_detr.model.box_ops import generalized_box_iou
from tests.support.training import random_boxes


def test_giou_matches_torchvision():
    generator = torch.Generator().manual_seed(0)
    boxes, others = random_boxes(40, generator=generator), random_boxes(30, generator=generator)
    expected = torchvision.ops.generalized_box_iou(*(box_convert(item, "cxcywh", "xyxy") for item in (boxes, others)))
    torch.testing.assert_close(generalized_box_iou(boxes[:, None], others), expected, rtol=0, atol=2e-6)


def test_giou_of_a_small_box_with_itself_is_one():
    box = torch.tensor([0.5, 0.5, 1e-3, 1e-3])  # one pixel of a 1000-pixel image
    assert generalized_box_iou(box, box).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("other", [[0.5, 0.5, 0.0, 0.0], [0.2, 0.3, 0.0, 0.0], [0.5, 0.5, 0.2, 0.0]])
def test_giou_of_zero_area_boxes_is_finite(other):
    box = torch.tensor([0.5, 0.5, 0.0, 0.0], requires_grad=True)
    value = generalized_box_iou(box, torch.tensor(other))
    value.backward()
    assert value.isfinite()
    assert -1 <= value <= 1
    assert box.grad is not None
    assert box.grad.isfinite().all()


def test_torchvision_giou_of_zero_area_boxes_is_nan():
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert torchvision.ops.generalized_box_iou(point, point).isnan().all()
