"""The one call: what did the model look at, for a detection or from a point?"""

from __future__ import annotations

from typing import Any, overload

from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError
from .results import DetectionExplanation, PointExplanation
from .trace import trace


@overload
def explain(
    model: DeformableDETRNetwork, image: Any, detection: int | None = ..., *, threshold: float = ..., top_k: int = ...
) -> DetectionExplanation: ...


@overload
def explain(
    model: DeformableDETRNetwork, image: Any, *, point: tuple[float, float], threshold: float = ..., top_k: int = ...
) -> PointExplanation: ...


def explain(
    model: DeformableDETRNetwork,
    image: Any,
    detection: int | None = None,
    *,
    point: tuple[float, float] | None = None,
    threshold: float = 0.5,
    top_k: int = 100,
) -> DetectionExplanation | PointExplanation:
    """Where the model looked, layer by layer, in pixels of the original image.

    image: a path, PIL image, array or tensor, as for `predict`.
    detection: position in what `predict` finds with this threshold and top_k, counted from 0, the best; none: the best.
    point: instead of a detection, (x, y) in pixels: the encoder's sampling points of the tokens there.

    For several detections or points of one image, `trace` runs the model once.
    Raises UserError for an image that cannot be read, a detection that is not there and a point outside the image.
    """
    if detection is not None and point is not None:
        raise UserError("explain a detection or a point, not both at once")
    traced = trace(model, image, threshold, top_k)
    return traced.point(*point) if point is not None else traced.detection(detection or 0)
