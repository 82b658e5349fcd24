"""The data that the parts of the package exchange: a batch of images, a training target, detections."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .utils.packages import need
from .utils.rle import Rle, crop_masks, decode_masks

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class ImageBatch:
    """Images of different sizes, each in the upper left corner of a common canvas.

    Attributes:
        pixels: (B, 3, H, W), RGB; uint8 as read, float after `normalize`.
        padding_mask: (B, H, W) bool, True = padding.
    """

    pixels: Tensor
    padding_mask: Tensor

    def to(self, device: torch.device | str, **options: Any) -> ImageBatch:
        """Return the batch on another device. Options are those of `Tensor.to`."""
        return ImageBatch(self.pixels.to(device, **options), self.padding_mask.to(device, **options))

    def pin_memory(self) -> ImageBatch:
        """Return the batch in page-locked memory, which a GPU can copy from asynchronously."""
        return ImageBatch(self.pixels.pin_memory(), self.padding_mask.pin_memory())

    def normalize(self, mean: Tensor, std: Tensor) -> ImageBatch:
        """Return the batch with float pixels: (pixels / 255 − mean) / std, and 0 in the padding.

        Args:
            mean: (3,), RGB mean in 0..1.
            std: (3,), RGB standard deviation in 0..1.
        """
        if self.pixels.dtype != torch.uint8:
            raise TypeError(f"normalize needs uint8 pixels, not {self.pixels.dtype}")
        scale, shift = 1 / (255 * std), -mean / std
        pixels = self.pixels * scale[:, None, None] + shift[:, None, None]
        return replace(self, pixels=pixels.masked_fill_(self.padding_mask[:, None], 0.0))

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Target:
    """The annotated objects of one image.

    Attributes:
        labels: (N,) int64 in 0..num_classes − 1.
        boxes: (N, 4) float32 (cx, cy, w, h), relative to the unpadded image, in 0..1.
        image_id: The image's id in its annotation file.
        original_size: (height, width) in pixels of the image file, EXIF orientation applied.
        masks: (N, R, R) uint8 in 0..255, how much of each cell the object covers; cells divide the object's box into
            R rows and R columns. None: the dataset was opened without masks.
        has_mask: (N,) bool, False for an object that is annotated with a box only. None as for `masks`.
    """

    labels: Tensor
    boxes: Tensor
    image_id: int
    original_size: tuple[int, int]
    masks: Tensor | None = None
    has_mask: Tensor | None = None

    @classmethod
    def empty(cls, image_id: int, original_size: tuple[int, int]) -> Target:
        """Return the target of an image without objects or without annotations."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), image_id, original_size)

    def pin_memory(self) -> Target:
        """Return the target in page-locked memory, which a GPU can copy from asynchronously."""
        names = [name for name, value in vars(self).items() if isinstance(value, Tensor)]
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclass(frozen=True)
class Category:
    """A class: the dataset's own id and the name. Labels are positions in the dataset's list of categories."""

    id: int
    name: str


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The detected objects of one image, best score first. All tensors are on the CPU.

    Attributes:
        boxes: (N, 4) float32 (x1, y1, x2, y2) in pixels of the original image, EXIF orientation applied, clipped to it.
        scores: (N,) float32 in 0..1.
        labels: (N,) int64 in 0..num_classes − 1.
        category_ids: (N,) int64, the dataset's own ids of the labels.
        names: N class names.
        image_size: (height, width) of the original image in pixels.
        image: The image as passed to `predict` (path, PIL image, array or tensor), on which `save` draws.
        segmentations: N masks as COCO's compressed RLE, {"size": [height, width], "counts": text}. None: the model has
            no masks.
        track_ids: (N,) int64, the same for an object in every frame; −1: not confirmed by the tracker yet. None: no
            tracking.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    category_ids: Tensor
    names: tuple[str, ...]
    image_size: tuple[int, int]
    image: Any = field(default=None)
    segmentations: tuple[Rle, ...] | None = None
    track_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        best = zip(self.names[:5], self.scores.tolist()[:5], strict=True)
        listing = ", ".join(f"{name} {score:.2f}" for name, score in best)
        listing += ", …" if len(self) > 5 else ""
        return f"Detections({len(self)} in {self.path or 'an image'}{': ' + listing if listing else ''})"

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows; None without an image."""
        from .visualize.draw import draw, png_for_notebook

        return None if self.image is None else png_for_notebook(lambda: draw(self))

    @property
    def path(self) -> str | None:
        """The path of the image, or None if it was not passed as a path."""
        return os.fspath(self.image) if isinstance(self.image, str | os.PathLike) else None

    @property
    def masks(self) -> Tensor | None:
        """The masks (N, H, W) bool at the size of the image, decoded at each access; None without masks."""
        return None if self.segmentations is None else decode_masks(self.segmentations, self.image_size)

    def select(self, index: Tensor) -> Detections:
        """Return a copy with the detections that an index (K,) int64 or a mask (N,) bool selects, in that order."""
        rows: list[int] = torch.arange(len(self))[index].tolist()
        return replace(
            self,
            boxes=self.boxes[index],
            scores=self.scores[index],
            labels=self.labels[index],
            category_ids=self.category_ids[index],
            names=tuple(self.names[row] for row in rows),
            segmentations=None if self.segmentations is None else tuple(self.segmentations[row] for row in rows),
            track_ids=None if self.track_ids is None else self.track_ids[index],
        )

    def crop_masks(self) -> Detections:
        """Return a copy whose masks have only the pixels inside their boxes; itself without masks.

        The masks of a model may extend beyond its boxes.
        """
        if self.segmentations is None:
            return self
        return replace(self, segmentations=crop_masks(self.segmentations, self.boxes))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, ready for JSON.

        {"image": path or None, "height", "width", "detections": [{"box": [x1, y1, x2, y2] in pixels, "score", "label",
        "category_id", "name"}, …]}; with masks, each detection also has its RLE as "mask"; with tracking, its
        "track_id", null if it is not confirmed yet.
        """
        keys = ("box", "score", "label", "category_id", "name")
        columns = (x.tolist() for x in (self.boxes, self.scores, self.labels, self.category_ids))
        records: list[dict[str, Any]] = [
            dict(zip(keys, row, strict=True)) for row in zip(*columns, self.names, strict=True)
        ]
        if self.track_ids is not None:
            numbers = self.track_ids.tolist()
            records = [
                {**record, "track_id": None if number < 0 else number}
                for record, number in zip(records, numbers, strict=True)
            ]
        height, width = self.image_size
        detections = self._with_masks(records, "mask")
        return {"image": self.path, "height": height, "width": width, "detections": detections}

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Return COCO results: [{"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"}, …].

        With masks, each also has its RLE as "segmentation".
        """
        boxes = torch.cat([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], dim=1).tolist()
        results = [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(self.category_ids.tolist(), boxes, self.scores.tolist(), strict=True)
        ]
        return self._with_masks(results, "segmentation")

    def _with_masks(self, records: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
        if self.segmentations is None:
            return records
        return [{**record, key: dict(rle)} for record, rle in zip(records, self.segmentations, strict=True)]

    def to_supervision(self) -> supervision.Detections:
        """Return `supervision.Detections`: class_id is the label; data has "class_name" and "category_id".

        With masks, `mask` is (N, height, width) bool; with tracking, `tracker_id` is `track_ids`.
        """
        import numpy as np

        with warnings.catch_warnings():  # it suggests installing OpenCV, which is not needed here
            warnings.filterwarnings("ignore", message=".*OpenCV.*", category=UserWarning)
            sv = need("supervision", "supervision")
        masks = self.masks
        return sv.Detections(
            xyxy=self.boxes.numpy(),
            mask=None if masks is None else masks.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            tracker_id=None if self.track_ids is None else self.track_ids.numpy(),
            data={"class_name": np.array(self.names, dtype=str), "category_id": self.category_ids.numpy()},
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Draw the detections on their image, write it in the format of the path's suffix and return the path."""
        from .visualize.draw import draw, save_image

        return save_image(draw(self), Path(path))
