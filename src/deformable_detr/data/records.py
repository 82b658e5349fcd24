"""The records of a COCO dict as arrays; every record that cannot be used is reported. For all formats."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any, NamedTuple

import numpy as np

from ..structures import Category
from ..utils.errors import UserError
from .discovery import ImageFolder
from .problems import OnProblem, Problem
from .source import Source


class MaskBox(list[float]):
    """The xywh box of an object whose record has none: the extent of its mask."""


class ImageEntry(NamedTuple):
    """A usable image record: its index in the file, id, file name, and (height, width) if the record has them."""

    position: int
    id: int
    name: str
    size: tuple[int, int] | None


@dataclass
class Records:
    """The usable records of one split.

    Attributes:
        content: The COCO dict.
        categories: Category id → name.
        images: One entry per image.
        folder: Where the image files are.
        positions: (N,) index of each object in the file.
        image_indices: (N,) index of each object's image in `images`.
        category_ids: (N,) ids after `category_shift`.
        crowds: (N,) bool, `iscrowd`.
        boxes: (N, 4) float64 xywh in pixels.
        category_shift: Added to the objects' category ids because these are off by one; normally 0.
    """

    content: dict[str, Any]
    categories: dict[int, str]
    images: list[ImageEntry]
    folder: ImageFolder
    positions: np.ndarray
    image_indices: np.ndarray
    category_ids: np.ndarray
    crowds: np.ndarray
    boxes: np.ndarray
    category_shift: int = 0

    @property
    def category_list(self) -> tuple[Category, ...]:
        """The categories, sorted by id."""
        return tuple(Category(id=key, name=self.categories[key]) for key in sorted(self.categories))


def is_finite(value: Any) -> bool:
    """Whether it is a finite number; booleans are not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # math.isfinite raises for 10**400


def is_int64(value: Any) -> bool:
    """Whether it is an integer of 64 bits; booleans are not."""
    return type(value) is int and -(2**63) <= value < 2**63


def record_name(records: Sequence[Any], position: int) -> str:
    """Return the name of an annotation in messages: its place in the label file, or its index and id."""
    record = records[position]
    if isinstance(record, dict) and isinstance(record.get("where"), str):
        return record["where"]
    own_id = f" (id {brief(record['id'])})" if isinstance(record, dict) and "id" in record else ""
    return f"annotations[{position}]{own_id}"


def area_of(annotation: dict[str, Any]) -> float:
    """Return the record's area in square pixels; that of its box if it has none."""
    area: Any = annotation.get("area")
    return area if is_finite(area) else annotation["bbox"][2] * annotation["bbox"][3]


def read_records(content: dict[str, Any], source: Source, on_problem: OnProblem) -> Records:
    """Check every record of a COCO dict and turn the usable ones into arrays; doubtful ones have `fatal=False`."""
    reader = _RecordReader(content, source, on_problem)
    categories = reader.categories()
    images = reader.images()
    folder = reader.folder(images)
    shift = reader.category_shift(categories)
    arrays = reader.objects(images, folder, categories, shift)
    return Records(content, categories, images, folder, *arrays, category_shift=shift)


OBJECT_KEYS = ("id", "image_id", "category_id", "iscrowd", "bbox")


class _RecordReader:
    """Reads categories, images and objects of one COCO dict, in this order."""

    def __init__(self, content: dict[str, Any], source: Source, on_problem: OnProblem) -> None:
        self.content, self.source, self.on_problem = content, source, on_problem

    def _report(
        self, code: str, section: str, position: int, message: str, hint: str = "", fatal: bool = True, **more: Any
    ) -> None:
        if position < 0:
            record, section = "", ""
        elif section == "annotations":
            record = record_name(self.content["annotations"], position)
        else:
            record = f"{section}[{position}]"
        self.on_problem(Problem(code, self.source.file, record, message, hint, section, position, fatal=fatal, **more))

    def categories(self) -> dict[int, str]:
        positions: dict[int, int] = {}
        for position, record in enumerate(self.content["categories"]):
            fields = record if isinstance(record, dict) else {}
            if not is_int64(fields.get("id")) or not isinstance(fields.get("name"), str):
                self._report("category-record", "categories", position, "needs an integer 'id' and a text 'name'",
                             "complete or remove it")  # fmt: skip
            elif record["id"] in positions:
                message = f"({record['name']!r}) has the id {record['id']} of categories[{positions[record['id']]}]"
                self._report("category-id-duplicate", "categories", position, message, "give each its own id")
            else:
                positions[record["id"]] = position
        if not self.content["categories"]:
            hint = "list the classes with their ids and names"
            self._report("category-record", "", -1, "'categories' is empty", hint)
        records = {key: self.content["categories"][position] for key, position in positions.items()}
        if _is_group(records, self.content["annotations"]):
            del records[0]
        names: set[str] = set()
        for key, record in records.items():
            if record["name"] in names:
                message = f"(id {key}) has the name {record['name']!r} of another"
                self._report("category-name-duplicate", "categories", positions[key], message, fatal=False)
            names.add(record["name"])
        return {key: record["name"] for key, record in records.items()}

    def images(self) -> list[ImageEntry]:
        images: list[ImageEntry] = []
        positions: dict[int, int] = {}
        same_file = _repeated_files(self.content)
        hint = "complete or remove it"
        for position, record in enumerate(self.content["images"]):
            if not isinstance(record, dict) or not is_int64(record.get("id")):
                self._report("image-record", "images", position, "needs an integer 'id'", hint)
                continue
            image_id, name = record["id"], record.get("file_name")
            if not isinstance(name, str) or not name:
                message = f"(id {image_id}) needs the 'file_name' of its image"
                self._report("image-record", "images", position, message, hint)
                continue
            if image_id in positions:
                first = positions[image_id]
                first_name = self.content["images"][first]["file_name"]
                message = f"({name!r}) has the id {image_id} of images[{first}] ({first_name!r})"
                self._report("image-id-duplicate", "images", position, message, "give each image its own id")
                continue
            if position in same_file:
                first, objects_differ = same_file[position]
                message = f"(id {image_id}) names the file {name!r} of images[{first}]"
                if objects_differ:  # each record would teach that the other's objects are background
                    message += ", and their objects differ"
                    merge = "merge the records, for example with deformable-detr check --fix"
                    self._report("image-in-parts", "images", position, message, merge)
                else:
                    self._report("image-twice", "images", position, message, fatal=False)
            positions[image_id] = position
            sides: tuple[Any, Any] = record.get("height"), record.get("width")
            known = all(is_int64(side) and side > 0 for side in sides)
            images.append(ImageEntry(position, image_id, name, sides if known else None))
        if not self.content["images"]:
            self._report("image-record", "", -1, "has no images", "add at least one image")
        return images

    def folder(self, images: list[ImageEntry]) -> ImageFolder:
        try:
            folder = self.source.find_images([image.name for image in images])
        except UserError as error:
            self.on_problem(Problem.from_error("file-unreadable", self.source.file, error))
            return ImageFolder(self.source.file.parent)
        all_missing = len(folder.missing) == len({image.name for image in images})
        hint = "add the file or remove its record"
        if all_missing and folder.searched:
            option = f" or set data.{folder.option}" if folder.option else ""
            hint = f"put the images there{option} (none was found in {', '.join(map(str, folder.searched))})"
        for image in images:
            if (likely := folder.missing.get(image.name)) is None:
                continue
            message = f"names the image {image.name!r}, which is missing in {folder.path}"
            if likely:
                self._report("image-name", "images", image.position, f"{message}, where {likely!r} is",
                             "write the name of the file, for example with deformable-detr check --fix")  # fmt: skip
            else:
                self._report("image-missing", "images", image.position, message, hint)
                hint = "add the file or remove its record"
        return folder

    def category_shift(self, categories: dict[int, str]) -> int:
        """Return what to add to the objects' category ids to make all of them known, if that explains unknown ids."""
        ids: list[Any] = [r.get("category_id") for r in self.content["annotations"] if isinstance(r, dict)]
        if not ids or not categories or not all(map(is_int64, ids)) or (used := set(ids)) <= categories.keys():
            return 0
        first = min(categories)
        # With gaps between the ids, a missing category is more likely.
        if sorted(categories) != list(range(first, first + len(categories))):
            return 0
        shift = next((shift for shift in (1, -1) if {value + shift for value in used} <= categories.keys()), 0)
        if shift:
            message = f"has objects of classes {first - shift}, …, but categories {first}, …: ids are off by one"
            hint = f"{'add 1 to' if shift > 0 else 'subtract 1 from'} the objects' category_id"
            self._report("category-off-by-one", "", -1, message, hint)
        return shift

    def objects(
        self, images: list[ImageEntry], folder: ImageFolder, categories: dict[int, str], shift: int
    ) -> tuple[np.ndarray, ...]:
        index_of: dict[Any, int] = {image.id: index for index, image in enumerate(images)}
        # Objects of an unusable image record are not reported again.
        listed = {r.get("id") for r in self.content["images"] if isinstance(r, dict) and is_int64(r.get("id"))}
        first_positions: dict[int, int] = {}
        rows: list[tuple[int, int, int, bool]] = []
        boxes: list[list[float]] = []
        for position, record in enumerate(self.content["annotations"]):
            if not isinstance(record, dict):
                message, hint = "is not an object", "export the annotations again"
                self._report("annotation-record", "annotations", position, message, hint)
                continue
            values: list[Any] = [record.get(key) for key in OBJECT_KEYS]
            own_id, image_id, category, crowd, box = values
            if is_int64(own_id) and (first := first_positions.setdefault(own_id, position)) != position:
                message = f"has the id of annotations[{first}]"
                self._report("annotation-id-duplicate", "annotations", position, message, fatal=False)
            if not is_int64(image_id) or image_id not in listed:
                message = f"has image_id {brief(image_id)}, which is not among the images"
                hint = "add the image or remove the object"
                self._report("image-unknown", "annotations", position, message, hint)
                continue
            if (index := index_of.get(image_id)) is None:
                continue
            fault = _object_fault(category, crowd, box, categories, shift)
            if fault is None:
                rows.append((position, index, category + shift, bool(crowd)))
                boxes.append(box)
                continue
            name = images[index].name
            image = folder.path / (folder.missing.get(name) or name)
            shown_box = tuple(box) if fault[0] == "category-unknown" else None
            self._report(fault[0], "annotations", position, fault[1], fault[2], image=image, box=shown_box)
        if count := sum(isinstance(box, MaskBox) for box in boxes):
            message = f"has {count} object{'s' * (count > 1)} with a mask but no bbox: the box of the mask is used"
            self._report("box-from-mask", "", -1, message, fatal=False)
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        xywh = np.clip(np.array(boxes, dtype=np.float64).reshape(-1, 4), -1e9, 1e9)
        return table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(bool), xywh


def _object_fault(
    category: Any, crowd: Any, box: Any, categories: dict[int, str], shift: int
) -> tuple[str, str, str] | None:
    """Return code, message and hint of an object that cannot be used."""
    if crowd not in (None, 0, 1):
        return "annotation-record", f"has iscrowd {brief(crowd)}", "write 0 or 1"
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)):
        hint = "write four finite numbers, [x, y, width, height] in pixels"
        return "annotation-record", f"has bbox {brief(box)}", hint
    if not is_int64(category) or category + shift not in categories:
        message = f"has category_id {brief(category)}, which is not among the categories"
        return "category-unknown", message, "list the category, or correct the object"
    return None


def _is_group(records: dict[int, dict[str, Any]], annotations: Sequence[Any]) -> bool:
    """Whether category 0 has no objects and only names the group of all others, as in Roboflow's exports."""
    group = records.get(0)
    others = [record for record in records.values() if record is not group]
    if not group or not others or any(record.get("supercategory") != group["name"] for record in others):
        return False
    return not any(isinstance(record, dict) and record.get("category_id") == 0 for record in annotations)


def _repeated_files(content: dict[str, Any]) -> dict[int, tuple[int, bool]]:
    """Map image records that name the file of an earlier one to that one, and to whether their objects differ."""
    first: dict[str, int] = {}
    repeated: dict[int, int] = {}
    for position, record in enumerate(content["images"]):
        name = record.get("file_name") if isinstance(record, dict) and is_int64(record.get("id")) else None
        if isinstance(name, str) and (other := first.setdefault(name, position)) != position:
            repeated[position] = other
    objects: dict[int, set[str]] = {content["images"][one]["id"]: set() for pair in repeated.items() for one in pair}
    for record in content["annotations"] if repeated else ():
        if isinstance(record, dict) and is_int64(image_id := record.get("image_id")) and image_id in objects:
            objects[image_id].add(repr((record.get("category_id"), record.get("bbox"))))

    def objects_of(position: int) -> set[str]:
        return objects[content["images"][position]["id"]]

    return {position: (other, objects_of(position) != objects_of(other)) for position, other in repeated.items()}
