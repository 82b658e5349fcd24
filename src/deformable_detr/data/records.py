"""The records of a COCO dict as arrays; every record that cannot be used is reported."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Literal, Self

import numpy as np

from ..structures import Category
from ..utils.errors import UserError
from .discovery import ImageFolder
from .issues import Issue, OnIssue
from .named import rotated_boxes
from .source import Source
from .transforms import MIN_SIDE

Relation = Literal["same", "parts", "clash"]


class MaskBox(list[float]):
    """The xywh box of an object whose record has none: the extent of its mask."""


class RotatedBox(list[float]):
    """The xywh extent of an object whose record has a rotated box."""


class TextId(int):
    """The number of a record whose id is a text; messages show the text."""

    text: str

    def __new__(cls, number: int, text: str) -> Self:
        self = super().__new__(cls, number)
        self.text = text
        return self

    def __repr__(self) -> str:
        return repr(self.text)

    @staticmethod
    def in_file(value: int) -> int | str:
        """Return an id as it is in the file."""
        return value.text if isinstance(value, TextId) else value

    def __reduce__(self) -> tuple[Any, ...]:
        return TextId, (int(self), self.text)


class SwappedBox(list[float]):
    """The xywh box of an object whose record has a negative width or height: the box between its corners."""


@dataclass
class ImageRecord:
    """A usable image record. A check of the files fills in the values from `broken` on.

    Attributes:
        position: Index in the COCO dict.
        name: File name; if that file is missing, the one that is likely meant.
        path: The image file.
        declared: (height, width) from the record.
        missing: Whether there is no such file.
        broken: Whether the file cannot be read.
        size: (height, width) of the upright image, from the file.
        orientation: EXIF orientation; 1 if there is none.
        digest: Hash of the pixels.
        bits: Bits per sample; see `read_header`.
        brightest: Highest level, 0..255, if the image was decoded.
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
    bits: int = 8
    brightest: int | None = None


@dataclass
class Records:
    """The usable records of one split.

    Attributes:
        source: The files.
        content: The COCO dict.
        categories: Category id → name.
        images: One record per image.
        folder: Where the image files are.
        category_shift: Added to the objects' category ids because these are off by one; normally 0.
        positions: (N,) index of each object in the COCO dict.
        image_indices: (N,) index of each object's image in `images`.
        category_ids: (N,) ids after `category_shift`.
        crowds: (N,) bool, `iscrowd`.
        boxes: (N, 4) float64 xywh in pixels.
    """

    source: Source
    content: dict[str, Any]
    categories: dict[int, str]
    images: list[ImageRecord]
    folder: ImageFolder
    category_shift: int
    positions: np.ndarray
    image_indices: np.ndarray
    category_ids: np.ndarray
    crowds: np.ndarray
    boxes: np.ndarray

    @property
    def category_list(self) -> tuple[Category, ...]:
        """The categories, sorted by id."""
        return tuple(Category(int(key), name) for key, name in sorted(self.categories.items()))

    def object_name(self, index: int) -> str:
        """Return the name of an object in messages, with its image."""
        name = record_name(self.content["annotations"], int(self.positions[index]))
        return f"{name} of image {self.images[self.image_indices[index]].name!r}"


def is_finite(value: Any) -> bool:
    """Return whether it is a finite number; booleans are not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # math.isfinite raises for 10**400


def is_int64(value: Any) -> bool:
    """Return whether it is an integer of 64 bits; booleans are not."""
    return type(value) in (int, TextId) and -(2**63) <= value < 2**63


def record_name(records: Sequence[Any], position: int) -> str:
    """Return the name of an annotation in messages: its place in the label file, or its index and id."""
    record = records[position]
    if isinstance(record, dict) and isinstance(record.get("where"), str):
        return record["where"]
    own_id = f" (id {brief(record['id'])})" if isinstance(record, dict) and "id" in record else ""
    return f"annotations[{position}]{own_id}"


def clip_corners(corners: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip xyxy boxes (N, 4) to their images' (width, height) (N, 2); also return which of them (N,) keep an area."""
    clipped = np.clip(corners, 0, np.concatenate([limits, limits], axis=1))
    return clipped, np.min(clipped[:, 2:] - clipped[:, :2], axis=1) >= MIN_SIDE


def area_of(annotation: dict[str, Any]) -> float:
    """Return the record's area in square pixels; that of its box if it has none."""
    area: Any = annotation.get("area")
    return area if is_finite(area) else annotation["bbox"][2] * annotation["bbox"][3]


def read_records(content: dict[str, Any], source: Source, on_issue: OnIssue) -> Records:
    """Check every record of a COCO dict and turn the usable ones into arrays."""
    reader = _RecordReader(content, source, on_issue)
    categories = reader.categories()
    images = reader.images()
    folder = reader.locate(images)
    shift = reader.category_shift(categories)
    arrays = reader.objects(images, categories, shift)
    return Records(source, content, categories, images, folder, shift, *arrays)


class _RecordReader:
    """Reads categories, images and objects of one COCO dict, in this order."""

    def __init__(self, content: dict[str, Any], source: Source, on_issue: OnIssue) -> None:
        self.content, self.file, self.find_images, self.on_issue = content, source.file, source.find_images, on_issue
        self.is_coco = source.format == "coco"

    def _report(self, code: str, section: str, position: int, message: str, hint: str = "", **more: Any) -> None:
        name = record_name(self.content[section], position) if section == "annotations" else f"{section}[{position}]"
        self.on_issue(Issue(code, self.file, name, message, hint, section, position, **more))

    def _report_file(self, code: str, message: str, hint: str = "") -> None:
        self.on_issue(Issue(code, self.file, "", message, hint))

    def categories(self) -> dict[int, str]:
        positions: dict[int, int] = {}
        for position, record in enumerate(self.content["categories"]):
            fields = record if isinstance(record, dict) else {}
            if not is_int64(fields.get("id")) or not isinstance(fields.get("name"), str):
                self._report("category-record", "categories", position, "needs an integer 'id' and a text 'name'")
            elif record["id"] in positions:
                message = f"({record['name']!r}) has the id {record['id']} of categories[{positions[record['id']]}]"
                self._report("category-id-duplicate", "categories", position, message)
            else:
                positions[record["id"]] = position
        if not self.content["categories"]:
            self._report_file("category-record", "'categories' is empty", "list the classes with their ids and names")
        records = {key: self.content["categories"][position] for key, position in positions.items()}
        if _is_group(records, self.content["annotations"]):
            del records[0]
        names: set[str] = set()
        for key, record in records.items():
            if record["name"] in names:
                message = f"(id {key}) has the name {record['name']!r} of another"
                self._report("category-name-duplicate", "categories", positions[key], message)
            names.add(record["name"])
        return {key: record["name"] for key, record in records.items()}

    def images(self) -> list[ImageRecord]:
        images: list[ImageRecord] = []
        positions: dict[int, int] = {}
        same_file = repeated_files(self.content)
        objects = Counter(str(r.get("image_id")) for r in self.content["annotations"] if isinstance(r, dict))
        for position, record in enumerate(self.content["images"]):
            if not isinstance(record, dict) or not is_int64(record.get("id")):
                self._report("image-record", "images", position, "needs an integer 'id'")
                continue
            image_id, name = record["id"], record.get("file_name")
            if not isinstance(name, str) or not name:
                message = f"(id {image_id}) needs the 'file_name' of its image"
                self._report("image-record", "images", position, message, objects=objects.pop(str(image_id), 0))
                continue
            if image_id in positions:
                first = positions[image_id]
                first_name = self.content["images"][first]["file_name"]
                message = f"({name!r}) has the id {image_id} of images[{first}] ({first_name!r})"
                self._report("image-id-duplicate", "images", position, message)
                continue
            if position in same_file:
                first, relation = same_file[position]
                message = f"(id {image_id}) names the file {name!r} of images[{first}]"
                if relation == "same":
                    self._report("image-twice", "images", position, message)
                elif relation == "parts":  # each record would teach that the other's objects are background
                    message += ", and their objects differ"
                    merge = "merge the records, for example with deformable-detr check --fix"
                    self._report("image-in-parts", "images", position, message, merge)
                else:
                    message += ", and their objects differ: they may be of two pictures with one name"
                    export = "export again with a name per picture, or merge the records if they are of one picture"
                    self._report("image-in-parts", "images", position, message, export)
            positions[image_id] = position
            sides: tuple[Any, Any] = record.get("height"), record.get("width")
            declared = sides if all(is_int64(side) and side > 0 for side in sides) else None
            images.append(ImageRecord(position, image_id, name, Path(name), declared))
        if not self.content["images"]:
            hint = "add some, or move some of another split here with deformable-detr split"
            self._report_file("image-record", "has no images", hint)
        return images

    def locate(self, images: list[ImageRecord]) -> ImageFolder:
        """Find the folder of the images and complete their records."""
        try:
            folder = self.find_images([image.name for image in images])
        except UserError as error:
            self.on_issue(Issue.from_error("file-unreadable", self.file, error))
            folder = ImageFolder(self.file.parent)
        hint = ""
        if folder.searched and len(folder.missing) == len({image.name for image in images}):
            option = f" or set data.{folder.option}" if folder.option else ""
            hint = f"put the images there{option} (none was found in {', '.join(map(str, folder.searched))})"
        hint = folder.hint or hint
        for image in images:
            likely = folder.missing.get(image.name)
            message = f"names the image {image.name!r}, which is missing in {folder.path}"
            if likely:
                if (
                    self.is_coco or os.path.basename(os.path.splitext(likely)[0]) != image.name
                ):  # tables have no suffixes
                    self._report("image-name", "images", image.position, f"{message}: {likely!r} is read instead")
                image.name = likely
            elif likely is not None:
                self._report("image-missing", "images", image.position, message, hint)
                image.missing, hint = True, ""
            image.path = folder.path / image.name
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
            self._report_file("category-off-by-one", message, hint)
        return shift

    def objects(self, images: list[ImageRecord], categories: dict[int, str], shift: int) -> tuple[np.ndarray, ...]:
        index_of: dict[Any, int] = {image.id: index for index, image in enumerate(images)}
        # Objects of an unusable image record are not reported again.
        listed = {r.get("id") for r in self.content["images"] if isinstance(r, dict) and is_int64(r.get("id"))}
        first_positions: dict[int, int] = {}
        rows: list[tuple[int, int, int, bool]] = []
        boxes: list[list[float]] = []
        for position, record in enumerate(self.content["annotations"]):
            if not isinstance(record, dict):
                self._report("annotation-record", "annotations", position, "is not an object", objects=1)
                continue
            values: list[Any] = [record.get(key) for key in ("id", "image_id", "category_id", "iscrowd", "bbox")]
            own_id, image_id, category, crowd, box = values
            if is_int64(own_id) and (first := first_positions.setdefault(own_id, position)) != position:
                message = f"has the id of annotations[{first}]"
                self._report("annotation-id-duplicate", "annotations", position, message)
            if not is_int64(image_id) or image_id not in listed:
                message = f"has image_id {brief(image_id)}, which is not among the images"
                self._report("image-unknown", "annotations", position, message, objects=1)
                continue
            if (index := index_of.get(image_id)) is None:
                continue
            image = images[index].path
            if crowd not in (None, 0, 1):
                message = f"has iscrowd {brief(crowd)} instead of 0 or 1"
                self._report("annotation-record", "annotations", position, message, image=image, objects=1)
            elif not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)):
                message = f"has bbox {brief(box)} instead of four finite numbers [x, y, width, height] in pixels"
                self._report("annotation-record", "annotations", position, message, image=image, objects=1)
            elif not is_int64(category) or category + shift not in categories:
                message = f"has category_id {brief(category)}, which is not among the categories"
                details: dict[str, Any] = {"image": image, "box": tuple(box), "objects": 1}
                self._report("category-unknown", "annotations", position, message, **details)
            else:
                if isinstance(box, SwappedBox):
                    message = "has a negative width or height; the box between its corners is used"
                    self._report("box-swapped", "annotations", position, message, image=image, box=tuple(box))
                rows.append((position, index, category + shift, bool(crowd)))
                boxes.append(box)
        if count := sum(isinstance(box, MaskBox) for box in boxes):
            message = f"has {count} object{'s' * (count > 1)} with a mask but no bbox: the box of the mask is used"
            self._report_file("box-from-mask", message)
        if count := sum(isinstance(box, RotatedBox) for box in boxes):
            self.on_issue(rotated_boxes(count, self.file))
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        xywh = np.clip(np.array(boxes, dtype=np.float64).reshape(-1, 4), -1e9, 1e9)
        return table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(bool), xywh


def _is_group(records: dict[int, dict[str, Any]], annotations: Sequence[Any]) -> bool:
    """Return whether category 0 has no objects and only names the group of all others, as in Roboflow's exports."""
    group = records.get(0)
    others = [record for record in records.values() if record is not group]
    if not group or not others or any(record.get("supercategory") != group["name"] for record in others):
        return False
    return not any(isinstance(record, dict) and record.get("category_id") == 0 for record in annotations)


def repeated_files(content: dict[str, Any]) -> dict[int, tuple[int, Relation]]:
    """Map image records that name the file of an earlier one to that one, and to what their objects say.

    'same': equal objects. 'parts': they complete each other. 'clash': they may be two pictures with one name, because
    each has objects of a class that the other has too, or the sizes differ, or because that holds for another name.
    """
    first: dict[str, int] = {}
    records: dict[int, dict[str, Any]] = {}
    repeated: dict[int, int] = {}
    for position, record in enumerate(content["images"]):
        if isinstance(record, dict) and is_int64(record.get("id")) and isinstance(record.get("file_name"), str):
            records[position] = record
            if (other := first.setdefault(record["file_name"], position)) != position:
                repeated[position] = other
    objects: dict[int, set[tuple[str, str]]] = {records[one]["id"]: set() for pair in repeated.items() for one in pair}
    for record in content["annotations"] if repeated else ():
        if isinstance(record, dict) and is_int64(image_id := record.get("image_id")) and image_id in objects:
            objects[image_id].add((repr(record.get("category_id")), repr(record.get("bbox"))))

    def relation(record: dict[str, Any], other: dict[str, Any]) -> Relation:
        mine, theirs = objects[record["id"]], objects[other["id"]]
        new, old = mine - theirs, theirs - mine
        sizes_differ = any(record.get(side, 0) != other.get(side, 0) for side in ("height", "width"))
        if (new or old) and sizes_differ and {"height", "width"} <= record.keys() & other.keys():
            return "clash"
        shared = {label for label, _ in new} & {label for label, _ in old}
        return "clash" if shared else "parts" if new or old else "same"

    relations: dict[int, Relation] = {}
    for position, other in repeated.items():
        relations[position] = relation(records[position], records[other])
    if "clash" in relations.values():  # the same export wrote the others
        relations |= {position: "clash" for position, kind in relations.items() if kind == "parts"}
    return {position: (other, relations[position]) for position, other in repeated.items()}
