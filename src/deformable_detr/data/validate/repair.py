"""A repaired copy of a data set, as COCO JSON in Roboflow's layout; the original is only read."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ...utils.errors import UserError
from ...utils.files import write_text
from ...utils.images import TRANSPOSED_ORIENTATIONS
from ..discovery import ROBOFLOW
from ..records import MaskBox, is_int64, record_name
from . import Report
from .annotations import ImageRecord, Split
from .boxes import clipped, sizes_of, unit_fault
from .issues import OVERHANG

# Kinds whose record is left out of the copy. Objects of an image that is left out go with it.
LEFT_OUT = {
    "image-record", "image-id-duplicate", "image-missing", "image-unreadable", "leak", "category-record",
    "category-id-duplicate", "category-unknown", "annotation-record", "image-unknown",
}  # fmt: skip
NOT_READ = {"label-row", "label-unreadable", "image-record", "image-missing"}  # what readers of YOLO and VOC pass over
CHANGES = "changes.jsonl"  # not .json: a folder's only JSON file may be taken for annotations
SAME_SHAPE = 0.02  # relative difference of the two scales up to which an image counts as resized after labeling

Change = dict[str, Any]


@contextmanager
def new_copy(data: Path, out: Path, option: str) -> Iterator[None]:
    """Makes the folder of the copy, and empties or removes it where what then writes it fails.

    Raises `UserError` where it is in the set, holds anything, or cannot be written.
    """
    existed = out.exists()
    _prepare_copy(data, out, option)
    try:
        yield
    except BaseException as error:
        for path in out.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        if not existed:
            out.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{option} {out}: cannot be written: {error.strerror or error}") from None
        raise


def _prepare_copy(data: Path, out: Path, option: str) -> None:
    root = data.expanduser()
    copy, original = Path(os.path.realpath(out)), Path(os.path.realpath(root if root.is_dir() else root.parent))
    inside = copy == original or original in copy.parents
    if inside:
        raise UserError(f"{option} {out}: lies in the data set; name a folder elsewhere")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{option} {out}: is not empty; name a new folder")
    except OSError as error:
        raise UserError(f"{option} {out}: cannot be written: {error.strerror or error}") from None


def repair(report: Report, out: Path) -> list[Change]:
    """Writes the copy into the empty folder `out`, with the list of changes, and returns these.

    Images are hard links where the file system has them, else copies.
    """
    changes: list[Change] = []
    for split in report.splits:
        folder = out / split.name
        folder.mkdir(parents=True)
        write_annotations(folder, _Repair(report, split, changes).content(folder))
    write_text(out / CHANGES, "".join(json.dumps(change, ensure_ascii=False) + "\n" for change in changes))
    return changes


def write_annotations(folder: Path, content: dict[str, Any]) -> None:
    """The COCO dict as the folder's annotation file. What is no text in a name becomes JSON's own \\udc80."""
    text = json.dumps(content, ensure_ascii=False)
    (folder / ROBOFLOW).write_text(text, encoding="utf-8", errors="backslashreplace")


class _Repair:
    """The repair of one split; `changes` gets every change."""

    def __init__(self, report: Report, split: Split, changes: list[Change]) -> None:
        self.split, self.changes = split, changes
        self.findings = [finding for finding in report.findings if finding.split == split.name]
        self.left_out: dict[str, set[int]] = defaultdict(set)
        for finding in self.findings:
            if finding.code in LEFT_OUT and finding.position >= 0:
                if finding.position not in self.left_out[finding.section]:
                    self.tell(finding.code, f"{finding.section}[{finding.position}]", f"left out: {finding.what}")
                self.left_out[finding.section].add(finding.position)
            elif finding.code in NOT_READ and finding.position < 0:
                self.tell(finding.code, f"{finding.file} {finding.record}".strip(), f"left out: {finding.what}")

    def tell(self, code: str, record: str, change: str) -> None:
        self.changes.append({"split": self.split.name, "code": code, "record": record, "change": change})

    def content(self, folder: Path) -> dict[str, Any]:
        """The COCO dict of the copy, its images put into `folder`."""
        split = self.split
        raw = self._raw()
        mixed = self._mixed_ids()
        kept = [p for p in split.pictures if p.position not in self.left_out["images"] and p.id not in mixed]
        kept, merged = self._merged(kept)
        images = []
        names: set[str] = {ROBOFLOW}
        for picture in kept:
            record = dict(raw["images"][picture.position])
            if record["file_name"] != picture.name:
                self.tell("image-name", f"images[{picture.position}]", f"{record['file_name']!r} → {picture.name!r}")
            record["file_name"] = _put(picture.path, folder, _own_name(picture, names))
            if (size := picture.size) is not None and size != picture.declared:
                if picture.declared is not None:
                    self.tell("image-size", f"images[{picture.position}]", f"size {picture.declared} → {size}")
                record["height"], record["width"] = size
            images.append(record)
        categories = [
            record for position, record in enumerate(raw["categories"]) if position not in self.left_out["categories"]
        ]
        if moved := split.moved:
            changed = ", ".join(f"{number} → {other}" for number, other in moved.items() if number != other)
            self.tell("category-renumbered", split.file.name, f"category ids {changed}")
            categories = [record | {"id": moved[record["id"]]} for record in categories if record["id"] in moved]
        annotations = self._annotations(raw["annotations"], {picture.id: picture.id for picture in kept} | merged)
        rest = {key: raw[key] for key in raw if key not in ("images", "annotations", "categories")}
        return {**rest, "images": images, "annotations": annotations, "categories": categories}

    def _merged(self, pictures: list[ImageRecord]) -> tuple[list[ImageRecord], dict[int, int]]:
        """The pictures, each file once; and the ids of the records left out → the ids that their objects get."""
        first: dict[str, ImageRecord] = {}
        merged: dict[int, int] = {}
        for picture in pictures:
            if (other := first.setdefault(picture.name, picture)) is not picture:
                merged[picture.id] = other.id
                change = f"merged into images[{other.position}], which names {picture.name!r} too"
                self.tell("image-twice", f"images[{picture.position}]", change)
        return list(first.values()), merged

    def _raw(self) -> dict[str, Any]:
        """The records as the check has them, with their masks, which it does without."""
        read = self.split.content
        if self.split.source.format != "coco":
            return read
        raw = json.loads(self.split.file.read_bytes())
        pairs = zip(raw["annotations"], read["annotations"], strict=True)
        rest = {key: read[key] for key in ("images", "categories")}
        return raw | rest | {"annotations": [own | lean if isinstance(lean, dict) else lean for own, lean in pairs]}

    def _mixed_ids(self) -> set[int]:
        """Ids of images whose objects cannot be told apart, because two different files have the id."""
        records = self.split.content["images"]
        mixed = set()
        for finding in self.findings:
            if finding.code == "image-id-duplicate":
                record = records[finding.position]
                first = next(r for r in records if isinstance(r, dict) and r.get("id") == record["id"])
                if first.get("file_name") != record["file_name"]:
                    mixed.add(record["id"])
                    self.tell(finding.code, f"images with id {record['id']}", "left out with their objects")
        return mixed

    def _annotations(self, records: list[Any], image_ids: dict[int, int]) -> list[dict[str, Any]]:
        split = self.split
        kept: list[int] = [  # indices of the whole records whose image stays
            index
            for index, position in enumerate(split.positions.tolist())
            if split.pictures[split.images[index]].id in image_ids and position not in self.left_out["annotations"]
        ]
        objects = [(int(split.positions[index]), index) for index in kept]
        boxes, changed = self._boxes(np.array(kept, dtype=np.int64))
        ids, seen, result = _Ids(records), set(), []
        if split.shift:
            self.tell("category-off-by-one", split.file.name, f"category_id {split.shift:+d} for all objects")
        for (position, index), box, why in zip(objects, boxes, changed, strict=True):
            record = {key: value for key, value in records[position].items() if key != "where"}
            record["category_id"] = int(split.labels[index])
            record["image_id"] = image_ids[record["image_id"]]
            name = record_name(split.content["annotations"], position)
            if box is None:
                self.tell("box-outside", name, f"left out: bbox {record['bbox']} has no area inside its image")
                continue
            key = (record["image_id"], record["category_id"], *np.rint(np.array(box) * 100).tolist())
            if key in seen and not record.get("iscrowd"):
                self.tell("box-duplicate", name, "left out: the box and class of another")
                continue
            seen.add(key)
            if isinstance(record["bbox"], MaskBox):
                self.tell("box-from-mask", name, f"bbox {record['bbox']}, the extent of its mask")
            if why:
                self.tell(why, name, f"bbox {record['bbox']} → {box}")
                record |= {"bbox": box, "area": box[2] * box[3]}
                if why == "image-size" and "segmentation" in record:
                    record["segmentation"] = self._outline(record["segmentation"], int(split.images[index]))
            result.append(record)
        return self._numbered(result, ids)

    def _numbered(self, records: list[dict[str, Any]], ids: _Ids) -> list[dict[str, Any]]:
        for record in records:
            if (number := ids.of(record)) != record.get("id"):
                self.tell("annotation-id-duplicate", f"annotation of image {record['image_id']}", f"id {number}")
                record["id"] = number
        return records

    def _outline(self, polygons: Any, image: int) -> list[list[float]]:
        """Polygons moved as the boxes of their image are; none where they are run lengths, which do not move so."""
        picture, moved = self.split.pictures[image], []
        for polygon in polygons if isinstance(polygons, list) else []:
            points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
            boxes = np.concatenate([points, np.zeros_like(points)], axis=1)
            found = _moved(boxes, picture.declared, picture.size, picture.orientation)  # type: ignore[arg-type]
            assert found is not None  # the boxes were moved
            moved.append(found[:, :2].round(4).reshape(-1).tolist())
        return moved

    def _boxes(self, kept: np.ndarray) -> tuple[list[list[float] | None], list[str]]:
        """xywh of the objects in the copy, None for those without an area; and why one was changed, '' where not."""
        split = self.split
        boxes, crowds = split.boxes[kept].copy(), split.crowds[kept]
        reasons = np.full(len(kept), "", dtype=object)
        limits = sizes_of(split)[split.images[kept]]
        unit = unit_fault(boxes[~crowds], limits[~crowds]) if split.source.format == "coco" else ""
        if unit == "normalized":
            boxes *= np.concatenate([limits, limits], axis=1)
            reasons[:] = "boxes-normalized"
        elif unit == "corners":
            boxes[:, 2:] -= boxes[:, :2]
            reasons[:] = "boxes-corners"
        for index in _drawn_before(split, boxes, split.images[kept], crowds):
            picture, mine = split.pictures[index], split.images[kept] == index
            moved = _moved(boxes[mine], picture.declared, picture.size, picture.orientation)  # type: ignore[arg-type]
            if moved is not None:
                boxes[mine] = moved
                reasons[mine] = "image-size"
        corners, inside, _ = clipped(boxes, limits)
        x, y, w, h = boxes.T
        over = np.max(np.stack([-x, -y, x + w - limits[:, 0], y + h - limits[:, 1]]), axis=0, initial=0)
        cut = inside & (over > OVERHANG)
        boxes[cut] = np.concatenate([corners[cut, :2], corners[cut, 2:] - corners[cut, :2]], axis=1)
        reasons[cut & (reasons == "")] = "box-overhang"
        keep = inside | crowds
        return [
            box if stays else None for box, stays in zip(boxes.round(4).tolist(), keep, strict=True)
        ], reasons.tolist()


class _Ids:
    """An id for each object: its own where no other had it before, else a fresh one."""

    def __init__(self, records: list[Any]) -> None:
        numbers = [record["id"] for record in records if isinstance(record, dict) and is_int64(record.get("id"))]
        self.next = max(numbers, default=0) + 1
        self.taken: set[int] = set()

    def of(self, record: dict[str, Any]) -> int:
        number = record.get("id")
        if not isinstance(number, int) or not is_int64(number) or number in self.taken:
            number, self.next = self.next, self.next + 1
        self.taken.add(number)
        return number


def _drawn_before(split: Split, boxes: np.ndarray, images: np.ndarray, crowds: np.ndarray) -> list[int]:
    """Pictures that are not of their record's size, and whose xywh boxes were drawn on one that was.

    Boxes that reach out of the record's size and fit the file prove that only the record is wrong; where they fit both
    or neither, most of the others decide.
    """
    votes: dict[int, int] = {}
    for index, picture in enumerate(split.pictures):
        if picture.size is None or picture.declared is None or picture.declared == picture.size:
            continue
        far = (boxes[:, :2] + boxes[:, 2:])[(images == index) & ~crowds].max(axis=0, initial=0) - OVERHANG
        fits = [int(far[0] <= width and far[1] <= height) for height, width in (picture.declared, picture.size)]
        votes[index] = fits[0] - fits[1]
    usual = sum(votes.values())
    return [index for index, vote in votes.items() if vote > 0 or (vote == 0 and usual >= 0)]


def _moved(boxes: np.ndarray, before: tuple[int, int], size: tuple[int, int], orientation: int) -> np.ndarray | None:
    """xywh boxes that were drawn on a picture of (height, width) `before` as they lie on the one of `size`.

    None where the one is not the other turned as EXIF says, nor resized.
    """
    (height, width), (own_height, own_width) = size, before
    if orientation in TRANSPOSED_ORIENTATIONS and before == size[::-1]:
        return _turned(boxes, own_height, own_width, orientation)
    across, down = width / own_width, height / own_height
    if abs(across / down - 1) > SAME_SHAPE:
        return None
    return boxes * np.array([across, down, across, down])


def _turned(boxes: np.ndarray, height: int, width: int, orientation: int) -> np.ndarray:
    """Boxes in a stored picture of height × width as they lie once it is turned upright (EXIF values 5 to 8)."""
    x, y, w, h = boxes.T
    right, bottom = width - x - w, height - y - h
    new_x, new_y = {5: (y, x), 6: (bottom, x), 7: (bottom, right), 8: (y, right)}[orientation]
    return np.stack([new_x, new_y, h, w], axis=1)


def _own_name(picture: ImageRecord, taken: set[str]) -> str:
    """A file name inside the split's folder that no other picture has."""
    path = PurePath(picture.name)
    name = path.name if path.is_absolute() or ".." in path.parts else str(path)
    stem, suffix = os.path.splitext(name)
    number = 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    taken.add(name)
    return name


def _put(source: Path, folder: Path, name: str) -> str:
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), place)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, place)
    return name
