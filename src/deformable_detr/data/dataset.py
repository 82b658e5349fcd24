"""Data sets, in COCO JSON or made so: found in the layouts people have, checked, and kept small in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
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
from .coco import area_of, read_annotations, read_categories, read_images, record_name, used_categories
from .formats import CocoSource, find_source
from .problems import Source, content_hash, other_split, renumbered, same_split
from .transforms import MIN_SIDE

Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]

log = logging.getLogger(__name__)


def open_dataset(
    root: str | os.PathLike[str],
    split: str = "train",
    data: DataConfig | None = None,
    categories: Sequence[Category] | None = None,
    transform: Transform | None = None,
) -> CocoDataset:
    """One split of the set at `root`, checked record by record; no image is decoded yet.

    root: the folder of a COCO set (`layouts.find_annotations` lists the layouts), of a YOLO set (with its `data.yaml`)
    or of a Pascal VOC set; a split's own folder; a COCO JSON file or a data.yaml.
    split: 'train', 'val', …; `data` can name the files of sets in no known layout.
    categories: those of a model, whose label order is then used; an annotation of a class that the model lacks is an
    error. Ids decide, or names where `sources.renumbered` says so. None: the set's own, sorted by id.
    transform: (image, target) → (image, target), applied to each sample.

    Raises `UserError` with one line that names the file and the record for everything that is wrong.
    """
    data = data or DataConfig()
    return CocoDataset(find_source(Path(root).expanduser(), split, data), None, categories, transform)


def refuse_same_file(train: CocoDataset, val: CocoDataset, root: str | os.PathLike[str]) -> None:
    """`UserError` where both splits are one annotation file: figures on training images would say nothing."""
    if same_split(train.source, val.source):
        raise UserError(
            f"{train.annotation_file} would be both the training and the validation split; "
            f"{other_split(val.source, os.fspath(root))}"
        )


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images and objects of one COCO JSON file, or of another `Source`.

    `dataset[i]` is (uint8 RGB (3, H, W), Target), after the transform. Left out of the targets: crowds, and boxes with
    no area inside their image (counted in one logged warning); the others are clipped to the image. Images without
    objects stay. `ground_truth` keeps every record, for evaluation. Both have the category ids of `categories`.

    categories: label → `Category`, sorted by id. image_ids: (len,) int64. annotation_file (of other sources: what
    stands for the split), image_folder: what is read.
    """

    def __init__(
        self,
        source: Source | Path,
        image_folder: Path | None = None,
        categories: Sequence[Category] | None = None,
        transform: Transform | None = None,
    ) -> None:
        """source: a split, or its COCO JSON file. image_folder: where the images are; None: where the source says."""
        if isinstance(source, Path):
            source = CocoSource(source, source, "", DataConfig())
        self.source = source
        self.annotation_file = annotation_file = source.file
        self.transform = transform
        content = source.read(categories)
        own = read_categories(content, annotation_file)
        self.categories = tuple(categories) if categories is not None else own
        moved = renumbered(own, self.categories, used_categories(content))
        _warn_of_other_names(own, self.categories, moved, annotation_file)

        # Arrays, not lists of records: worker processes then share their memory instead of copying it piece by piece.
        ids, names, sizes = read_images(content, annotation_file)
        self.image_ids = np.array(ids, dtype=np.int64)
        self._names = np.array(names)
        self._sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)  # (height, width), 0 = not given
        self.image_folder = image_folder if image_folder is not None else source.image_folder(names)
        self._starts, self._labels, self._boxes = self._objects(content, own, moved)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index = range(len(self))[index]
        image = read_image(self.path(index))
        height, width = image.shape[-2:]
        self._warn_of_other_size(index, (height, width))
        mine = slice(self._starts[index], self._starts[index + 1])
        boxes, inside = _clipped(self._boxes[mine].astype(np.float64), np.array([[height, width]]))
        x0, y0, x1, y1 = boxes[inside].T
        centerd = np.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height], 1)
        target = Target(
            labels=torch.from_numpy(self._labels[mine][inside].astype(np.int64)),
            boxes=torch.from_numpy(centerd.astype(np.float32)),
            image_id=int(self.image_ids[index]),
            original_size=(height, width),
        )
        return self.transform(image, target) if self.transform else (image, target)

    @property
    def sizes(self) -> np.ndarray:
        """(len, 2) height and width of each image as its record has them; 1 where it does not."""
        return np.maximum(self._sizes, 1)

    def path(self, index: int) -> Path:
        """The file of one image."""
        return self.image_folder / str(self._names[index])

    @cached_property
    def ground_truth(self) -> dict[str, Any]:
        """The COCO dict for metrics: every record, crowds too, masks left out.

        Repaired where metrics would stumble: annotation ids are numbered from 1, a missing `area` is that of the box, a
        missing `iscrowd` is 0, a category that only groups others is dropped. Read from the file when first asked for,
        so that a training set does not hold it.
        """
        content = self.source.read(self.categories)
        own = read_categories(content, self.annotation_file)
        ids = renumbered(own, self.categories, used_categories(content))
        ids = ids or {category.id: category.id for category in own}
        return {
            **content,
            "categories": [
                {**category, "id": ids[category["id"]]} for category in content["categories"] if category["id"] in ids
            ],
            "annotations": [
                {
                    **{key: value for key, value in annotation.items() if key != "where"},
                    "id": number,
                    "category_id": ids[annotation["category_id"]],
                    "area": area_of(annotation),
                    "iscrowd": int(annotation.get("iscrowd") or 0),
                }
                for number, annotation in enumerate(content["annotations"], start=1)
            ],
        }

    def fingerprint(self) -> str:
        """Tells these annotations from others, wherever their folder lies."""
        return content_hash(self.source, self.categories)

    def __getstate__(self) -> dict[str, Any]:
        # What goes to a worker process: never the ground truth, which only the main one asks for.
        return {key: value for key, value in self.__dict__.items() if key != "ground_truth"}

    def _objects(
        self, content: dict[str, Any], own: Sequence[Category], moved: dict[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Objects to train on, image by image: starts (images + 1,), labels (N,), boxes (N, 4) xyxy in pixels."""
        records = content["annotations"]
        images, categories, crowds, xywh = read_annotations(content, self.annotation_file, self.image_ids, own)
        if moved:
            categories = np.array([moved[number] for number in categories.tolist()], dtype=np.int64)
        labels = self._labels_of(records, categories, own)

        x, y, w, h = np.clip(xywh, -1e9, 1e9).T
        # In reach of single precision, far beyond any image.
        corners = np.clip(np.stack([x, y, x + w, y + h], axis=1), -1e7, 1e7)
        inside = self._inside(corners, images)
        lost = np.flatnonzero(~inside & ~crowds)
        if len(lost):
            first = int(lost[0])
            log.warning(
                "%s: %d of %d boxes have no area inside their image and are skipped in training; the first is %s of "
                "image %r", self.annotation_file, len(lost), len(records), record_name(records, first),
                str(self._names[images[first]]),
            )  # fmt: skip
        kept = np.flatnonzero(inside & ~crowds)
        kept = kept[np.argsort(images[kept], kind="stable")]
        starts = np.searchsorted(images[kept], np.arange(len(self.image_ids) + 1))
        return starts, labels[kept].astype(np.int32), corners[kept].astype(np.float32)

    def _inside(self, corners: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Which xyxy boxes (N, 4) have an area in their image. Where a record's size says no, the file itself is asked:

        records of turned or resized pictures may have their old size, and the boxes the new one.
        """
        sizes = np.where(self._sizes > 0, self._sizes, 10**7)
        _, inside = _clipped(corners, sizes[images])
        _, anywhere = _clipped(corners, np.array([[10**7, 10**7]]))
        for index in np.unique(images[anywhere & ~inside]).tolist():
            with suppress(UserError):  # a file that cannot be read is named when it is to be used
                sizes[index] = read_size(self.path(index))
        return _clipped(corners, sizes[images])[1]

    def _labels_of(self, records: Sequence[Any], ids: np.ndarray, own: Sequence[Category]) -> np.ndarray:
        """Category ids (N,) to labels; a class that the model lacks is an error."""
        known = np.array([category.id for category in self.categories], dtype=np.int64)
        order = np.argsort(known)
        place = np.minimum(np.searchsorted(known[order], ids), len(known) - 1)
        unknown = np.flatnonzero(known[order][place] != ids)
        if len(unknown):
            first = int(unknown[0])
            name = next(category.name for category in own if category.id == ids[first])
            raise UserError(
                f"{self.annotation_file}: {record_name(records, first)} has category {ids[first]} ({name!r}), which "
                "the model does not know; use the set that the model was trained on, or one with its categories"
            )
        return order[place]

    def _warn_of_other_size(self, index: int, size: tuple[int, int]) -> None:
        declared = tuple(self._sizes[index].tolist())
        if min(declared) > 0 and declared != size and not getattr(self, "_warned_of_size", False):
            self._warned_of_size = True
            log.warning(
                "%s: image %r is %d × %d pixels, upright, but its record says %d × %d; its boxes are taken in "
                "pixels of the image as it is (more such images are not reported)",
                self.annotation_file, str(self._names[index]), *size[::-1], *declared[::-1],
            )  # fmt: skip


def _clipped(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """xyxy boxes (N, 4) cut to their images' (height, width) (N, 2), and which of them (N,) keep an area."""
    limits = sizes[:, [1, 0, 1, 0]]
    cut = np.clip(boxes, 0, limits)
    return cut, np.min(cut[:, 2:] - cut[:, :2], axis=1) >= MIN_SIDE


def _warn_of_other_names(
    own: Sequence[Category], wanted: Sequence[Category], moved: dict[int, int], path: Path
) -> None:
    names = {category.id: category.name for category in wanted}
    first = next((category for category in own if moved.get(category.id, category.id) != category.id), None)
    if first is not None:
        log.warning(
            "%s: the classes have other ids here than in the model, such as %r %d instead of %d; names decide",
            path, first.name, first.id, moved[first.id],
        )  # fmt: skip
        return
    for category in own:
        if names.get(category.id, category.name) != category.name:
            none = {other.name for other in own}.isdisjoint(names.values())
            log.warning(
                "%s: %scategory %d is %r here and %r in the model; ids decide, so the one counts as the other",
                path, "no class is called as in the model: " if none else "",
                category.id, category.name, names[category.id],
            )  # fmt: skip
            return
