"""Box overlaps that are finite, in value and gradient, for every pair of boxes."""

import torch
from torch import Tensor

from ..utils.dtype import upcast

_MIN_AREA = 1e-8  # far below any real box, far above where float32 divisions overflow


def generalized_box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalized IoU of each pair of boxes (Rezatofighi et al. 2019, equation 1), in −1..1.

    Unlike torchvision's: cxcywh, elementwise with broadcasting, not all pairs.

    Args:
        boxes: (..., 4) cxcywh in 0..1.
        others: (..., 4), of a shape that broadcasts with `boxes`.

    Areas below 1e-8 count as 1e-8, so that boxes without area have a finite result: 0 for two equal points.
    """
    intersection, union, hull = _areas(boxes, others)
    return intersection / union.clamp(min=_MIN_AREA) - (hull - union) / hull.clamp(min=_MIN_AREA)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of each pair of boxes, in 0..1. Unlike torchvision's: arguments as in `generalized_box_iou`."""
    intersection, union, _ = _areas(boxes, others)
    return intersection / union.clamp(min=_MIN_AREA)


def _areas(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection, union and hull (the smallest enclosing box) of each pair."""
    from torchvision.ops import box_convert

    left, top, right, bottom = box_convert(upcast(boxes), "cxcywh", "xyxy").unbind(-1)
    left2, top2, right2, bottom2 = box_convert(upcast(others), "cxcywh", "xyxy").unbind(-1)
    width = torch.minimum(right, right2) - torch.maximum(left, left2)
    height = torch.minimum(bottom, bottom2) - torch.maximum(top, top2)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = (right - left) * (bottom - top) + (right2 - left2) * (bottom2 - top2) - intersection
    hull_width = torch.maximum(right, right2) - torch.minimum(left, left2)
    hull_height = torch.maximum(bottom, bottom2) - torch.minimum(top, top2)
    return intersection, union, hull_width * hull_height
