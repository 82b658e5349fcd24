"""Reproducible batches: order and augmentations depend only on the seed, the epoch and the sample's index."""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..structures import ImageBatch, Target
from ..utils.errors import UserError
from ..utils.process import STOP_SIGNALS, malloc_trim
from .sampling import READ_TOGETHER, EpochSampling

Sample = tuple[Tensor, Target]
Batch = tuple[ImageBatch, list[Target]]

log = logging.getLogger(__name__)

POOL_STEPS = 16  # steps whose images are grouped by size together
_GRACE_SECONDS = 60


@dataclass(frozen=True)
class LoaderOptions:
    """Options of `build_dataloader`.

    Attributes:
        batch_size: Images per batch, at most.
        num_workers: Processes that load images; 0 loads in the calling process, as daemonic processes and threads other
            than the main one always do.
        shuffle: Draw a new order per epoch. Otherwise, keep the dataset's order.
        seed: Seed of the order and of each sample's augmentation.
        total_batch_size: Images per optimizer step over all processes. Default: `batch_size` × `world_size`.
        rank: Index of this process.
        world_size: Number of processes.
        aspect_ratio_grouping: Let images of similar size share a step. Needs a dataset with `sizes` and a
            `TrainTransform`.
        sampling: With `shuffle`, how often an epoch shows each sample. Default: each once.
    """

    batch_size: int
    num_workers: int = 0
    shuffle: bool = False
    seed: int = 0
    total_batch_size: int | None = None
    rank: int = 0
    world_size: int = 1
    aspect_ratio_grouping: bool = False
    sampling: EpochSampling | None = None


def pad_images(images: Sequence[Tensor]) -> ImageBatch:
    """Pad uint8 images (3, H, W) with zeros to the smallest common size, each in the upper left corner."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for canvas, mask, image in zip(pixels, padding_mask, images, strict=True):
        _, h, w = image.shape
        canvas[:, :h, :w] = image
        mask[:h, :w] = False
    return ImageBatch(pixels, padding_mask)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad the images of the samples with `pad_images`."""
    return pad_images([image for image, _ in samples]), [target for _, target in samples]


def build_dataloader(dataset: Dataset[Sample], options: LoaderOptions) -> DetectionLoader:
    """Build a loader of (ImageBatch, list[Target]) batches, padded by `collate`.

    Call `loader.sampler.set_epoch(epoch)` before each epoch. Batches are the same with any number of workers, and the
    caller's random state is not touched. With CUDA, batches are in pinned memory. A `UserError` about an image is
    raised as it is, also from a worker.
    """
    assert isinstance(dataset, Sized)
    seeded = _SeededDataset(dataset, options.seed)
    sample_size = seeded.final_size if options.aspect_ratio_grouping else None
    sampler = DistributedBatchSampler(len(dataset), options, sample_size)
    workers = _possible_workers(options.num_workers)
    return DetectionLoader(
        seeded,
        batch_size=None,  # the sampler makes the batches
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_pack,
        worker_init_fn=_defer_signals,
        prefetch_factor=max(2, math.ceil(2 * sampler.micro_batches(0) / workers)) if workers else None,  # two steps
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(options.seed),
    )


class DetectionLoader(DataLoader):
    """A `DataLoader` of (ImageBatch, list[Target])."""

    sampler: DistributedBatchSampler

    def check_worker_number_rationality(self) -> None:
        """Skip PyTorch's warning about more workers than CPUs: the user sets --workers."""

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.num_workers and self._iterator is None:
            malloc_trim()  # forked workers would keep a copy of every freed page that this process writes again
            with _hide_script(self.dataset.dataset):  # pyright: ignore[reportAttributeAccessIssue]
                batches = super().__iter__()
            atexit.register(_end_workers, weakref.ref(batches))
        else:
            batches = super().__iter__()
        while (batch := self._next(batches)) is not None:
            if isinstance(batch, UserError):
                raise batch
            yield _unpack(batch)

    def _next(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, or None at the end. If a worker was killed, say so in PyTorch's words."""
        try:
            return next(batches, None)
        except RuntimeError as error:
            workers = getattr(self._iterator, "_workers", ())
            if "exited unexpectedly" in str(error) and any(worker.exitcode == -9 for worker in workers):
                raise RuntimeError("DataLoader worker (pid unknown) was killed by signal: Killed") from error
            raise


class SampleKey(NamedTuple):
    """One sample to load: its epoch, its index, whether it may be a mosaic, and how often it was already shown."""

    epoch: int
    index: int
    mosaic: bool = False
    copy: int = 0


class DistributedBatchSampler(Sampler[list[SampleKey]]):
    """Divide each optimizer step among processes and micro-batches; resumable at any step.

    A step takes the next `total_batch_size` samples; the last step of an epoch takes the rest. They are divided evenly
    among the processes, and there into micro-batches of at most `batch_size`. Every process has the same number of
    micro-batches per step; some may be empty.

    Args:
        length: Samples in the dataset.
        options: See `LoaderOptions`.
        sample_size: Gives the final (height, width) of a sample, to group images of similar size.
    """

    def __init__(
        self, length: int, options: LoaderOptions, sample_size: Callable[[SampleKey], tuple[int, int]] | None = None
    ) -> None:
        sampling = options.sampling
        self.length, self.options, self.sample_size = len(sampling) if sampling else length, options, sample_size
        self.total_batch_size = options.total_batch_size or options.batch_size * options.world_size
        self.num_steps = math.ceil(self.length / self.total_batch_size)
        self.epoch, self.start_step, self.step_stride, self.mosaic = 0, 0, 1, False

    def set_epoch(self, epoch: int, start_step: int = 0, step_stride: int = 1, mosaic: bool = False) -> None:
        """Set what the next iteration yields: every `step_stride`-th step of the epoch from `start_step` on."""
        self.epoch, self.start_step, self.step_stride, self.mosaic = epoch, start_step, step_stride, mosaic

    def micro_batches(self, step: int) -> int:
        """Return the number of batches that every process has in a step of the epoch."""
        images = min(self.total_batch_size, self.length - step * self.total_batch_size)
        return max(1, math.ceil(math.ceil(images / self.options.world_size) / self.options.batch_size))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        keys = self._epoch_keys()
        start_step, stride = self.start_step, self.step_stride
        size, rank, world_size = self.options.batch_size, self.options.rank, self.options.world_size
        for step in range(start_step, self.num_steps, stride):
            if self.sample_size is not None and (step == start_step or step % POOL_STEPS == 0):
                first = step - step % POOL_STEPS  # pools do not depend on where an iteration starts
                pool = slice(first * self.total_batch_size, (first + POOL_STEPS) * self.total_batch_size)
                keys[pool] = self._group_by_size(keys[pool], first)
            step_keys = keys[step * self.total_batch_size : (step + 1) * self.total_batch_size]
            share, remainder = divmod(len(step_keys), world_size)
            start = rank * share + min(rank, remainder)
            rank_keys = step_keys[start : start + share + (rank < remainder)]
            for number in range(self.micro_batches(step)):
                yield rank_keys[number * size : (number + 1) * size]

    def __len__(self) -> int:
        """Return the number of batches of this process in the epoch."""
        return sum(self.micro_batches(step) for step in range(self.start_step, self.num_steps, self.step_stride))

    def _epoch_keys(self) -> list[SampleKey]:
        """Return all samples of the epoch in their order."""
        options = self.options
        if options.shuffle and options.sampling is not None:
            together = min(READ_TOGETHER, self.total_batch_size // 2)  # a step shows at least two files
            drawn = options.sampling.draw(options.seed, self.epoch, together)
            pairs = zip(*(numbers.tolist() for numbers in drawn), strict=True)
            return [SampleKey(self.epoch, index, self.mosaic, copy) for index, copy in pairs]
        order = torch.arange(self.length)
        if options.shuffle:
            generator = torch.Generator().manual_seed(mix_seeds(options.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator)
        return [SampleKey(self.epoch, index, self.mosaic) for index in order.tolist()]

    def _group_by_size(self, pool: list[SampleKey], first_step: int) -> list[SampleKey]:
        """Reorder a pool into steps of similar images, in random order; an incomplete step stays last."""
        assert self.sample_size is not None
        total = self.total_batch_size
        log_sizes = np.log([self.sample_size(key) for key in pool])
        order = _order_by_size(log_sizes, np.arange(len(pool)), (total, self.options.batch_size))
        steps = [order[start : start + total] for start in range(0, len(order), total)]
        full = len(pool) // total
        permutation = np.random.default_rng((self.options.seed, self.epoch, first_step)).permutation(full)
        return [pool[index] for step in [*(steps[n] for n in permutation), *steps[full:]] for index in step.tolist()]


def _order_by_size(log_sizes: np.ndarray, indices: np.ndarray, group_sizes: tuple[int, ...]) -> np.ndarray:
    """Order indices so that each group of `group_sizes[0]` has similar sizes, and so on within it (as a k-d tree).

    log_sizes: (N, 2) logarithms of height and width.
    """
    if len(indices) <= group_sizes[0]:
        return indices if len(group_sizes) == 1 else _order_by_size(log_sizes, indices, group_sizes[1:])
    spread = np.ptp(log_sizes[indices], axis=0)
    indices = indices[np.argsort(log_sizes[indices, spread.argmax()], kind="stable")]
    half = math.ceil(len(indices) / group_sizes[0]) // 2 * group_sizes[0]
    return np.concatenate([_order_by_size(log_sizes, part, group_sizes) for part in (indices[:half], indices[half:])])


class _SeededDataset(Dataset):
    """Samples of a batch by their keys, each made with a random state of its own."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def final_size(self, key: SampleKey) -> tuple[int, int]:
        """Return the (height, width) of a sample after the training transform."""
        height, width = self.dataset.sizes[key.index]
        with _seeded(self.seed, key):
            return self.dataset.transform.final_size(int(height), int(width))

    def __getitem__(self, keys: list[SampleKey]) -> list[Sample] | UserError:
        samples = []
        for key in keys:
            with _seeded(self.seed, key):
                try:
                    samples.append(self.dataset[(key.index, True) if key.mosaic else key.index])
                except UserError as error:
                    return error  # PyTorch would wrap a raised exception in a long traceback
        return samples


@contextmanager
def _seeded(seed: int, key: SampleKey) -> Iterator[None]:
    """Seed PyTorch's CPU generator for one sample and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs, which fork_rng does not restore here.
        copy = (key.copy,) if key.copy else ()
        torch.default_generator.manual_seed(mix_seeds(seed, key.epoch, key.index, *copy))
        yield


def mix_seeds(*numbers: int) -> int:
    """Combine numbers to one seed; (0, 1) and (1, 0) give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _pack(samples: list[Sample] | UserError) -> Any:
    """Collate, with the targets in a few tensors: each tensor that leaves a worker keeps a file descriptor open."""
    if isinstance(samples, UserError):
        return samples
    if not samples:
        empty = ImageBatch(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, 1, 1, dtype=torch.bool))
        return empty, ()
    images, targets = collate(samples)
    rows = [(len(target.labels), target.image_id, target.original_size) for target in targets]
    names = [name for name, value in vars(targets[0]).items() if isinstance(value, Tensor)]
    return images, rows, {name: torch.cat([getattr(target, name) for target in targets]) for name in names}


def _unpack(packed: Any) -> Batch:
    images, rows, *tensors = packed
    if not rows:
        return images, []
    counts = [count for count, _, _ in rows]
    parts = {name: tensor.split(counts) for name, tensor in tensors[0].items()}
    return images, [
        Target(**{name: part[n] for name, part in parts.items()}, image_id=image_id, original_size=tuple(size))
        for n, (_, image_id, size) in enumerate(rows)
    ]


def _possible_workers(requested: int) -> int:
    """Return 0 where no worker processes can be started, and warn once; else `requested`."""
    process = multiprocessing.current_process()
    reason = None
    if getattr(process, "_inheriting", False):
        reason = 'a child process runs the script again; put its calls under `if __name__ == "__main__":`'
    elif process.daemon:
        reason = "a daemonic process cannot start other processes"
    elif threading.current_thread() is not threading.main_thread():
        reason = "this thread is not the main one"
    if reason is None or not requested:
        return requested
    _warn_once(f"images are loaded without worker processes: {reason}")
    return 0


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


@contextmanager
def _hide_script(dataset: Any) -> Iterator[None]:
    """Start processes that do not import the script again: without a `__main__` guard it would start over in them.

    The start methods spawn and forkserver read these attributes. A dataset defined in the script needs the import.
    """
    main = sys.modules["__main__"]
    if type(dataset).__module__ == "__main__" or multiprocessing.get_start_method() == "fork":
        yield
        return
    saved = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    try:
        main.__spec__ = None
        yield
    finally:
        vars(main).update(saved)


def _defer_signals(worker: int) -> None:
    """Let a worker survive a minute: launchers and terminals signal the whole process group during a step."""
    for number in STOP_SIGNALS:
        if number != signal.SIGINT and hasattr(signal, "alarm"):
            signal.signal(number, lambda *_: signal.alarm(_GRACE_SECONDS))


def _end_workers(iterator: weakref.ref[Any]) -> None:
    """End the workers of an iterator that an exception keeps until the program exits; PyTorch does so only with CUDA.

    Otherwise, `multiprocessing` sends SIGTERM at exit and waits for them, a minute by `_defer_signals`.
    """
    if (batches := iterator()) is not None:
        batches._shutdown_workers()
