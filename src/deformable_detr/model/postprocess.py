"""From the network's outputs to boxes in pixels, as the paper evaluates: the best of all query and class pairs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..structures import Category, Detections
from ..utils.dtype import upcast
from .box_ops import box_iou
from .mask_ops import MASK_OUTPUTS, EncodedMasks, MaskLogits, has_masks, select_masks

NMS_CANDIDATES = 300  # query and class pairs that NMS compares, or top_k if that is more
GRAPH_ROUNDS = 16  # of NMS in an exported graph


class ScoredBoxes(NamedTuple):
    """The k best query and class pairs of one image, best first, on the CPU.

    boxes: (k, 4) float32 (x1, y1, x2, y2) in pixels of the original image, not clipped; float64 for a float64 model.
    scores: (k,) of the same dtype in 0..1.
    labels: (k,) int64.
    queries: (k,) int64.
    masks: Their masks; None if the model has none.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    queries: Tensor
    masks: MaskLogits | EncodedMasks | None = None

    def select(self, index: Any) -> "ScoredBoxes":
        """Return the pairs that a slice or bool mask (k,) selects."""
        masks = None if self.masks is None else self.masks[index]
        return ScoredBoxes(self.boxes[index], self.scores[index], self.labels[index], self.queries[index], masks)


def postprocess(
    outputs: Mapping[str, Any],
    original_sizes: Sequence[tuple[int, int]],
    top_k: int = 100,
    threshold: float = 0.0,
    nms_iou: float | None = None,
) -> list[ScoredBoxes]:
    """Return the best query and class pairs of each image, as transformers and the official code do.

    One query may give several classes. Boxes are not clipped to the image; see `clip_boxes_to_image`.

    Args:
        outputs: The network's "pred_logits" (B, Q, K) and "pred_boxes" (B, Q, 4); with masks also those of `mask_ops`
            and their "content_ratios" (B, 2).
        original_sizes: B × (height, width) in pixels.
        top_k: Maximum number of pairs per image.
        threshold: Minimum score of a pair, only with masks, which take memory. Without masks, all pairs are returned.
        nms_iou: See `topk_boxes`.
    """
    logits, boxes = upcast(outputs["pred_logits"]), upcast(outputs["pred_boxes"])
    sizes = torch.as_tensor(original_sizes, dtype=boxes.dtype, device=boxes.device).reshape(len(boxes), 2)
    corners, scores, labels, queries = topk_boxes(logits, boxes, sizes, top_k, nms_iou)
    # float32 holds integers up to 2²⁴ exactly, so labels and queries can share the one copy to the host.
    indices = torch.stack([labels, queries], dim=2).to(boxes.dtype)
    packed = torch.cat([corners, scores[:, :, None], indices], dim=2).cpu()
    scored = [
        ScoredBoxes(rows[:, :4], rows[:, 4], labels=rows[:, 5].long(), queries=rows[:, 6].long()) for rows in packed
    ]
    if nms_iou is not None:
        scored = [pairs.select(~(pairs.scores < 0)) for pairs in scored]
    if not has_masks(outputs):
        return scored
    masked = []
    for index, (pairs, ratio) in enumerate(zip(scored, outputs["content_ratios"].tolist(), strict=True)):
        count, image = int((~(pairs.scores < threshold)).sum()), slice(index, index + 1)  # the best come first
        parts = {key: outputs[key][image] for key in MASK_OUTPUTS if key in outputs}
        logits = select_masks(parts, pairs.queries[None, :count].to(queries.device))[0].cpu()
        masked.append(pairs.select(slice(count))._replace(masks=MaskLogits(logits, tuple(ratio))))
    return masked


def topk_boxes(
    logits: Tensor, boxes: Tensor, original_sizes: Tensor, top_k: int, nms_iou: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return boxes (B, k, 4) xyxy in pixels, scores, labels and queries (B, k) of the best pairs, best first.

    logits: (B, Q, K). boxes: (B, Q, 4). original_sizes: (B, 2) float (height, width) in pixels.
    nms_iou: Of the `NMS_CANDIDATES` best pairs, those that overlap a better one of their class by more get score −1.
    """
    from torchvision.ops import box_convert

    Q, K = logits.shape[1:]
    candidates = top_k if nms_iou is None else max(NMS_CANDIDATES, top_k)
    scores, pairs = logits.sigmoid().flatten(1).topk(torch.sym_min(candidates, Q * K), dim=1)  # (B, k)
    if nms_iou is not None:
        index = (pairs // K)[:, :, None].expand(-1, -1, 4)
        scores = scores.where(non_maximum_suppression(boxes.gather(1, index), pairs % K, nms_iou), -1.0)
        scores, best = scores.topk(torch.sym_min(top_k, Q * K), dim=1)
        pairs = pairs.gather(1, best)
    queries, labels = pairs // K, pairs % K
    chosen = boxes.gather(1, queries[:, :, None].expand(-1, -1, 4))
    return box_convert(chosen, "cxcywh", "xyxy") * _scale(original_sizes), scores, labels, queries


def non_maximum_suppression(boxes: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Return which boxes greedy NMS keeps (B, k), as torchvision's `batched_nms`, for a batch at once.

    boxes: (B, k, 4) cxcywh, best first. labels: (B, k).
    iou: A box is removed if a kept, better one of its class overlaps it by more.
    """
    same = labels[:, :, None] == labels[:, None]
    overlaps = (same & (box_iou(boxes[:, :, None], boxes[:, None]) > iou)).triu(1).to(boxes.dtype)  # (B, better, worse)
    keep = torch.ones_like(labels, dtype=torch.bool)
    # A round settles the boxes whose better ones are settled. A graph has a fixed number: chains are short.
    for _ in range(GRAPH_ROUNDS if torch.compiler.is_exporting() else labels.shape[1]):
        before = keep
        keep = (before[:, None].to(boxes.dtype) @ overlaps)[:, 0] < 0.5
        if not torch.compiler.is_exporting() and torch.equal(keep, before):
            break
    return keep


def to_detections(
    scored: ScoredBoxes, size: tuple[int, int], threshold: float, categories: Sequence[Category], source: Any = None
) -> Detections:
    """Return the pairs of an image of `size` (height, width) that score at least `threshold`, clipped to the image."""
    boxes, scores, labels, _, masks = scored.select(scored.scores >= threshold)
    boxes = clip_boxes_to_image(boxes[None].float(), torch.tensor([size]))[0]
    predicted = [categories[label] for label in labels.tolist()]
    ids = torch.tensor([category.id for category in predicted], dtype=torch.int64)
    names = tuple(category.name for category in predicted)
    segmentations = None if masks is None else masks.to_rle(size)
    return Detections(boxes, scores.float(), labels, ids, names, size, source, segmentations)


def clip_boxes_to_image(corners: Tensor, original_sizes: Tensor) -> Tensor:
    """Clip boxes (B, k, 4) xyxy in pixels to images of sizes (B, 2), (height, width)."""
    limits = _scale(original_sizes.to(corners.dtype))
    return corners.clamp(min=torch.zeros_like(limits), max=limits)


def _scale(original_sizes: Tensor) -> Tensor:
    heights, widths = original_sizes.unbind(1)
    return torch.stack([widths, heights, widths, heights], dim=1)[:, None]  # (B, 1, 4)
