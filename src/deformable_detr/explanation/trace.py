"""One pass of a model over one image, with all it looked at, and its parts in pixels of the original image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.schema import ModelConfig
from ..data.dataloader import collate
from ..data.transforms import resize
from ..model.network import DeformableDETRNetwork
from ..model.postprocess import postprocess, to_detections
from ..predict.predictor import evaluating, model_categories
from ..structures import Detections, Target
from ..utils.errors import UserError
from ..utils.images import read_image
from .results import DecoderLayerSampling, DetectionExplanation, EncoderLayerSampling, PointExplanation


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """What a model said of one image and where it looked. All tensors are on the CPU.

    image: as it was given. pixels: (3, H, W) uint8, as read. threshold: the least score of a detection.
    detections: as `predict` gives them. queries: (N,), the decoder's query behind each.
    best_score: the highest score of any query, 0..1.
    outputs: the model's, with return_attention.
    valid_ratios: (L, 2), unpadded part (width, height) of each level's map.
    """

    image: Any
    pixels: Tensor
    threshold: float
    detections: Detections
    queries: Tensor
    best_score: float
    outputs: dict[str, Any]
    valid_ratios: Tensor

    @property
    def image_size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[2]

    def detection(self, index: int) -> DetectionExplanation:
        """How detection `index`, counted from 0, the best first, came to be.

        Raises UserError where there is no such detection.
        """
        found = len(self.detections)
        if not found:
            raise UserError(
                f"{self._name}: no detection scores {self.threshold:g} or more (the best {self.best_score:.2g}); "
                "lower the threshold, or ask for a point"
            )
        if not 0 <= index < found:
            raise UserError(
                f"{self._name}: there is no detection {index + 1}: only {found} "
                f"score{'s' if found == 1 else ''} {self.threshold:g} or more; lower the threshold for others"
            )
        query = int(self.queries[index])
        looks = []
        for layer, details in enumerate(self.outputs["decoder_attention"]):
            reference = self.outputs["decoder_reference_points"][layer][0, query]
            looks.append(
                DecoderLayerSampling(
                    reference_point=self._in_pixels(reference[:2]),
                    reference_box=self._corners(reference) if len(reference) == 4 else None,
                    box=self._corners(self.outputs["layer_boxes"][layer, 0, query]),
                    scores=self.outputs["layer_logits"][layer, 0, query].float().sigmoid(),
                    locations=self._locations(details.locations[0, query]),
                    weights=details.weights[0, query].to(torch.float32, copy=True),
                )
            )
        return DetectionExplanation(
            self.image, self.image_size, self._shapes, tuple(looks), self.detections, index, query
        )

    def point(self, x: float, y: float) -> PointExplanation:
        """Where the encoder looked from the tokens at (x, y) in pixels of the original image, its edges included.

        Raises UserError for a point outside the image and for a model without encoder layers.
        """
        height, width = self.image_size
        if not (0 <= x <= width and 0 <= y <= height):
            raise UserError(f"{self._name}: the point {x:g},{y:g} is outside the image of {width} × {height} pixels")
        if not self.outputs["encoder_attention"]:
            raise UserError("the model has no encoder layers, which a point would show; ask for a detection")
        tokens, centers, start = [], [], 0
        for (h, w), (across, down) in zip(self._shapes, self.valid_ratios.tolist(), strict=True):
            columns, rows = max(1, round(across * w)), max(1, round(down * h))  # those that are no padding
            column, row = min(int(x / width * columns), columns - 1), min(int(y / height * rows), rows - 1)
            tokens.append(start + row * w + column)
            centers.append(((column + 0.5) / columns * width, (row + 0.5) / rows * height))
            start += h * w
        looks = [
            EncoderLayerSampling(
                self._locations(details.locations[0, tokens]), details.weights[0, tokens].to(torch.float32, copy=True)
            )
            for details in self.outputs["encoder_attention"]
        ]
        return PointExplanation(
            self.image, self.image_size, self._shapes, tuple(looks), (x, y), torch.tensor(tokens), torch.tensor(centers)
        )

    @property
    def _shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple((int(h), int(w)) for h, w in self.outputs["spatial_shapes"])

    @property
    def _name(self) -> str:
        return self.detections.path or "the image"

    def _locations(self, on_canvas: Tensor) -> Tensor:
        return from_canvas(on_canvas, self.valid_ratios, self.image_size)

    def _in_pixels(self, points: Tensor) -> Tensor:
        height, width = self.image_size
        return points.float() * torch.tensor([width, height])

    def _corners(self, box: Tensor) -> Tensor:
        """(cx, cy, w, h) in 0..1 of the unpadded image → x1, y1, x2, y2 in pixels."""
        from torchvision.ops import box_convert

        return self._in_pixels(box_convert(box.float(), "cxcywh", "xyxy").view(2, 2)).flatten()


def trace(
    model: DeformableDETRNetwork,
    image: Any,
    threshold: float = 0.5,
    top_k: int = 100,
    canvas: tuple[int, int] | None = None,
) -> Trace:
    """Runs the model on one image as `predict` does, and keeps where every layer looked.

    image: a path, PIL image, array or tensor, as for `predict`. threshold: the least score of a detection, 0..1.
    top_k: at most so many detections.
    canvas: (height, width) of a larger canvas that the resized image is padded to, as in a batch with larger ones.

    Raises UserError for bad settings and for an image that cannot be read.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} is not in 0..1")
    if top_k < 1:
        raise UserError(f"top_k {top_k} is under 1")
    config: ModelConfig = model.config
    pixels = read_image(image)
    size = (pixels.shape[1], pixels.shape[2])
    nothing = Target.empty(0, size)
    resized = resize(pixels, config.image_size, config.long_side, size_divisor=config.size_divisor)
    batch, _ = collate([(resized, nothing)])
    if canvas is not None:
        below, beside = canvas[0] - batch.pixels.shape[2], canvas[1] - batch.pixels.shape[3]
        batch = type(batch)(
            F.pad(batch.pixels, (0, beside, 0, below)), F.pad(batch.padding_mask, (0, beside, 0, below), value=True)
        )
    with evaluating(model):
        mean, std = model.get_buffer("pixel_mean"), model.get_buffer("pixel_std")
        ready = batch.to(mean.device).normalize(mean, std)
        outputs = model(ready.pixels, ready.padding_mask, return_attention=True)
        selection = postprocess(outputs, [size], top_k)[0]
        scores = selection.scores
        queries = _chosen_queries(outputs, len(scores))
    kept = scores >= threshold
    detections = to_detections(selection, size, threshold, model_categories(config), image)
    ratios = _valid_ratios(batch.padding_mask[0], outputs["spatial_shapes"])
    best = scores[0].item() if len(scores) else math.nan
    return Trace(image, pixels, threshold, detections, queries[kept], best, _on_host(outputs), ratios)


def from_canvas(locations: Tensor, valid_ratios: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Sampling locations as the layers use them → pixels of the original image, the same shape.

    locations: (…, L, P, 2), (x, y) in 0..1 of each level's map with its padding.
    valid_ratios: (L, 2), the unpadded part (width, height) of each map: the model puts a position p of the image at
    p · ratio of the map (`model.decoder`), so this is that turned round. image_size: (height, width).
    """
    height, width = image_size
    return locations.float() / valid_ratios[:, None] * torch.tensor([width, height])


def _valid_ratios(padding_mask: Tensor, spatial_shapes: Any) -> Tensor:
    """The model's own: a level's mask is the nearest of the canvas's, its first row and column tell the sizes."""
    mask = padding_mask[None, None].float()
    levels = [F.interpolate(mask, size=shape)[0, 0] == 0 for shape in spatial_shapes]
    return torch.stack([torch.stack((level[0].float().mean(), level[:, 0].float().mean())) for level in levels])


def _chosen_queries(outputs: dict[str, Any], count: int) -> Tensor:
    """The query of each of `postprocess`'s pairs, which come from the same choice."""
    scores = outputs["pred_logits"].float().sigmoid().flatten(1)
    return (scores.topk(count, dim=1).indices[0] // outputs["pred_logits"].shape[2]).cpu()


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_on_host, value))  # a named tuple
    return type(value)(map(_on_host, value)) if isinstance(value, list | tuple) else value
