"""The set loss: focal class loss, L1 and generalised IoU of matched pairs, for every layer at once (appendix A.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TrainConfig
from ..structures import Target
from .boxes import generalised_iou, in_float32
from .matcher import Matches, PackedTargets, Predictions, focal_terms, match


@dataclass(frozen=True)
class Losses:
    """The loss of a batch.

    total: scalar, the weighted sum, to differentiate.
    parts: unweighted scalars without gradient: "loss_class", "loss_boxes", "loss_giou" of the last decoder layer, the
        same with "_0", "_1", … of the layers before it and "_encoder" of the proposals; and "cardinality_error", no
        loss: how far the number of queries with a score over 0.5 is from the number of objects, on average.
    finite: for each image, whether its predictions and matching costs were finite.
    """

    total: Tensor
    parts: dict[str, Tensor]
    finite: tuple[bool, ...]


class DetectionLoss:
    """Matches the outputs of the model with the objects and measures what is wrong."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def __call__(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Target], num_boxes: float | Tensor | None = None
    ) -> Losses:
        """The losses of a batch, in float32 also under autocast.

        outputs: of the model: "layer_logits" (L, B, Q, K), "layer_boxes" (L, B, Q, 4) and, of a two-stage model,
            "encoder_logits" (B, S, K), "encoder_boxes" (B, S, 4).
        num_boxes: what the sums are divided by; none given: the number of objects in the batch, at least 1.
        """
        config = self.config
        layers = slice(None) if config.auxiliary_loss else slice(-1, None)
        sets = [Predictions(outputs["layer_logits"][layers], outputs["layer_boxes"][layers])]
        if "encoder_logits" in outputs:
            sets.append(Predictions(outputs["encoder_logits"][None], outputs["encoder_boxes"][None], True))
        device = outputs["layer_logits"].device
        objects = PackedTargets.pack(targets, device)
        if num_boxes is None:
            num_boxes = float(max(sum(objects.sizes), 1))
        matching = match(sets, objects, config)

        with torch.autocast(device.type, enabled=False):
            tables = [
                set_losses(item, objects, pairs, config) / num_boxes
                for item, pairs in zip(sets, matching.matches, strict=True)
            ]
            table = torch.cat(tables, dim=1)  # (3, layers + encoder)
            class_loss, l1_loss, giou_loss = table.sum(dim=1).unbind()
            total = config.class_weight * class_loss + config.l1_weight * l1_loss + config.giou_weight * giou_loss
            last = outputs["layer_logits"][-1].detach()
            parts = _name(table.detach(), decoder_layers=len(sets[0].logits))
            parts["cardinality_error"] = cardinality_error(last, objects.counts)
        return Losses(total, parts, matching.finite)


def set_losses(predictions: Predictions, targets: PackedTargets, matches: Matches, config: TrainConfig) -> Tensor:
    """(3, L): class, L1 and GIoU loss of each layer, summed over the batch and not yet divided by the number of boxes.

    Takes any matches, so that queries whose objects are known beforehand need no matching.
    """
    logits, boxes = in_float32(predictions.logits), in_float32(predictions.boxes)
    layer = torch.arange(len(logits), device=logits.device)[:, None]
    place = (layer, matches.image, matches.query)

    # Every logit as if it should be 0, then the matched ones put right: no (L, B, Q, K) table of zeros and ones.
    _, everywhere = focal_terms(logits, config.focal_alpha, config.focal_gamma)
    matched = logits[(*place, predictions.labels(targets)[matches.target])]  # (L, M)
    positive, negative = focal_terms(matched, config.focal_alpha, config.focal_gamma)
    class_loss = everywhere.flatten(1).sum(1) + (positive - negative).sum(1)

    found, wanted = boxes[place], targets.boxes[matches.target]  # (L, M, 4)
    l1_loss = (found - wanted).abs().sum(dim=(1, 2))
    giou_loss = (1 - generalised_iou(found, wanted)).sum(1)
    return torch.stack([class_loss, l1_loss, giou_loss])


def cardinality_error(logits: Tensor, counts: Tensor) -> Tensor:
    """Mean over images of |queries with a score over 0.5 − objects|; logits (B, Q, K), counts (B,)."""
    found = (logits.amax(dim=-1) > 0).sum(dim=1)
    return (found - counts).abs().float().mean()


def _name(table: Tensor, decoder_layers: int) -> dict[str, Tensor]:
    """Names for the columns of the (3, layers) table: last decoder layer, earlier ones, encoder."""
    suffixes = [*(f"_{layer}" for layer in range(decoder_layers - 1)), "", "_encoder"]
    order = sorted(range(table.shape[1]), key=lambda column: suffixes[column] != "")
    kinds = ("loss_class", "loss_boxes", "loss_giou")
    return {f"{kind}{suffixes[column]}": table[row, column] for column in order for row, kind in enumerate(kinds)}
