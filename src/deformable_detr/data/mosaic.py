"""Mosaics: four images share a picture, so that a small set shows more scales and neighbors (YOLOv4, section 3.3)."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..structures import Target
from .dataset import CocoDataset
from .transforms import MIN_SIDE

FILL = 114  # gray level of what no image covers
CENTER = (0.3, 0.7)  # where the four meet, in parts of the picture


class Mosaics(Dataset[tuple[Tensor, Target]]):
    """A data set whose `set[i, True]` is by chance a mosaic; `set[i]` is the sample as it was.

    The picture keeps the size of image i, so a mosaic changes nothing about the sizes in a batch. Its choices come from
    a generator of their own, made from the seed of PyTorch's: the transform that follows draws what it would draw.
    """

    def __init__(self, dataset: CocoDataset, chance: float) -> None:
        """dataset: with its transform; it is left as it is."""
        self.transform, self.chance = dataset.transform, chance
        self.raw = copy.copy(dataset)
        self.raw.transform = None

    @property
    def sizes(self) -> np.ndarray:
        """(len, 2) height and width of each image, as `CocoDataset.sizes`."""
        return self.raw.sizes

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, key: int | tuple[int, bool]) -> tuple[Tensor, Target]:
        index, allowed = key if isinstance(key, tuple) else (key, False)
        image, target = self.raw[index]
        generator = torch.Generator().manual_seed(torch.default_generator.initial_seed())
        if allowed and torch.rand((), generator=generator).item() < self.chance:
            others = torch.randint(len(self), (3,), generator=generator).tolist()
            samples = [(image, target), *(self.raw[other] for other in others)]
            order = torch.randperm(4, generator=generator).tolist()
            low, high = CENTER
            center = low + (high - low) * torch.rand(2, generator=generator)
            image, merged = mosaic([samples[n] for n in order], image.shape[-2:], center.tolist())
            target = replace(merged, image_id=target.image_id, original_size=target.original_size)
        return self.transform(image, target) if self.transform else (image, target)


def mosaic(samples: list[tuple[Tensor, Target]], size: tuple[int, ...], center: list[float]) -> tuple[Tensor, Target]:
    """Four images in the quarters of a picture, each whole, as large as fits, touching the point where they meet.

    size: (height, width) of the picture. center: (y, x) of that point in 0..1. The image_id and original_size are the
    first sample's. Boxes that would become thinner than a thousandth of a pixel are dropped.
    """
    from torchvision.transforms.v2 import functional

    height, width = size
    cy, cx = (min(max(1, round(part * side)), max(1, side - 1)) for part, side in zip(center, size, strict=True))
    picture = torch.full((3, height, width), FILL, dtype=torch.uint8)
    labels, boxes = [], []
    for number, (image, target) in enumerate(samples):
        below, right = divmod(number, 2)
        room = (height - cy if below else cy, width - cx if right else cx)
        if min(room) < 1:
            continue
        scale = min(room[0] / image.shape[1], room[1] / image.shape[2])
        h, w = (max(1, min(space, round(scale * side))) for space, side in zip(room, image.shape[1:], strict=True))
        top, left = cy if below else cy - h, cx if right else cx - w
        picture[:, top : top + h, left : left + w] = functional.resize(image, [h, w], antialias=True)
        stretch = torch.tensor([w / width, h / height] * 2)
        moved = target.boxes * stretch + torch.tensor([left / width, top / height, 0, 0])
        visible = (moved[:, 2:] * torch.tensor([width, height]) >= MIN_SIDE).all(dim=1)
        labels.append(target.labels[visible])
        boxes.append(moved[visible])
    return picture, replace(samples[0][1], labels=torch.cat(labels), boxes=torch.cat(boxes))
