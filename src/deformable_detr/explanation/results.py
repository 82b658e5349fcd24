"""What each layer sampled, as plain data.

M heads, L levels, P points, K classes, T tokens. Positions are (x, y) in pixels of the upright original image, from
(0, 0) in its upper left corner to (width, height). Points outside the image read zeros.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DecoderLayerSampling(NamedTuple):
    """One decoder layer and one query.

    Attributes:
        reference_point: (2,), the point that the layer samples around: the center of its reference box, if it has one.
        reference_box: (4,) x1, y1, x2, y2, the box that the layer starts from. None if it starts from a point.
        box: (4,) x1, y1, x2, y2, the box that the layer predicts. It may extend beyond the image.
        scores: (K,) in 0..1, the class scores after the layer.
        locations: (M, L, P, 2), the sampling points.
        weights: (M, L, P), their attention weights, which sum to 1 over L × P (equation 3).
    """

    reference_point: Tensor
    reference_box: Tensor | None
    box: Tensor
    scores: Tensor
    locations: Tensor
    weights: Tensor


class EncoderLayerSampling(NamedTuple):
    """One encoder layer and the tokens at a point: one per level, the finest level first (T = L).

    Attributes:
        locations: (T, M, L, P, 2), the sampling points.
        weights: (T, M, L, P), their attention weights, which sum to 1 over L × P.
    """

    locations: Tensor
    weights: Tensor


def attention_inside_box(locations: Tensor, weights: Tensor, box: Tensor) -> Tensor:
    """Return the share of the attention weight inside a box or on its edge, a scalar in 0..1.

    Args:
        locations: (…, 2), in the units of the box.
        weights: (…).
        box: (4,) x1, y1, x2, y2.
    """
    box = box.to(locations)
    inside = ((locations >= box[:2]) & (locations <= box[2:])).all(-1)
    return (weights * inside).sum() / weights.sum()
