"""The training loss of a transformers' detector, as its own code computes it."""

import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

from torch import Tensor, nn

from ..structures import ImageBatch


class AdapterObjective(nn.Module):
    """A `TransformersDetector` with its own matcher, losses and denoising queries; see `training.objective`.

    transformers divides its losses by the objects of its batch, for some families by the mean over all processes.
    Here the divisor is that of the whole step, so that micro-batches and processes count as one batch.
    """

    denoising = None  # the network makes its own queries

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: ImageBatch, targets: Any, max_objects: int, rng: Any) -> dict[str, Tensor]:
        """Return `pred_logits`, `pred_boxes`, `loss` and the losses of the last layer, without gradient."""
        device, counts = images.pixels.device, list(targets.host_counts)
        labels, boxes = (part.to(device).split(counts) for part in (targets.labels, targets.boxes))
        described = [{"class_labels": label, "boxes": box} for label, box in zip(labels, boxes, strict=True)]
        mask = (~images.padding_mask).long()
        network = self.model.network
        code = sys.modules[network.loss_function.__module__]
        with mock.patch.object(code, "_is_torch_distributed_initialized", return_value=False, create=True):
            outputs = network(pixel_values=images.pixels, pixel_mask=mask, labels=described)
        classification = next(name for name in ("loss_vfl", "loss_mal", "loss_ce") if name in outputs.loss_dict)
        names = {"loss_class": classification, "loss_bbox": "loss_bbox", "loss_giou": "loss_giou"}
        parts = {name: outputs.loss_dict[theirs].detach().float() for name, theirs in names.items()}
        return {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes, "loss": outputs.loss, **parts}

    def losses(
        self, outputs: Mapping[str, Tensor], targets: Any, num_boxes: float, num_masks: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor], list[bool]]:
        """Return the loss to differentiate, its parts, and for each image whether its predictions are finite."""
        scale = max(sum(targets.host_counts), 1) / num_boxes
        parts = {name: outputs[name] * scale for name in ("loss_class", "loss_bbox", "loss_giou")}
        logits, boxes = outputs["pred_logits"].detach().float(), outputs["pred_boxes"].detach()
        confident = (logits.amax(dim=-1) > 0).sum(dim=1)
        parts["cardinality_error"] = (confident - targets.counts).abs().float().mean()
        finite = logits.isfinite().flatten(1).all(1) & boxes.isfinite().flatten(1).all(1)
        return outputs["loss"].float() * scale, parts, finite.tolist()

    def unused_modules(self) -> list[nn.Module]:
        """Return modules of which a step may use no parameter, such as the label embedding in one without objects."""
        return [self.model]
