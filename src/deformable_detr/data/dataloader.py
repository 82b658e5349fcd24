"""From samples to batches: one canvas a batch, an order and augmentations that follow from the seed alone."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..structures import ImageBatch, Target
from ..utils.errors import UserError
from ..utils.process import malloc_trim

Sample = tuple[Tensor, Target]
Batch = tuple[ImageBatch, list[Target]]

_GRACE_SECONDS = 60  # in which a training that was told to stop saves


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
    dataset: Dataset[Sample],
    batch_size: int,
    workers: int,
    shuffle: bool,
    seed: int,
    drop_last: bool = False,
    effective: int | None = None,
    process: tuple[int, int] = (0, 1),
    aspect_ratio_grouping: bool = False,
) -> Loader:
    """Batches of `dataset` (which has a length) as `collate` makes them.

    The order follows from `seed` and the epoch that `loader.sampler.set_epoch(epoch)` sets (0 at first), and the random
    choices for each sample from `seed`, the epoch and its index: they are the same with any number of workers, and the
    caller's random numbers are left alone. workers: processes that load; 0: the caller's own. Batches lie in pinned
    memory where CUDA is available. A `UserError` about an image arrives as it was raised, also from a worker.

    effective, process, aspect_ratio_grouping: see `StepSampler`; aspect_ratio_grouping needs a dataset with `sizes`
    and a `Training` transform.
    """
    assert isinstance(dataset, Sized)
    measure = _final_size(dataset, seed) if aspect_ratio_grouping else None
    sampler = StepSampler(len(dataset), batch_size, shuffle, seed, drop_last, effective, process, measure)
    ahead = max(2, math.ceil(2 * sampler.passes(0) / workers)) if workers else None  # of a worker; all: two steps
    return Loader(
        _Seeded(dataset, seed),
        batch_size=None,  # the sampler makes the batches
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_as_it_is,
        worker_init_fn=_bear_terminations,
        prefetch_factor=ahead,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )


class Loader(DataLoader):
    """A `DataLoader` of (ImageBatch, list[Target])."""

    sampler: StepSampler

    def check_worker_number_rationality(self) -> None:
        """No word from PyTorch on every loader of a process that may use few processors: --workers is the user's."""

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.num_workers and self._iterator is None:
            # Workers are about to be forked. They hold each page as it is now: where we write again, there are two.
            malloc_trim()
        for batch in super().__iter__():
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield _unpack(batch)


class Key(NamedTuple):
    """A sample to make: which image, in which epoch, and whether it may be a mosaic."""

    epoch: int
    index: int
    mosaic: bool = False


class StepSampler(Sampler[list[Key]]):
    """What each optimizer step sees, and which part of it each process makes, batch by batch.

    The order of the images is that of the set, or follows from the seed and the epoch. A step takes the next
    `effective` images, the last one what is left, and divides them among the processes, as evenly as may be, and these
    into batches of at most `batch_size`. Every process has equally many batches a step, `passes`; some may be empty.

    process: (rank, size). measure: gives the size that a sample will have; images of like size then share a step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
        effective: int | None = None,
        process: tuple[int, int] = (0, 1),
        measure: Callable[[Key], tuple[int, int]] | None = None,
    ) -> None:
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.rank, self.size = process
        self.effective = effective or batch_size * self.size
        self.measure = measure
        self.steps = length // self.effective if drop_last else math.ceil(length / self.effective)
        self.epoch, self.skip, self.stride, self.mosaic = 0, 0, 1, False

    def set_epoch(self, epoch: int, skip: int = 0, stride: int = 1, mosaic: bool = False) -> None:
        """What the next iteration is to be: every `stride`-th step of the epoch from step `skip` on."""
        self.epoch, self.skip, self.stride, self.mosaic = epoch, skip, stride, mosaic

    def passes(self, step: int) -> int:
        """Batches that every process has in a step of the epoch."""
        images = min(self.effective, self.length - step * self.effective)
        return max(1, math.ceil(math.ceil(images / self.size) / self.batch_size))

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(_mixed(self.seed, self.epoch)))
        return self._batches([Key(self.epoch, index, self.mosaic) for index in order.tolist()], self.skip, self.stride)

    def _batches(self, order: list[Key], skip: int, stride: int) -> Iterator[list[Key]]:
        for step in range(skip, self.steps, stride):
            if self.measure is not None and (step == skip or step % POOL == 0):
                first = step - step % POOL  # pools do not depend on where an iteration begins
                pool = slice(first * self.effective, (first + POOL) * self.effective)
                order[pool] = self._bucketed(order[pool], first)
            chosen = order[step * self.effective : (step + 1) * self.effective]
            each, more = divmod(len(chosen), self.size)
            start = self.rank * each + min(self.rank, more)
            mine = chosen[start : start + each + (self.rank < more)]
            for number in range(self.passes(step)):
                yield mine[number * self.batch_size : (number + 1) * self.batch_size]

    def _bucketed(self, pool: list[Key], first: int) -> list[Key]:
        """The pool in another order: steps of like images, in random order; one that is not full stays the last."""
        assert self.measure is not None
        sizes = np.log([self.measure(key) for key in pool])
        order = _alike(sizes, np.arange(len(pool)), (self.effective, self.batch_size))
        steps = [order[start : start + self.effective] for start in range(0, len(order), self.effective)]
        full = len(pool) // self.effective
        places = np.random.default_rng((self.seed, self.epoch, first)).permutation(full)
        return [pool[place] for step in [*(steps[n] for n in places), *steps[full:]] for place in step.tolist()]

    def __len__(self) -> int:
        """Batches of the epoch, of this process."""
        return sum(self.passes(step) for step in range(self.skip, self.steps, self.stride))


POOL = 16  # steps whose images are sorted by size together


def _alike(sizes: np.ndarray, places: np.ndarray, units: tuple[int, ...]) -> np.ndarray:
    """The places in an order in which each `units[0]` neighbors are of like size, and in these each `units[1]`.

    sizes: (N, 2) logarithms of height and width. Halves along the side that differs more, as a k-d tree.
    """
    if len(places) <= units[0]:
        return places if len(units) == 1 else _alike(sizes, places, units[1:])
    spread = np.ptp(sizes[places], axis=0)
    places = places[np.argsort(sizes[places, spread.argmax()], kind="stable")]
    half = math.ceil(len(places) / units[0]) // 2 * units[0]
    return np.concatenate([_alike(sizes, part, units) for part in (places[:half], places[half:])])


@dataclass(frozen=True)
class _Failure:
    """A `UserError` on its way out of a worker: raised there, PyTorch would wrap it in pages of traceback."""

    message: str


class _Seeded(Dataset):
    """Packed batches by their keys, with PyTorch's CPU generator seeded for each sample and put back after it."""

    def __init__(self, dataset: Dataset[Sample], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, keys: list[Key]) -> Any:
        samples = []
        for key in keys:
            with _seeded(self.seed, key):
                try:
                    samples.append(self.dataset[(key.index, True) if key.mosaic else key.index])
                except UserError as error:
                    return _Failure(str(error))
        return _pack(samples)


@contextmanager
def _seeded(seed: int, key: Key) -> Iterator[None]:
    """PyTorch's CPU generator as the sample's own, put back in the end."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs too, which nobody puts back.
        torch.default_generator.manual_seed(_mixed(seed, key.epoch, key.index))
        yield


def _final_size(dataset: Any, seed: int) -> Callable[[Key], tuple[int, int]]:
    """(height, width) that the training transform will give a sample: its random choices drawn without the image."""

    def measure(key: Key) -> tuple[int, int]:
        height, width = dataset.sizes[key.index]
        with _seeded(seed, key):
            return dataset.transform.final_size(int(height), int(width))

    return measure


def _mixed(*numbers: int) -> int:
    """One seed from several: (0, 1) and (1, 0) have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _pack(samples: Sequence[Sample]) -> Any:
    """`collate`, with the targets in few tensors: each one that leaves a worker holds a file descriptor open."""
    if not samples:
        nothing = ImageBatch(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, 1, 1, dtype=torch.bool))
        return nothing, (), (), ()
    images, targets = collate(samples)
    facts = [(len(target.labels), target.image_id, target.original_size) for target in targets]
    return images, torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets]), facts


def _bear_terminations(worker: int) -> None:
    """Lets a worker outlive a SIGTERM by a minute: launchers signal the whole group, and a step is under way."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


def _as_it_is(packed: Any) -> Any:
    return packed


def _unpack(packed: Any) -> Batch:
    images, labels, boxes, facts = packed
    if not facts:
        return images, []
    counts = [count for count, _, _ in facts]
    split = zip(labels.split(counts), boxes.split(counts), facts, strict=True)
    return images, [Target(label, box, number, tuple(size)) for label, box, (_, number, size) in split]
