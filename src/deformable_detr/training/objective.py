"""What a training step differentiates: the model with its denoising queries, and the criterion.

A detector may bring an objective of its own (`Detector.training_objective`), with the same members:

    forward(images, targets, max_objects, rng) -> outputs     runs inside DistributedDataParallel and autocast
    losses(outputs, targets, num_boxes, num_masks) -> (total, parts, finite)     in float32; see `criterion.LossOutput`
    unused_modules() -> modules whose parameters a step may leave unused
    denoising: a module to save with the run, or None
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..config.schema import TrainConfig
from ..model.mask_ops import has_masks
from ..structures import ImageBatch
from ..utils.errors import UserError
from .criterion import SetCriterion
from .denoising import BatchConsistentRng, Denoising
from .matcher import PackedTargets


class SetObjective(nn.Module):
    """Deformable DETR with the set criterion and, if the config asks for them, denoising queries."""

    def __init__(self, model: Any, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.denoising = model, None
        if config.num_denoising:
            if not model.config.two_stage:
                raise UserError("train.num_denoising needs model.two_stage: true; set train.num_denoising=0")
            device = model.pixel_mean.device
            self.denoising = Denoising(config, model.config.num_classes, model.config.hidden_dim).to(device)
        one_to_many = bool(model.config.roi_grid) and model.config.nms_iou is not None
        self.criterion = SetCriterion(config, model.config.class_aware_proposals, one_to_many)

    def forward(
        self, images: ImageBatch, targets: PackedTargets, max_objects: int, rng: BatchConsistentRng | None
    ) -> dict[str, Any]:
        """Return the model's outputs; with denoising, the matches of its queries as "denoising_matches"; with masks,
        the random points of their loss (`MaskCriterion.draw_points`).
        """
        queries, matches = None, None
        if self.denoising is not None:
            queries, matches = self.denoising(targets, self.model.config.num_queries, max_objects, rng)
        outputs = self.model(images.pixels, images.padding_mask, denoising_queries=queries)
        if has_masks(outputs):
            outputs |= self.criterion.masks.draw_points(images, rng)
        return outputs if matches is None else {**outputs, "denoising_matches": matches}

    def losses(
        self, outputs: Mapping[str, Any], targets: PackedTargets, num_boxes: float, num_masks: float
    ) -> tuple[Tensor, dict[str, Tensor], list[bool]]:
        """Return the loss to differentiate, its parts, and for each image whether its predictions are finite."""
        losses = self.criterion(outputs, targets, num_boxes, outputs.get("denoising_matches"), num_masks)
        return losses.total, losses.parts, losses.finite

    def unused_modules(self) -> list[nn.Module]:
        """Return the denoising queries: a step without objects has none."""
        return [] if self.denoising is None else [self.denoising]
