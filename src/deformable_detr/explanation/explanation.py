"""Explanations of a detection and of a point, with methods to draw, save and export them.

M heads, L levels, P points, K classes, T tokens. Positions are (x, y) in pixels of the upright original image, from
(0, 0) in its upper left corner to (width, height). Points outside the image read zeros.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..structures import Detections
from ..utils.errors import UserError
from ..utils.images import read_image
from ..visualize.draw import image_format, png_for_notebook, save_image
from ..visualize.fonts import legible
from . import plot
from .viewport import Viewport, close_up


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


@dataclass(frozen=True, eq=False)
class Explanation:
    """What each layer sampled for a detection or a point of an image.

    Attributes:
        image: The image as passed to `explain`.
        image_size: (height, width) in pixels.
        spatial_shapes: (height, width) of the feature map of each level.
        layers: What each layer sampled.
    """

    image: Any
    image_size: tuple[int, int]
    spatial_shapes: tuple[tuple[int, int], ...]
    layers: tuple[DecoderLayerSampling, ...] | tuple[EncoderLayerSampling, ...]

    @property
    def title(self) -> str:
        """What is explained, in a few words."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title}; {len(self.layers)} layers)"

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows."""
        return png_for_notebook(self.draw)

    def check_layer(self, layer: int) -> None:
        """Raise UserError if there is no layer with this index, counted from 0."""
        if not 0 <= layer < len(self.layers):
            part = "decoder" if isinstance(self, DetectionExplanation) else "encoder"
            raise UserError(f"no layer {layer + 1}: the {part} has {len(self.layers)}, numbered from 1")

    def viewport(self) -> Viewport:
        """Return the part of the image that holds nearly all of the attention and what is explained."""
        points = np.concatenate([layer.locations.reshape(-1, 2).numpy() for layer in self.layers])
        weights = np.concatenate([layer.weights.flatten().numpy() for layer in self.layers])
        return close_up(points, weights, self._subject(), self.image_size)

    def draw(self, layer: int | None = None) -> Image.Image:
        """Draw an overview of the image and the sampling points of each layer as an RGB image.

        Args:
            layer: Draw only this layer, counted from 0. For a point, the token of each level then gets a panel.

        Raises:
            UserError: There is no such layer, or the image cannot be read again.
        """
        if layer is None:
            return self._draw(range(len(self.layers)))
        self.check_layer(layer)
        return self._draw([layer], split=True)

    def save(self, path: str | os.PathLike[str], layer: int | None = None) -> Path:
        """Write `draw(layer)` to an image file and return its path. A .gif of all layers is an animation.

        Raises:
            UserError: The file extension is not an image format, or the file cannot be written.
        """
        path = Path(path)
        if image_format(path) == "GIF" and layer is None:
            return plot.save_gif([self._draw([index]) for index in range(len(self.layers))], path)
        return save_image(self.draw(layer), path)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings for JSON: the image, what is explained, and the arrays of each layer."""
        height, width = self.image_size
        path = os.fspath(self.image) if isinstance(self.image, str | os.PathLike) else None
        layers = [
            {name: value.tolist() if isinstance(value, Tensor) else value for name, value in layer._asdict().items()}
            for layer in self.layers
        ]
        shapes = [list(shape) for shape in self.spatial_shapes]
        return {"image": path, "height": height, "width": width, "spatial_shapes": shapes, "layers": layers}

    def _draw(self, layers: Sequence[int], split: bool = False) -> Image.Image:
        pixels = read_image(self.image)
        if tuple(pixels.shape[1:]) != tuple(self.image_size):
            raise UserError("the image has changed since it was explained; explain it again")
        panels = [panel for layer in layers for panel in self._panels(layer, split)]
        max_weight = max(float(layer.weights.max()) for layer in self.layers)
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        shapes = self.spatial_shapes
        return plot.draw(plot.Plot(image, *self._heading(), shapes, self.viewport(), max_weight, panels))

    def _heading(self) -> tuple[str, str | None]:
        """The title of the figure and a font file for it."""
        return self.title, None

    def _subject(self) -> np.ndarray:
        """Points (K, 2) that a close-up must contain."""
        raise NotImplementedError

    def _panels(self, layer: int, split: bool) -> list[plot.Panel]:
        """The panels of a layer. split: one for each token."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class DetectionExplanation(Explanation):
    """How the decoder came to one detection.

    Attributes:
        layers: One per decoder layer.
        detections: All detections of the image.
        index: Index of this detection among them.
        query: Index of its query in the decoder.
    """

    layers: tuple[DecoderLayerSampling, ...]
    detections: Detections
    index: int
    query: int

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
        """(4,) x1, y1, x2, y2 of the detection, clipped to the image."""
        return self.detections.boxes[self.index]

    @property
    def title(self) -> str:
        return f"{self.name} {self.score:.2f}, detection {self.index + 1} of {len(self.detections)}"

    def attention_inside_box(self, box: Tensor | None = None) -> Tensor:
        """Return the share of each layer's attention weight that lies inside a box: (N,) in 0..1.

        Args:
            box: (4,) x1, y1, x2, y2 in pixels. Default: the detected box.
        """
        box = self.box if box is None else box.to(self.box)
        shares = []
        for layer in self.layers:
            inside = ((layer.locations >= box[:2]) & (layer.locations <= box[2:])).all(-1)
            shares.append((layer.weights * inside).sum() / layer.weights.sum())
        return torch.stack(shares)

    def layer_summaries(self) -> list[dict[str, Any]]:
        """Return each layer's references, box, score and attention inside the detected box, rounded for web pages."""
        return [
            {
                "reference_point": _rounded(layer.reference_point),
                "reference_box": None if layer.reference_box is None else _rounded(layer.reference_box),
                "box": _rounded(layer.box),
                "score": round(layer.scores[self.label].item(), 5),
                "share_inside_box": round(share, 5),
            }
            for layer, share in zip(self.layers, self.attention_inside_box().tolist(), strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        result = super().to_dict()
        for layer, share in zip(result["layers"], self.attention_inside_box().tolist(), strict=True):
            layer["share_inside_box"] = share
        detection = self.detections.to_dict()["detections"][self.index]
        return {**result, "detection": {"number": self.index + 1, "query": self.query, **detection}}

    def _heading(self) -> tuple[str, str | None]:
        name, font = legible(self.name, f"class {self.detections.category_ids[self.index]}")
        name = name if len(name) <= 30 else f"{name[:29]}…"
        return name + self.title.removeprefix(self.name), font

    def _subject(self) -> np.ndarray:
        return self.box.view(2, 2).numpy()

    def _panels(self, layer: int, split: bool) -> list[plot.Panel]:
        reference_point, reference_box, box, scores, locations, weights = self.layers[layer]
        share = self.attention_inside_box()[layer]
        caption = f"layer {layer + 1}: score {scores[self.label]:.2f}, {share:.0%} inside the box"
        reference = None if reference_box is None else reference_box.numpy()
        points = locations.numpy(), weights.numpy(), reference_point.numpy()
        return [plot.Panel(caption, *points, reference, box.numpy())]


@dataclass(frozen=True, eq=False, repr=False)
class PointExplanation(Explanation):
    """What the encoder sampled for the tokens at one point of the image.

    Attributes:
        layers: One per encoder layer.
        point: (x, y) in pixels.
        tokens: (T,), indices of the tokens in the encoder's memory: per level, the one whose cell contains the point.
        token_centers: (T, 2), the centers of these cells in pixels.
    """

    layers: tuple[EncoderLayerSampling, ...]
    point: tuple[float, float]
    tokens: Tensor
    token_centers: Tensor

    @property
    def title(self) -> str:
        x, y = self.point
        return f"encoder attention at x {x:g}, y {y:g}"

    def to_dict(self) -> dict[str, Any]:
        tokens = {"tokens": self.tokens.tolist(), "token_centers": self.token_centers.tolist()}
        return {**super().to_dict(), "point": list(self.point), **tokens}

    def _subject(self) -> np.ndarray:
        return np.array([self.point])

    def _panels(self, layer: int, split: bool) -> list[plot.Panel]:
        caption, centers = f"layer {layer + 1}", self.token_centers.numpy()
        locations, weights = (array.numpy() for array in self.layers[layer])
        if not split:
            return [plot.Panel(caption, locations, weights, self._subject()[0])]
        return [
            plot.Panel(f"{caption}, token of level {level + 1} ({w} × {h})", locations[level], weights[level], center)
            for level, ((h, w), center) in enumerate(zip(self.spatial_shapes, centers, strict=True))
        ]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 2) for value in values.tolist()]
