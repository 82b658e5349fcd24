"""Which part of an image shows where a model looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .results import DetectionExplanation, Explanation, PointExplanation

BORDER = 0.08  # so much around the image can be shown, relative to its sides


@dataclass(frozen=True)
class Viewport:
    """A part of the image and a little around it: x1, y1, x2, y2 in pixels."""

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
        """(…, 2), what lies beyond an edge moved to just inside it."""
        border = 0.012 * max(self.width, self.height)
        inside = points.clip((self.x1 + border, self.y1 + border), (self.x2 - border, self.y2 - border))
        return np.where(self.holds(points)[..., None], points, inside)

    def holds(self, points: np.ndarray) -> np.ndarray:
        """(…, 2) → (…) bool."""
        x, y = points[..., 0], points[..., 1]
        return (x >= self.x1) & (x <= self.x2) & (y >= self.y1) & (y <= self.y2)


def panel_aspect(width: int, height: int) -> float:
    """Width to height of a panel for an image of that size: its own, within limits."""
    return min(max(width / height, 0.5), 2.0)


def close_up(explanation: Explanation) -> Viewport:
    """Where nearly all of the attention is, with the boxes, in the panels' proportions."""
    height, width = explanation.image_size
    size, aspect = np.array([width, height]), panel_aspect(width, height)
    points, weights = _flat(explanation.layers)
    lowest, highest = (_weighted_quantile(points, weights, part) for part in (0.01, 0.99))
    corners = [lowest, highest]
    if isinstance(explanation, DetectionExplanation):
        box = explanation.box.numpy()
        corners += [box[:2], box[2:]]
    else:
        assert isinstance(explanation, PointExplanation)
        corners.append(np.array(explanation.point))
    limit = size * BORDER
    low = np.maximum(np.min(corners, axis=0), -limit)
    high = np.minimum(np.max(corners, axis=0), size + limit)
    center, extent = (low + high) / 2, np.maximum(high - low, 4) * 1.16
    extent = np.minimum(extent, size + 2 * limit)
    width = max(extent[0], extent[1] * aspect)
    sides = np.array([width, width / aspect])
    # Moved inside where it would show more than the border around the image.
    room = size + limit - sides
    low = np.where(room > -limit, np.clip(center - sides / 2, -limit, room), (size - sides) / 2)
    return Viewport(*low.tolist(), *(low + sides).tolist())


def _flat(looks: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """All points (N, 2) and weights (N,) of the layers."""
    points = np.concatenate([look.locations.numpy().reshape(-1, 2) for look in looks])
    return points, np.concatenate([look.weights.numpy().reshape(-1) for look in looks])


def _weighted_quantile(points: np.ndarray, weights: np.ndarray, part: float) -> np.ndarray:
    """(2,): where that part of the weight lies below, in x and in y."""
    result = []
    for values in points.T:
        order = values.argsort()
        below = weights[order].cumsum() / weights.sum()
        result.append(values[order][min(int(np.searchsorted(below, part)), len(values) - 1)])
    return np.array(result)
