"""Box overlap that is finite for every pair of boxes, in value and in gradient."""

from __future__ import annotations

import torch
from torch import Tensor

# A hundredth of a pixel's area at 100 × 100 pixels: smaller than any real box, and large enough that dividing by it
# stays far from overflow in float32.
_SMALLEST_AREA = 1e-8


def upcast(values: Tensor) -> Tensor:
    """The values in float32, for what overflows or rounds away in halves; float64 stays as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def generalized_box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalized IoU (Rezatofighi et al. 2019, equation 1) of each pair of boxes.

    boxes, others: (..., 4) cxcywh in 0..1, of shapes that broadcast; halves are read as float32.
    Returns (...) in −1..1. Areas below 1e-8 of the image divide as 1e-8, so boxes without area give a finite value and
    gradient: 0 for two equal points.
    """
    intersection, union, hull = _areas(boxes, others)
    return intersection / union.clamp(min=_SMALLEST_AREA) - (hull - union) / hull.clamp(min=_SMALLEST_AREA)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each pair of boxes, in 0..1; shapes and small areas as in `generalized_box_iou`."""
    intersection, union, _ = _areas(boxes, others)
    return intersection / union.clamp(min=_SMALLEST_AREA)


def _areas(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection, union and hull of each pair."""
    from torchvision.ops import box_convert

    left, top, right, bottom = box_convert(upcast(boxes), "cxcywh", "xyxy").unbind(-1)
    left2, top2, right2, bottom2 = box_convert(upcast(others), "cxcywh", "xyxy").unbind(-1)
    shared_width = torch.minimum(right, right2) - torch.maximum(left, left2)
    shared_height = torch.minimum(bottom, bottom2) - torch.maximum(top, top2)
    intersection = shared_width.clamp(min=0) * shared_height.clamp(min=0)
    union = (right - left) * (bottom - top) + (right2 - left2) * (bottom2 - top2) - intersection
    hull_width = torch.maximum(right, right2) - torch.minimum(left, left2)
    hull_height = torch.maximum(bottom, bottom2) - torch.minimum(top, top2)
    return intersection, union, hull_width * hull_height
