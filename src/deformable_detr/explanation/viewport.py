"""The part of an image that shows a set of sampling points."""

from typing import NamedTuple

import numpy as np

MARGIN = 0.08  # how far a viewport may extend beyond the image, relative to its sides


class Viewport(NamedTuple):
    """A rectangle in pixels of the image, which it may exceed."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def width(self) -> float:
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        return self.y2 - self.y1

    def clamp(self, points: np.ndarray) -> np.ndarray:
        """Return points (…, 2) with those outside moved to just inside the nearest edge."""
        inset = 0.012 * max(self.width, self.height)
        clipped = points.clip((self.x1 + inset, self.y1 + inset), (self.x2 - inset, self.y2 - inset))
        return np.where(self.contains(points)[..., None], points, clipped)

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Return which points (…, 2) are inside, (…) bool."""
        return np.all((points >= self[:2]) & (points <= self[2:]), axis=-1)


def panel_aspect(width: int, height: int) -> float:
    """Return the width-to-height ratio of panels for an image: its own, limited to 0.5..2."""
    return min(max(width / height, 0.5), 2.0)


def close_up(points: np.ndarray, weights: np.ndarray, include: np.ndarray, image_size: tuple[int, int]) -> Viewport:
    """Return the viewport that holds 98% of the attention in x and in y, in the proportions of a panel.

    Args:
        points: (N, 2), sampling points in pixels.
        weights: (N,), their attention weights.
        include: (K, 2), points that it must contain, such as the corners of a box.
        image_size: (height, width) in pixels.
    """
    size = np.array(image_size[::-1])
    aspect, margin = panel_aspect(*size), size * MARGIN
    corners = np.concatenate([include, [_weighted_quantile(points, weights, q) for q in (0.01, 0.99)]])
    low, high = np.maximum(corners.min(0), -margin), np.minimum(corners.max(0), size + margin)
    center, extent = (low + high) / 2, np.minimum(np.maximum(high - low, 4) * 1.16, size + 2 * margin)
    width = max(extent[0], extent[1] * aspect)
    sides = np.array([width, width / aspect])
    furthest = size + margin - sides  # of the upper left corner
    low = np.where(furthest > -margin, np.clip(center - sides / 2, -margin, furthest), (size - sides) / 2)
    return Viewport(*low.tolist(), *(low + sides).tolist())


def _weighted_quantile(points: np.ndarray, weights: np.ndarray, q: float) -> np.ndarray:
    """The weighted quantile of x and of y: (2,)."""
    order = points.argsort(axis=0)  # (N, 2)
    cumulative = weights[order].cumsum(axis=0) / weights.sum()
    first = np.minimum((cumulative < q).sum(axis=0), len(points) - 1)
    return points[order[first, [0, 1]], [0, 1]]
