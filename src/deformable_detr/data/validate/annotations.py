"""The records of a split for the checks: unusable records become issues, the others arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...structures import Category
from ...utils.errors import UserError
from ..problems import Problem
from ..records import read_records, record_name
from ..source import AnnotationCache, Source, remap_category_ids
from .issues import Issues


@dataclass
class ImageRecord:
    """One image of a split.

    Attributes:
        position: Index in the COCO dict.
        declared: (height, width) from the record.
        missing: Whether there is no such file.
        broken: Whether the file cannot be read.
        size: (height, width) of the upright image, from the file.
        orientation: EXIF orientation; 1 if there is none.
        digest: Hash of the pixels.
        dim: Highest value of a 16-bit gray image that uses at most 12 bits, otherwise 0.
    """

    position: int
    id: int
    name: str
    path: Path
    declared: tuple[int, int] | None
    missing: bool = False
    broken: bool = False
    size: tuple[int, int] | None = None
    orientation: int = 1
    digest: bytes | None = None
    dim: int = 0

    @property
    def best_size(self) -> tuple[int, int] | None:
        """(height, width) of the file if known, otherwise of the record."""
        return self.size or self.declared


@dataclass
class Split:
    """The usable records of one split.

    Attributes:
        content: The COCO dict as read.
        categories: Category id → name.
        folder: Folder of the images.
        positions: (N,) index of each object in the COCO dict.
        images: (N,) index of each object's image in `image_records`.
        labels: (N,) category ids.
        crowds: (N,) bool.
        boxes: (N, 4) xywh in pixels.
        shift: Added to the objects' category ids because these are off by one.
        moved: Category ids of the file → those of the training split, if names decide.
        unlisted: Images in the folder that no record names.
    """

    name: str
    source: Source
    content: dict[str, Any]
    categories: dict[int, str]
    folder: Path
    image_records: list[ImageRecord]
    positions: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray
    boxes: np.ndarray
    shift: int = 0
    moved: dict[int, int] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        """The file that identifies the split."""
        return self.source.file

    def record(self, index: int) -> str:
        """Return the name of an object in messages, with its image."""
        name = record_name(self.content["annotations"], int(self.positions[index]))
        return f"{name} of image {self.image_records[self.images[index]].name!r}"

    def locate(self, index: int) -> dict[str, Any]:
        """Return the arguments of `Issues.add` that locate and show an object."""
        return {
            "split": self.name,
            "section": "annotations",
            "position": int(self.positions[index]),
            "image": self.image_records[self.images[index]].path,
            "box": tuple(float(value) for value in self.boxes[index]),
        }


def read_split(
    source: Source, name: str, categories: Sequence[Category] | None, issues: Issues, cache: AnnotationCache
) -> Split | None:
    """Read the usable records of a split and add an issue for each problem; None if the file cannot be read.

    `categories` are those of the training split; see `Source.read`.
    """

    def collect(problem: Problem) -> None:
        issues.add(
            problem.code, problem.file, problem.record, problem.message, problem.hint, split=name,
            section=problem.section, position=problem.position, image=problem.image, box=problem.box,
        )  # fmt: skip

    def collect_from_reader(problem: Problem) -> None:
        if problem.code != "image-unreadable":  # all images are checked later
            collect(problem)

    try:
        content = source.read(categories, collect_from_reader, cache)
    except UserError as error:
        collect(Problem.from_error("file-unreadable", source.file, error))
        return None
    records = read_records(content, source, collect)
    folder, missing = records.folder.path, records.folder.missing
    images = []
    for position, image_id, file_name, size in records.images:
        actual = missing.get(file_name) or file_name
        is_missing = missing.get(file_name) == ""
        images.append(ImageRecord(position, image_id, actual, folder / actual, size, is_missing))
    split = Split(
        name, source, content, records.categories, folder, images, records.positions, records.image_indices,
        records.category_ids, records.crowds, records.boxes, records.category_shift, unlisted=records.folder.unlisted,
    )  # fmt: skip
    if categories is not None:
        _remap_categories(split, categories, collect)
    return split


def _remap_categories(split: Split, categories: Sequence[Category], collect: Any) -> None:
    """Give objects the ids of the training split's classes if these have the same names under other ids."""
    file_categories = [Category(*item) for item in split.categories.items()]
    split.moved = moved = remap_category_ids(file_categories, categories, set(split.labels.tolist()))
    if not moved:
        return
    first = next(number for number, other in moved.items() if number != other)
    message = (
        f"lists the training set's classes under other ids, such as {split.categories[first]!r} {first} instead of "
        f"{moved[first]}: names decide"
    )
    collect(Problem("category-renumbered", split.file, "", message))
    split.categories = {moved[number]: name for number, name in split.categories.items() if number in moved}
    split.labels = np.array([moved[number] for number in split.labels.tolist()], dtype=np.int64)
