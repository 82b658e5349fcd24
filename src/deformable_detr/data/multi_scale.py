"""Batches of several sizes for models that stretch every image to one size (RT-DETR, section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F

from ..config.detector import DetectorConfig
from ..config.image_size import FixedSize
from ..structures import ImageBatch
from .dataloader import mix_seeds
from .transforms import NUM_SCALES


@dataclass(frozen=True)
class MultiScaleBatches:
    """Resize the batch of a training step to a size that depends only on the seed and the step.

    So all processes draw the same size, and a resumed run draws the sizes of an uninterrupted one.

    Attributes:
        sizes: (height, width) in pixels, without duplicates.
        seed: Seed of the run.
        antialias: Smooth images that are shrunk.
    """

    sizes: tuple[tuple[int, int], ...]
    seed: int
    antialias: bool = True

    @classmethod
    def from_config(cls, model: DetectorConfig, train_scales: tuple[float, float], seed: int) -> Self | None:
        """Return the sizes of a resize rule "fixed", None for other rules.

        The 11 sizes range over `train_scales` × the model's size, each side a multiple of `size_divisor`: 480, 512, …
        800 for 640 pixels and (0.75, 1.25). A size below the model's is left out if it has less than one token per
        query at stride 16: the encoder could not propose that many.
        """
        rule, divisor = model.resize_rule, model.size_divisor
        if not isinstance(rule, FixedSize):
            return None
        low, high = train_scales
        scales = [low + (high - low) * number / (NUM_SCALES - 1) for number in range(NUM_SCALES)]
        sides = [[max(1, round(scale * side / divisor)) * divisor for side in rule(0, 0)] for scale in scales]
        area = rule.height * rule.width
        sizes = {(h, w): None for h, w in sides if h * w >= min(area, 16**2 * model.num_queries)}
        return cls(tuple(sizes) or (rule(0, 0),), seed, rule.antialias)

    def size(self, step: int) -> tuple[int, int]:
        """Return the (height, width) of all batches of a step."""
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, step))
        return self.sizes[int(torch.randint(len(self.sizes), (), generator=generator))]

    def __call__(self, images: ImageBatch, step: int) -> ImageBatch:
        """Resize normalized images: pixels bilinearly, padding to the nearest pixel."""
        size = self.size(step)
        if images.pixels.shape[-2:] == size:
            return images
        pixels = F.interpolate(images.pixels, size, mode="bilinear", antialias=self.antialias)
        mask = F.interpolate(images.padding_mask[:, None].to(pixels.dtype), size, mode="nearest")[:, 0] > 0
        return ImageBatch(pixels, mask)
