"""Checks of the boxes of a split: unit, area inside the image, duplicates, and size."""

from typing import Any

import numpy as np

from ...config.image_size import ModelResize
from ...utils.tiles import MIN_TILE, tile_grid
from ..issues import CORNERS_SHARE, OVERHANG, SMALL_SIDE, TINY_SIDE, Issues
from ..records import clip_corners
from ..transforms import MIN_SIDE
from .annotations import Split

MIN_TILES_PER_SIDE = 1.5  # long side of an image, relative to a tile, from which on tiles are suggested
LISTED = 100  # detections per image that COCO metrics and `model.predict` keep by default


def check_boxes(split: Split, rule: ModelResize, issues: Issues, tile: int | None = None, train: bool = False) -> None:
    """Add the issues of a split's boxes; image sizes are those of the files, if these were read.

    `tile` is the side of the tiles that larger images are cut into. For the training split, small objects are an issue.
    """
    kept = np.flatnonzero(~split.crowds)
    boxes, limits = split.boxes[kept], object_limits(split)[kept]
    if split.source.format != "yolo" and (unit := wrong_unit(boxes, limits)):
        _report_unit(split, unit, int(kept[0]), issues)
        return

    def report(code: str, index: Any, message: str) -> None:
        number = int(kept[index])
        issues.add(code, split.file, split.object_name(number), message, **split.locate(number))

    corners, inside = clip_boxes(boxes, limits)
    degenerate = boxes[:, 2:].min(axis=1) < MIN_SIDE
    overhang = box_overhang(boxes, limits)
    for index in np.flatnonzero(degenerate):
        report("box-degenerate", index, f"is {boxes[index, 2]:g} × {boxes[index, 3]:g} pixels")
    for index in np.flatnonzero(~degenerate & ~inside):
        message = f"lies outside its image of {_size_text(limits[index])} with bbox {_box_text(boxes[index])}"
        report("box-outside", index, message)
    for index in np.flatnonzero(inside & (overhang > OVERHANG)):
        size = _size_text(limits[index])
        message = f"exceeds its image of {size} by {overhang[index]:.0f} pixels with bbox {_box_text(boxes[index])}"
        report("box-overhang", index, message)
    for first, index in _duplicates(split, kept):
        message = f"has the box and class of {split.object_name(first)}"
        issues.add("box-duplicate", split.file, split.object_name(index), message, **split.locate(index))
    known = inside & np.isfinite(limits).all(axis=1)
    sides, limits = corners[known, 2:] - corners[known, :2], limits[known]
    resized = sides * _scales(limits, rule, tile)
    _check_tiny(split, kept[known], resized, rule, issues)
    if train and known.any():
        _check_small(split, sides, limits, resized, rule, issues)


def check_crowded(split: Split, num_queries: int | None, issues: Issues, tile: int | None = None) -> None:
    """Add an issue if images or their tiles have more objects than the model has queries, or than are listed."""
    counts = np.bincount(split.image_indices[~split.crowds], minlength=len(split.images))
    highest = int(counts.max(initial=0))
    if not highest > min(num_queries or highest, LISTED):
        return
    name = split.images[int(counts.argmax())].name
    if num_queries is not None and highest > num_queries:
        _report_few_queries(split, counts, num_queries, tile, issues)
    if highest > LISTED:
        message = (
            f"has {np.count_nonzero(counts > LISTED)} images with more than {LISTED} objects, at most {highest} "
            f"({name!r}); COCO metrics, model.predict, predict-dataset and serve keep the {LISTED} best by default"
        )
        hint = f"set their top_k to {-(-highest // 100) * 100}; the metrics have no such option"
        issues.add("crowded-images", split.file, "", message, hint, split=split.name)


def _report_few_queries(split: Split, counts: np.ndarray, num_queries: int, tile: int | None, issues: Issues) -> None:
    """Add an issue if images, or with `tile` their tiles, have more objects than queries; `counts` (images,)."""
    views = counts.copy()
    for index in np.flatnonzero(counts > num_queries) if tile else ():
        views[index] = _most_per_tile(split, int(index), tile or 0)
    highest, name = int(views.max()), split.images[int(views.argmax())].name
    if highest <= num_queries:
        return
    message = (
        f"has {np.count_nonzero(views > num_queries)} images with more objects than the model's {num_queries} "
        f"queries, at most {highest} ({name!r}{' in a tile' if tile else ''}); it cannot find all of them"
    )
    hint = f"train with --set model.num_queries={-(-highest * 3 // 200) * 100}"
    issues.add("too-many-objects", split.file, "", message, hint, split=split.name)


def _most_per_tile(split: Split, image: int, tile: int) -> int:
    """Return how many objects have their center in the fullest tile of an image."""
    objects = np.flatnonzero(~split.crowds & (split.image_indices == image))
    boxes, (width, height) = split.boxes[objects], object_limits(split)[objects[0]]
    if not np.isfinite(width):
        return len(objects)
    centers = boxes[:, :2] + boxes[:, 2:] / 2
    frames = np.array([window.box for window in tile_grid(int(height), int(width), tile)])[:, None]
    return int(((centers >= frames[..., :2]) & (centers < frames[..., 2:])).all(-1).sum(-1).max())


def object_limits(split: Split) -> np.ndarray:
    """Return (N, 2) width and height in pixels of each object's image; infinite if unknown."""
    sizes = [image.size or image.declared or (np.inf, np.inf) for image in split.images]
    return np.array(sizes, dtype=np.float64).reshape(-1, 2)[split.image_indices, ::-1]


def clip_boxes(boxes: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip xywh boxes (N, 4) to limits (N, 2); return them as xyxy, and which of them (N,) keep an area."""
    return clip_corners(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), limits)


def box_overhang(boxes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return (N,) pixels by which xywh boxes (N, 4) exceed their image; negative inside."""
    return np.maximum(-boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - limits).max(axis=1)


def wrong_unit(boxes: np.ndarray, limits: np.ndarray) -> str:
    """Return 'normalized' if all boxes are in 0..1, 'corners' if they fit only as x0, y0, x1, y1, otherwise ''."""
    if not len(boxes):
        return ""
    x, y, w, h = boxes.T
    if boxes.min() >= 0 and boxes.max() <= 1 and np.minimum(w, h).max() > 0 and limits.min() > 4:
        return "normalized"
    width, height = limits.T
    too_large = (x + w > width + OVERHANG) | (y + h > height + OVERHANG)
    as_corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
    return "corners" if as_corners.all() and too_large.mean() >= CORNERS_SHARE else ""


def _duplicates(split: Split, indices: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of objects with the same image, class and box (to 0.01 pixel)."""
    if not len(indices):
        return []
    columns = (split.image_indices, split.category_ids, np.rint(split.boxes * 100))
    keys = np.column_stack([column[indices] for column in columns])
    _, firsts, groups = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    firsts = firsts[groups.reshape(-1)]
    return [(int(indices[first]), int(indices[k])) for k, first in enumerate(firsts) if first != k]


def _report_unit(split: Split, unit: str, example: int, issues: Issues) -> None:
    box = _box_text(split.boxes[example])
    if unit == "normalized":
        message, hint = f"has all boxes in 0..1, such as {box}", "multiply them by the width and height of their images"
        issues.add("boxes-normalized", split.file, "", message, hint, split=split.name)
    else:
        message = f"has boxes that fit their images only as x0, y0, x1, y1, such as {box}"
        location = {**split.locate(example), "section": "", "position": -1}
        issues.add("boxes-corners", split.file, "", message, **location)


def _scales(limits: np.ndarray, rule: ModelResize, tile: int | None) -> np.ndarray:
    """Return the scale (x, y) of the resize of each image, or of its tiles, for their (width, height) (N, 2)."""
    sizes, groups = np.unique(limits.astype(np.int64), axis=0, return_inverse=True)
    views = np.minimum(sizes, tile) if tile else sizes
    resized = [rule(height, width)[::-1] for width, height in views.tolist()]
    return (np.array(resized, dtype=np.float64).reshape(-1, 2) / views)[groups.reshape(-1)]


def _check_tiny(split: Split, indices: np.ndarray, resized: np.ndarray, rule: ModelResize, issues: Issues) -> None:
    """Add an issue per image with objects that are tiny after the resize, when they are `resized` (N, 2) pixels."""
    sides = resized.min(axis=1, initial=np.inf)
    images = split.image_indices[indices]
    totals = np.bincount(images, minlength=len(split.images))
    tiny = np.flatnonzero(sides < TINY_SIDE)
    tiny = tiny[np.lexsort((sides[tiny], images[tiny]))]  # the smallest of each image first
    for image, first, count in zip(*np.unique(images[tiny], return_index=True, return_counts=True), strict=True):
        smallest, record = tiny[first], split.images[image]
        message = (
            f"({record.name!r}) has {count} of {totals[image]} objects under {TINY_SIDE:g} pixels at image size "
            f"{rule.short}, the smallest {sides[smallest]:.1f}"
        )
        location = split.locate(int(indices[smallest])) | split.locate_image(record)
        issues.add("tiny-objects", split.file, f"images[{record.position}]", message, **location)


def _check_small(
    split: Split, sides: np.ndarray, limits: np.ndarray, resized: np.ndarray, rule: ModelResize, issues: Issues
) -> None:
    """Add an issue if the median object is small after the resize.

    The suggested tile keeps the image's resolution if the median object has `SMALL_SIDE` to twice as many pixels there.
    Otherwise, the tile is enlarged or reduced to the nearest of these sizes.
    """
    median = float(np.median(np.sqrt(resized.prod(axis=1))))
    if median >= SMALL_SIDE:
        return
    pixels = float(np.median(np.sqrt(sides.prod(axis=1))))
    smallest, largest = rule.short * pixels / (2 * SMALL_SIDE), rule.short * pixels / SMALL_SIDE
    tile = max(2 * MIN_TILE, int(min(max(rule.short, smallest), largest)) // 32 * 32)
    if np.median(limits.max(axis=1)) >= MIN_TILES_PER_SIDE * tile:
        hint = f"train, evaluate and predict with --tile {tile}"
    else:
        hint = f"train with --image-size {-(-int(rule.short * SMALL_SIDE / median) // 32) * 32}"
    message = f"has objects of {median:.1f} pixels at image size {rule.short} (median of √(width · height))"
    issues.add("small-objects", split.file, "", message, hint, split=split.name)


def _size_text(limit: np.ndarray) -> str:
    return " × ".join(f"{side:.0f}" for side in limit)


def _box_text(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in box) + "]"
