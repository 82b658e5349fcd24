"""The records of a split: every one that cannot be used is a finding, the others become arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np

from ...structures import Category
from ...utils.errors import UserError
from ..coco import MaskBox, four_numbers, is_text, only_groups, positive, record_name, records_of_one_file, whole
from ..discovery import best_image_folder
from ..formats import CocoSource
from ..problems import Source, renumbered
from .issues import Findings


@dataclass
class Picture:
    """One image of a split. position: in the COCO dict. declared: (height, width) of the record.

    Filled in when the file is looked at: size (height, width) upright; orientation: its EXIF value, 1 without;
    digest: of its pixels; dim: the highest value of a gray picture of 16 bits that uses 12 of them or fewer, else 0.
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
        """(height, width) of the file where known, else of the record."""
        return self.size or self.declared


@dataclass
class Split:
    """One split as far as it can be used.

    content: the COCO dict as read. categories: id → name. positions (N,), images (N,) indices into `pictures`,
    labels (N,) category ids, crowds (N,) bool, boxes (N, 4) xywh: the objects whose records are whole. shift: what was
    added to their category ids, where these are off by one; moved: category ids of the file → those to train on, where
    names decide. unlisted: images in the folder that no record names.
    """

    name: str
    source: Source
    content: dict[str, Any]
    categories: dict[int, str]
    folder: Path
    pictures: list[Picture]
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
        return self.source.file

    def record(self, index: int) -> str:
        """How an object is called in messages, with its image."""
        own = record_name(self.content["annotations"], int(self.positions[index]))
        return f"{own} of image {self.pictures[self.images[index]].name!r}"

    def place(self, index: int) -> dict[str, Any]:
        """The arguments of a finding that say which object it is and show it."""
        box = tuple(float(value) for value in self.boxes[index])
        return {
            "split": self.name, "section": "annotations", "position": int(self.positions[index]),
            "image": self.pictures[self.images[index]].path, "box": box,
        }  # fmt: skip


def read_split(source: Source, name: str, categories: Sequence[Category] | None, found: Findings) -> Split | None:
    """The usable part of a split; None where its file is none at all. categories: see `Source.read`."""

    def complain(code: str, file: Path, record: str, what: str, mend: str) -> None:
        if code != "image-unreadable":  # all images are looked at later
            found.add(code, file, record, what, mend, split=name)

    try:
        content = source.read(categories, complain)
    except UserError as error:
        what, _, mend = str(error).removeprefix(f"{source.file}: ").rpartition("; ")
        found.add("file-unreadable", source.file, "", what or mend, mend if what else "", split=name)
        return None
    listed = _categories(content, source.file, name, found)
    pictures, folder, unlisted = _pictures(content, source, name, found)
    shift = _off_by_one(content["annotations"], listed)
    if shift:
        what = f"has objects of classes {min(listed) - shift}, …, but categories {min(listed)}, …: ids are off by one"
        mend = "add 1 to the objects' category_id" if shift > 0 else "take 1 from the objects' category_id"
        found.add("category-off-by-one", source.file, "", what, mend, split=name)
    arrays = _objects(content, source.file, name, pictures, listed, shift, found)
    split = Split(name, source, content, listed, folder, pictures, *arrays, shift=shift, unlisted=unlisted)
    if categories is not None:
        _take_ids(split, categories, found)
    return split


def _take_ids(split: Split, categories: Sequence[Category], found: Findings) -> None:
    """Gives the objects the ids of the training set's classes, where these have the same names under other ids."""
    own = [Category(*item) for item in split.categories.items()]
    split.moved = moved = renumbered(own, categories, set(split.labels.tolist()))
    if not moved:
        return
    first = next(number for number, other in moved.items() if number != other)
    what = f"lists the training set's classes under other ids, such as {split.categories[first]!r} {first} instead of "
    found.add("category-renumbered", split.file, "", f"{what}{moved[first]}: names decide", split=split.name)
    split.categories = {moved[number]: name for number, name in split.categories.items() if number in moved}
    split.labels = np.array([moved[number] for number in split.labels.tolist()], dtype=np.int64)


def _categories(content: dict[str, Any], file: Path, split: str, found: Findings) -> dict[int, str]:
    listed: dict[int, str] = {}
    records: dict[int, dict[str, Any]] = {}
    places: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(content["categories"]):
        place = {"split": split, "section": "categories", "position": position}
        if not isinstance(record, dict) or not whole(record.get("id")) or not is_text(record.get("name")):
            found.add("category-record", file, f"categories[{position}]", "needs a whole number 'id' and a text 'name'",
                      "complete or remove it", **place)  # fmt: skip
        elif record["id"] in listed:
            what = f"({record['name']!r}) has the id {record['id']} of {listed[record['id']]!r}"
            found.add("category-id-duplicate", file, f"categories[{position}]", what, **place)
        else:
            listed[record["id"]] = record["name"]
            records[record["id"]] = record
            places[record["id"]] = place
    if only_groups(records, content["annotations"]):
        del listed[0]
    named: set[str] = set()
    for number, name in listed.items():
        if name in named:
            what = f"(id {number}) has the name {name!r} of another"
            place = places[number]
            found.add("category-name-duplicate", file, f"categories[{place['position']}]", what, **place)
        named.add(name)
    if not content["categories"]:
        found.add("category-record", file, "", "'categories' is empty", "list the classes with their ids and names",
                  split=split)  # fmt: skip
    return listed


def _pictures(
    content: dict[str, Any], source: Source, split: str, found: Findings
) -> tuple[list[Picture], Path, list[str]]:
    file = source.file
    pictures: list[Picture] = []
    ids: dict[int, int] = {}
    again = records_of_one_file(content)
    for position, record in enumerate(content["images"]):
        place: dict[str, Any] = {"split": split, "section": "images", "position": position}
        where = f"images[{position}]"
        if not isinstance(record, dict) or not whole(record.get("id")):
            found.add("image-record", file, where, "needs a whole number 'id'", "complete or remove it", **place)
            continue
        number, name = record["id"], record.get("file_name")
        if not isinstance(name, str) or not name:
            what = f"(id {number}) needs the 'file_name' of its image"
            found.add("image-record", file, where, what, "complete or remove it", **place)
            continue
        if number in ids:
            first = content["images"][ids[number]]["file_name"]
            what = f"({name!r}) has the id {number} of images[{ids[number]}] ({first!r})"
            found.add("image-id-duplicate", file, where, what, "give each image its own id", **place)
            continue
        if position in again:
            other, differ = again[position]
            what = f"(id {number}) names the file {name!r} of images[{other}]"
            what += ", and their objects differ" if differ else ""
            found.add("image-in-parts" if differ else "image-twice", file, where, what, **place)
        ids[number] = position
        height: Any = record.get("height")
        width: Any = record.get("width")
        declared = (height, width) if positive(height) and positive(width) else None
        pictures.append(Picture(position, number, name, Path(name), declared))
    if not content["images"]:
        found.add("image-record", file, "", "has no images", "a set needs at least one image", split=split)

    folder, missing, unlisted = _folder(source, [picture.name for picture in pictures], split, found)
    for picture in pictures:
        picture.path = folder / picture.name
        if way := missing.get(picture.name):
            found.add("image-name", file, f"images[{picture.position}]",
                      f"names the image {picture.name!r}, which is missing in {folder}, where {way!r} is",
                      split=split, section="images", position=picture.position)  # fmt: skip
            picture.name, picture.path = way, folder / way
        elif picture.name in missing:
            picture.missing = True
            found.add("image-missing", file, f"images[{picture.position}]",
                      f"names the image {picture.name!r}, which is missing in {folder}",
                      split=split, section="images", position=picture.position)  # fmt: skip
    return pictures, folder, unlisted


def _folder(source: Source, names: list[str], split: str, found: Findings) -> tuple[Path, dict[str, str], list[str]]:
    """The folder of the images, the names that it lacks, and its images that no record names; see `layouts`."""
    if not isinstance(source, CocoSource):
        folder = source.image_folder(names)
        return folder, {name: "" for name in names if not (folder / name).is_file()}, []
    try:
        return best_image_folder(source.file, source.root, source.split, source.data, names)
    except UserError as error:
        found.add("file-unreadable", source.file, "", str(error), "correct the setting", split=split)
        return source.file.parent, {}, []


def _objects(
    content: dict[str, Any], file: Path, split: str, pictures: list[Picture], listed: dict[int, str], shift: int,
    found: Findings,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    records = content["annotations"]
    image_at = {picture.id: index for index, picture in enumerate(pictures)}
    # Objects of an image whose own record is bad are reported with that record alone.
    known = {r.get("id") for r in content["images"] if isinstance(r, dict) and whole(r.get("id"))}
    seen: dict[Any, int] = {}
    rows: list[tuple[int, int, int, bool]] = []
    boxes: list[list[float]] = []
    for position, record in enumerate(records):
        place: dict[str, Any] = {"split": split, "section": "annotations", "position": position}
        where = record_name(records, position)
        if not isinstance(record, dict):
            found.add("annotation-record", file, where, "is no object", "export the annotations again", **place)
            continue
        own = record.get("id")
        if whole(own) and own in seen:
            what = f"has the id of annotations[{seen[own]}]"
            found.add("annotation-id-duplicate", file, where, what, **place)
        elif whole(own):
            seen[own] = position
        fields: list[Any] = [record.get(key) for key in ("image_id", "category_id", "iscrowd", "bbox")]
        image, category, crowd, box = fields
        if not whole(image) or image not in known:
            found.add(
                "image-unknown", file, where, f"has image_id {brief(image)}, which is not among the images", **place
            )
            continue
        if image not in image_at:
            continue
        place["image"] = pictures[image_at[image]].path
        if crowd not in (None, 0, 1):
            found.add("annotation-record", file, where, f"has iscrowd {brief(crowd)}", "write 0 or 1", **place)
            continue
        if not four_numbers(box):
            found.add("annotation-record", file, where, f"has bbox {brief(box)}",
                      "write four finite numbers, [x, y, width, height] in pixels", **place)  # fmt: skip
            continue
        if not whole(category) or category + shift not in listed:
            what = f"has category_id {brief(category)}, which is not among the categories"
            found.add("category-unknown", file, where, what, box=tuple(box), **place)
            continue
        rows.append((position, image_at[image], category + shift, bool(crowd)))
        boxes.append(box)
    if taken := sum(isinstance(box, MaskBox) for box in boxes):
        what = f"has {taken} object{'s' * (taken > 1)} with a mask but no bbox: the extent of the mask is taken"
        found.add("box-from-mask", file, "", what, split=split)
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    xywh = np.clip(np.array(boxes, dtype=np.float64).reshape(-1, 4), -1e9, 1e9)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(bool), xywh


def _off_by_one(records: Sequence[Any], listed: dict[int, str]) -> int:
    """What to add to the objects' category ids so that all are listed; 0 where that is no explanation."""
    named: list[Any] = [record.get("category_id") for record in records if isinstance(record, dict)]
    if not named or not listed or not all(whole(value) for value in named):
        return 0
    if (used := set(named)) <= listed.keys():
        return 0
    # Ids must be a run of numbers: with gaps, a missing category is the likelier fault.
    if sorted(listed) != list(range(min(listed), min(listed) + len(listed))):
        return 0
    return next((shift for shift in (1, -1) if {value + shift for value in used} <= listed.keys()), 0)
