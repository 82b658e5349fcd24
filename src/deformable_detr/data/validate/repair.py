"""Write a repaired copy of a dataset as COCO JSON in Roboflow's layout; the original is only read."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ...utils.errors import UserError
from ...utils.files import read_regular, write_text
from ...utils.images import TRANSPOSED_ORIENTATIONS
from ...utils.progress import progress_bar
from ...utils.rle import resize_mask
from ..discovery import ROBOFLOW
from ..issues import OVERHANG
from ..records import ImageRecord, MaskBox, RotatedBox, SwappedBox, is_int64, record_name, repeated_files
from ..segmentation import Segmentation, read_segmentation
from ..source import BROKEN_MASK
from . import Report
from .annotations import Split
from .boxes import box_overhang, clip_boxes, object_limits, wrong_unit
from .mask_repair import clip_mask, turn_mask

# Issue types whose record is dropped. The objects of a dropped image are dropped too.
DROPPED = {
    "image-record", "image-id-duplicate", "image-missing", "image-unreadable", "leak", "category-record",
    "category-id-duplicate", "category-unknown", "annotation-record", "image-unknown",
}  # fmt: skip
# Issue types of label files, which readers have left out or corrected before the check.
SKIPPED_BY_READERS = {
    "label-row", "label-unreadable", "label-unmatched", "image-record", "image-missing", "image-format",
    "annotations-unread", "outside-splits",
}  # fmt: skip
CORRECTED_BY_READERS = {"label-name", "label-confidence", "image-name", "box-swapped", "box-rotated", "path-moved"}
REPAIRED_MASKS = {"mask-broken", "mask-empty", "mask-outside"}
CHANGES = "changes.jsonl"  # not .json, because the only JSON file of a folder can be read as its annotations
MAX_ASPECT_CHANGE = 0.02  # above it, an image is not a resized version of the labeled one

Change = dict[str, Any]


@contextmanager
def new_copy(data: Path, out: Path, option: str) -> Iterator[None]:
    """Create the folder of a copy; remove its content if the code inside fails.

    Raises UserError if the folder lies in the dataset, is not empty, or cannot be written.
    """
    root, existed = data.expanduser(), out.exists()
    copy, original = Path(os.path.realpath(out)), Path(os.path.realpath(root if root.is_dir() else root.parent))
    if copy == original or original in copy.parents:
        raise UserError(f"{option} {out}: lies in the dataset; name a folder elsewhere")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{option} {out}: is not empty; name a new folder")
        try:
            yield
        except BaseException:
            for path in out.iterdir():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            if not existed:
                out.rmdir()
            raise
    except OSError as error:
        raise UserError(f"{option} {out}: cannot be written: {error.strerror or error}") from None


def repair(report: Report, out: Path, progress: bool = False) -> list[Change]:
    """Write the repaired copy and its changes.jsonl into the empty folder `out`, and return the changes.

    Images are hard links if the file system supports them, otherwise copies.
    """
    changes: list[Change] = []
    for split in report.splits:
        folder = out / split.name
        folder.mkdir(parents=True)
        with progress_bar(len(split.images), "images", f"copy {split.name}", progress, keep=False) as bar:
            write_annotations(folder, _Repair(report, split, changes, bar.update).content(folder))
    write_text(out / CHANGES, "".join(json.dumps(change, ensure_ascii=False) + "\n" for change in changes))
    return changes


def write_annotations(folder: Path, content: dict[str, Any]) -> None:
    """Write a COCO dict as the annotation file of a folder; undecodable bytes of file names are escaped."""
    text = json.dumps(content, ensure_ascii=False, default=np.ndarray.tolist)
    (folder / ROBOFLOW).write_text(text, encoding="utf-8", errors="backslashreplace")


class _Repair:
    """The repair of one split; appends each change to `changes`."""

    def __init__(
        self, report: Report, split: Split, changes: list[Change], on_image: Callable[[], object] = lambda: None
    ) -> None:
        self.split, self.changes, self.on_image = split, changes, on_image
        self.issues = [issue for issue in report.issues if issue.split == split.name]
        self.dropped: dict[str, set[int]] = defaultdict(set)  # positions by section
        self.mask_codes: dict[int, list[str]] = defaultdict(list)  # issues of masks to repair, by position
        for issue in self.issues:
            if issue.code in REPAIRED_MASKS:
                self.mask_codes[issue.position].append(issue.code)
            if issue.code in DROPPED and issue.position >= 0:
                if issue.position not in self.dropped[issue.section]:
                    self.log(issue.code, f"{issue.section}[{issue.position}]", f"dropped: {issue.message}")
                self.dropped[issue.section].add(issue.position)
            elif issue.code in SKIPPED_BY_READERS | CORRECTED_BY_READERS and issue.position < 0:
                change = f"dropped: {issue.message}" if issue.code in SKIPPED_BY_READERS else issue.message
                self.log(issue.code, f"{issue.file} {issue.record}".strip(), change)

    def log(self, code: str, record: str, change: str) -> None:
        self.changes.append({"split": self.split.name, "code": code, "record": record, "change": change})

    def content(self, folder: Path) -> dict[str, Any]:
        """Link the images into `folder` and return the COCO dict of the copy."""
        raw = self._raw()
        ambiguous = self._ambiguous_ids()
        dropped = self.dropped["images"]
        kept = [record for record in self.split.images if record.position not in dropped and record.id not in ambiguous]
        records, image_ids = self._merge_records(kept)
        names: set[str] = {ROBOFLOW}
        images = [self._image(record, raw["images"][record.position], folder, names) for record in records]
        categories = self._categories(raw["categories"])
        annotations = self._annotations(raw["annotations"], image_ids)
        return raw | {"images": images, "annotations": annotations, "categories": categories}

    def _raw(self) -> dict[str, Any]:
        """Return the records that were checked, with the masks of the file as they are."""
        checked = self.split.content
        if self.split.source.format != "coco":
            return checked
        raw = json.loads(read_regular(self.split.file))
        pairs = zip(raw["annotations"], checked["annotations"], strict=True)
        annotations = [
            own | {key: value for key, value in parsed.items() if key not in ("segmentation", BROKEN_MASK)}
            if isinstance(parsed, dict)
            else parsed
            for own, parsed in pairs
        ]
        return raw | {"images": checked["images"], "categories": checked["categories"], "annotations": annotations}

    def _ambiguous_ids(self) -> set[int]:
        """Return the ids of images whose objects may be those of another picture with their id or file name."""
        records = self.split.content["images"]
        ambiguous = set()
        for issue in self.issues:
            if issue.code == "image-id-duplicate":
                record = records[issue.position]
                first = next(r for r in records if isinstance(r, dict) and r.get("id") == record["id"])
                if first.get("file_name") != record["file_name"]:
                    ambiguous.add(record["id"])
                    self.log(issue.code, f"images with id {record['id']}", "dropped with their objects")
        for position, (first, relation) in repeated_files(self.split.content).items():
            if relation == "clash":
                ambiguous |= {records[position]["id"], records[first]["id"]}
                change = f"dropped with their objects: {records[first]['file_name']!r} may be either picture"
                self.log("image-in-parts", f"images[{first}] and images[{position}]", change)
        return ambiguous

    def _merge_records(self, records: list[ImageRecord]) -> tuple[list[ImageRecord], dict[int, int]]:
        """Keep one record per file; also return each id → the id of the record that is kept."""
        first: dict[str, ImageRecord] = {}
        image_ids: dict[int, int] = {}
        for record in records:
            other = first.setdefault(record.name, record)
            image_ids[record.id] = other.id
            if other is not record:
                change = f"merged into images[{other.position}], which also names {record.name!r}"
                self.log("image-twice", f"images[{record.position}]", change)
        return list(first.values()), image_ids

    def _image(self, record: ImageRecord, raw: dict[str, Any], folder: Path, names: set[str]) -> dict[str, Any]:
        position = f"images[{record.position}]"
        self.on_image()
        if raw["file_name"] != record.name:
            self.log("image-name", position, f"{raw['file_name']!r} → {record.name!r}")
        image = raw | {"file_name": _link_image(record.path, folder, _unique_name(record, names))}
        if record.size is not None and record.size != record.declared:
            if record.declared is not None:
                self.log("image-size", position, f"size {record.declared} → {record.size}")
            image["height"], image["width"] = record.size
        return image

    def _categories(self, raw: list[Any]) -> list[dict[str, Any]]:
        records = [record for position, record in enumerate(raw) if position not in self.dropped["categories"]]
        if new_ids := self.split.remapped:
            changed = ", ".join(f"{old} → {new}" for old, new in new_ids.items() if old != new)
            self.log("category-renumbered", self.split.file.name, f"category ids {changed}")
            records = [record | {"id": new_ids[record["id"]]} for record in records if record["id"] in new_ids]
        return records

    def _annotations(self, raw: list[Any], image_ids: dict[int, int]) -> list[dict[str, Any]]:
        split = self.split
        image_kept = np.array([image.id in image_ids for image in split.images], dtype=bool)[split.image_indices]
        dropped = np.isin(split.positions, list(self.dropped["annotations"]))
        kept = np.flatnonzero(image_kept & ~dropped)
        boxes, reasons = self._boxes(kept)
        if split.category_shift:
            self.log("category-off-by-one", split.file.name, f"category_id {split.category_shift:+d} for all objects")
        seen: set[tuple[Any, ...]] = set()
        annotations = []
        for index, box, reason in zip(kept.tolist(), boxes, reasons, strict=True):
            position = int(split.positions[index])
            name = record_name(split.content["annotations"], position)
            record = {key: value for key, value in raw[position].items() if key not in ("where", BROKEN_MASK)}
            record |= {"category_id": int(split.category_ids[index]), "image_id": image_ids[record["image_id"]]}
            if box is None:
                self.log("box-outside", name, f"dropped: bbox {record['bbox']} has no area inside its image")
                continue
            key = (record["image_id"], record["category_id"], *np.rint(np.array(box) * 100).tolist())
            if key in seen and not record.get("iscrowd"):
                self.log("box-duplicate", name, "dropped: another object has its box and class")
                continue
            seen.add(key)
            if isinstance(record["bbox"], SwappedBox):
                self.log("box-swapped", name, f"bbox {record['bbox']}, without its negative size")
            if isinstance(record["bbox"], RotatedBox):
                self.log("box-rotated", name, f"bbox {record['bbox']}, the extent of its rotated box")
            if isinstance(record["bbox"], MaskBox):
                self.log("box-from-mask", name, f"bbox {record['bbox']}, the extent of its mask")
            if reason:
                self.log(reason, name, f"bbox {record['bbox']} → {box}")
                record |= {"bbox": box, "area": box[2] * box[3]}
            self._repair_mask(record, index, reason)
            annotations.append(record)
        self._renumber(annotations, raw)
        return annotations

    def _repair_mask(self, record: dict[str, Any], index: int, reason: str) -> None:
        """Move the mask of a record like its box, clip it to the image, and remove what is not a mask."""
        split, position = self.split, int(self.split.positions[index])
        codes = self.mask_codes[position]
        if not record.get("segmentation") or not (codes or reason in ("image-size", "boxes-normalized")):
            return
        mask = split.content["annotations"][position].get("segmentation")
        mask = mask if mask is not None else read_segmentation(record["segmentation"])[0]
        limits = object_limits(split)[index]
        if isinstance(mask, list) and reason == "boxes-normalized" and max(part.max() for part in mask) <= 1:
            mask = [part * np.tile(limits, len(part) // 2) for part in mask]
        if mask is not None and reason == "image-size":
            mask = _transform_mask(mask, split.images[split.image_indices[index]])
        if mask is not None and "mask-outside" in codes and np.isfinite(limits).all():
            mask = clip_mask(mask, limits)
        mask = None if "mask-empty" in codes else mask
        record["segmentation"] = [part.round(4) for part in mask] if isinstance(mask, list) else mask or []
        for code in codes:
            change = "clipped to the image" if code == "mask-outside" else "without the parts that are no mask"
            self.log(code, record_name(split.content["annotations"], position), change)

    def _renumber(self, annotations: list[dict[str, Any]], raw: list[Any]) -> None:
        """Give a new id to each object without an id of its own."""
        next_id = 1 + max((r["id"] for r in raw if isinstance(r, dict) and is_int64(r.get("id"))), default=0)
        used: set[int] = set()
        for record in annotations:
            if not is_int64(record.get("id")) or record["id"] in used:
                self.log("annotation-id-duplicate", f"annotation of image {record['image_id']}", f"id {next_id}")
                record["id"], next_id = next_id, next_id + 1
            used.add(record["id"])

    def _boxes(self, kept: np.ndarray) -> tuple[list[list[float] | None], list[str]]:
        """Return the repaired xywh boxes, None without an area, and the issue types that changed them, or ''."""
        split = self.split
        boxes, crowds, images = split.boxes[kept].copy(), split.crowds[kept], split.image_indices[kept]
        reasons = np.full(len(kept), "", dtype=object)
        limits = object_limits(split)[kept]
        unit = wrong_unit(boxes[~crowds], limits[~crowds]) if split.source.format != "yolo" else ""
        if unit == "normalized":
            boxes *= np.concatenate([limits, limits], axis=1)
            reasons[:] = "boxes-normalized"
        elif unit == "corners":
            boxes[:, 2:] -= boxes[:, :2]
            reasons[:] = "boxes-corners"
        for index in _labeled_at_declared_size(split, boxes, images, crowds):
            in_image = images == index
            if (moved := _transform(boxes[in_image], split.images[index])) is not None:
                boxes[in_image] = moved
                reasons[in_image] = "image-size"
        corners, inside = clip_boxes(boxes, limits)
        clipped = inside & (box_overhang(boxes, limits) > OVERHANG)
        boxes[clipped] = np.concatenate([corners[clipped, :2], corners[clipped, 2:] - corners[clipped, :2]], axis=1)
        reasons[clipped & (reasons == "")] = "box-overhang"
        valid = inside | crowds
        return [b if ok else None for b, ok in zip(boxes.round(4).tolist(), valid, strict=True)], reasons.tolist()


def _labeled_at_declared_size(split: Split, boxes: np.ndarray, images: np.ndarray, crowds: np.ndarray) -> list[int]:
    """Return the images that differ from their declared size, and whose boxes were drawn at the declared size.

    Boxes that exceed the declared size but fit the file show that only the record is wrong. Images whose boxes fit
    both or neither follow the majority.
    """
    votes: dict[int, int] = {}
    for index, record in enumerate(split.images):
        if record.size is None or record.declared is None or record.declared == record.size:
            continue
        extent = (boxes[:, :2] + boxes[:, 2:])[(images == index) & ~crowds].max(axis=0, initial=0) - OVERHANG
        fits = [int(extent[0] <= width and extent[1] <= height) for height, width in (record.declared, record.size)]
        votes[index] = fits[0] - fits[1]
    majority = sum(votes.values()) >= 0
    return [index for index, vote in votes.items() if vote > 0 or (vote == 0 and majority)]


def _transform(boxes: np.ndarray, record: ImageRecord) -> np.ndarray | None:
    """Move xywh boxes from an image of the declared size to the file's; None if it was not rotated or resized."""
    assert record.size is not None
    assert record.declared is not None
    (height, width), (declared_height, declared_width) = record.size, record.declared
    if record.orientation in TRANSPOSED_ORIENTATIONS and record.declared == record.size[::-1]:
        return _rotate(boxes, declared_height, declared_width, record.orientation)
    scale_x, scale_y = width / declared_width, height / declared_height
    if abs(scale_x / scale_y - 1) > MAX_ASPECT_CHANGE:
        return None
    return boxes * np.array([scale_x, scale_y, scale_x, scale_y])


def _transform_mask(mask: Segmentation, record: ImageRecord) -> Segmentation:
    """Move a mask as the boxes of its image."""
    assert record.size is not None
    if isinstance(mask, dict):
        turned = record.orientation in TRANSPOSED_ORIENTATIONS and record.declared == record.size[::-1]
        return turn_mask(mask, record.orientation) if turned else resize_mask(mask, record.size)
    moved = []
    for polygon in mask:
        points = polygon.reshape(-1, 2)
        boxes = _transform(np.concatenate([points, np.zeros_like(points)], axis=1), record)
        assert boxes is not None  # the boxes of this image were moved
        moved.append(boxes[:, :2].reshape(-1))
    return moved


def _rotate(boxes: np.ndarray, height: int, width: int, orientation: int) -> np.ndarray:
    """Rotate xywh boxes in a stored image of height × width to the upright image (EXIF orientation 5 to 8)."""
    x, y, w, h = boxes.T
    right, bottom = width - x - w, height - y - h
    new_x, new_y = {5: (y, x), 6: (bottom, x), 7: (bottom, right), 8: (y, right)}[orientation]
    return np.stack([new_x, new_y, h, w], axis=1)


def _unique_name(record: ImageRecord, names: set[str]) -> str:
    """Return a file name inside the split's folder, and add it to `names`."""
    path = PurePath(record.name)
    name = path.name if path.is_absolute() or ".." in path.parts else str(path)
    stem, suffix = os.path.splitext(name)
    number = 1
    while name in names:
        number += 1
        name = f"{stem}-{number}{suffix}"
    names.add(name)
    return name


def _link_image(source: Path, folder: Path, name: str) -> str:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
    return name
