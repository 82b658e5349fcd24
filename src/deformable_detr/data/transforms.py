"""How an image and its boxes change before the model sees them, as in the paper (appendix A.4, after DETR's).

All images are uint8 (3, H, W). Boxes are (cx, cy, w, h) in 0..1 of the image, so a resize leaves them as they are.
Random choices come from PyTorch's CPU generator: whoever seeds it decides them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config.image_size import resized_size
from ..config.schema import DataConfig
from ..structures import Target

SCALE_STEPS = 11  # short sides in training: 480, 512, … 800 for the paper's range
CROP_SHORT_SIDES = (400 / 800, 500 / 800, 600 / 800)  # of image_size, before a crop
CROP_SIDES = (384 / 800, 600 / 800)  # of image_size: smallest and largest side of a crop
CROP_TRIES = 10  # places for a crop that should not cut objects
# A side below this is no box: single precision, in which boxes travel, cannot tell it from zero on a large image.
MIN_SIDE = 1e-3  # pixels


def training(image_size: int, long_side: int, data: DataConfig, multiple: int = 1) -> Training:
    """The paper's augmentation for a short side of `image_size` and a long side of at most `long_side` pixels."""
    chances = {
        "flip": data.hflip_prob,
        "crop": data.crop_prob,
        "visible": data.min_visibility,
        "color": data.color_jitter_prob,
    }
    return Training(image_size, long_side, data.train_scales, multiple=multiple, **chances)


def evaluation(image_size: int, long_side: int, canvas: tuple[int, int] | None = None, multiple: int = 1) -> Evaluation:
    """`resize` alone."""
    return Evaluation(image_size, long_side, canvas, multiple)


@dataclass(frozen=True)
class Evaluation:
    """(image, target) with the image resized to a short side of `image_size`, the long one at most `long_side`."""

    image_size: int
    long_side: int
    canvas: tuple[int, int] | None = None
    multiple: int = 1

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        return resize(image, self.image_size, self.long_side, self.canvas, self.multiple), target


@dataclass(frozen=True)
class Training:
    """A flip by chance, a crop by chance, and a resize to one of 11 short sides in `scales` × `image_size`.

    Before a crop the image is resized to a short side of 1/2, 5/8 or 3/4 `image_size`; the crop's sides are drawn from
    0.48 to 0.75 `image_size`, or the image's own where that is smaller. Boxes without a visible part are dropped; a
    crop that would leave less than `visible` of an object's area is tried elsewhere (after SSD, section 2.2). Last, by
    chance `color`, `change_colors`.
    """

    image_size: int
    long_side: int
    scales: tuple[float, float] = (0.6, 1.0)
    flip: float = 0.5
    crop: float = 0.5
    visible: float = 0.0
    color: float = 0.0
    multiple: int = 1

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        choice = self.choose(*image.shape[-2:])
        if choice.flipped:
            image, target = flip(image, target)
        if choice.part is not None:
            image = resize(image, choice.before, 8 * self.long_side)
            image, target = crop(image, target, *self._moved(choice.part, target, *image.shape[-2:]))
        image = resize(image, choice.short, self.long_side, multiple=self.multiple)
        return change_colors(image) if _happens(self.color) else image, target

    def choose(self, height: int, width: int) -> Choice:
        """Draws what happens to an image of this size."""
        flipped, part, before = _happens(self.flip), None, 0
        if _happens(self.crop):
            side = CROP_SHORT_SIDES[_between(0, len(CROP_SHORT_SIDES) - 1)]
            before = max(1, round(side * self.image_size))
            # The paper sets no limit here; this one keeps a needle of a picture from filling the memory.
            height, width = resized_size(height, width, before, 8 * self.long_side)
            low, high = (max(1, round(side * self.image_size)) for side in CROP_SIDES)
            crop_height = _between(min(low, height), min(high, height))
            crop_width = _between(min(low, width), min(high, width))
            part = (_between(0, height - crop_height), _between(0, width - crop_width), crop_height, crop_width)
        smallest, largest = self.scales
        scale = smallest + (largest - smallest) * _between(0, SCALE_STEPS - 1) / (SCALE_STEPS - 1)
        return Choice(flipped, before, part, max(1, round(scale * self.image_size)))

    def final_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this size will have, from the same random numbers."""
        choice = self.choose(height, width)
        if choice.part is not None:
            height, width = choice.part[2:]
        return resized_size(height, width, choice.short, self.long_side, self.multiple)

    def _moved(self, part: Part, target: Target, height: int, width: int) -> Part:
        """The part, elsewhere if it would cut objects too small; of all places tried, the one that cuts least."""
        tries, best = [part], part
        least = 0.0
        while self.visible and (kept := least_visible(target, tries[-1], height, width)) < self.visible:
            if kept > least:
                least, best = kept, tries[-1]
            if len(tries) == CROP_TRIES:
                return best
            _, _, h, w = part
            tries.append((_between(0, height - h), _between(0, width - w), h, w))
        return tries[-1]


Part = tuple[int, int, int, int]  # top, left, height, width in pixels


@dataclass(frozen=True)
class Choice:
    """What happens to one image: a flip; the part that stays of it at the short side `before`; its short side."""

    flipped: bool
    before: int
    part: Part | None
    short: int


def least_visible(target: Target, part: Part, height: int, width: int) -> float:
    """Of the objects that a part of an image (height, width) shows, the least share of an area that it leaves; or 1."""
    from torchvision.ops import box_convert

    top, left, h, w = part
    corners = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
    frame = torch.tensor([left, top, left + w, top + h])
    cut = torch.cat([torch.maximum(corners[:, :2], frame[:2]), torch.minimum(corners[:, 2:], frame[2:])], dim=1)
    left_over = (cut[:, 2:] - cut[:, :2]).clamp(min=0).prod(dim=1)
    share = left_over / (corners[:, 2:] - corners[:, :2]).prod(dim=1).clamp(min=1e-9)
    return float(share[left_over > 0].min()) if (left_over > 0).any() else 1.0


def resize(
    image: Tensor, image_size: int, long_side: int, canvas: tuple[int, int] | None = None, multiple: int = 1
) -> Tensor:
    """A uint8 image (3, H, W) at the size that `resized_size` gives: bilinear, antialiased.

    canvas: (height, width), the image fills as much of instead, proportions kept.
    """
    from torchvision.transforms.v2 import functional

    height, width = image.shape[-2:]
    if canvas is None:
        size = resized_size(height, width, image_size, long_side, multiple)
    else:
        scale = min(canvas[0] / height, canvas[1] / width)
        size = tuple(max(1, min(side, round(old * scale))) for side, old in zip(canvas, (height, width), strict=True))
    return image if size == (height, width) else functional.resize(image, list(size), antialias=True)


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Left and right exchanged."""
    from torchvision.transforms.v2 import functional

    cx, cy, w, h = target.boxes.unbind(-1)
    return functional.horizontal_flip(image), replace(target, boxes=torch.stack([1 - cx, cy, w, h], dim=-1))


def crop(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> tuple[Tensor, Target]:
    """The part of the image from (top, left), all in pixels; boxes are cut to it, those outside it dropped."""
    from torchvision.ops import box_convert, clip_boxes_to_image
    from torchvision.transforms.v2 import functional

    old_height, old_width = image.shape[-2:]
    corners = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([old_width, old_height] * 2)
    corners = clip_boxes_to_image(corners - torch.tensor([left, top] * 2), (height, width))
    visible = ((corners[:, 2:] - corners[:, :2]) >= MIN_SIDE).all(dim=1)
    boxes = box_convert(corners[visible] / torch.tensor([width, height] * 2), "xyxy", "cxcywh")
    return functional.crop(image, top, left, height, width), replace(target, labels=target.labels[visible], boxes=boxes)


def change_colors(image: Tensor) -> Tensor:
    """Brightness, contrast and saturation between 0.6 and 1.4 times what they were (after SSD, section 2.2).

    The hue stays: it often tells classes apart, as of lamps, fruit and stained cells, and takes longer than all else.
    """
    from torchvision.transforms.v2 import ColorJitter

    return ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)(image)


def _happens(chance: float) -> bool:
    return torch.rand(()).item() < chance


def _between(low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()).item())
