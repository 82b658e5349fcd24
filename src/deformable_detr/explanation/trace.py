"""Run a model once on an image and look up what its layers sampled for any detection or point."""

import math
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..data.dataloader import pad_images
from ..data.transforms import resize
from ..model.geometry import get_valid_ratios
from ..model.layers import resize_mask
from ..model.postprocess import postprocess, to_detections
from ..predict.predictor import Detector, evaluating, forward, model_categories
from ..structures import Detections
from ..utils.errors import UserError
from ..utils.images import read_image
from .explanation import DecoderLayerSampling, DetectionExplanation, EncoderLayerSampling, PointExplanation


@overload
def explain(
    model: Detector, image: Any, detection: int | None = ..., *, threshold: float = ..., top_k: int = ...
) -> DetectionExplanation: ...


@overload
def explain(
    model: Detector, image: Any, *, point: tuple[float, float], threshold: float = ..., top_k: int = ...
) -> PointExplanation: ...


def explain(
    model: Detector,
    image: Any,
    detection: int | None = None,
    *,
    point: tuple[float, float] | None = None,
    threshold: float = 0.5,
    top_k: int = 100,
) -> DetectionExplanation | PointExplanation:
    """Explain a detection, or the encoder's attention at a point. Use `trace` to explain several of one image.

    Args:
        model: A `DeformableDETR`, or a `TransformersDetector` for detections.
        image: A path, PIL image, array or tensor, as for `predict`.
        detection: Index among the detections of `predict` with this threshold and top_k. Default: 0, the best.
        point: (x, y) in pixels. Explains the encoder's tokens there instead of a detection.
        threshold: Minimum score of a detection, 0..1.
        top_k: Maximum number of detections.

    Raises:
        UserError: The image cannot be read, there is no such detection, or the point is outside the image.
    """
    if detection is not None and point is not None:
        raise UserError("explain takes a detection or a point, not both")
    traced = trace(model, image, threshold, top_k)
    return traced.point(*point) if point is not None else traced.detection(detection or 0)


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """The outputs of a model for one image, with the sampling points of every layer. All tensors are on the CPU.

    Attributes:
        image: The image as passed to `trace`.
        pixels: (3, H, W) uint8 RGB, upright.
        threshold: Minimum score of a detection.
        detections: The same as from `predict`.
        queries: (N,), the decoder query of each detection.
        best_score: The highest score of any query, 0..1.
        outputs: The outputs of the network with `return_attention=True`.
        valid_ratios: (L, 2), unpadded fraction (width, height) of the feature map of each level.
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
        """(height, width) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def spatial_shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the feature map of each level."""
        return tuple((int(h), int(w)) for h, w in self.outputs["spatial_shapes"])

    def detection(self, index: int) -> DetectionExplanation:
        """Explain the detection with this index, counted from 0. Raises UserError if there is none."""
        if not 0 <= index < len(self.detections):
            raise UserError(
                f"{self._image_name}: no detection {index + 1}: {len(self.detections)} have a score of "
                f"{self.threshold:g} or more (the best score is {self.best_score:.2g}); lower the threshold"
            )
        query = int(self.queries[index])
        layers = tuple(self._decoder_layer(layer, query) for layer in range(len(self.outputs["decoder_attention"])))
        shapes = self.spatial_shapes
        return DetectionExplanation(self.image, self.image_size, shapes, layers, self.detections, index, query)

    def point(self, x: float, y: float) -> PointExplanation:
        """Explain the encoder's tokens at (x, y) in pixels of the original image, its edges included.

        Raises:
            UserError: The point is outside the image, or the encoder has no deformable attention.
        """
        height, width = self.image_size
        if not (0 <= x <= width and 0 <= y <= height):
            raise UserError(f"{self._image_name}: point {x:g},{y:g} is outside the image of {width} × {height} pixels")
        if not self.outputs["encoder_attention"]:
            raise UserError(
                "the model's encoder has no deformable attention, so a point samples nothing; use a detection"
            )
        tokens, centers, start = [], [], 0
        for (h, w), (ratio_x, ratio_y) in zip(self.spatial_shapes, self.valid_ratios.tolist(), strict=True):
            columns, rows = max(1, round(ratio_x * w)), max(1, round(ratio_y * h))  # without the padding
            column, row = min(int(x / width * columns), columns - 1), min(int(y / height * rows), rows - 1)
            tokens.append(start + row * w + column)
            centers.append(((column + 0.5) / columns * width, (row + 0.5) / rows * height))
            start += h * w
        layers = []
        for details in self.outputs["encoder_attention"]:
            locations = canvas_to_pixels(details.locations[0, tokens], self.valid_ratios, self.image_size)
            layers.append(EncoderLayerSampling(locations, details.weights[0, tokens].float()))
        context = self.image, self.image_size, self.spatial_shapes
        return PointExplanation(*context, tuple(layers), (x, y), torch.tensor(tokens), torch.tensor(centers))

    @property
    def _image_name(self) -> str:
        return self.detections.path or "the image"

    def _decoder_layer(self, layer: int, query: int) -> DecoderLayerSampling:
        from torchvision.ops import box_convert

        height, width = self.image_size
        scale = torch.tensor([width, height, width, height])
        reference = self.outputs["decoder_reference_points"][layer][0, query].float()
        box = self.outputs["layer_boxes"][layer, 0, query].float()
        details = self.outputs["decoder_attention"][layer]
        return DecoderLayerSampling(
            reference_point=reference[:2] * scale[:2],
            reference_box=box_convert(reference, "cxcywh", "xyxy") * scale if len(reference) == 4 else None,
            box=box_convert(box, "cxcywh", "xyxy") * scale,
            scores=self.outputs["layer_logits"][layer, 0, query].float().sigmoid(),
            locations=canvas_to_pixels(details.locations[0, query], self.valid_ratios, self.image_size),
            weights=details.weights[0, query].to(torch.float32, copy=True),
        )


def trace(model: Detector, image: Any, threshold: float = 0.5, top_k: int = 100) -> Trace:
    """Run a model on one image as `predict` does and keep the sampling points of every layer.

    The arguments are those of `explain`. Raises UserError if the image cannot be read or a setting is out of range.
    """
    if not model.explains:
        raise UserError("optimized models and exported files have no sampling points; use the original model")
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} is not in 0..1")
    if top_k < 1:
        raise UserError(f"top_k {top_k} is less than 1")
    config = model.config
    pixels = read_image(image)
    image_size = pixels.shape[1], pixels.shape[2]
    resized = resize(pixels, model.resize_rule)
    batch = pad_images([resized])
    with evaluating(model):
        outputs = forward(model, batch, return_attention=True)
        selection = postprocess(outputs, [image_size], top_k, nms_iou=config.nms_iou)[0]
    detections = to_detections(selection, image_size, threshold, model_categories(config), image)
    masks = [resize_mask(batch.padding_mask, shape) for shape in outputs["spatial_shapes"]]
    return Trace(
        image=image,
        pixels=pixels,
        threshold=threshold,
        detections=detections,
        queries=selection.queries[selection.scores >= threshold],
        best_score=selection.scores[0].item() if len(selection.scores) else math.nan,
        outputs=tree_map_only(Tensor, lambda tensor: tensor.cpu(), outputs),
        valid_ratios=get_valid_ratios(masks, torch.float32)[0],
    )


def canvas_to_pixels(locations: Tensor, valid_ratios: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Convert sampling locations in 0..1 of the padded map of each level to pixels of the original image.

    The model places a point p of the image at p · valid_ratio on the map of a level; this is the inverse. Shapes:
    locations (…, L, P, 2), valid_ratios (L, 2), result (…, L, P, 2).
    """
    height, width = image_size
    return locations.float() / valid_ratios[:, None] * torch.tensor([width, height])
