"""Checks of the masks of a split. Nothing is checked of a dataset that was read without masks."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...utils.rle import hotcoco_rows
from ..issues import CROSSING, MASK_BOX_IOU, OVERHANG, Issues
from ..segmentation import Segmentation
from ..source import BROKEN_MASK
from ..transforms import MIN_SIDE
from .annotations import Split
from .boxes import object_limits

CHUNK = 5000  # objects that are checked together
GRID = 64  # rows and columns of the grid in which outlines are drawn
MIN_CELLS = 0.02 * GRID * GRID  # smaller differences of areas come from the grid


class MaskSizes(NamedTuple):
    """What the checks need of N masks.

    extents: (N, 4) xyxy in pixels.
    areas: (N,) in square pixels.
    crossings: (N,) part of the area that an outline which crosses itself covers twice or not at all.
    """

    extents: np.ndarray
    areas: np.ndarray
    crossings: np.ndarray


def mask_of(split: Split, index: int) -> Segmentation | None:
    """Return the segmentation of an object."""
    return split.content["annotations"][split.positions[index]].get("segmentation")


def count_masks(split: Split) -> int:
    """Return the number of objects with a mask."""
    return sum(mask_of(split, index) is not None for index in range(len(split.positions)))


def check_masks(split: Split, issues: Issues) -> None:
    """Add the issues of a split's masks."""
    records = split.content["annotations"]

    def report(code: str, index: int, message: str) -> None:
        issues.add(code, split.file, split.object_name(index), message, **split.locate(index))

    for index, position in enumerate(split.positions.tolist()):
        if reason := records[position].get(BROKEN_MASK):
            report("mask-broken", index, f"has a 'segmentation' that {reason}")
    masked = np.array([index for index in range(len(split.positions)) if mask_of(split, index) is not None], dtype=int)
    without = np.setdiff1d(np.flatnonzero(~split.crowds), masked)
    if len(masked) and len(without):
        message = f"has masks for {len(masked)} of {len(split.positions)} objects, but not for "
        message += f"{split.object_name(int(without[0]))} and {len(without) - 1} more"
        issues.add("masks-missing", split.file, "", message, split=split.name)
    for start in range(0, len(masked), CHUNK):
        for code, index, message in _problems(split, masked[start : start + CHUNK]):
            report(code, index, message)


def _problems(split: Split, indices: np.ndarray) -> Iterator[tuple[str, int, str]]:
    """Yield the code, the object and the message of each issue of the masks of some objects."""
    masks = [mask_of(split, index) for index in indices.tolist()]
    limits, boxes = object_limits(split)[indices], split.boxes[indices]
    extents, areas, crossings = measure(masks)
    for number, mask in enumerate(masks):
        if isinstance(mask, dict) and np.isfinite(limits[number]).all():
            height, width = mask["size"]
            if (width, height) != tuple(limits[number]):
                size = " × ".join(f"{side:.0f}" for side in limits[number])
                message = f"has a mask of {width} × {height} pixels in an image of {size}"
                yield "mask-size", int(indices[number]), message
    overhang = np.maximum(-extents[:, :2], extents[:, 2:] - limits).max(axis=1)
    ious = _ious(extents, np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), limits)
    empty = (areas == 0) | ((extents[:, 2:] - extents[:, :2]).min(axis=1) < MIN_SIDE)
    for number in np.flatnonzero(empty):
        yield "mask-empty", int(indices[number]), "has a mask without an area"
    polygons = np.array([isinstance(mask, list) for mask in masks])
    for number in np.flatnonzero(~empty & polygons & (overhang > OVERHANG)):
        message = f"has a mask that exceeds its image by {overhang[number]:.0f} pixels"
        yield "mask-outside", int(indices[number]), message
    for number in np.flatnonzero(~empty & (crossings > CROSSING) & ~split.crowds[indices]):
        message = f"has an outline that crosses itself, with {crossings[number]:.0%} of its area"
        yield "mask-crossing", int(indices[number]), message
    for number in np.flatnonzero(~empty & (ious < MASK_BOX_IOU)):
        x0, y0, x1, y1 = extents[number]
        box = ", ".join(f"{value:.6g}" for value in boxes[number])
        message = f"has a mask with the extent [{x0:.6g}, {y0:.6g}, {x1 - x0:.6g}, {y1 - y0:.6g}] but bbox [{box}]"
        yield "mask-box", int(indices[number]), message


def _ious(first: np.ndarray, second: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return the IoUs (N,) of xyxy boxes (N, 4) inside their images; 1 if both are empty."""
    first, second = (np.clip(corners, 0, np.tile(limits, 2)) for corners in (first, second))
    sides = (np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])).clip(min=0)
    areas = [(corners[:, 2:] - corners[:, :2]).prod(axis=1) for corners in (first, second)]
    union = areas[0] + areas[1] - sides.prod(axis=1)
    return np.where(union > 0, sides.prod(axis=1) / np.maximum(union, 1e-12), 1)


def measure(masks: Sequence[Any]) -> MaskSizes:
    """Measure masks, none of which is None."""
    import hotcoco

    extents, areas, crossings = np.zeros((len(masks), 4)), np.zeros(len(masks)), np.zeros(len(masks))
    runs = [number for number, mask in enumerate(masks) if isinstance(mask, dict)]
    if runs:
        rles = hotcoco_rows([masks[number] for number in runs])
        boxes = hotcoco.mask.to_bbox(rles)
        extents[runs] = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        areas[runs] = hotcoco.mask.area(rles)
    outlined = [number for number, mask in enumerate(masks) if isinstance(mask, list)]
    if outlined:
        parts = measure_polygons([polygon for number in outlined for polygon in masks[number]])
        counts = np.array([len(masks[number]) for number in outlined])
        starts = np.cumsum(counts) - counts
        extents[outlined, :2] = np.minimum.reduceat(parts.extents[:, :2], starts)
        extents[outlined, 2:] = np.maximum.reduceat(parts.extents[:, 2:], starts)
        areas[outlined] = total = np.add.reduceat(parts.areas, starts)
        crossings[outlined] = np.add.reduceat(parts.crossings * parts.areas, starts) / np.maximum(total, 1e-12)
    return MaskSizes(extents, areas, crossings)


def measure_polygons(polygons: Sequence[np.ndarray]) -> MaskSizes:
    """Measure polygons.

    Each is drawn into a grid over its extent, where inside is what a ray enters after an odd number of crossings. If an
    outline crosses itself, that area differs from the one by the shoelace formula, which counts loops with their sign.
    """
    import hotcoco

    points = np.concatenate(polygons).reshape(-1, 2)
    counts = np.array([len(polygon) // 2 for polygon in polygons])
    starts = np.cumsum(counts) - counts
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    sides = np.maximum(high - low, MIN_SIDE)
    cells = (points - np.repeat(low, counts, axis=0)) / np.repeat(sides, counts, axis=0) * GRID
    following = np.arange(1, len(points) + 1)
    following[starts + counts - 1] = starts
    cross = cells[:, 0] * cells[following, 1] - cells[following, 0] * cells[:, 1]
    net = np.abs(np.add.reduceat(cross, starts)) / 2
    parts: list[Any] = [part.tolist() for part in np.split(cells.reshape(-1), 2 * starts[1:])]
    drawn = np.atleast_1d(hotcoco.mask.area(hotcoco.mask.frPyObjects(parts, GRID, GRID))).astype(np.float64)
    largest = np.maximum(net, drawn)
    difference = np.abs(net - drawn)
    crossings = np.where(difference > MIN_CELLS, difference / np.maximum(largest, 1e-12), 0)
    areas = largest * sides.prod(axis=1) / GRID**2
    return MaskSizes(np.concatenate([low, high], axis=1), areas, crossings)
