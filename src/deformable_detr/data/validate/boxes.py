"""The boxes of a split: in pixels, with an area inside their image, there once, and large enough to be seen."""

from __future__ import annotations

import numpy as np

from ...config.image_size import resized_size
from ..transforms import MIN_SIDE
from .annotations import Split
from .issues import CORNERS_PART, OVERHANG, TINY_SIDE, Findings


def check_boxes(split: Split, image_size: int, long_side: int, found: Findings) -> None:
    """Adds what is wrong with the boxes of a split; sizes are those of the files where these were looked at."""
    kept = np.flatnonzero(~split.crowds)
    boxes = split.boxes[kept]
    limits = sizes_of(split)[split.images[kept]]  # (N, 2) width, height; infinite where unknown
    if split.source.format == "coco" and (kind := unit_fault(boxes, limits)):
        _tell_unit(split, kind, int(kept[0]), found)
        return
    corners, inside, degenerate = clipped(boxes, limits)
    x, y, w, h = boxes.T
    over = np.max(np.stack([-x, -y, x + w - limits[:, 0], y + h - limits[:, 1]]), axis=0)
    for index in np.flatnonzero(degenerate):
        what = f"is {w[index]:g} × {h[index]:g} pixels"
        found.add("box-degenerate", split.file, split.record(kept[index]), what, **split.place(kept[index]))
    for index in np.flatnonzero(~degenerate & ~inside):
        what = f"lies outside its image of {_size(limits[index])} with bbox {_text(boxes[index])}"
        found.add("box-outside", split.file, split.record(kept[index]), what, **split.place(kept[index]))
    for index in np.flatnonzero(inside & (over > OVERHANG)):
        what = (
            f"reaches {over[index]:.0f} pixels over its image of {_size(limits[index])} with bbox {_text(boxes[index])}"
        )
        found.add("box-overhang", split.file, split.record(kept[index]), what, **split.place(kept[index]))
    for first, index in duplicates(split, kept):
        what = f"has the box and class of {split.record(first)}"
        found.add("box-duplicate", split.file, split.record(index), what, **split.place(index))
    _find_tiny(split, kept[inside], corners[inside], limits[inside], image_size, long_side, found)


def sizes_of(split: Split) -> np.ndarray:
    """(images, 2) width and height in pixels, infinite where unknown."""
    sizes = [picture.best_size or (np.inf, np.inf) for picture in split.pictures]
    return np.array(sizes, dtype=np.float64).reshape(-1, 2)[:, ::-1]


def clipped(boxes: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """xywh boxes (N, 4) as xyxy cut to (width, height) (N, 2); which keep an area; which never had one."""
    x, y, w, h = boxes.T
    corners = np.stack([x, y, x + w, y + h], axis=1)
    cut = np.clip(corners, 0, np.concatenate([limits, limits], axis=1))
    inside = np.min(cut[:, 2:] - cut[:, :2], axis=1, initial=np.inf) >= MIN_SIDE
    return cut, inside, np.minimum(w, h) < MIN_SIDE


def unit_fault(boxes: np.ndarray, limits: np.ndarray) -> str:
    """'normalized' where all xywh boxes are in 0..1; 'corners' where they fit as x0 y0 x1 y1 only; else ''."""
    if not len(boxes):
        return ""
    x, y, w, h = boxes.T
    if boxes.min() >= 0 and boxes.max() <= 1 and np.minimum(w, h).max() > 0 and limits.min() > 4:
        return "normalized"
    width, height = limits.T
    over = (x + w > width + OVERHANG) | (y + h > height + OVERHANG)
    as_corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
    return "corners" if as_corners.all() and over.mean() >= CORNERS_PART else ""


def duplicates(split: Split, indices: np.ndarray) -> list[tuple[int, int]]:
    """(first, again) of objects with the image, the class and the box of an earlier one, to 0.01 pixel."""
    if not len(indices):
        return []
    boxes = np.rint(split.boxes[indices] * 100)
    keys = np.column_stack([split.images[indices], split.labels[indices], boxes])
    _, firsts, groups = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    firsts = firsts[groups.reshape(-1)]
    return [(int(indices[first]), int(indices[k])) for k, first in enumerate(firsts) if first != k]


def _tell_unit(split: Split, kind: str, example: int, found: Findings) -> None:
    box = _text(split.boxes[example])
    if kind == "normalized":
        what, mend = f"has all boxes in 0..1, such as {box}", "multiply them by the width and height of their images"
        found.add("boxes-normalized", split.file, "", what, mend, split=split.name)
    else:
        what = f"has boxes that fit their images only as x0, y0, x1, y1, such as {box}"
        found.add("boxes-corners", split.file, "", what, "write them as x, y, width, height",
                  **{**split.place(example), "section": "", "position": -1})  # fmt: skip


def _find_tiny(
    split: Split, indices: np.ndarray, corners: np.ndarray, limits: np.ndarray, image_size: int, long_side: int,
    found: Findings,
) -> None:  # fmt: skip
    """One finding for each image with objects that are tiny after the resize."""
    known = np.isfinite(limits).all(axis=1)
    indices, corners = indices[known], corners[known]
    sizes, groups = np.unique(limits[known].astype(np.int64), axis=0, return_inverse=True)
    resized = [resized_size(height, width, image_size, long_side)[::-1] for width, height in sizes.tolist()]
    scales = (np.array(resized, dtype=np.float64).reshape(-1, 2) / sizes)[groups.reshape(-1)]
    sides = np.min((corners[:, 2:] - corners[:, :2]) * scales, axis=1, initial=np.inf)
    images = split.images[indices]
    totals = np.bincount(images, minlength=len(split.pictures))
    tiny = np.flatnonzero(sides < TINY_SIDE)
    tiny = tiny[np.lexsort((sides[tiny], images[tiny]))]  # the smallest of each image first
    for image, first, count in zip(*np.unique(images[tiny], return_index=True, return_counts=True), strict=True):
        smallest, picture = tiny[first], split.pictures[image]
        what = (
            f"({picture.name!r}) has {count} of {totals[image]} objects under {TINY_SIDE:g} pixels at image size "
            f"{image_size}, the smallest {sides[smallest]:.1f}"
        )
        place = {**split.place(int(indices[smallest])), "section": "images", "position": picture.position}
        found.add("tiny-objects", split.file, f"images[{picture.position}]", what, **place)


def _size(limit: np.ndarray) -> str:
    return " × ".join(f"{side:.0f}" for side in limit)


def _text(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in box) + "]"
