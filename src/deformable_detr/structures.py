"""What travels between the parts: a batch of images, the truth about one, and what was found in one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """Images of different sizes on one canvas, each in its upper left corner.

    pixels: (B, 3, H, W), uint8 RGB as read, or float after `normalise`.
    padding_mask: (B, H, W) bool, True = padding.
    """

    pixels: Tensor
    padding_mask: Tensor

    def to(self, device: torch.device | str, **options: Any) -> ImageBatch:
        """The batch on another device."""
        return replace(
            self, pixels=self.pixels.to(device, **options), padding_mask=self.padding_mask.to(device, **options)
        )

    def pin_memory(self) -> ImageBatch:
        """The batch in page-locked memory, from which copies to a GPU run in the background."""
        return replace(self, pixels=self.pixels.pin_memory(), padding_mask=self.padding_mask.pin_memory())

    def normalise(self, mean: Tensor, std: Tensor) -> ImageBatch:
        """uint8 pixels to float: (RGB / 255 − mean) / std with mean and std of shape (3,); padding becomes 0."""
        if self.pixels.dtype != torch.uint8:
            raise TypeError(f"normalise takes uint8 pixels, not {self.pixels.dtype}")
        scale, shift = 1 / (255 * std), -mean / std
        pixels = self.pixels * scale[:, None, None] + shift[:, None, None]
        return replace(self, pixels=pixels.masked_fill_(self.padding_mask[:, None], 0.0))

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Target:
    """The objects of one image.

    labels: (N,) int64 in 0..num_classes − 1.
    boxes: (N, 4) float32 (cx, cy, w, h), each 0..1 of the unpadded image.
    image_id: the image's id in its annotation file.
    original_size: (height, width) in pixels of the image as read, EXIF orientation applied.
    """

    labels: Tensor
    boxes: Tensor
    image_id: int
    original_size: tuple[int, int]

    def to(self, device: torch.device | str, **options: Any) -> Target:
        """The target on another device."""
        return replace(self, labels=self.labels.to(device, **options), boxes=self.boxes.to(device, **options))

    def pin_memory(self) -> Target:
        """The target in page-locked memory."""
        return replace(self, labels=self.labels.pin_memory(), boxes=self.boxes.pin_memory())


@dataclass(frozen=True)
class Category:
    """One class of a data set: its own id and its name. Labels are positions in the list of categories."""

    id: int
    name: str
