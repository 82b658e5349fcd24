"""Prediction: images in any form people have them, `Detections` out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from ..data.dataloader import collate
from ..data.discovery import IMAGE_SUFFIXES, is_hidden
from ..data.transforms import resize
from ..model.postprocess import ScoredBoxes, postprocess, to_detections
from ..structures import Category, Detections, Target
from ..utils.errors import UserError
from ..utils.images import read_image


def predict(
    model: nn.Module, source: Any, threshold: float = 0.5, top_k: int = 100, batch_size: int = 1
) -> Detections | list[Detections]:
    """The objects in one image or in several.

    source: a path, a PIL image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8, both RGB, gives `Detections`; a
        list or tuple of these, or the path of a folder (all images in it, by name), gives a list in the same order.
    threshold: the least score, 0..1. top_k: at most so many detections an image.
    batch_size: images that go through the model together. They share a canvas, and group normalization sees its
        padding: scores of differently shaped images can differ by up to a tenth from those at batch_size 1.

    Images are resized as in evaluation. The model keeps its device and its training mode.
    Raises UserError for bad settings and for images that cannot be read.
    """
    many = isinstance(source, list | tuple) or _is_folder(source)
    found = list(predict_iter(model, source if many else [source], threshold, top_k, batch_size))
    return found if many else found[0]


def predict_iter(
    model: nn.Module, sources: Any, threshold: float = 0.5, top_k: int = 100, batch_size: int = 1
) -> Iterator[Detections]:
    """`predict` for any number of images: yields the `Detections` one after the other and keeps none.

    sources: the path of a folder, or any iterable, endless ones too, of what `predict` takes as one image.

    Files are read and resized ahead in threads while the model works, a few at a time.
    """
    return _good(predict_each(model, sources, threshold, top_k, batch_size))


def _good(every: Generator[Detections | UserError, None, None]) -> Iterator[Detections]:
    with closing(every):
        for found in every:
            if isinstance(found, UserError):
                raise found
            yield found


def predict_each(
    model: nn.Module, sources: Any, threshold: float = 0.5, top_k: int = 100, batch_size: int = 1
) -> Generator[Detections | UserError, None, None]:
    """`predict_iter` that goes on after an image that cannot be read: it yields what was wrong in its place."""
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} is not in 0..1")
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} {value} is under 1")
    images = iter(folder_images(Path(sources)) if _is_folder(sources) else sources)
    return _predictions(model, images, threshold, top_k, batch_size)


class _Read(NamedTuple):
    """An image on its way to the model: (height, width) as read, and the resized pixels (3, H, W), or what is wrong."""

    source: Any
    size: tuple[int, int]
    pixels: Tensor | UserError


def _predictions(
    model: nn.Module, sources: Iterator[Any], threshold: float, top_k: int, batch_size: int
) -> Generator[Detections | UserError, None, None]:
    config: ModelConfig = model.config  # pyright: ignore[reportAssignmentType]
    categories = model_categories(config)
    with closing(_read_ahead(model, sources, batch_size)) as images:
        while batch := list(islice(images, batch_size)):
            good = [image for image in batch if isinstance(image.pixels, Tensor)]
            selections = iter(_detect(model, good, top_k) if good else ())
            for source, size, pixels in batch:
                if isinstance(pixels, UserError):
                    yield pixels
                    continue
                yield to_detections(next(selections), size, threshold, categories, source)
            del batch, good


def _read_ahead(model: nn.Module, sources: Iterator[Any], batch_size: int) -> Generator[_Read, None, None]:
    """The images in order. Files are read by threads, at most `ahead` of them before they are wanted.

    What is in memory already is not taken before it is wanted: it may be a camera's picture, or large.
    """
    config: ModelConfig = model.config  # pyright: ignore[reportAssignmentType]
    canvas = getattr(model, "canvas", None)

    def read(source: Any) -> _Read:
        try:
            image = read_image(source)
        except UserError as error:
            return _Read(source, (0, 0), error)
        resized = resize(image, config.image_size, config.long_side, canvas, config.size_divisor)
        return _Read(source, (image.shape[1], image.shape[2]), resized)

    threads = min(8, max(1, (os.cpu_count() or 1) // 2))
    ahead = max(batch_size, 2 * threads)
    pending: deque[Future[_Read]] = deque()
    pool = ThreadPoolExecutor(threads, "read-image")
    try:
        for source in sources:
            if not isinstance(source, str | os.PathLike):
                while pending:
                    yield pending.popleft().result()
                yield read(source)
                continue
            pending.append(pool.submit(read, source))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _detect(model: nn.Module, images: Sequence[_Read], top_k: int) -> list[ScoredBoxes]:
    """The selections of one batch of images that could be read."""
    samples = []
    for position, (_, size, pixels) in enumerate(images):
        assert isinstance(pixels, Tensor)
        samples.append((pixels, Target.empty(position, size)))
    batch, _ = collate(samples)
    with evaluating(model):
        return postprocess(forward(model, batch), [image.size for image in images], top_k)


def forward(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The outputs of the model for a uint8 `ImageBatch`, on the model's device."""
    mean, std = model.pixel_mean, model.pixel_std
    batch = batch.to(mean.device, non_blocking=True).normalize(mean, std)
    return model(batch.pixels, batch.padding_mask)


_lock = Lock()
_evaluating: dict[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = {}  # threads in it, modes before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; after the last thread that is in it every module is in the mode it was in."""
    with _lock:
        users, modes = _evaluating.get(model) or (0, [(module, module.training) for module in model.modules()])
        _evaluating[model] = users + 1, modes
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        with _lock:
            users, modes = _evaluating.pop(model)
            if users > 1:
                _evaluating[model] = users - 1, modes
            else:
                for module, mode in modes:
                    module.training = mode


def model_categories(config: ModelConfig) -> tuple[Category, ...]:
    """The categories in label order. Without ids in the config they are the labels, without names "class 0", …"""
    labels = range(config.num_classes)
    ids: Iterable[int] = config.category_ids or labels
    names: Iterable[str] = config.class_names or (f"class {label}" for label in labels)
    return tuple(Category(number, name) for number, name in zip(ids, names, strict=True))


def folder_images(folder: Path, suffixes: AbstractSet[str] = IMAGE_SUFFIXES, what: str = "images") -> list[Path]:
    """The images (or files of other suffixes) directly in a folder, by name, hidden ones left out.

    Raises UserError where there are none.
    """
    try:
        with os.scandir(folder) as entries:
            files = (e.name for e in entries if not is_hidden(e.name) and e.is_file())
            names = sorted(name for name in files if Path(name).suffix.lower() in suffixes)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror or error}") from None
    if not names:
        raise UserError(f"folder {folder} has no {what} in it ({', '.join(sorted(suffixes))})")
    return [folder / name for name in names]


def _is_folder(source: Any) -> bool:
    return isinstance(source, str | os.PathLike) and os.path.isdir(source)
