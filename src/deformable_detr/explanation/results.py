"""What an explanation holds: where each layer looked, in pixels of the original image.

M heads, L levels, P points, K classes, T tokens. Positions are (x, y) in pixels of the upright original image, (0, 0)
its upper left corner and (width, height) its lower right one; a model may look outside, where it reads zeros.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..structures import Detections

if TYPE_CHECKING:
    from PIL import Image


class DecoderLayerSampling(NamedTuple):
    """One decoder layer's work on one query.

    reference_point: (2,), where the layer looked from; where it looked from a box, that box's center.
    reference_box: (4,) x1, y1, x2, y2, the box that the layer started from; none where it had only a point.
    box: (4,) x1, y1, x2, y2, the box that the layer gave; it may reach out of the image.
    scores: (K,) in 0..1, each class's score after the layer.
    locations: (M, L, P, 2), the sampling points. weights: (M, L, P), over L × P they sum to 1 (equation 3).
    """

    reference_point: Tensor
    reference_box: Tensor | None
    box: Tensor
    scores: Tensor
    locations: Tensor
    weights: Tensor


class EncoderLayerSampling(NamedTuple):
    """One encoder layer's work on the tokens at a point, one token a level, the finest first (T = L).

    locations: (T, M, L, P, 2), the sampling points. weights: (T, M, L, P), over L × P they sum to 1.
    """

    locations: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What both kinds share.

    image: as it was given. image_size: (height, width) in pixels.
    spatial_shapes: (height, width) of each level's map.
    """

    image: Any
    image_size: tuple[int, int]
    spatial_shapes: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> tuple[DecoderLayerSampling, ...] | tuple[EncoderLayerSampling, ...]:
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What is explained, in a few words."""
        raise NotImplementedError

    def draw(self, layer: int | None = None) -> Image.Image:
        """An RGB picture of all layers, or of one, counted from 0. See `explanation.picture`."""
        from .plot import draw

        return draw(self, layer)

    def save(self, path: str | os.PathLike[str], layer: int | None = None) -> Path:
        """Writes a picture (.png, .jpg, …), or an animation across the layers (.gif, .webp, .apng).

        Returns the path. Raises UserError for an ending that is neither and for a file that cannot be written.
        """
        from .plot import save

        return save(self, Path(path), layer)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON: the image, what is explained, and `layers` with the raw arrays."""
        height, width = self.image_size
        path = os.fspath(self.image) if isinstance(self.image, str | os.PathLike) else None
        layers = [
            {name: value.tolist() if isinstance(value, Tensor) else value for name, value in look._asdict().items()}
            for look in self.layers
        ]
        shapes = [list(shape) for shape in self.spatial_shapes]
        return {"image": path, "height": height, "width": width, "spatial_shapes": shapes, "layers": layers}


@dataclass(frozen=True, eq=False, repr=False)
class DetectionExplanation(Explanation):
    """How the decoder came to one detection.

    looks: of each decoder layer.
    detections: all that were found in the image. index: which of them this is. query: the decoder's query behind it.
    """

    looks: tuple[DecoderLayerSampling, ...]
    detections: Detections
    index: int
    query: int

    @property
    def layers(self) -> tuple[DecoderLayerSampling, ...]:
        return self.looks

    @property
    def name(self) -> str:
        return self.detections.names[self.index]

    @property
    def score(self) -> float:
        return self.detections.scores[self.index].item()

    @property
    def label(self) -> int:
        return int(self.detections.labels[self.index])

    @property
    def box(self) -> Tensor:
        """(4,) x1, y1, x2, y2 of the detection, inside the image."""
        return self.detections.boxes[self.index]

    @property
    def title(self) -> str:
        return f"{self.name} {self.score:.2f}, detection {self.index + 1} of {len(self.detections)}"

    def attention_inside_box(self, box: Tensor | None = None) -> Tensor:
        """Part of each layer's attention weight that lies inside the detected box, or inside another: (N,) in 0..1.

        box: (4,) x1, y1, x2, y2 in pixels of the original image.
        """
        inside = self.box if box is None else box
        return torch.stack([attention_inside_box(look.locations, look.weights, inside) for look in self.looks])

    def to_dict(self) -> dict[str, Any]:
        shares = self.attention_inside_box().tolist()
        found = self.detections.to_dict()["detections"][self.index]
        whole = super().to_dict()
        for layer, share in zip(whole["layers"], shares, strict=True):
            layer["share_inside_box"] = share
        return {**whole, "detection": {"number": self.index + 1, "query": self.query, **found}}

    def __repr__(self) -> str:
        return f"DetectionExplanation({self.title}; {len(self.looks)} decoder layers)"


@dataclass(frozen=True, eq=False, repr=False)
class PointExplanation(Explanation):
    """Where the encoder looked from one point of the image.

    looks: of each encoder layer.
    point: (x, y) in pixels.
    tokens: (T,) positions in the encoder's memory of the tokens whose pixels the point lies in, one a level.
    token_centers: (T, 2), the centers of these pixels.
    """

    looks: tuple[EncoderLayerSampling, ...]
    point: tuple[float, float]
    tokens: Tensor
    token_centers: Tensor

    @property
    def layers(self) -> tuple[EncoderLayerSampling, ...]:
        return self.looks

    @property
    def title(self) -> str:
        x, y = self.point
        return f"the encoder at x {x:g}, y {y:g}"

    def to_dict(self) -> dict[str, Any]:
        facts = {"tokens": self.tokens.tolist(), "token_centers": self.token_centers.tolist()}
        return {**super().to_dict(), "point": list(self.point), **facts}

    def __repr__(self) -> str:
        return f"PointExplanation({self.title}; {len(self.looks)} encoder layers)"


def attention_inside_box(locations: Tensor, weights: Tensor, box: Tensor) -> Tensor:
    """Part of the attention weight whose sampling points lie inside a box or on its edge, a number in 0..1.

    locations: (…, 2) and box: (4,) x1, y1, x2, y2, in the same units. weights: (…).
    """
    box = box.to(locations)
    inside = ((locations >= box[:2]) & (locations <= box[2:])).all(-1)
    return (weights * inside).sum() / weights.sum()
