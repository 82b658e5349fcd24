"""From the model's outputs to boxes in pixels (the paper's evaluation: the best of all query and class pairs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..structures import Category, Detections


class ScoredBoxes(NamedTuple):
    """The best pairs of one image, best first, on the CPU.

    boxes: (k, 4) float32 (x1, y1, x2, y2) in pixels of the original image, whose border they may cross.
    scores: (k,) float32 in 0..1. labels: (k,) int64. float64 where the model computes in that.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def postprocess(
    outputs: Mapping[str, Any], original_sizes: Sequence[tuple[int, int]], top_k: int = 100
) -> list[ScoredBoxes]:
    """The top_k query and class pairs of each image by sigmoid score; one query may give several classes.

    outputs: the model's, of which "pred_logits" (B, Q, K) and "pred_boxes" (B, Q, 4) cxcywh in 0..1 are used.
    original_sizes: B times (height, width) in pixels, to which boxes are scaled.
    top_k: at most this many; where Q · K is less, all of them.

    The numbers are those of the paper authors' code and of transformers on the same outputs, so boxes are measured as
    they are; `clip_boxes_to_image` cuts them at the border for whoever looks at them.
    All images are worked on at once on the outputs' device, in float32 at least, and copied to the host once.
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    precision = torch.promote_types(logits.dtype, torch.float32)
    logits, boxes = logits.to(precision), boxes.to(precision)
    sizes = torch.as_tensor(original_sizes, dtype=precision, device=boxes.device).reshape(len(boxes), 2)
    corners, scores, labels = topk_boxes(logits, boxes, sizes, top_k)
    # Labels are exact in float32 up to 2²⁴, so one tensor carries all to the host.
    packed = torch.cat([corners, scores[:, :, None], labels[:, :, None].to(precision)], dim=2).cpu()
    return [ScoredBoxes(image[:, :4], image[:, 4], image[:, 5].long()) for image in packed]


def topk_boxes(logits: Tensor, boxes: Tensor, original_sizes: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, k, 4) xyxy in pixels, scores (B, k) and labels (B, k) of the best query and class pairs, best first.

    logits: (B, Q, K). boxes: (B, Q, 4) cxcywh in 0..1. original_sizes: (B, 2) float (height, width) in pixels.
    """
    from torchvision.ops import box_convert

    Q, K = logits.shape[1:]
    scores, pairs = logits.sigmoid().flatten(1).topk(torch.sym_min(top_k, Q * K), dim=1)  # (B, k)
    queries, labels = pairs // K, pairs % K
    chosen = boxes.gather(1, queries[:, :, None].expand(-1, -1, 4))
    corners = box_convert(chosen, "cxcywh", "xyxy") * _borders(original_sizes)
    return corners, scores, labels


def to_detections(
    selection: ScoredBoxes,
    size: tuple[int, int],
    threshold: float,
    categories: Sequence[Category],
    source: Any = None,
) -> Detections:
    """The pairs of an image of (height, width) `size` whose score reaches the threshold, cut at its border."""
    kept = selection.scores >= threshold
    boxes, scores, labels = (part[kept] for part in selection)
    boxes = clip_boxes_to_image(boxes[None].float(), torch.tensor([size]))[0]
    found = [categories[label] for label in labels.tolist()]
    ids = torch.tensor([category.id for category in found], dtype=torch.int64)
    return Detections(boxes, scores.float(), labels, ids, tuple(category.name for category in found), size, source)


def clip_boxes_to_image(corners: Tensor, original_sizes: Tensor) -> Tensor:
    """Boxes (B, k, 4) xyxy in pixels, cut where their images (B, 2), (height, width) in pixels, end."""
    limits = _borders(original_sizes.to(corners.dtype))
    return corners.clamp(min=torch.zeros_like(limits), max=limits)


def _borders(original_sizes: Tensor) -> Tensor:
    heights, widths = original_sizes.unbind(1)
    return torch.stack([widths, heights, widths, heights], dim=1)[:, None]  # (B, 1, 4)
