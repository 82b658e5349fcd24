"""A COCO JSON file, checked record by record: what is wrong is one line that names the record and the mend."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NoReturn

import numpy as np

from ..structures import Category
from ..utils.errors import UserError

_NUMBER = re.compile("[0-9]{1,18}")


def read_json(path: Path) -> dict[str, Any]:
    """The file's dict with its three lists; masks are dropped while reading, or they would fill the memory.

    An object with a mask but no box gets a `MaskBox`.
    """
    if path.is_fifo():  # reading would wait for ever
        raise UserError(f"{path}: is a pipe; give a COCO JSON file that can be read")
    try:
        content = json.loads(path.read_bytes(), object_hook=_lean)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a COCO JSON file that can be read") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not valid JSON ({reason}); export the annotations again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not COCO JSON: a {type(content).__name__} instead of an object with 'images'")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise UserError(f"{path}: not COCO JSON: it has no list '{key}'; export the annotations as COCO detection")
    return content


def is_other_json(path: Path) -> bool:
    """Whether it is an object of neither images nor annotations, such as the notes that some tools export."""
    try:
        text = path.read_bytes() if path.is_file() else b""
        if b'"images"' in text or b'"annotations"' in text:  # a large file need not be parsed
            return False
        content = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and not content.keys() & {"images", "annotations"}


class MaskBox(list[float]):
    """The xywh box of an object whose record has none: the extent of its polygons or run lengths."""


def _lean(record: dict[str, Any]) -> dict[str, Any]:
    """Without the mask, of which the box is taken where the record has no other; ids 7.0 (pandas) and "7" are 7."""
    for key in ("id", "image_id", "category_id"):
        value = record.get(key)
        if (type(value) is float and value.is_integer()) or (isinstance(value, str) and _NUMBER.fullmatch(value)):
            record[key] = int(value)
    if record.get("iscrowd") in ("0", "1"):
        record["iscrowd"] = int(record["iscrowd"])
    if type(name := record.get("name")) is int:  # a class called 3
        record["name"] = str(name)
    mask = record.pop("segmentation", None)
    if record.get("bbox") not in (None, [], [0, 0, 0, 0]):
        return record
    if isinstance(mask, list) and mask and all(map(_is_polygon, mask)):
        x, y = ([value for polygon in mask for value in polygon[axis::2]] for axis in (0, 1))
        record["bbox"] = MaskBox([min(x), min(y), max(x) - min(x), max(y) - min(y)])
    elif isinstance(mask, dict):
        import hotcoco

        with suppress(ValueError, TypeError, KeyError, OverflowError):  # no run lengths: the record has no box
            record["bbox"] = MaskBox(hotcoco.mask.to_bbox(mask).tolist())
    return record


def _is_polygon(points: Any) -> bool:
    """Whether it is [x, y, x, y, …] of three points or more."""
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0 and all(map(_finite, points))


def whole(value: Any) -> bool:
    """Whether it is a whole number of 64 bits; True is none."""
    return type(value) is int and -(2**63) <= value < 2**63


def positive(value: Any) -> bool:
    """Whether it is a whole number above 0."""
    return whole(value) and value > 0


def is_text(value: Any) -> bool:
    """Whether it is a text that a file can hold: half of a surrogate pair is none."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def record_name(records: Sequence[Any], position: int) -> str:
    """An annotation as error messages call it."""
    record = records[position]
    if isinstance(record, dict) and isinstance(record.get("where"), str):
        return record["where"]  # of a set that was no COCO JSON
    own = f" (id {brief(record['id'])})" if isinstance(record, dict) and "id" in record else ""
    return f"annotations[{position}]{own}"


def read_categories(content: dict[str, Any], path: Path) -> tuple[Category, ...]:
    """Sorted by id, without an entry that has no objects and names only the group of the others (Roboflow's id 0)."""
    records: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(content["categories"]):
        place = f"{path}: categories[{position}]"
        if not isinstance(record, dict) or not whole(record.get("id")) or not is_text(record.get("name")):
            raise UserError(f"{place} needs a whole number 'id' and a text 'name'")
        if record["id"] in records:
            raise UserError(f"{place} ({record['name']!r}) has the id {record['id']} of another; give each its own")
        records[record["id"]] = record
    if not records:
        raise UserError(f"{path}: 'categories' is empty; list the classes with their ids and names")

    if only_groups(records, content["annotations"]):
        del records[0]
    return tuple(Category(id=key, name=records[key]["name"]) for key in sorted(records))


def only_groups(records: dict[int, dict[str, Any]], annotations: Sequence[Any]) -> bool:
    """Whether the category 0 has no objects and only names the group of all others."""
    group = records.get(0)
    others = [record for record in records.values() if record is not group]
    if not group or not others or any(record.get("supercategory") != group["name"] for record in others):
        return False
    return not any(isinstance(record, dict) and record.get("category_id") == 0 for record in annotations)


def used_categories(content: dict[str, Any]) -> set[int]:
    """Ids of the categories that have objects."""
    records: list[dict[str, Any]] = [record for record in content["annotations"] if isinstance(record, dict)]
    return {record["category_id"] for record in records if whole(record.get("category_id"))}


def read_images(content: dict[str, Any], path: Path) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    """Ids, file names and (height, width) of all images, 0 where a size is not given."""
    if not content["images"]:
        raise UserError(f"{path}: 'images' is empty; a set needs at least one image")
    positions: dict[int, int] = {}
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    for position, record in enumerate(content["images"]):
        place = f"{path}: images[{position}]"
        if not isinstance(record, dict) or not whole(record.get("id")):
            raise UserError(f"{place} needs a whole number 'id'")
        number, name = record["id"], record.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{place} (id {number}) needs the 'file_name' of its image")
        if number in positions:
            raise UserError(
                f"{place} ({name!r}) has the id {number} of images[{positions[number]}] "
                f"({names[positions[number]]!r}); give each image its own id"
            )
        positions[number] = position
        names.append(name)
        height: Any = record.get("height")
        width: Any = record.get("width")
        sizes.append((height, width) if positive(height) and positive(width) else (0, 0))
    for position, (other, differ) in records_of_one_file(content).items():
        if differ:  # each would teach, and expect, that the other's objects are background
            raise UserError(
                f"{path}: images[{position}] names the file {names[position]!r} of images[{other}], and their objects "
                "differ; merge the records, as deformable-detr check --fix does"
            )
    return list(positions), names, sizes


def records_of_one_file(content: dict[str, Any]) -> dict[int, tuple[int, bool]]:
    """Image records whose file an earlier one names: position → the earlier one's, and whether their objects differ."""
    first: dict[str, int] = {}
    again: dict[int, int] = {}
    for position, record in enumerate(content["images"]):
        name = record.get("file_name") if isinstance(record, dict) and whole(record.get("id")) else None
        if isinstance(name, str) and (other := first.setdefault(name, position)) != position:
            again[position] = other
    objects: dict[int, set[str]] = {content["images"][one]["id"]: set() for pair in again.items() for one in pair}
    for record in content["annotations"] if again else ():
        if isinstance(record, dict) and whole(number := record.get("image_id")) and number in objects:
            objects[number].add(repr((record.get("category_id"), record.get("bbox"))))

    def of(position: int) -> set[str]:
        return objects[content["images"][position]["id"]]

    return {position: (other, of(position) != of(other)) for position, other in again.items()}


def read_annotations(
    content: dict[str, Any], path: Path, image_ids: np.ndarray, categories: Sequence[Category]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every annotation, checked: image positions (N,), category ids (N,), crowds (N,) bool, boxes (N, 4) xywh."""
    records = content["annotations"]
    image_at = {number: position for position, number in enumerate(image_ids.tolist())}
    known = {category.id for category in categories}
    images, labels, crowds, boxes = [], [], [], []

    def fail(position: int, what: str) -> NoReturn:
        raise UserError(f"{path}: {record_name(records, position)} {what}")

    for position, record in enumerate(records):
        if not isinstance(record, dict):
            fail(position, "is no object; export the annotations again")
        image, category, crowd = record.get("image_id"), record.get("category_id"), record.get("iscrowd")
        if not whole(image) or image not in image_at:
            fail(
                position,
                f"has image_id {brief(image)}, which is not among the images; add the image or remove the record",
            )
        if not whole(category) or category not in known:
            fail(position, f"has category_id {brief(category)}, which is not among the categories; add or change it")
        if crowd not in (None, 0, 1):
            fail(position, f"has iscrowd {brief(crowd)}; write 0 or 1")
        box = record.get("bbox")
        if not four_numbers(box):
            fail(position, f"has bbox {brief(box)}; write four finite numbers, [x, y, width, height] in pixels")
        images.append(image_at[image])
        labels.append(category)
        crowds.append(bool(crowd))
        boxes.append(box)
    return (
        np.array(images, dtype=np.int64),
        np.array(labels, dtype=np.int64),
        np.array(crowds, dtype=bool),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
    )


def four_numbers(box: Any) -> bool:
    """Whether it is a list of four finite numbers."""
    return isinstance(box, list) and len(box) == 4 and all(_finite(value) for value in box)


def _finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def area_of(annotation: dict[str, Any]) -> float:
    """The record's area in square pixels; that of its box where it gives none."""
    area: Any = annotation.get("area")
    return area if _finite(area) else annotation["bbox"][2] * annotation["bbox"][3]
