"""Prediction: images in any form people have them, `Detections` out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ModelConfig
from ..data.batching import collate
from ..data.images import read_image
from ..data.transforms import resize
from ..errors import UserError
from ..structures import Category, Detections, Target
from .postprocess import inside, select

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def predict(
    model: nn.Module, source: Any, threshold: float = 0.5, top_k: int = 100, batch_size: int = 1
) -> Detections | list[Detections]:
    """The objects in one image or in several.

    source: a path, a PIL image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8, both RGB, gives `Detections`; a
        list or tuple of these, or the path of a folder (all images in it, by name), gives a list in the same order.
    threshold: the least score, 0..1. top_k: at most so many detections an image.
    batch_size: images that go through the model together. They share a canvas, and group normalisation sees its
        padding: scores of differently shaped images can differ in the second decimal from those at batch_size 1.

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
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} is not in 0..1")
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} {value} is under 1")
    images = iter(folder_images(Path(sources)) if _is_folder(sources) else sources)
    return _predictions(model, images, threshold, top_k, batch_size)


def _predictions(
    model: nn.Module, sources: Iterator[Any], threshold: float, top_k: int, batch_size: int
) -> Iterator[Detections]:
    config: ModelConfig = model.config  # pyright: ignore[reportAssignmentType]
    categories = model_categories(config)
    ids = torch.tensor([category.id for category in categories])
    while batch := list(islice(sources, batch_size)):
        for image, size, (boxes, scores, labels) in zip(batch, *_detect(model, batch, top_k), strict=True):
            kept = scores >= threshold
            boxes, scores, labels = boxes[kept].float(), scores[kept].float(), labels[kept]
            boxes = inside(boxes[None], torch.tensor([size]))[0]
            names = tuple(categories[label].name for label in labels.tolist())
            yield Detections(boxes, scores, labels, ids[labels], names, size, image)


def _detect(model: nn.Module, sources: Sequence[Any], top_k: int):
    """Original sizes and selections of one batch."""
    config: ModelConfig = model.config  # pyright: ignore[reportAssignmentType]
    samples, sizes = [], []
    for position, source in enumerate(sources):
        image = read_image(source)
        size = (image.shape[1], image.shape[2])
        sizes.append(size)
        nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), position, size)
        resized = resize(image, config.image_size, config.long_side, getattr(model, "canvas", None))
        samples.append((resized, nothing))
    batch, _ = collate(samples)
    with evaluating(model):
        return sizes, select(forward(model, batch), sizes, top_k)


def forward(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The outputs of the model for a uint8 `ImageBatch`, on the model's device."""
    mean, std = model.pixel_mean, model.pixel_std
    batch = batch.to(mean.device, non_blocking=True).normalise(mean, std)
    return model(batch.pixels, batch.padding_mask)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def model_categories(config: ModelConfig) -> tuple[Category, ...]:
    """The categories in label order. Without ids in the config they are the labels, without names "class 0", …"""
    labels = range(config.num_classes)
    ids: Iterable[int] = config.category_ids or labels
    names: Iterable[str] = config.class_names or (f"class {label}" for label in labels)
    return tuple(Category(number, name) for number, name in zip(ids, names, strict=True))


def folder_images(folder: Path) -> list[Path]:
    """The images directly in a folder, by name. Raises UserError where there are none."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if Path(e.name).suffix.lower() in SUFFIXES and e.is_file())
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror or error}") from None
    if not names:
        raise UserError(f"folder {folder} has no images in it ({', '.join(sorted(SUFFIXES))})")
    return [folder / name for name in names]


def _is_folder(source: Any) -> bool:
    return isinstance(source, str | os.PathLike) and os.path.isdir(source)
