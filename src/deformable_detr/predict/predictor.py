"""Prediction: images from files or memory in, `Detections` out."""

import logging
import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config.detector import DetectorConfig
from ..config.image_size import FixedSize, ResizeRule
from ..data.dataloader import pad_images
from ..data.discovery import describe_unread, is_hidden, is_unread_image
from ..data.matching import IMAGE_SUFFIXES
from ..data.transforms import resize
from ..model.mask_ops import content_ratios, has_masks
from ..model.postprocess import ScoredBoxes, postprocess, to_detections
from ..structures import Category, Detections
from ..utils.errors import UserError
from ..utils.images import read_image
from .track import Tracker

log = logging.getLogger(__name__)


class Detector(nn.Module):
    """What models, optimized models and exported files have in common; all that predict, evaluate and serve use.

    `forward(pixels, padding_mask)` takes normalized RGB (B, 3, H, W) and a bool mask (B, H, W) or None, and returns a
    dict with `pred_logits` (B, Q, K) and `pred_boxes` (B, Q, 4), (cx, cy, w, h) in 0..1 of the unpadded image.

    Attributes:
        config: Classes and resize rule, and what describes the network.
        pixel_mean, pixel_std: (3,) statistics of RGB pixels in 0..1, on the detector's device.
        explains: Whether `forward(…, return_attention=True)` also returns where every layer sampled.
        exports_any_size: Whether an exported file can take images of any size.
        int8_modules: Parts of `export_module` that int8 is tried on, the fastest choice first: a name for the report,
            and a pattern that the names of the modules start with. Empty: no int8.
        backbone_parameters: What the names of the parameters start with that the backbone's learning rate applies to.
    """

    explains = False
    exports_any_size = False
    int8_modules: Mapping[str, re.Pattern[str]] = {}
    backbone_parameters = re.compile(r"(.*\.)?backbone\.")
    config: DetectorConfig
    pixel_mean: Tensor
    pixel_std: Tensor

    @property
    def resize_rule(self) -> ResizeRule:
        """The size that an image is resized to."""
        return self.config.resize_rule

    def save_pretrained(self, folder: str | os.PathLike[str], card_data: Any = None) -> None:
        """Write the model into a folder from which `load_detector` reads it. Raises UserError if it is not a model."""
        raise UserError(f"{type(self).__name__} cannot be saved; save the model that it was made from")

    def training_objective(self) -> nn.Module | None:
        """Return the loss that the detector brings with it; None: the set criterion. See `training.objective`."""
        return None

    def optimize(self, precision: str = "fp32", compile: bool = False) -> "Detector":
        """Return a faster copy for inference with the same outputs; itself if there is none."""
        return self

    def export_config(self) -> DetectorConfig:
        """Return the config that an exported file stores, with `pixel_mean` and `pixel_std`.

        Raises UserError if the detector cannot be exported.
        """
        raise UserError("only a model can be exported, not its optimized copy or an exported file")

    def export_module(self) -> nn.Module:
        """Return a copy with the detector's `forward`, in fp32, for `torch.export` with a dynamic batch size.

        It runs its attention by `ops`, so that the backend chosen while it is traced decides on the operators.
        """
        raise NotImplementedError

    def proposal_scores(self, pixels: Tensor, padding_mask: Tensor | None = None) -> Tensor | None:
        """Return the scores (B, S) of which `forward` takes the best as queries. None: its queries are learned."""
        return None

    def export_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """Return the (height, width) of an exported file for the requested `size`; None: any size.

        Raises UserError if the detector cannot take it.
        """
        rule, divisor = self.resize_rule, self.config.size_divisor
        if isinstance(rule, FixedSize):
            fixed = (rule.height, rule.width)
            if size not in (None, fixed):
                raise UserError(f"--image-size {size[0]},{size[1]}: the model takes {fixed[0]},{fixed[1]}")
            return fixed
        if self.exports_any_size:
            return size
        if size is None or size[0] % divisor or size[1] % divisor:
            given = "dynamic" if size is None else f"{size[0]},{size[1]}"
            multiples = f" in multiples of {divisor}" if divisor > 1 else ""
            raise UserError(f"--image-size {given}: this model needs H,W{multiples}")
        return size

    def predict(self, source: Any, threshold: float = 0.5, top_k: int = 100, batch_size: int = 1) -> Any:
        """Detect objects.

        Args:
            source: An image as a path, PIL image, HWC array or CHW tensor; a list of images, or the path of a folder.
            threshold: Minimum score, 0 to 1.
            top_k: Maximum number of detections per image.
            batch_size: Images per forward pass.

        Returns:
            `Detections` for an image, a list of them for a list or a folder.
        """
        return predict(self, source, threshold, top_k, batch_size)


def predict(
    model: Detector, source: Any, threshold: float = 0.5, top_k: int = 100, batch_size: int = 1
) -> Detections | list[Detections]:
    """Detect the objects in one or more images.

    Args:
        model: A detector; it keeps its device and training mode.
        source: A path, PIL image, RGB array (H, W, 3) uint8 or RGB tensor (3, H, W) uint8. A list or tuple of these,
            or the path of a folder, returns a list.
        threshold: Minimum score, 0..1.
        top_k: Maximum number of detections per image.
        batch_size: Images per batch. They are padded to the largest, and group normalization sees the padding: scores
            of differently shaped images can differ by up to 0.1 from those at batch_size 1.

    Returns:
        `Detections` in pixels of the original image, or a list of them in the order of the source; those of a folder
        are sorted by name.

    Raises:
        UserError: A setting is out of range or an image cannot be read.
    """
    many = isinstance(source, list | tuple) or _is_folder(source)
    results = list(predict_iter(model, source if many else [source], threshold, top_k, batch_size))
    return results if many else results[0]


def default_top_k(model: Detector) -> int:
    """Return a maximum of detections per image that cuts no image off: each object is found by its own query."""
    return max(100, model.config.num_queries)


def predict_iter(
    model: Detector,
    sources: Any,
    threshold: float = 0.5,
    top_k: int = 100,
    batch_size: int = 1,
    track: bool = False,
    frame_rate: float | Fraction = 30.0,
) -> Iterator[Detections]:
    """Detect the objects in any number of images in constant memory; see `predict`.

    Args:
        sources: The path of a folder, or an iterable of single images as for `predict`, which may be endless.
        track: The images are the frames of a video: set `Detections.track_ids`. See `track.Tracker`.
        frame_rate: Frames per second, for `track`.

    Yields:
        The `Detections` of each image. Files are read ahead in threads while the model runs.
    """
    if not track:
        return _raise_errors(predict_each(model, sources, threshold, top_k, batch_size))
    tracker = Tracker(threshold, frame_rate)
    results = predict_each(model, sources, tracker.min_score, top_k, batch_size)
    return _raise_errors(r if isinstance(r, UserError) else tracker.update(r) for r in results)


def _raise_errors(results: Generator[Detections | UserError, None, None]) -> Iterator[Detections]:
    with closing(results):
        for result in results:
            if isinstance(result, UserError):
                raise result
            yield result


def predict_each(
    model: Detector,
    sources: Any,
    threshold: float = 0.5,
    top_k: int = 100,
    batch_size: int = 1,
    keep_pixels: bool = False,
) -> Generator[Detections | UserError, None, None]:
    """Like `predict_iter`, but yield the `UserError` of an image that cannot be read and continue.

    Args:
        keep_pixels: Set `Detections.image` to the decoded image (3, H, W) instead of the source, so that drawing it
            does not decode it again.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold}: must be from 0 to 1")
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} {value}: must be 1 or more")
    images = iter(folder_images(Path(sources)) if _is_folder(sources) else sources)
    return _predictions(model, _read_ahead(model, images, batch_size, keep_pixels), threshold, top_k, batch_size)


class _InputImage(NamedTuple):
    """An image on its way to the model."""

    image: Any  # for `Detections.image`
    size: tuple[int, int]  # (height, width) as read
    pixels: Tensor | UserError  # resized, (3, H, W) uint8


def _predictions(
    model: Detector, inputs: Generator[_InputImage, None, None], threshold: float, top_k: int, batch_size: int
) -> Generator[Detections | UserError, None, None]:
    categories = model_categories(model.config)
    with closing(inputs):
        while batch := list(islice(inputs, batch_size)):
            readable = [(item.pixels, item.size) for item in batch if isinstance(item.pixels, Tensor)]
            results = iter(_detect(model, readable, threshold, top_k) if readable else ())
            for image, size, pixels in batch:
                if isinstance(pixels, UserError):
                    yield pixels
                else:
                    yield to_detections(next(results), size, threshold, categories, image)
            del batch, readable  # before the next batch is read


def _read_ahead(
    model: Detector, sources: Iterator[Any], batch_size: int, keep_pixels: bool
) -> Generator[_InputImage, None, None]:
    """Read and resize the images in order: files in threads, a bounded number ahead; others only when requested."""
    rule = model.resize_rule

    def read(source: Any) -> _InputImage:
        try:
            image = read_image(source)
        except UserError as error:
            return _InputImage(source, (0, 0), error)
        resized = resize(image, rule)
        return _InputImage(image if keep_pixels else source, (image.shape[1], image.shape[2]), resized)

    threads = min(8, max(1, (os.cpu_count() or 1) // 2))
    limit = max(batch_size, threads if keep_pixels else 2 * threads)
    pending: deque[Future[_InputImage]] = deque()
    pool = ThreadPoolExecutor(threads, "read-image")
    try:
        for source in sources:
            if not isinstance(source, str | os.PathLike):
                while pending:
                    yield pending.popleft().result()
                yield read(source)
                continue
            pending.append(pool.submit(read, source))
            if len(pending) > limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _detect(
    model: Detector, images: Sequence[tuple[Tensor, tuple[int, int]]], threshold: float, top_k: int
) -> list[ScoredBoxes]:
    """Run the model on a batch of resized images with their original sizes."""
    pixels, sizes = zip(*images, strict=True)
    with evaluating(model):
        return postprocess(forward(model, pad_images(pixels)), sizes, top_k, threshold)


def forward(model: Detector, batch: Any, **options: Any) -> dict[str, Any]:
    """Normalize a uint8 `ImageBatch` on the model's device and return the model's outputs, as `postprocess` needs them.

    Options are those of the model's `forward`.
    """
    mean, std = model.pixel_mean, model.pixel_std
    batch = batch.to(mean.device, non_blocking=True).normalize(mean, std)
    outputs = model(batch.pixels, batch.padding_mask, **options)
    if has_masks(outputs) and "content_ratios" not in outputs:  # an exported file may have a larger canvas
        outputs["content_ratios"] = content_ratios(batch.padding_mask)
    return outputs


_lock = Lock()
_evaluating: dict[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = {}  # threads inside, modes before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and inference mode; restore every module's mode after the last thread has left."""
    with _lock:
        threads, modes = _evaluating.get(model) or (0, [(module, module.training) for module in model.modules()])
        _evaluating[model] = threads + 1, modes
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        with _lock:
            threads, modes = _evaluating.pop(model)
            if threads > 1:
                _evaluating[model] = threads - 1, modes
            else:
                for module, mode in modes:
                    module.training = mode


def model_categories(config: DetectorConfig) -> tuple[Category, ...]:
    """Return the categories in label order. Default ids are the labels, default names "class 0", "class 1", …"""
    labels = range(config.num_classes)
    ids: Iterable[int] = config.category_ids or labels
    names: Iterable[str] = config.class_names or (f"class {label}" for label in labels)
    return tuple(Category(number, name) for number, name in zip(ids, names, strict=True))


def folder_images(folder: Path, suffixes: AbstractSet[str] = IMAGE_SUFFIXES, kind: str = "images") -> list[Path]:
    """Return the files with these suffixes directly in a folder, sorted by name, without hidden ones.

    Logs a warning about images in formats that are not read.

    Raises:
        UserError: The folder cannot be read or has no such file.
    """
    try:
        with os.scandir(folder) as entries:
            files = sorted(entry.name for entry in entries if not is_hidden(entry.name) and entry.is_file())
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror or error}") from None
    names = [name for name in files if Path(name).suffix.lower() in suffixes]
    unread = [name for name in files if is_unread_image(name)]
    if not names:
        reason = describe_unread(unread) if unread else ", ".join(sorted(suffixes))
        raise UserError(f"folder {folder} contains no {kind} ({reason})")
    if unread:
        log.warning("folder %s: %s", folder, describe_unread(unread))
    return [folder / name for name in names]


def _is_folder(source: Any) -> bool:
    return isinstance(source, str | os.PathLike) and os.path.isdir(source)
