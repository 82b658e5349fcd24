"""From samples to batches: one canvas a batch, an order and augmentations that follow from the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from ..structures import ImageBatch, Target

Sample = tuple[Tensor, Target]
Batch = tuple[ImageBatch, list[Target]]


def collate(samples: Sequence[Sample]) -> Batch:
    """uint8 images (3, H, W) of any sizes on the smallest canvas that holds them, upper left; padding is zero."""
    images = [image for image, _ in samples]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for place, mask, image in zip(pixels, padding_mask, images, strict=True):
        _, h, w = image.shape
        place[:, :h, :w] = image
        mask[:h, :w] = False
    return ImageBatch(pixels, padding_mask), [target for _, target in samples]


def loader(
    dataset: Dataset[Sample], batch_size: int, workers: int, shuffle: bool, seed: int, drop_last: bool = False
) -> Loader:
    """Batches of `dataset` (which has a length) as `collate` makes them.

    The order follows from `seed` and the epoch that `loader.sampler.set_epoch(epoch)` sets (0 at first), and the random
    choices for each sample from `seed`, the epoch and its index: they are the same with any number of workers, and the
    caller's random numbers are left alone. workers: processes that load; 0: the caller's own. Batches lie in pinned
    memory where CUDA is available. A `UserError` about an image arrives as it was raised, also from a worker.
    """
    assert isinstance(dataset, Sized)
    return Loader(
        _Seeded(dataset, seed),
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), shuffle, seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_pack,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),
    )


class Loader(DataLoader):
    """A `DataLoader` of (ImageBatch, list[Target])."""

    sampler: EpochSampler

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for batch in super().__iter__():
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield _unpack(batch)


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) of each sample; the order is that of the set, or follows from the seed and the epoch."""

    def __init__(self, length: int, shuffle: bool, seed: int) -> None:
        self.length, self.shuffle, self.seed, self.epoch = length, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """What the next iteration is to be."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(_mixed(self.seed, self.epoch)))
        epoch = self.epoch
        return ((epoch, index) for index in order.tolist())

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class _Failure:
    """A `UserError` on its way out of a worker: raised there, PyTorch would wrap it in pages of traceback."""

    message: str


class _Seeded(Dataset):
    """The dataset by (epoch, index), with PyTorch's CPU generator seeded for each sample and put back after it."""

    def __init__(self, dataset: Dataset[Sample], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample | _Failure:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPUs too, which nobody puts back.
            torch.default_generator.manual_seed(_mixed(self.seed, epoch, index))
            try:
                return self.dataset[index]
            except UserError as error:
                return _Failure(str(error))


def _mixed(*numbers: int) -> int:
    """One seed from several: (0, 1) and (1, 0) have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _pack(samples: Sequence[Sample | _Failure]) -> Any:
    """`collate`, with the targets in few tensors: each one that leaves a worker holds a file descriptor open."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
        good.append(sample)
    images, targets = collate(good)
    facts = [(len(target.labels), target.image_id, target.original_size) for target in targets]
    return images, torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets]), facts


def _unpack(packed: Any) -> Batch:
    images, labels, boxes, facts = packed
    counts = [count for count, _, _ in facts]
    split = zip(labels.split(counts), boxes.split(counts), facts, strict=True)
    return images, [Target(label, box, number, tuple(size)) for label, box, (_, number, size) in split]
