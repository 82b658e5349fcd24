"""Which prediction answers for which object: the one-to-one matching of the set loss (DETR, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.schema import TrainConfig
from ..model.box_ops import generalized_box_iou, upcast
from ..structures import Target

# Stands for a cost that is not finite: a matching then exists, and the loss of it is not finite either.
_WORST_COST = 1e6


@dataclass(frozen=True)
class PackedTargets:
    """All T objects of a batch in one row.

    labels: (T,) int64; boxes: (T, 4) float32 cxcywh 0..1; image: (T,) int64, each object's place in the batch;
    counts: (B,) int64, objects an image; sizes: the same counts on the host.
    """

    labels: Tensor
    boxes: Tensor
    image: Tensor
    counts: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def pack(cls, targets: Sequence[Target], device: torch.device | str) -> PackedTargets:
        """The targets of a batch, put in a row where they are and then moved at once."""
        sizes = tuple(len(target.labels) for target in targets)
        counts = torch.tensor(sizes, dtype=torch.int64)
        image = torch.arange(len(sizes)).repeat_interleave(counts)
        labels = torch.cat([target.labels for target in targets]) if targets else torch.zeros(0, dtype=torch.int64)
        boxes = torch.cat([target.boxes for target in targets]) if targets else torch.zeros(0, 4)
        row = [tensor.to(device, non_blocking=True) for tensor in (labels, boxes.float(), image, counts)]
        return cls(row[0], row[1], row[2], row[3], sizes)


@dataclass(frozen=True)
class Predictions:
    """Predictions of L layers that share their number of queries, matched layer by layer.

    logits: (L, B, Q, K); boxes: (L, B, Q, 4) cxcywh 0..1.
    class_agnostic: every object counts as class 0, as the encoder's proposals have it (appendix A.4).
    """

    logits: Tensor
    boxes: Tensor
    class_agnostic: bool = False

    def labels(self, targets: PackedTargets) -> Tensor:
        """(T,) the labels that these predictions should find."""
        return torch.zeros_like(targets.labels) if self.class_agnostic else targets.labels


@dataclass(frozen=True)
class Matches:
    """The matched pairs of L layers, M a layer: M = sum over images of min(objects, queries).

    image, query: (L, M) int64, place of the prediction; target: (L, M) int64, place of the object in `PackedTargets`.
    """

    image: Tensor
    query: Tensor
    target: Tensor


@dataclass(frozen=True)
class Matching:
    """Matches of every set of predictions, and for each image whether its predictions and costs were all finite."""

    matches: tuple[Matches, ...]
    finite: tuple[bool, ...]


def focal_terms(logits: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Sigmoid focal loss (Lin et al. 2017, equation 5) of each logit if it should be 1, and if it should be 0.

    Powers are taken of logarithms, so that value and gradient stay finite for logits of any size and any gamma.
    """
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = -alpha * torch.exp(gamma * log_not_p) * log_p
    negative = -(1 - alpha) * torch.exp(gamma * log_p) * log_not_p
    return positive, negative


@torch.no_grad()
def match(predictions: Sequence[Predictions], targets: PackedTargets, config: TrainConfig) -> Matching:
    """The cheapest one-to-one matching of every layer of every image, by the Hungarian algorithm.

    The cost of a pair is class_cost × focal (positive − negative) + l1_cost × L1 of cxcywh − giou_cost × GIoU, in
    float32 (float64 stays). Costs exist for pairs of the same image only. All layers' costs come to the host in one
    copy, which is the step's only wait for the device; whether all predictions are finite travels with it.

    An image with more objects than queries leaves some objects unmatched; one without objects has no matches. Costs
    that are not finite count as very dear, and `Matching.finite` marks the image: check it before using the loss.
    """
    with torch.autocast(targets.boxes.device.type, enabled=False):
        costs = torch.cat([_costs(item, targets, config) for item in predictions], dim=1)  # (T, sum of L·Q)
        health = sum(_sum_per_image(item.logits) + _sum_per_image(item.boxes) for item in predictions)
        assert isinstance(health, Tensor), "match needs a set of predictions"
        host = torch.cat([costs.flatten(), health]).cpu().numpy()
    images = len(health)
    table, finite = host[: costs.numel()].reshape(costs.shape), np.isfinite(host[costs.numel() :])

    bad = ~np.isfinite(table)
    if bad.any():
        finite &= ~np.isin(np.arange(images), np.repeat(np.arange(images), targets.sizes)[bad.any(axis=1)])
        table = np.where(bad, _WORST_COST, table)

    matches, column = [], 0
    for item in predictions:
        layers, _, queries, _ = item.logits.shape
        pairs = [_assign(table[:, start : start + queries], targets.sizes)
                 for start in range(column, column + layers * queries, queries)]  # fmt: skip
        column += layers * queries
        matches.append(Matches(*torch.from_numpy(np.stack(pairs, axis=1)).to(costs.device, non_blocking=True)))
    return Matching(tuple(matches), tuple(finite.tolist()))


def _costs(predictions: Predictions, targets: PackedTargets, config: TrainConfig) -> Tensor:
    """(T, L·Q): what it costs to give each object to each prediction of its own image."""
    logits = predictions.logits[:, targets.image, :, predictions.labels(targets)]  # (T, L, Q)
    positive, negative = focal_terms(upcast(logits), config.focal_alpha, config.focal_gamma)
    boxes = upcast(predictions.boxes.transpose(0, 1)[targets.image])  # (T, L, Q, 4)
    objects = targets.boxes[:, None, None]
    l1 = (boxes - objects).abs().sum(-1)
    giou = generalized_box_iou(boxes, objects)
    cost = config.class_cost * (positive - negative) + config.l1_cost * l1 - config.giou_cost * giou
    return cost.flatten(1)


def _sum_per_image(values: Tensor) -> Tensor:
    """(B,) sum over all but the image of (L, B, Q, n): finite only if all values are."""
    return values.sum(dim=(0, 2, 3), dtype=torch.promote_types(values.dtype, torch.float32))


def _assign(table: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """(3, M) image, query and target of the best pairs, from the (T, Q) costs of one layer."""
    from scipy.optimize import linear_sum_assignment

    pairs, first = [np.zeros((3, 0), dtype=np.int64)], 0
    for image, size in enumerate(sizes):
        if size:
            rows, columns = linear_sum_assignment(table[first : first + size])
            pairs.append(np.stack([np.full_like(rows, image), columns, rows + first]))
        first += size
    return np.concatenate(pairs, axis=1)
