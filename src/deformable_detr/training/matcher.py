"""Bipartite matching between predictions and objects (DETR, section 3.1).

Dimensions: B images, Q queries, K classes, N objects of the whole batch, "pairs" matched per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.schema import TrainConfig
from ..model.box_ops import generalized_box_iou
from ..structures import Target
from ..utils.dtype import upcast

_NON_FINITE_COST = 1e6  # replaces NaN and infinity, which scipy refuses; the loss of such a pair is not finite either


@dataclass(frozen=True)
class PackedTargets:
    """All N objects of a batch in one row, image by image.

    labels: (N,) int64; boxes: (N, 4) float32 cxcywh in 0..1; image: (N,) int64, position of the object's image in the
    batch; counts: (B,) int64, objects per image; host_counts: the same on the host. Of the M objects that have a mask:
    masked: (M,) int64, which they are; masks: (M, R, R) uint8, see `Target`; host_mask_counts: how many per image.
    """

    labels: Tensor
    boxes: Tensor
    image: Tensor
    counts: Tensor
    host_counts: tuple[int, ...]
    masked: Tensor
    masks: Tensor
    host_mask_counts: tuple[int, ...]

    @classmethod
    def pack(cls, targets: Sequence[Target]) -> PackedTargets:
        """Concatenate the targets of a batch of at least one image."""
        host_counts = tuple(len(target.labels) for target in targets)
        counts = torch.tensor(host_counts, dtype=torch.int64)
        labels = torch.cat([target.labels for target in targets])
        boxes = torch.cat([target.boxes for target in targets]).float()
        image = torch.arange(len(counts)).repeat_interleave(counts)
        present = [target.has_mask for target in targets]
        has_mask = [
            torch.zeros(n, dtype=torch.bool) if m is None else m for n, m in zip(host_counts, present, strict=True)
        ]
        masks = [target.masks[m] for target, m in zip(targets, has_mask, strict=True) if target.masks is not None]
        return cls(
            labels, boxes, image, counts, host_counts,
            masked=torch.cat(has_mask).nonzero()[:, 0],
            masks=torch.cat(masks) if masks else torch.zeros(0, 1, 1, dtype=torch.uint8),
            host_mask_counts=tuple(int(m.sum()) for m in has_mask),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> PackedTargets:
        """Return the targets on another device."""
        names = ("labels", "boxes", "image", "counts", "masked", "masks")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class Predictions:
    """Predictions of one or more layers that have equally many queries.

    logits: (layers, B, Q, K); boxes: (layers, B, Q, 4) cxcywh in 0..1.
    class_agnostic: every object has label 0, as for the proposals of the encoder (appendix A.4).
    """

    logits: Tensor
    boxes: Tensor
    class_agnostic: bool = False

    def labels(self, targets: PackedTargets) -> Tensor:
        """Return the (N,) labels that these predictions must find."""
        return torch.zeros_like(targets.labels) if self.class_agnostic else targets.labels


@dataclass(frozen=True)
class Matches:
    """The matched pairs of each layer, as many as the sum over images of min(objects, queries).

    image, query: (layers, pairs) int64, indices of the prediction.
    target: (layers, pairs) int64, index into `PackedTargets`.
    """

    image: Tensor
    query: Tensor
    target: Tensor


class HungarianMatcher:
    """Match every object to one query of its image at the lowest total cost.

    cost = class_cost × (focal loss as positive − as negative) + l1_cost × L1(cxcywh) − giou_cost × GIoU, and with masks
    + mask_cost × cross-entropy + dice_cost × dice (`mask_loss`)
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @torch.no_grad()
    def __call__(
        self, predictions: Sequence[Predictions], targets: PackedTargets, mask_costs: Tensor | None = None
    ) -> tuple[list[Matches], list[bool]]:
        """Match every layer of every image; an image with more objects than queries leaves objects unmatched.

        mask_costs: (N, layers, Q), added to the costs of the first item of `predictions`.
        Returns the matches of each item of `predictions`, and for each image whether its predictions and costs are
        finite: check it before using the loss. The copy to the host is the only point where a training step waits for
        the device.
        """
        with torch.autocast(targets.boxes.device.type, enabled=False):
            tables = [self.costs(item, targets) for item in predictions]
            if mask_costs is not None:
                tables[0] = tables[0] + mask_costs
            costs = torch.cat([table.flatten(1) for table in tables], dim=1)  # (N, layers·Q)
            sums = torch.stack([_sum_per_image(item) for item in predictions]).sum(0)  # (B,)
            host = torch.cat([costs.flatten(), sums]).cpu().numpy()
        table, finite = host[: costs.numel()].reshape(costs.shape), np.isfinite(host[costs.numel() :])

        non_finite = ~np.isfinite(table)
        if non_finite.any():
            images = np.arange(len(finite))
            finite &= ~np.isin(images, np.repeat(images, targets.host_counts)[non_finite.any(axis=1)])
            table = np.where(non_finite, _NON_FINITE_COST, table)

        matches, column = [], 0
        for item in predictions:
            layers, _, queries, _ = item.logits.shape
            pairs = []
            for _ in range(layers):
                pairs.append(_assign(table[:, column : column + queries], targets.host_counts))
                column += queries
            matches.append(Matches(*torch.from_numpy(np.stack(pairs, axis=1)).to(costs.device, non_blocking=True)))
        return matches, finite.tolist()

    def costs(self, predictions: Predictions, targets: PackedTargets) -> Tensor:
        """Return the (N, layers, Q) cost of matching each object to each query of its own image."""
        config = self.config
        logits = predictions.logits[:, targets.image, :, predictions.labels(targets)]  # (N, layers, Q)
        positive, negative = focal_terms(upcast(logits), config.focal_alpha, config.focal_gamma)
        boxes = upcast(predictions.boxes.transpose(0, 1)[targets.image])  # (N, layers, Q, 4)
        objects = targets.boxes[:, None, None]
        l1 = (boxes - objects).abs().sum(-1)
        giou = generalized_box_iou(boxes, objects)
        return config.class_cost * (positive - negative) + config.l1_cost * l1 - config.giou_cost * giou


def focal_terms(logits: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the sigmoid focal loss (Lin et al. 2017, equation 5) of each logit with target 1, and with target 0.

    Powers are taken of logarithms, so that value and gradient are finite for any logit and gamma.
    """
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = -alpha * torch.exp(gamma * log_not_p) * log_p
    negative = -(1 - alpha) * torch.exp(gamma * log_p) * log_not_p
    return positive, negative


def _sum_per_image(predictions: Predictions) -> Tensor:
    """Return (B,) sums over all predictions of an image, finite only if all of them are."""
    sums = [
        values.sum(dim=(0, 2, 3), dtype=torch.promote_types(values.dtype, torch.float32))
        for values in (predictions.logits, predictions.boxes)
    ]
    return sums[0] + sums[1]


def _assign(costs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Return (3, pairs) image, query and target of the cheapest pairs, from the (N, Q) costs of one layer."""
    from scipy.optimize import linear_sum_assignment

    pairs, first = [np.zeros((3, 0), dtype=np.int64)], 0
    for image, count in enumerate(counts):
        if count:
            rows, columns = linear_sum_assignment(costs[first : first + count])
            pairs.append(np.stack([np.full_like(rows, image), columns, rows + first]))
        first += count
    return np.concatenate(pairs, axis=1)
