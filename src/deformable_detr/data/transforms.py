"""Image and box transforms of training and evaluation (DETR, section 4).

Images are uint8 (3, H, W). Boxes are (cx, cy, w, h) in 0..1 of the image, so a resize does not change them.
Random choices come from PyTorch's global CPU generator.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config.image_size import FixedSize, ModelResize, ResizeRule, ShortestEdge
from ..config.schema import DataConfig
from ..structures import Target
from .masks import drop_outlines, move_objects

NUM_SCALES = 11  # short sides in training: 480, 512, … 800 for the paper's range
CROP_SHORT_SIDES = (400 / 800, 500 / 800, 600 / 800)  # short sides before a crop, relative to the short side
CROP_SIDE_RANGE = (384 / 800, 600 / 800)  # smallest and largest side of a crop, relative to the short side
MAX_CROP_TRIES = 10
# Smallest side of a box in pixels. Float32 boxes cannot tell a shorter side from zero on a large image.
MIN_SIDE = 1e-3

CropWindow = tuple[int, int, int, int]  # top, left, height, width in pixels


@dataclass(frozen=True)
class EvalTransform:
    """Resize the image by the model's rule; leave the target as it is, but without masks, which only training needs."""

    rule: ResizeRule

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        return resize(image, self.rule), drop_outlines(target)


@dataclass(frozen=True)
class SampledAugmentation:
    """The random choices for one image; sides are in pixels."""

    hflip: bool
    crop_short_side: int  # before the crop
    crop_window: CropWindow | None  # in the image of that size
    short_side: int


@dataclass(frozen=True)
class TrainTransform:
    """Random flip, random crop, multi-scale resize and color jitter.

    The final short side is one of 11 sizes in `train_scales` × `rule.short`. Before a crop, the image is resized to a
    short side of 1/2, 5/8 or 3/4 `rule.short`; the sides of the crop are 0.48 to 0.75 `rule.short`, at most the
    image's own. Boxes without a visible part are dropped. A crop that leaves less than `min_visibility` of an
    object's area is drawn again (after SSD, section 2.2).
    """

    rule: ShortestEdge
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        sampled = self.sample(*image.shape[-2:])
        if sampled.hflip:
            image, target = hflip(image, target)
        if sampled.crop_window is not None:
            image = resize(image, self._crop_rule(sampled.crop_short_side))
            window = self._visible_window(sampled.crop_window, target, *image.shape[-2:])
            image, target = crop(image, target, *window)
        image = resize(image, replace(self.rule, short=sampled.short_side))
        return color_jitter(image) if _random_bool(self.data.color_jitter_prob) else image, target

    def sample(self, height: int, width: int) -> SampledAugmentation:
        """Draw the random choices for an image of this size."""
        flipped, window, crop_short_side = _random_bool(self.data.hflip_prob), None, 0
        if _random_bool(self.data.crop_prob):
            scale = CROP_SHORT_SIDES[_random_int(0, len(CROP_SHORT_SIDES) - 1)]
            crop_short_side = max(1, round(scale * self.rule.short))
            height, width = self._crop_rule(crop_short_side)(height, width)
            low, high = (max(1, round(side * self.rule.short)) for side in CROP_SIDE_RANGE)
            crop_height = _random_int(min(low, height), min(high, height))
            crop_width = _random_int(min(low, width), min(high, width))
            top, left = _random_int(0, height - crop_height), _random_int(0, width - crop_width)
            window = (top, left, crop_height, crop_width)
        smallest, largest = self.data.train_scales
        scale = smallest + (largest - smallest) * _random_int(0, NUM_SCALES - 1) / (NUM_SCALES - 1)
        return SampledAugmentation(flipped, crop_short_side, window, max(1, round(scale * self.rule.short)))

    def final_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image of this size gets with the current random state."""
        sampled = self.sample(height, width)
        if sampled.crop_window is not None:
            height, width = sampled.crop_window[2:]
        return replace(self.rule, short=sampled.short_side)(height, width)

    def _crop_rule(self, short: int) -> ShortestEdge:
        # The paper sets no limit on the long side; this one bounds the memory of a very long image.
        return ShortestEdge(short, 8 * self.rule.long)

    def _visible_window(self, window: CropWindow, target: Target, height: int, width: int) -> CropWindow:
        """Move the window until it keeps `min_visibility` of each object; otherwise return the best one tried."""
        best, best_visibility = window, 0.0
        _, _, h, w = window
        for attempt in range(MAX_CROP_TRIES):
            if attempt:
                window = (_random_int(0, height - h), _random_int(0, width - w), h, w)
            visibility = lowest_visibility(target, window, height, width)
            if visibility >= self.data.min_visibility:
                return window
            if visibility > best_visibility:
                best, best_visibility = window, visibility
        return best


@dataclass(frozen=True)
class FixedSizeTrainTransform:
    """Zoom out, crop with a minimum IoU, flip, color jitter, and stretch (RT-DETR, section 5.1; SSD, section 2.2)."""

    rule: FixedSize
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if _random_bool(self.data.zoom_out_prob):
            image, target = zoom_out(image, target)
        if _random_bool(self.data.crop_prob):
            image, target = iou_crop(image, target)
        if _random_bool(self.data.hflip_prob):
            image, target = hflip(image, target)
        image = resize(image, self.rule)
        return color_jitter(image) if _random_bool(self.data.color_jitter_prob) else image, target

    def final_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image of this size gets."""
        return self.rule(height, width)


def train_transform(rule: ModelResize, data: DataConfig) -> TrainTransform | FixedSizeTrainTransform:
    """Return the training augmentation that fits a resize rule."""
    return TrainTransform(rule, data) if isinstance(rule, ShortestEdge) else FixedSizeTrainTransform(rule, data)


def lowest_visibility(target: Target, window: CropWindow, height: int, width: int) -> float:
    """Return the smallest visible share of an area among the objects that a crop shows; 1 if it shows none.

    `height` and `width` are those of the whole image in pixels.
    """
    from torchvision.ops import box_convert

    top, left, h, w = window
    boxes_xyxy = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
    frame = torch.tensor([left, top, left + w, top + h])
    visible = torch.cat(
        [torch.maximum(boxes_xyxy[:, :2], frame[:2]), torch.minimum(boxes_xyxy[:, 2:], frame[2:])], dim=1
    )
    visible_areas = (visible[:, 2:] - visible[:, :2]).clamp(min=0).prod(dim=1)
    shares = visible_areas / (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(dim=1).clamp(min=1e-9)
    return float(shares[visible_areas > 0].min()) if (visible_areas > 0).any() else 1.0


def resize(image: Tensor, rule: ResizeRule) -> Tensor:
    """Resize a uint8 image (3, H, W) by a rule: bilinear, antialiased unless the rule says otherwise."""
    from torchvision.transforms.v2 import functional

    height, width = image.shape[-2:]
    size = rule(height, width)
    return image if size == (height, width) else functional.resize(image, list(size), antialias=rule.antialias)


def hflip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Flip the image and its boxes horizontally."""
    from torchvision.transforms.v2 import functional

    cx, cy, w, h = target.boxes.unbind(-1)
    boxes = torch.stack([1 - cx, cy, w, h], dim=-1)
    return functional.horizontal_flip(image), move_objects(target, boxes, scale=(-1.0, 1.0), shift=(1.0, 0.0))


def crop(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> tuple[Tensor, Target]:
    """Crop the image to a window in pixels; clip boxes to it and drop those outside."""
    from torchvision.ops import box_convert, clip_boxes_to_image
    from torchvision.transforms.v2 import functional

    old_height, old_width = image.shape[-2:]
    boxes_xyxy = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([old_width, old_height] * 2)
    boxes_xyxy = clip_boxes_to_image(boxes_xyxy - torch.tensor([left, top] * 2), (height, width))
    visible = ((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) >= MIN_SIDE).all(dim=1)
    boxes = box_convert(boxes_xyxy[visible] / torch.tensor([width, height] * 2), "xyxy", "cxcywh")
    scale, shift = (old_width / width, old_height / height), (-left / width, -top / height)
    return functional.crop(image, top, left, height, width), move_objects(target, boxes, visible, scale, shift)


def zoom_out(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Place the image on a black canvas with sides 1 to 4 times as long (SSD, section 2.2)."""
    from torchvision.transforms.v2 import RandomZoomOut

    return _apply_v2(RandomZoomOut(p=1.0), image, target)


def iou_crop(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Crop so that the overlap with an object exceeds a random minimum; drop objects whose center is outside (SSD)."""
    from torchvision.transforms.v2 import RandomIoUCrop

    return _apply_v2(RandomIoUCrop(), image, target) if len(target.labels) else (image, target)


def _apply_v2(transform: Any, image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Apply a transform of torchvision.transforms.v2 to an image with its boxes and labels."""
    from torchvision.ops import box_convert
    from torchvision.transforms.v2 import SanitizeBoundingBoxes
    from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

    height, width = image.shape[-2:]
    corners = box_convert(target.boxes * torch.tensor([width, height] * 2), "cxcywh", "xyxy")
    boxes = BoundingBoxes(corners, format=BoundingBoxFormat.XYXY, canvas_size=(height, width))  # type: ignore[call-arg]
    sanitize = SanitizeBoundingBoxes(min_size=1)
    drawn: dict[str, Any] = {}
    draw = transform.make_params
    transform.make_params = lambda inputs: drawn.update(draw(inputs)) or drawn
    # The indices in place of the labels tell which objects are kept.
    image, kept = sanitize(*transform(image, {"boxes": boxes, "labels": torch.arange(len(target.labels))}))
    new_height, new_width = image.shape[-2:]
    boxes = box_convert(kept["boxes"].as_subclass(Tensor), "xyxy", "cxcywh") / torch.tensor([new_width, new_height] * 2)
    left, top, *_ = drawn.get("padding") or (-drawn.get("left", 0), -drawn.get("top", 0))
    scale, shift = (width / new_width, height / new_height), (left / new_width, top / new_height)
    return image, move_objects(target, boxes, kept["labels"], scale, shift)


def color_jitter(image: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation by random factors in 0.6..1.4 (after SSD, section 2.2).

    The hue stays: it often tells classes apart, and changing it takes longer than everything else.
    """
    from torchvision.transforms.v2 import ColorJitter

    return ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)(image)


def _random_bool(probability: float) -> bool:
    return torch.rand(()).item() < probability


def _random_int(low: int, high: int) -> int:
    """Draw an integer from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()).item())
