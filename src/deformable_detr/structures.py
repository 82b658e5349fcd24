"""What travels between the parts: a batch of images, the truth about one, and what was found in one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class ImageBatch:
    """Images of different sizes on one canvas, each in its upper left corner.

    pixels: (B, 3, H, W), uint8 RGB as read, or float after `normalize`.
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

    def normalize(self, mean: Tensor, std: Tensor) -> ImageBatch:
        """uint8 pixels to float: (RGB / 255 − mean) / std with mean and std of shape (3,); padding becomes 0."""
        if self.pixels.dtype != torch.uint8:
            raise TypeError(f"normalize takes uint8 pixels, not {self.pixels.dtype}")
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

    @classmethod
    def empty(cls, image_id: int, original_size: tuple[int, int]) -> Target:
        """That of an image without objects, or of which none are known."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), image_id, original_size)

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


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """What was found in one image, best score first. All tensors are on the CPU.

    boxes: (N, 4) float32 (x1, y1, x2, y2) in pixels of the original image, EXIF orientation applied, inside the image.
    scores: (N,) float32 in 0..1.
    labels: (N,) int64 in 0..num_classes − 1.
    category_ids: (N,) int64, the data set's own ids of the labels.
    names: N class names.
    image_size: (height, width) of the original image in pixels.
    image: what it was found in, as given: a path, PIL image, array or tensor; `save` draws on it.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    category_ids: Tensor
    names: tuple[str, ...]
    image_size: tuple[int, int]
    image: Any = field(default=None)

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        best = zip(self.names[:5], self.scores.tolist()[:5], strict=True)
        listed = ", ".join(f"{name} {score:.2f}" for name, score in best)
        listed += ", …" if len(self) > 5 else ""
        return f"Detections({len(self)} in {self.path or 'an image'}{': ' + listed if listed else ''})"

    @property
    def path(self) -> str | None:
        """The image's path, where it was given as one."""
        return os.fspath(self.image) if isinstance(self.image, str | os.PathLike) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON.

        {"image": path or None, "height", "width", "detections": [{"box": [x1, y1, x2, y2] in pixels, "score", "label",
        "category_id", "name"}]}
        """
        height, width = self.image_size
        records = zip(
            self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.category_ids.tolist(), self.names,
            strict=True,
        )  # fmt: skip
        keys = ("box", "score", "label", "category_id", "name")
        found = [dict(zip(keys, record, strict=True)) for record in records]
        return {"image": self.path, "height": height, "width": width, "detections": found}

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """COCO results: {"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"} with the original ids."""
        corners, sizes = self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]
        boxes = torch.cat([corners, sizes], dim=1).tolist()
        return [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(self.category_ids.tolist(), boxes, self.scores.tolist(), strict=True)
        ]

    def to_supervision(self) -> supervision.Detections:
        """The same for supervision: class_id is the label; data has "class_name" and "category_id"."""
        import warnings

        import numpy as np

        with warnings.catch_warnings():  # a hint to install OpenCV, which nothing here needs
            warnings.filterwarnings("ignore", message=".*OpenCV.*", category=UserWarning)
            import supervision

        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str), "category_id": self.category_ids.numpy()},
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Draws the detections on their image and writes it; the format follows the name's ending.

        Returns the path. Raises UserError where the image cannot be read again or the file cannot be written.
        """
        from .visualize.draw import save

        return save(self, Path(path))
