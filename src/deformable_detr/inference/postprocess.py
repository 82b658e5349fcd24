"""From the model's outputs to boxes in pixels (the paper's evaluation: the best of all query and class pairs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """The best pairs of one image, best first, on the CPU.

    boxes: (k, 4) float32 (x1, y1, x2, y2) in pixels of the original image.
    scores: (k,) float32 in 0..1. labels: (k,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def select(outputs: Mapping[str, Any], original_sizes: Sequence[tuple[int, int]], top_k: int = 100) -> list[Selection]:
    """The top_k query and class pairs of each image by sigmoid score; one query may give several classes.

    outputs: the model's, of which "pred_logits" (B, Q, K) and "pred_boxes" (B, Q, 4) cxcywh in 0..1 are used.
    original_sizes: B times (height, width) in pixels; boxes are scaled to them and clamped into them.
    top_k: at most this many; where Q · K is less, all of them.

    All images are worked on at once on the outputs' device, in float32, and copied to the host once.
    """
    logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
    sizes = torch.tensor(original_sizes, dtype=torch.float32, device=boxes.device).reshape(len(boxes), 2)
    corners, scores, labels = best_pairs(logits, boxes, sizes, top_k)
    # Labels are exact in float32 up to 2²⁴, so one tensor carries all to the host.
    packed = torch.cat([corners, scores[:, :, None], labels[:, :, None].float()], dim=2).cpu()
    return [Selection(image[:, :4], image[:, 4], image[:, 5].long()) for image in packed]


def best_pairs(logits: Tensor, boxes: Tensor, original_sizes: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, k, 4) xyxy in pixels, scores (B, k) and labels (B, k) of the best query and class pairs, best first.

    logits: (B, Q, K). boxes: (B, Q, 4) cxcywh in 0..1. original_sizes: (B, 2) float (height, width) in pixels.
    """
    from torchvision.ops import box_convert

    Q, K = logits.shape[1:]
    scores, pairs = logits.sigmoid().flatten(1).topk(torch.sym_min(top_k, Q * K), dim=1)  # (B, k)
    queries, labels = pairs // K, pairs % K
    chosen = boxes.gather(1, queries[:, :, None].expand(-1, -1, 4))
    heights, widths = original_sizes.unbind(1)
    limits = torch.stack([widths, heights, widths, heights], dim=1)[:, None]  # (B, 1, 4)
    corners = (box_convert(chosen, "cxcywh", "xyxy") * limits).clamp(min=torch.zeros_like(limits), max=limits)
    return corners, scores, labels
