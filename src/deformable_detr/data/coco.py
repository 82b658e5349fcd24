"""COCO JSON files."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ..config.schema import DataConfig
from ..structures import Category
from ..utils.errors import UserError
from ..utils.files import read_regular
from .annotation_files import to_numbers
from .discovery import ImageFolder, configured_annotations, find_image_folder, names_other_split, split_of
from .issues import Issue
from .matching import url_path
from .named import rotated_extent
from .records import MaskBox, RotatedBox, SwappedBox, TextId, is_finite, is_int64
from .segmentation import read_segmentation
from .source import BROKEN_MASK, AnnotationCache, ParsedAnnotations, Source

_DIGITS = re.compile("[0-9]{1,18}")
_SUBSET = re.compile(rb'"file_name"\s*:\s*"([^"/\\]+)(?:/|\\\\)|"split"\s*:\s*"([^"]+)"')


@dataclass(frozen=True)
class CocoSource(Source):
    """A COCO JSON file; see `Source`. The images are where `find_image_folder` finds them.

    Attributes:
        file: The file, with the name of the subset if it is only a part of it.
        path: The file itself.
        subset: The split's name in the file: 'split' of its images or the first folder of their names; '' for all.
    """

    file: Path
    path: Path = field(compare=False)
    root: Path = field(compare=False)
    split: str = field(compare=False)
    data: DataConfig = field(compare=False)
    subset: str = ""
    format: ClassVar[str] = "coco"

    @property
    def annotation_files(self) -> tuple[Path, ...]:
        return (self.path,)

    def parse(self, masks: bool = False) -> ParsedAnnotations:
        """Read a COCO JSON file. Masks are dropped or made compact while parsing, because they would fill the memory.

        An object with a mask but no box gets a `MaskBox`.

        Raises:
            UserError: The file cannot be read, is not JSON, or lacks one of the three lists.
        """
        try:
            data = read_regular(self.path)
            content = json.loads(data, object_hook=_clean_with_mask if masks else _clean)
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror or error}; give a COCO JSON file that can be read") from None
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.file}: not valid JSON ({reason}); export the annotations again") from None
        for key in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise UserError(f"{self.file}: not COCO JSON: it has no list '{key}'; export it as COCO detection")
        _number_text_ids(content)
        issues = self._select(content) if self.subset else ()
        return ParsedAnnotations(content, issues, hashlib.sha256(data).hexdigest())

    def _select(self, content: dict[str, Any]) -> list[Issue]:
        """Keep the images of the subset with their objects; the training split reports images of no split."""
        own = split_of(self.subset) or self.subset
        images = [record for record in content["images"] if isinstance(record, dict)]
        splits = {repr(record.get("id")): split_of(_subset_of(record)) or _subset_of(record) for record in images}
        objects = [(r, splits.get(repr(r.get("image_id")), own)) for r in content["annotations"] if isinstance(r, dict)]
        unused = sum(split_of(split) is None for _, split in objects if split != own)
        content["images"] = [record for record in images if splits[repr(record.get("id"))] == own]
        content["annotations"] = [record for record, split in objects if split == own]
        if not unused or self.split != self.data.train_split:
            return []
        message = f"has {unused} objects of images that are neither train, val nor test by their folder or 'split'"
        return [Issue("label-row", self.path, "", message, "move these images to one of the splits", objects=unused)]

    def to_coco(
        self, parsed: ParsedAnnotations, categories: Sequence[Category] | None, cache: AnnotationCache
    ) -> dict[str, Any]:
        """Return the COCO dict as it is in the file; masks as `parse` returns them."""
        return parsed.content

    def find_images(self, names: Sequence[str]) -> ImageFolder:
        """Find the folder of the images; see `find_image_folder`."""
        return find_image_folder(self.file, self.root, self.split, self.data, names)


def find_coco(file: Path, root: Path, split: str, data: DataConfig) -> CocoSource:
    """Return one split of a COCO JSON file: a part, if its images name their splits and the file's name does not."""
    whole = CocoSource(file, file, root, split, data)
    if configured_annotations(split, data) or names_other_split(file, "\0") or not file.is_file():
        return whole
    with suppress(OSError):
        names = {(folder or value).decode(errors="replace") for folder, value in _SUBSET.findall(read_regular(file))}
        subset = next((name for name in sorted(names) if split_of(name) and split_of(name) == split_of(split)), "")
        if subset and len(set(map(split_of, names)) - {None}) > 1:
            return replace(whole, file=file.with_name(f"{file.name} (subset {subset})"), subset=subset)
    return whole


def _subset_of(image: dict[str, Any]) -> str:
    split, name = image.get("split"), image.get("file_name")
    return (
        split if isinstance(split, str) else name.replace("\\", "/").partition("/")[0] if isinstance(name, str) else ""
    )


def _clean_with_mask(record: dict[str, Any]) -> dict[str, Any]:
    """Clean a record, and keep the usable part of its mask."""
    segmentation, reason = read_segmentation(record.get("segmentation"))
    record = _clean(record)
    if segmentation is not None:
        record["segmentation"] = segmentation
    if reason:
        record[BROKEN_MASK] = reason
    return record


def _clean(record: dict[str, Any]) -> dict[str, Any]:
    """Drop the mask, after taking a missing box from it, and accept 7.0 (pandas) and "7" as ids and numbers."""
    for key in ("id", "image_id", "category_id", "width", "height"):
        value = record.get(key)
        if (type(value) is float and value.is_integer()) or (isinstance(value, str) and _DIGITS.fullmatch(value)):
            record[key] = TextId(int(value), value) if isinstance(value, str) and key == "id" else int(value)
    if not record.get("file_name") and isinstance(url := record.get("coco_url"), str):  # LVIS
        record["file_name"] = url_path(url, 2)
    if record.get("iscrowd") in ("0", "1"):
        record["iscrowd"] = int(record["iscrowd"])
    if type(name := record.get("name")) is int:  # a class named 3
        record["name"] = str(name)
    mask = record.pop("segmentation", None)
    box: Any = record.get("bbox")
    if isinstance(box, str) or (isinstance(box, list) and any(isinstance(value, str) for value in box)):
        texts = box.strip("[]() ").replace(",", " ").split() if isinstance(box, str) else box
        box = record["bbox"] = to_numbers(texts) or box
    if box not in (None, [], [0, 0, 0, 0]):
        if isinstance(box, list) and len(box) == 4 and all(map(is_finite, box)) and min(box[2:]) < 0:
            x, y, w, h = box
            record["bbox"] = SwappedBox([min(x, x + w), min(y, y + h), abs(w), abs(h)])
        return _without_rotation(record)
    if isinstance(mask, list) and mask and all(map(_is_polygon, mask)):
        x, y = ([value for polygon in mask for value in polygon[axis::2]] for axis in (0, 1))
        record["bbox"] = MaskBox([min(x), min(y), max(x) - min(x), max(y) - min(y)])
    elif isinstance(mask, dict):
        import hotcoco

        with suppress(ValueError, TypeError, KeyError, OverflowError):  # invalid RLE: the record has no box
            record["bbox"] = MaskBox(hotcoco.mask.to_bbox(mask).tolist())
    return record


def _without_rotation(record: dict[str, Any]) -> dict[str, Any]:
    """Replace a box before CVAT's rotation by the extent after it."""
    box, attributes = record["bbox"], record.get("attributes")
    degrees: Any = attributes.get("rotation") if isinstance(attributes, dict) else None
    if is_finite(degrees) and degrees % 180 and isinstance(box, list) and len(box) == 4 and all(map(is_finite, box)):
        record["bbox"] = RotatedBox(rotated_extent(box, degrees))
        record["attributes"] = dict(attributes or {}, rotation=0)  # a repaired copy is read again
    return record


def _number_text_ids(content: dict[str, Any]) -> None:
    """Give images with text ids a `TextId` in their order, and categories an integer in the order of their texts."""
    for section, key in (("images", "image_id"), ("categories", "category_id")):
        records = [record for record in content[section] if isinstance(record, dict)]
        texts = list(dict.fromkeys(record["id"] for record in records if isinstance(record.get("id"), str)))
        if not texts:
            continue
        objects = [record for record in content["annotations"] if isinstance(record, dict)]
        used = [record.get("id") for record in records] + [record.get(key) for record in objects]
        taken = set(filter(is_int64, used))
        free = (number for number in itertools.count(1) if number not in taken)
        ids: dict[Any, int] = {
            text: TextId(next(free), text) for text in (texts if key == "image_id" else sorted(texts))
        }
        for field_name, owners in (("id", records), (key, objects)):
            for record in owners:
                if isinstance(text := record.get(field_name), str):
                    record[field_name] = ids.get(text, text)


def _is_polygon(points: Any) -> bool:
    """Return whether it is [x, y, x, y, …] of at least three points."""
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0 and all(map(is_finite, points))
