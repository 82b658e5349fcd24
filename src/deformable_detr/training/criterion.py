"""The set criterion: class loss (focal or matchability-aware), L1 and GIoU loss, for all layers at once; mask losses.

Sources: section 5 (focal loss) and DETR, sections 3.1 (box losses) and 3.2 (losses of each layer). An RoI head whose
duplicates NMS removes learns as in R-CNN: from every query that overlaps an object, not only from the matched one.

Dimensions as in `matcher`: B images, Q queries, K classes, N objects of the whole batch, "pairs" matched per layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.schema import TrainConfig
from ..model.box_ops import box_iou, generalized_box_iou
from ..model.mask_ops import has_masks
from ..utils.dtype import upcast
from .mask_loss import MASK_LOSS_NAMES, MaskCriterion
from .matcher import HungarianMatcher, Matches, PackedTargets, Predictions, focal_terms

LOSS_NAMES = ("loss_class", "loss_bbox", "loss_giou")
MAL_GAMMA = 1.5  # γ of the matchability-aware loss (DEIM, equation 4)
ROI_IOU = 0.6  # IoU of a query's box with an object from which on the RoI head learns the object


@dataclass(frozen=True)
class LossOutput:
    """The loss of a batch.

    total: Scalar to differentiate, the weighted sum of all losses.
    parts: Unweighted scalars without gradient: "loss_class", "loss_bbox", "loss_giou" and, with masks, "loss_mask"
        (cross-entropy) and "loss_dice" of the last decoder layer; the same with "_0", "_1", … of the earlier layers,
        "_encoder" of the proposals, which have no masks, "_denoising" of the denoising queries of all layers; and the
        metric "cardinality_error".
    finite: For each image, whether its predictions and matching costs are finite.
    """

    total: Tensor
    parts: dict[str, Tensor]
    finite: list[bool]


class SetCriterion:
    """Match the outputs of the model with the objects and compute the losses."""

    def __init__(self, config: TrainConfig, class_aware_proposals: bool = False, one_to_many_roi: bool = False) -> None:
        self.config, self.class_aware_proposals, self.one_to_many_roi = config, class_aware_proposals, one_to_many_roi
        self.matcher, self.masks = HungarianMatcher(config), MaskCriterion(config)

    def __call__(
        self,
        outputs: Mapping[str, Tensor],
        targets: PackedTargets,
        num_boxes: float | Tensor | None = None,
        denoising_matches: tuple[Matches, int] | None = None,
        num_masks: float | Tensor | None = None,
    ) -> LossOutput:
        """Compute the losses of a batch, in float32 also under autocast.

        Args:
            outputs: Of the model: "layer_logits" (layers, B, Q, K), "layer_boxes" (layers, B, Q, 4); if two-stage,
                "encoder_logits" (B, S, K), "encoder_boxes" (B, S, 4); with `denoising_matches` also
                "denoising_logits" and "denoising_boxes". With masks, see `mask_loss.MaskCriterion`.
            targets: The objects of the batch, on the device of the outputs.
            num_boxes: Divisor of the sums. Default: the number of objects in the batch, at least 1.
            denoising_matches: The (1, pairs) matches of the denoising queries and the number of their groups.
            num_masks: Divisor of the sums of the mask losses. Default: the number of masks in the batch, at least 1.
        """
        config = self.config
        layers = slice(None) if config.auxiliary_loss else slice(-1, None)
        decoder = Predictions(outputs["layer_logits"][layers], outputs["layer_boxes"][layers])
        predictions = [decoder]
        if "encoder_logits" in outputs:
            logits, boxes = outputs["encoder_logits"][None], outputs["encoder_boxes"][None]
            predictions.append(Predictions(logits, boxes, class_agnostic=not self.class_aware_proposals))
        if num_boxes is None:
            num_boxes = float(max(sum(targets.host_counts), 1))
        with_masks = has_masks(outputs)
        with torch.autocast(decoder.logits.device.type, enabled=False):
            mask_costs = self.masks.costs(outputs, targets, layers) if with_masks else None
        matches_of_each, finite = self.matcher(predictions, targets, mask_costs)

        with torch.autocast(decoder.logits.device.type, enabled=False):
            pairs = zip(predictions, matches_of_each, strict=True)
            losses = [layer_losses(item, targets, matches, config) / num_boxes for item, matches in pairs]
            if self.one_to_many_roi and any(targets.host_counts):
                head = Predictions(decoder.logits[-1:], decoder.boxes[-1:])
                pairs, weights = one_to_many(outputs["layer_boxes"][-2].detach(), targets, matches_of_each[0])
                many = layer_losses(head, targets, pairs, config, weights) / num_boxes
                losses[0] = torch.cat([losses[0][:, :-1], many], dim=1)
            table = torch.cat(losses, dim=1)  # (3, decoder layers + encoder)
            sums = table.sum(dim=1)
            parts = _named_losses(table.detach(), len(decoder.logits))
            if denoising_matches is not None:
                denoising_losses = self._denoising_losses(outputs, targets, *denoising_matches) / num_boxes
                sums = sums + denoising_losses
                names = (f"{name}_denoising" for name in LOSS_NAMES)
                parts |= dict(zip(names, denoising_losses.detach(), strict=True))
            class_loss, l1_loss, giou_loss = sums.unbind()
            total = config.class_weight * class_loss + config.l1_weight * l1_loss + config.giou_weight * giou_loss
            if with_masks:
                num_masks = float(max(sum(targets.host_mask_counts), 1)) if num_masks is None else num_masks
                mask_losses = self.masks.losses(outputs, targets, matches_of_each[0], denoising_matches)
                total = total + self._weighted_masks(mask_losses, num_masks, parts)
            parts["cardinality_error"] = cardinality_error(outputs["layer_logits"][-1].detach(), targets.counts)
        return LossOutput(total, parts, finite)

    def _weighted_masks(
        self, losses: tuple[Tensor, Tensor | None], num_masks: float | Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        """Return the weighted sum of the losses of `MaskCriterion`, and add them to `parts`."""
        table = losses[0] / num_masks
        sums = table.sum(dim=1)
        parts |= _named_losses(table.detach(), table.shape[1], MASK_LOSS_NAMES)
        if losses[1] is not None:
            denoising = losses[1] / num_masks
            sums = sums + denoising
            parts |= {f"{name}_denoising": x for name, x in zip(MASK_LOSS_NAMES, denoising.detach(), strict=True)}
        return self.config.mask_weight * sums[0] + self.config.dice_weight * sums[1]

    def _denoising_losses(
        self, outputs: Mapping[str, Tensor], targets: PackedTargets, matches: Matches, groups: int
    ) -> Tensor:
        """Return the (3,) losses of the denoising queries, summed over the layers and averaged over the groups."""
        predictions = Predictions(outputs["denoising_logits"], outputs["denoising_boxes"])
        layers = len(predictions.logits)
        matches = Matches(*(index.expand(layers, -1) for index in (matches.image, matches.query, matches.target)))
        return layer_losses(predictions, targets, matches, self.config).sum(dim=1) / groups


def layer_losses(
    predictions: Predictions,
    targets: PackedTargets,
    matches: Matches,
    config: TrainConfig,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the (3, layers) class, L1 and GIoU loss, summed over the batch and not divided by the number of boxes.

    weights: Of the images (B,) and of the pairs (layers, pairs). If omitted, all are 1.
    """
    logits, boxes = upcast(predictions.logits), upcast(predictions.boxes)
    layer = torch.arange(len(logits), device=logits.device)[:, None]
    matched = (layer, matches.image, matches.query)
    matched_boxes, target_boxes = boxes[matched], targets.boxes[matches.target]  # (layers, pairs, 4)
    matched_logits = logits[(*matched, predictions.labels(targets)[matches.target])]  # (layers, pairs)

    l1_loss = (matched_boxes - target_boxes).abs().sum(dim=2)
    giou_loss = 1 - generalized_box_iou(matched_boxes, target_boxes)
    # All logits with target 0, then the matched ones corrected: no (layers, B, Q, K) table of one-hot targets.
    iou = None if config.class_loss == "focal" else box_iou(matched_boxes.detach(), target_boxes)
    correction = positive_class_loss(matched_logits, iou, config) - negative_class_loss(matched_logits, config)
    background = negative_class_loss(logits, config).flatten(2).sum(2)  # (layers, B)
    if weights is not None:
        background = background * weights[0]
        correction, l1_loss, giou_loss = (loss * weights[1] for loss in (correction, l1_loss, giou_loss))
    return torch.stack([background.sum(1) + correction.sum(1), l1_loss.sum(1), giou_loss.sum(1)])


def one_to_many(boxes: Tensor, targets: PackedTargets, matches: Matches) -> tuple[Matches, tuple[Tensor, Tensor]]:
    """Pair every query with an object, for the RoI head. Return the (1, B·Q) pairs and the weights for `layer_losses`.

    A query learns the object that its box overlaps most, if their IoU is at least `ROI_IOU`, and the matched queries
    learn their objects. The others have weight 0. The losses of an image are divided by the number of queries per
    object that learn, so that they stay comparable with those of the other layers.

    boxes: (B, Q, 4), those before the head. targets: At least one object. matches: Those of the last layer count.
    """
    objects = torch.zeros(boxes.shape[:2], dtype=torch.int64, device=boxes.device)  # (B, Q)
    positive = torch.zeros_like(objects, dtype=torch.bool)
    first = 0
    for image, count in enumerate(targets.host_counts):
        if count:
            iou = box_iou(boxes[image], targets.boxes[first : first + count, None])  # (count, Q)
            best, index = iou.max(dim=0)
            objects[image], positive[image] = index + first, best >= ROI_IOU
            first += count
    matched = matches.image[-1], matches.query[-1]
    objects[matched], positive[matched] = matches.target[-1], True

    images, queries = (torch.arange(n, device=boxes.device) for n in objects.shape)
    pairs = torch.meshgrid(images, queries, indexing="ij")
    weights = targets.counts.clamp(min=1) / positive.sum(dim=1).clamp(min=1)  # (B,)
    flat = Matches(*(index.reshape(1, -1) for index in (*pairs, objects)))
    return flat, (weights, (positive * weights[:, None]).reshape(1, -1))


def positive_class_loss(logits: Tensor, iou: Tensor | None, config: TrainConfig) -> Tensor:
    """Return the class loss of each matched logit, in the shape of `logits`.

    The target is 1 with `class_loss` "focal", and iou^MAL_GAMMA with "mal".

    iou: 0..1, of the matched boxes, in the shape of `logits`. Only "mal" needs it.
    """
    if config.class_loss == "focal":
        return focal_terms(logits, config.focal_alpha, config.focal_gamma)[0]
    assert iou is not None
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    target = iou**MAL_GAMMA
    return -(target * log_p + (1 - target) * log_not_p)


def negative_class_loss(logits: Tensor, config: TrainConfig) -> Tensor:
    """Return the class loss of each logit with target 0, in the shape of `logits`."""
    if config.class_loss == "focal":
        return focal_terms(logits, config.focal_alpha, config.focal_gamma)[1]
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    # Unlike the reference code, p^γ is differentiated.
    return -torch.exp(MAL_GAMMA * log_p) * log_not_p


def cardinality_error(logits: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over images of |queries with a score over 0.5 − objects|; logits (B, Q, K), counts (B,)."""
    confident = (logits.amax(dim=-1) > 0).sum(dim=1)
    return (confident - counts).abs().float().mean()


def _named_losses(table: Tensor, decoder_layers: int, names: Sequence[str] = LOSS_NAMES) -> dict[str, Tensor]:
    """Name the entries of a (names, layers) table: last decoder layer first, then the earlier ones and the encoder."""
    suffixes = [*(f"_{layer}" for layer in range(decoder_layers - 1)), "", "_encoder"]
    order = sorted(range(table.shape[1]), key=lambda column: suffixes[column] != "")
    return {f"{name}{suffixes[column]}": table[row, column] for column in order for row, name in enumerate(names)}
