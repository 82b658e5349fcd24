"""The set loss: focal class loss, L1 and generalized IoU of matched pairs, for every layer at once (appendix A.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.schema import TrainConfig
from ..model.box_ops import box_iou, generalized_box_iou, upcast
from ..structures import Target
from .matcher import Matches, PackedTargets, Predictions, focal_terms, match

KINDS = ("loss_class", "loss_boxes", "loss_giou")


@dataclass(frozen=True)
class LossOutput:
    """The loss of a batch.

    total: scalar, the weighted sum, to differentiate.
    parts: unweighted scalars without gradient: "loss_class", "loss_boxes", "loss_giou" of the last decoder layer, the
        same with "_0", "_1", … of the layers before it, "_encoder" of the proposals and "_denoising" of all layers'
        denoising queries; and "cardinality_error", no loss: how far the number of queries with a score over 0.5 is
        from the number of objects, on average.
    finite: for each image, whether its predictions and matching costs were finite.
    """

    total: Tensor
    parts: dict[str, Tensor]
    finite: tuple[bool, ...]


class SetCriterion:
    """Matches the outputs of the model with the objects and measures what is wrong."""

    def __init__(self, config: TrainConfig, class_aware_proposals: bool = False) -> None:
        self.config, self.class_aware_proposals = config, class_aware_proposals

    def __call__(
        self,
        outputs: Mapping[str, Tensor],
        targets: Sequence[Target],
        num_boxes: float | Tensor | None = None,
        known: tuple[Matches, int] | None = None,
    ) -> LossOutput:
        """The losses of a batch, in float32 also under autocast.

        outputs: of the model: "layer_logits" (L, B, Q, K), "layer_boxes" (L, B, Q, 4) and, of a two-stage model,
            "encoder_logits" (B, S, K), "encoder_boxes" (B, S, 4); with `known` also "denoising_logits" and
            "denoising_boxes".
        num_boxes: what the sums are divided by; none given: the number of objects in the batch, at least 1.
        known: the matches of the extra queries, (1, M), and how often each object is among them (`Denoising`).
        """
        config = self.config
        layers = slice(None) if config.auxiliary_loss else slice(-1, None)
        sets = [Predictions(outputs["layer_logits"][layers], outputs["layer_boxes"][layers])]
        if "encoder_logits" in outputs:
            logits, boxes = outputs["encoder_logits"][None], outputs["encoder_boxes"][None]
            sets.append(Predictions(logits, boxes, not self.class_aware_proposals))
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
            parts = _name(table.detach(), decoder_layers=len(sets[0].logits))
            if known is not None:
                extra = self._denoising(outputs, objects, *known) / num_boxes
                class_loss, l1_loss, giou_loss = torch.stack([class_loss, l1_loss, giou_loss]) + extra
                parts |= dict(zip((f"{kind}_denoising" for kind in KINDS), extra.detach(), strict=True))
            total = config.class_weight * class_loss + config.l1_weight * l1_loss + config.giou_weight * giou_loss
            last = outputs["layer_logits"][-1].detach()
            parts["cardinality_error"] = cardinality_error(last, objects.counts)
        return LossOutput(total, parts, matching.finite)

    def _denoising(self, outputs: Mapping[str, Tensor], objects: PackedTargets, once: Matches, groups: int) -> Tensor:
        """(3,): what is wrong with the extra queries, over all layers, as if each object were there once."""
        predictions = Predictions(outputs["denoising_logits"], outputs["denoising_boxes"])
        layers = len(predictions.logits)
        every = Matches(*(pairs.expand(layers, -1) for pairs in (once.image, once.query, once.target)))
        return set_losses(predictions, objects, every, self.config).sum(dim=1) / groups


def set_losses(predictions: Predictions, targets: PackedTargets, matches: Matches, config: TrainConfig) -> Tensor:
    """(3, L): class, L1 and GIoU loss of each layer, summed over the batch and not yet divided by the number of boxes.

    Takes any matches, so that queries whose objects are known beforehand need no matching.
    """
    logits, boxes = upcast(predictions.logits), upcast(predictions.boxes)
    layer = torch.arange(len(logits), device=logits.device)[:, None]
    place = (layer, matches.image, matches.query)

    found, wanted = boxes[place], targets.boxes[matches.target]  # (L, M, 4)
    l1_loss = (found - wanted).abs().sum(dim=(1, 2))
    giou = generalized_box_iou(found, wanted)
    giou_loss = (1 - giou).sum(1)

    # Every logit as if it should be 0, then the matched ones put right: no (L, B, Q, K) table of zeros and ones.
    matched = logits[(*place, predictions.labels(targets)[matches.target])]  # (L, M)
    overlap = None if config.class_loss == "focal" else box_iou(found.detach(), wanted)
    positive, _ = class_terms(matched, overlap, config)
    _, negative = class_terms(matched, None, config)
    _, everywhere = class_terms(logits, None, config)
    class_loss = everywhere.flatten(1).sum(1) + (positive - negative).sum(1)
    return torch.stack([class_loss, l1_loss, giou_loss])


def class_terms(logits: Tensor, overlap: Tensor | None, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Class loss of each logit if it is its object's class, and if it should be 0.

    overlap: IoU of the matched boxes in 0..1, which the score should tell, of the shape of logits; only for the first
    term of "mal" (DEIM, equation 4).
    """
    if config.class_loss == "focal":
        return focal_terms(logits, config.focal_alpha, config.focal_gamma)
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    negative = -torch.exp(1.5 * log_p) * log_not_p
    if overlap is None:
        return negative, negative
    score = overlap**1.5
    return -(score * log_p + (1 - score) * log_not_p), negative


def cardinality_error(logits: Tensor, counts: Tensor) -> Tensor:
    """Mean over images of |queries with a score over 0.5 − objects|; logits (B, Q, K), counts (B,)."""
    found = (logits.amax(dim=-1) > 0).sum(dim=1)
    return (found - counts).abs().float().mean()


def _name(table: Tensor, decoder_layers: int) -> dict[str, Tensor]:
    """Names for the columns of the (3, layers) table: last decoder layer, earlier ones, encoder."""
    suffixes = [*(f"_{layer}" for layer in range(decoder_layers - 1)), "", "_encoder"]
    order = sorted(range(table.shape[1]), key=lambda column: suffixes[column] != "")
    return {f"{kind}{suffixes[column]}": table[row, column] for column in order for row, kind in enumerate(KINDS)}
