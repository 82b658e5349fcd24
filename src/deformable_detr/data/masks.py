"""Masks of training objects: from outlines in the original image to the coverage of each object's box.

An augmentation moves an outline by an axis-aligned map per object and never touches pixels of a mask. `rasterize` draws
each outline once, at the end, into a grid of `MASK_SIZE` × `MASK_SIZE` cells of the object's final box.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..structures import Target
from ..utils.rle import Rle
from .segmentation import Segmentation, run_lengths

MASK_SIZE = 112  # rows and columns of a target's masks
SUPERSAMPLING = 4  # pixels that are drawn per row and column of a cell
MAX_PIXEL = 1e8  # in reach of int32, far outside of the grid


class MaskTable:
    """The segmentations of N objects in a few arrays, which worker processes share."""

    def __init__(self, segmentations: Iterable[Segmentation | None]) -> None:
        polygons: list[np.ndarray] = []
        counts: list[bytes] = []
        rows: list[tuple[int, int, int, int]] = []  # ends of the polygons and of the counts, height, width
        num_bytes = 0
        for segmentation in segmentations:
            height, width = 0, 0
            if isinstance(segmentation, dict):
                counts.append(segmentation["counts"].encode("ascii"))
                (height, width), num_bytes = segmentation["size"], num_bytes + len(counts[-1])
            else:
                polygons += segmentation or ()
            rows.append((len(polygons), num_bytes, height, width))
        self._rows = np.array([(0, 0, 0, 0), *rows], dtype=np.int64)
        self._ends = np.cumsum([0, *map(len, polygons)])
        self._coordinates = np.concatenate([np.zeros(0), *polygons], dtype=np.float32, casting="same_kind")
        self._counts = np.frombuffer(b"".join(counts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def num_masks(self) -> int:
        """How many of the objects have a segmentation."""
        return int(np.diff(self._rows[:, :2], axis=0).any(axis=1).sum())

    def __getitem__(self, index: int) -> Segmentation | None:
        (first, start, _, _), (last, end, height, width) = self._rows[index : index + 2].tolist()
        if height:
            return {"size": [height, width], "counts": self._counts[start:end].tobytes().decode("ascii")}
        ends = self._ends[first : last + 1].tolist()
        return [self._coordinates[start:end] for start, end in itertools.pairwise(ends)] or None


@dataclass(frozen=True)
class OutlinedTarget(Target):
    """A target whose masks are not drawn yet.

    Attributes:
        outlines: N segmentations in pixels of the original image, None for an object with a box only.
        maps: (N, 2, 2) float64: scale (x, y) and shift (x, y) of each object. The pixel p of its original image is at
            scale · p + shift in the current image, whose sides are 0..1.
    """

    outlines: Sequence[Segmentation | None] = ()
    maps: np.ndarray = field(default_factory=lambda: np.zeros((0, 2, 2)))

    def rasterize(self, size: int = MASK_SIZE) -> Target:
        """Return the target with its masks (N, size, size).

        An object counts as one without a mask if nothing of its mask is inside its box.
        """
        masks = np.zeros((len(self.outlines), size, size), dtype=np.uint8)
        boxes = self.boxes.numpy().astype(np.float64)
        sides = np.maximum(boxes[:, 2:], 1e-9)
        # From 0..1 of the image to cells of the box.
        scales = self.maps[:, 0] / sides * size
        shifts = (self.maps[:, 1] - boxes[:, :2] + boxes[:, 2:] / 2) / sides * size
        for mask, outline, scale, shift in zip(masks, self.outlines, scales, shifts, strict=True):
            if outline is not None:
                draw = _rle_coverage if isinstance(outline, dict) else _polygon_coverage
                mask[:] = draw(outline, scale, shift, size)  # pyright: ignore[reportArgumentType]
        has_mask = torch.from_numpy(masks.any(axis=(1, 2)))
        names = ("labels", "boxes", "image_id", "original_size")
        return Target(**{name: getattr(self, name) for name in names}, masks=torch.from_numpy(masks), has_mask=has_mask)


def move_objects(
    target: Target,
    boxes: Tensor,
    kept: Tensor | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
    shift: tuple[float, float] = (0.0, 0.0),
) -> Target:
    """Return the target with the `kept` objects, their new boxes, and their outlines moved likewise.

    Args:
        target: N objects.
        boxes: (K, 4) boxes after the move.
        kept: (N,) bool, or (K,) indices. Default: all objects.
        scale: (x, y) factors of the move; the sides of the image are 0..1 before and after it.
        shift: (x, y), added after the scale.
    """
    moved = replace(target, labels=target.labels if kept is None else target.labels[kept], boxes=boxes)
    if not isinstance(moved, OutlinedTarget):
        return moved
    maps = moved.maps * np.array(scale) + np.array([(0, 0), shift])
    if kept is None:
        return replace(moved, maps=maps)
    indices = torch.arange(len(maps))[kept].numpy()
    return replace(moved, outlines=[moved.outlines[index] for index in indices], maps=maps[indices])


def merge_objects(target: Target, parts: Sequence[Target]) -> Target:
    """Return the target with the objects of all parts instead of its own."""
    labels, boxes = torch.cat([part.labels for part in parts]), torch.cat([part.boxes for part in parts])
    merged = replace(target, labels=labels, boxes=boxes)
    outlined = [part for part in parts if isinstance(part, OutlinedTarget)]
    if not outlined:
        return merged
    outlines = [outline for part in outlined for outline in part.outlines]
    return replace(merged, outlines=outlines, maps=np.concatenate([part.maps for part in outlined]))


def drop_outlines(target: Target) -> Target:
    """Return the target without outlines."""
    if not isinstance(target, OutlinedTarget):
        return target
    return Target(target.labels, target.boxes, target.image_id, target.original_size)


def _polygon_coverage(polygons: list[np.ndarray], scale: np.ndarray, shift: np.ndarray, size: int) -> np.ndarray:
    """Draw the union of polygons, scaled and shifted to cells, as (size, size) uint8.

    Inside is where a ray crosses an outline an odd number of times, as in pycocotools.
    """
    from PIL import Image, ImageChops, ImageDraw

    side = size * SUPERSAMPLING
    union: Image.Image | None = None
    for polygon in polygons:
        pixels = (polygon.reshape(-1, 2) * scale + shift) * SUPERSAMPLING - 0.5  # Pillow's integers are pixel centers
        canvas = Image.new("L", (side, side))
        # Pillow draws all pixels that an edge touches; on average, half of each is inside.
        points = pixels.clip(-MAX_PIXEL, MAX_PIXEL).reshape(-1).tolist()
        ImageDraw.Draw(canvas).polygon(points, fill=255, outline=128)
        union = canvas if union is None else ImageChops.lighter(union, canvas)
    assert union is not None
    return np.asarray(union.reduce(SUPERSAMPLING))


def _rle_coverage(rle: Rle, scale: np.ndarray, shift: np.ndarray, size: int) -> np.ndarray:
    """Average the pixels of a mask, scaled and shifted to cells, as (size, size) uint8."""
    height, width = rle["size"]
    left, columns = _overlaps(width, scale[0], shift[0], size)
    top, rows = _overlaps(height, scale[1], shift[1], size)
    first, last = left * height, (left + columns.shape[1]) * height
    bounds = np.concatenate([[0], np.cumsum(run_lengths(rle["counts"]))]).clip(first, last)
    values = np.arange(len(bounds) - 1, dtype=np.float32) % 2
    pixels = np.repeat(values, np.diff(bounds)).reshape(-1, height)  # by column
    coverage = rows @ pixels[:, top : top + rows.shape[1]].T @ columns.T
    return np.rint(coverage * 255).clip(0, 255).astype(np.uint8)


def _overlaps(length: int, scale: float, shift: float, size: int) -> tuple[int, np.ndarray]:
    """Return the first of n pixels that lie in cells 0..size, and how much each covers of each cell, (size, n)."""
    low, high = sorted((-shift / scale, (size - shift) / scale))
    first = int(np.clip(np.floor(low), 0, length))
    last = int(np.clip(np.ceil(high), first, length))
    edges = np.arange(first, last + 1) * scale + shift
    starts, ends = np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:])
    cells = np.arange(size)[:, None]
    return first, (np.minimum(ends, cells + 1) - np.maximum(starts, cells)).clip(min=0).astype(np.float32)
