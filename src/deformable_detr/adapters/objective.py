"""The training loss of a transformers' detector, as its own code computes it."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..model.mask_ops import content_ratios, paste_masks
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
        targets, counts = targets.to(images.pixels.device), list(targets.host_counts)
        labels, boxes = targets.labels.split(counts), targets.boxes.split(counts)
        described = [{"class_labels": label, "boxes": box} for label, box in zip(labels, boxes, strict=True)]
        mask = (~images.padding_mask).long()
        network = self.model.network
        code = sys.modules[network.loss_function.__module__]
        with contextlib.ExitStack() as patches:
            one_process = mock.patch.object(code, "_is_torch_distributed_initialized", return_value=False, create=True)
            patches.enter_context(one_process)
            if self.model.config.masks:
                for target, masks in zip(described, self._canvas_masks(targets, images).split(counts), strict=True):
                    target["masks"] = masks
                known = torch.zeros(len(targets.labels), dtype=torch.bool).index_fill(0, targets.masked.cpu(), True)
                patches.enter_context(_without_missing_masks(code.RfDetrImageLoss, known.split(counts)))
            outputs = network(pixel_values=images.pixels, pixel_mask=mask, labels=described)
        classification = next(name for name in ("loss_vfl", "loss_mal", "loss_ce") if name in outputs.loss_dict)
        names = {"loss_class": classification, "loss_bbox": "loss_bbox", "loss_giou": "loss_giou"}
        names |= {"loss_mask": "loss_mask_ce", "loss_dice": "loss_mask_dice"} if self.model.config.masks else {}
        parts = {name: outputs.loss_dict[theirs].detach().float() for name, theirs in names.items()}
        return {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes, "loss": outputs.loss, **parts}

    def _canvas_masks(self, targets: Any, images: ImageBatch) -> Tensor:
        """Return the masks (N, h, w) at the size of `pred_masks`; where there is none, its box, for the matcher."""
        masks = targets.masks.new_full((len(targets.labels), *targets.masks.shape[1:]), 255)
        masks[targets.masked] = targets.masks
        ratios = content_ratios(images.padding_mask)[targets.image]
        height, width = (side // self.model.network.downsample_ratio for side in images.pixels.shape[2:])
        return paste_masks(masks, targets.boxes, ratios, (height, width))

    def losses(
        self, outputs: Mapping[str, Tensor], targets: Any, num_boxes: float, num_masks: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor], list[bool]]:
        """Return the loss to differentiate, its parts, and for each image whether its predictions are finite."""
        scale = max(sum(targets.host_counts), 1) / num_boxes
        parts = {name: value * scale for name, value in outputs.items() if name.startswith("loss_")}
        logits, boxes = outputs["pred_logits"].detach().float(), outputs["pred_boxes"].detach()
        confident = (logits.amax(dim=-1) > 0).sum(dim=1)
        parts["cardinality_error"] = (confident - targets.counts).abs().float().mean()
        finite = logits.isfinite().flatten(1).all(1) & boxes.isfinite().flatten(1).all(1)
        return outputs["loss"].float() * scale, parts, finite.tolist()

    def unused_modules(self) -> list[nn.Module]:
        """Return modules of which a step may use no parameter, such as the label embedding in one without objects."""
        return [self.model]


def _without_missing_masks(criterion: Any, has_mask: Sequence[Tensor]) -> Any:
    """Return a patch of transformers' criterion that leaves objects without a mask out of the mask losses."""
    original = criterion.loss_masks

    def loss_masks(self: Any, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> dict[str, Tensor]:
        indices = [(query[known[j]], j[known[j]]) for (query, j), known in zip(indices, has_mask, strict=True)]
        if not any(len(query) for query, _ in indices):  # where the original returns tensors that are no numbers
            return dict.fromkeys(("loss_mask_ce", "loss_mask_dice"), outputs["pred_masks"].sum() * 0.0)
        return original(self, outputs, targets, indices, num_boxes)

    return mock.patch.object(criterion, "loss_masks", loss_masks)
