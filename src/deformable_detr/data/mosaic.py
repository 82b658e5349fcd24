"""Mosaic augmentation: four images in one, which shows a small dataset at more scales (YOLOv4, section 3.3)."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..structures import Target
from .dataset import CocoDataset, Transform
from .masks import merge_objects, move_objects
from .tiles import TiledDataset
from .transforms import MIN_SIDE

FILL = 114  # gray level of uncovered pixels
CENTER_RANGE = (0.3, 0.7)  # range of the common corner, relative to the image


class MosaicDataset(Dataset[tuple[Tensor, Target]]):
    """Wrap a dataset so that `dataset[index, True]` is a mosaic with some probability; `dataset[index]` never is.

    A mosaic has the size of image `index`, so batch sizes do not change. Its random choices come from a generator of
    their own, seeded from PyTorch's: the transform afterwards draws the same numbers with and without a mosaic.
    """

    def __init__(self, dataset: CocoDataset | TiledDataset, mosaic_prob: float) -> None:
        self.dataset, self.mosaic_prob = dataset, mosaic_prob

    @property
    def transform(self) -> Transform | None:
        """The transform of all samples."""
        return self.dataset.transform

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each sample, (len, 2); see `CocoDataset.sizes`."""
        return self.dataset.sizes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, bool]) -> tuple[Tensor, Target]:
        index, mosaic_allowed = key if isinstance(key, tuple) else (key, False)
        image, target = self.dataset.load(index)
        generator = torch.Generator().manual_seed(torch.default_generator.initial_seed())
        if mosaic_allowed and torch.rand((), generator=generator).item() < self.mosaic_prob:
            samples = [(image, target), *map(self.dataset.load, self.dataset.draw(3, generator))]
            order = torch.randperm(4, generator=generator).tolist()
            low, high = CENTER_RANGE
            center = low + (high - low) * torch.rand(2, generator=generator)
            image, merged = mosaic([samples[n] for n in order], image.shape[-2:], center.tolist())
            target = replace(merged, image_id=target.image_id, original_size=target.original_size)
        return self.dataset.finish(image, target)


def mosaic(samples: list[tuple[Tensor, Target]], size: tuple[int, ...], center: list[float]) -> tuple[Tensor, Target]:
    """Place four whole images into the quarters of one, each as large as fits and touching the common corner.

    Args:
        samples: Four (image, target) pairs: top left, top right, bottom left, bottom right.
        size: (height, width) of the mosaic in pixels.
        center: (y, x) of the common corner, each 0..1.

    Returns:
        The uint8 image (3, H, W), and all objects with the `image_id` and `original_size` of the first sample.
        Boxes thinner than `MIN_SIDE` pixels are dropped.
    """
    from torchvision.transforms.v2 import functional

    height, width = size
    cy, cx = (min(max(1, round(part * side)), max(1, side - 1)) for part, side in zip(center, size, strict=True))
    canvas = torch.full((3, height, width), FILL, dtype=torch.uint8)
    parts = []
    for number, (image, target) in enumerate(samples):
        bottom, right = divmod(number, 2)
        quarter = (height - cy if bottom else cy, width - cx if right else cx)
        if min(quarter) < 1:
            continue
        scale = min(quarter[0] / image.shape[1], quarter[1] / image.shape[2])
        h, w = (max(1, min(space, round(scale * side))) for space, side in zip(quarter, image.shape[1:], strict=True))
        top, left = cy if bottom else cy - h, cx if right else cx - w
        canvas[:, top : top + h, left : left + w] = functional.resize(image, [h, w], antialias=True)
        factors, shift = (w / width, h / height), (left / width, top / height)
        shifted = target.boxes * torch.tensor(factors * 2) + torch.tensor([*shift, 0, 0])
        visible = (shifted[:, 2:] * torch.tensor([width, height]) >= MIN_SIDE).all(dim=1)
        parts.append(move_objects(target, shifted[visible], visible, factors, shift))
    return canvas, merge_objects(samples[0][1], parts)
