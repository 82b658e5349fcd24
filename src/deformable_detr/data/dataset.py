"""A detection dataset: images and targets of one split in COCO JSON, YOLO or Pascal VOC format."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config.schema import DataConfig
from ..structures import Category, Target
from ..utils.errors import UserError
from ..utils.images import read_image, read_size
from .formats import find_source
from .issues import raise_error
from .masks import MaskTable, OutlinedTarget
from .records import Records, TextId, area_of, clip_corners, read_records
from .sampling import EpochSampling, repeat_factors
from .source import (
    BROKEN_MASK,
    AnnotationCache,
    Source,
    content_hash,
    distinct_val_hint,
    remap_category_ids,
    same_split,
)

Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]

MAX_COORDINATE = 1e7  # in reach of float32, far beyond any image

log = logging.getLogger(__name__)


def open_dataset(
    root: str | os.PathLike[str],
    split: str = "train",
    data: DataConfig | None = None,
    categories: Sequence[Category] | None = None,
    transform: Transform | None = None,
    cache: AnnotationCache | None = None,
    masks: bool = False,
) -> CocoDataset:
    """Open one split of a dataset and check all of its records. No image is decoded.

    Args:
        root: Folder of a COCO, YOLO or Pascal VOC dataset, folder of one split, COCO JSON file, or data.yaml.
        split: 'train', 'val', …
        data: Settings; they can name the files of a dataset in another layout.
        categories: Categories of a model, whose label order is used. Default: the dataset's own, sorted by id. Ids
            decide which class is meant, or names; see `remap_category_ids`.
        transform: Applied to each (image, target).
        cache: Parsed annotations to share with `check_for_training`, made with the same `masks`.
        masks: Also read the objects' masks; see `CocoDataset`.

    Raises:
        UserError: Names the file and record that cannot be used, or that has a class unknown to the model.
    """
    source = find_source(Path(root).expanduser(), split, data or DataConfig())
    return CocoDataset(source, categories, transform, cache, masks)


def ensure_distinct_splits(train: CocoDataset, val: CocoDataset, root: str | os.PathLike[str]) -> None:
    """Raise `UserError` if both splits are the same file: metrics on training images would mean nothing."""
    if same_split(train.source, val.source):
        hint = distinct_val_hint(val.source, os.fspath(root))
        raise UserError(f"{train.annotation_file} would be both the training and the validation split; {hint}")


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images and objects of one split.

    `dataset[i]` is (uint8 RGB (3, H, W), Target), after the transform. Targets leave out crowds, and boxes without an
    area inside their image (one warning counts them); other boxes are clipped to the image. Images without objects
    stay. `ground_truth` has every record.

    With `masks`, `ground_truth` has a `segmentation` for each object that has one, and targets for training have
    `masks` and `has_mask`: outlines are drawn once, after the transform. `EvalTransform` drops them.

    Attributes:
        categories: Label → `Category`.
        image_ids: (len,) int64.
        annotation_file: Identifies the split in messages.
        file_category_ids: Pairs (category id, id in the file); set by `load_ground_truth`.
        image_folder: Folder that file names are relative to.
        masks: Whether it was opened with masks.
    """

    def __init__(
        self,
        source: Source,
        categories: Sequence[Category] | None = None,
        transform: Transform | None = None,
        cache: AnnotationCache | None = None,
        masks: bool = False,
    ) -> None:
        self.source, self.transform, self.masks = source, transform, masks
        cache = cache or AnnotationCache(masks)
        if cache.masks != masks:
            raise ValueError(f"the cache was made with masks={cache.masks}; use AnnotationCache(masks={masks})")
        self.annotation_file = source.file
        records = read_records(source.read(categories, cache=cache), source, raise_error)
        self.fingerprint = cache.parse(source).digest or content_hash(records.content)
        self.categories = records.category_list if categories is None else tuple(categories)
        id_map = remap_category_ids(records.category_list, self.categories, set(records.category_ids.tolist()))
        _warn_of_other_names(records.category_list, self.categories, id_map, self.annotation_file)
        id_map = id_map or {key: key for key in records.categories}
        self._id_map = tuple(id_map.items())

        # Arrays instead of lists of records: worker processes share their memory.
        self.image_folder = records.folder.path
        self.image_ids = np.array([image.id for image in records.images], dtype=np.int64)
        self._names = np.array([image.name for image in records.images])
        sizes = [image.declared or (0, 0) for image in records.images]
        self._sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)  # (height, width), 0 if unknown
        labels = self._labels_of(records, id_map)
        self._starts, self._labels, self._boxes, positions = self._training_objects(records, labels)
        if masks:
            annotations = records.content["annotations"]
            self._outlines = MaskTable(annotations[position].get("segmentation") for position in positions.tolist())

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_objects(self) -> int:
        """How many objects can be learned."""
        return len(self._labels)

    @property
    def objects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images (N,), labels (N,) and xyxy boxes in pixels (N, 4) of these objects."""
        images = np.repeat(np.arange(len(self)), np.diff(self._starts))
        return images, self._labels, self._boxes

    def sampling(self, repeat_threshold: float = 0.0) -> EpochSampling | None:
        """Return how often an epoch of training shows each image; None: once. See `repeat_factors`."""
        if not repeat_threshold:
            return None
        images, labels, _ = self.objects
        return EpochSampling(repeat_factors(images, labels, np.ones(len(self)), repeat_threshold))

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Draw images for mosaics."""
        return torch.randint(len(self), (count,), generator=generator).tolist()

    @property
    def num_masks(self) -> int:
        """How many of these objects have a mask; 0 if the dataset was opened without masks."""
        return self._outlines.num_masks if self.masks else 0

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.finish(*self.load(index))

    def finish(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Apply the transform, and draw the masks."""
        if self.transform:
            image, target = self.transform(image, target)
        return image, target.rasterize() if isinstance(target, OutlinedTarget) else target

    def load(self, index: int) -> tuple[Tensor, Target]:
        """Return an image and its target before the transform; with masks, an `OutlinedTarget`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index = range(len(self))[index]
        image = read_image(self.path(index))
        height, width = image.shape[-2:]
        self._warn_of_other_size(index, (height, width))
        rows = slice(self._starts[index], self._starts[index + 1])
        boxes, inside = clip_corners(self._boxes[rows].astype(np.float64), np.array([[width, height]]))
        x0, y0, x1, y1 = boxes[inside].T
        cxcywh = np.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height], 1)
        target = Target(
            labels=torch.from_numpy(self._labels[rows][inside].astype(np.int64)),
            boxes=torch.from_numpy(cxcywh.astype(np.float32)),
            image_id=int(self.image_ids[index]),
            original_size=(height, width),
        )
        if self.masks:
            numbers = (rows.start + np.flatnonzero(inside)).tolist()
            maps = np.tile([(1 / width, 1 / height), (0.0, 0.0)], (len(numbers), 1, 1))
            target = OutlinedTarget(**vars(target), outlines=[self._outlines[n] for n in numbers], maps=maps)
        return image, target

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes do not need the ground truth.
        return {key: value for key, value in self.__dict__.items() if key not in ("ground_truth", "file_category_ids")}

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image from its record, (len, 2); 1 if unknown."""
        return np.maximum(self._sizes, 1)

    def path(self, index: int) -> Path:
        """Return the file of one image."""
        return self.image_folder / str(self._names[index])

    @cached_property
    def ground_truth(self) -> dict[str, Any]:
        """The COCO dict for metrics: every record, crowds too.

        With masks, the `segmentation` of an object that has one is a list of flat arrays [x, y, x, y, …] (float64), or
        {"size": [height, width], "counts": text}, COCO's compressed run lengths.
        Annotation ids are numbered from 1, a missing `area` is that of the box, a missing `iscrowd` is 0, and a group
        category is dropped. Read from the file on first access; see `load_ground_truth`.
        """
        return self.load_ground_truth(AnnotationCache(self.masks))

    def load_ground_truth(self, cache: AnnotationCache) -> dict[str, Any]:
        """Build `ground_truth` from annotations that are already parsed, and keep it."""
        content = self.source.read(self.categories, cache=cache)
        ids = dict(self._id_map)
        annotations = [
            {
                **{key: value for key, value in annotation.items() if key not in ("where", BROKEN_MASK)},
                "id": number,
                "category_id": ids[annotation["category_id"]],
                "area": area_of(annotation),
                "iscrowd": int(annotation.get("iscrowd") or 0),
            }
            for number, annotation in enumerate(content["annotations"], start=1)
        ]
        categories = [{**c, "id": ids[c["id"]]} for c in content["categories"] if c["id"] in ids]
        file_ids = ((ids[c["id"]], TextId.in_file(c["id"])) for c in content["categories"] if c["id"] in ids)
        self.file_category_ids = tuple(file_ids)
        self.ground_truth = {**content, "categories": categories, "annotations": annotations}
        return self.ground_truth

    def _training_objects(self, records: Records, labels: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the objects to train on, image by image.

        Returns:
            starts (images + 1,), labels (N,), boxes (N, 4) xyxy, positions (N,) in the COCO dict.
        """
        images = records.image_indices
        x, y, w, h = records.boxes.T
        boxes = np.clip(np.stack([x, y, x + w, y + h], axis=1), -MAX_COORDINATE, MAX_COORDINATE)
        inside = self._has_area(boxes, images)
        skipped = np.flatnonzero(~inside & ~records.crowds)
        if len(skipped):
            log.warning(
                "%s: %d of %d boxes have no area inside their image and are skipped in training; the first is %s",
                self.annotation_file, len(skipped), len(boxes), records.object_name(skipped[0]),
            )  # fmt: skip
        kept = np.flatnonzero(inside & ~records.crowds)
        kept = kept[np.argsort(images[kept], kind="stable")]
        starts = np.searchsorted(images[kept], np.arange(len(self.image_ids) + 1))
        return starts, labels[kept].astype(np.int32), boxes[kept].astype(np.float32), records.positions[kept]

    def _has_area(self, boxes: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Tell which xyxy boxes (N, 4) have an area inside their image.

        If a record's size says no, the file's size decides: records of rotated or resized images may have the old size.
        """
        unlimited = np.array([[10**7, 10**7]])
        limits = np.where(self._sizes > 0, self._sizes, unlimited)[:, ::-1]
        _, inside = clip_corners(boxes, limits[images])
        _, positive = clip_corners(boxes, unlimited)
        for index in np.unique(images[positive & ~inside]).tolist():
            with suppress(UserError):  # an unreadable file is reported when it is used
                limits[index] = read_size(self.path(index))[::-1]
        return clip_corners(boxes, limits[images])[1]

    def _labels_of(self, records: Records, id_map: Mapping[int, int]) -> np.ndarray:
        """Turn category ids (N,) into labels."""
        labels = {category.id: label for label, category in enumerate(self.categories)}
        file_ids = records.category_ids.tolist()
        result = [labels.get(id_map.get(file_id, -1), -1) for file_id in file_ids]
        if -1 in result:
            first = result.index(-1)
            category = f"category {file_ids[first]} ({records.categories[file_ids[first]]!r})"
            raise UserError(
                f"{self.annotation_file}: {records.object_name(first)} has {category}, which the model does not know; "
                "use the dataset that the model was trained on, or one with its categories"
            )
        return np.array(result, dtype=np.int64)

    def _warn_of_other_size(self, index: int, size: tuple[int, int]) -> None:
        declared = tuple(self._sizes[index].tolist())
        if min(declared) > 0 and declared != size and not getattr(self, "_warned_of_size", False):
            self._warned_of_size = True
            log.warning(
                "%s: image %r is %d × %d pixels, upright, but its record says %d × %d; its boxes are used as pixels of "
                "the upright image (further images are not reported)",
                self.annotation_file, str(self._names[index]), *size[::-1], *declared[::-1],
            )  # fmt: skip


def _warn_of_other_names(
    file_categories: Sequence[Category], categories: Sequence[Category], id_map: dict[int, int], path: Path
) -> None:
    names = {category.id: category.name for category in categories}
    for category in file_categories:
        if id_map.get(category.id, category.id) != category.id:
            log.warning(
                "%s: classes have other ids than in the model, such as %r %d instead of %d; names decide",
                path, category.name, category.id, id_map[category.id],
            )  # fmt: skip
            return
        if not id_map and names.get(category.id, category.name) != category.name:
            no_common_name = {other.name for other in file_categories}.isdisjoint(names.values())
            log.warning(
                "%s: %scategory %d is %r in the file and %r in the model; ids decide, so they count as the same class",
                path, "no class name is known to the model: " if no_common_name else "",
                category.id, category.name, names[category.id],
            )  # fmt: skip
            return
