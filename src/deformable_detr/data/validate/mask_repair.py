"""Masks that follow the repair of their image, and that end at its border."""

from typing import Any

import numpy as np

from ...utils.rle import Rle, decode_masks, encode_masks
from ..segmentation import Segmentation

# EXIF orientation → the upright pixels of stored pixels (H, W)
TURNS: dict[int, Any] = {
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}


def clip_mask(mask: Segmentation, limits: np.ndarray) -> Segmentation | None:
    """Clip polygons to an image of (width, height) `limits`; None if nothing is left. Run lengths stay."""
    if isinstance(mask, dict):
        return mask
    clipped = [clip_polygon(polygon.reshape(-1, 2), limits).reshape(-1) for polygon in mask]
    return [polygon for polygon in clipped if len(polygon) >= 6] or None


def clip_polygon(points: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Clip a polygon (n, 2) at the four sides of an image, one after the other (Sutherland and Hodgman, 1974)."""
    for axis, limit, sign in ((0, 0.0, 1), (0, limits[0], -1), (1, 0.0, 1), (1, limits[1], -1)):
        if not len(points):
            break
        inside = sign * (points[:, axis] - limit) >= 0
        following = np.roll(points, -1, axis=0)
        crosses = inside != np.roll(inside, -1)
        steps = np.where(crosses, following[:, axis] - points[:, axis], 1)
        cuts = points + (following - points) * ((limit - points[:, axis]) / steps)[:, None]
        cuts[:, axis] = limit
        # Each point that is inside, and after it the point where its edge crosses the side.
        points = np.stack([points, cuts], axis=1)[np.stack([inside, crosses], axis=1)]
    return points


def turn_mask(rle: Rle, orientation: int) -> Rle:
    """Turn a mask by an EXIF orientation (5 to 8)."""
    pixels = decode_masks([rle], tuple(rle["size"])).numpy()[0]
    return encode_masks(np.ascontiguousarray(TURNS[orientation](pixels))[None])[0]
