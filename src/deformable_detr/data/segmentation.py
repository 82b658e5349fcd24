"""COCO's `segmentation` of an object in memory: polygons as arrays, or compressed run lengths."""

from typing import Any

import numpy as np

from ..utils.rle import Rle, encode_masks

# Flat float64 arrays [x, y, x, y, …] of at least three points, of which the object is the union; or run lengths.
Segmentation = list[np.ndarray] | Rle
ELLIPSE_POINTS = 64


def read_segmentation(value: Any) -> tuple[Segmentation | None, str]:
    """Return the usable part of a record's `segmentation`, None if there is none, and what is wrong with the rest."""
    if value in (None, [], {}, ""):
        return None, ""
    if isinstance(value, dict):
        try:
            return _read_run_lengths(value), ""
        except (ValueError, TypeError, KeyError, OverflowError):
            return None, "is not a valid run-length encoding of 'size' [height, width] and 'counts'"
    if not isinstance(value, list):
        return None, "is neither a list of polygons nor run lengths"
    parts = [polygon for part in value if (polygon := _read_polygon(part)) is not None]
    broken = len(value) - len(parts)
    reason = f"has {broken} of {len(value)} polygons that are not [x, y, …] of at least three points" if broken else ""
    return parts or None, reason


def polygon_of(points: Any) -> Segmentation | None:
    """Return the segmentation of one polygon [[x, y], …], None if it has fewer than three points."""
    flat = [value for point in points for value in point[:2]]
    polygon = _read_polygon(flat)
    return None if polygon is None else [polygon]


def ellipse_of(center: tuple[float, float], radii: tuple[float, float], degrees: float = 0.0) -> Segmentation:
    """Return the segmentation of an ellipse, which is rotated clockwise about its center, as a polygon."""
    angles, rotation = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False), np.radians(degrees)
    x, y = radii[0] * np.cos(angles), radii[1] * np.sin(angles)
    cos, sin = np.cos(rotation), np.sin(rotation)
    return [np.column_stack([center[0] + x * cos - y * sin, center[1] + x * sin + y * cos]).reshape(-1)]


def window_mask(pixels: np.ndarray, left: int, top: int, size: tuple[int, int]) -> Segmentation | None:
    """Return the segmentation of a bool mask (h, w) at (left, top) in an image of `size` (height, width)."""
    (height, width), (h, w) = size, pixels.shape
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + h, height), min(left + w, width)
    if y0 >= y1 or x0 >= x1:
        return None
    image = np.zeros((1, height, width), dtype=np.uint8)
    image[0, y0:y1, x0:x1] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    return encode_masks(image)[0] if image.any() else None


def run_lengths(counts: str) -> np.ndarray:
    """Decode COCO's compressed counts to the lengths of runs of 0, 1, 0, … pixels, column by column.

    A character has five bits of a number and whether more follow. From the fourth number on, they are differences from
    the number before the last (`rleFrString` of cocoapi).
    """
    codes = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    starts = np.flatnonzero(np.concatenate([[True], codes[:-1] & 0x20 == 0]))
    sizes = np.diff(np.append(starts, len(codes)))
    places = np.arange(len(codes)) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((codes & 0x1F) << (5 * places), starts)
    numbers -= (codes[starts + sizes - 1] >> 4 & 1) << (5 * sizes)  # the highest bit is the sign
    for chain in (numbers[1::2], numbers[2::2]):
        np.cumsum(chain, out=chain)
    return numbers


def _read_polygon(points: Any) -> np.ndarray | None:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return None
    try:
        polygon = np.array(points)
    except ValueError:  # lists of different lengths
        return None
    usable = polygon.ndim == 1 and polygon.dtype.kind in "iuf" and np.isfinite(polygon).all()
    return polygon.astype(np.float64, copy=False) if usable else None


def _read_run_lengths(value: dict[str, Any]) -> Rle:
    """Return run lengths in their compressed form. Raises ValueError, TypeError, KeyError or OverflowError."""
    import hotcoco

    height, width = value["size"]
    counts = value["counts"]
    if not isinstance(counts, str):
        if type(height) is not int or type(width) is not int or min(counts) < 0:
            raise ValueError
        rle: Any = hotcoco.mask.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)
        counts = rle["counts"].decode("ascii")
    lengths = run_lengths(counts)
    if min(height, width) < 1 or lengths.min(initial=0) < 0 or lengths.sum() != height * width:
        raise ValueError
    return {"size": [int(height), int(width)], "counts": counts}
