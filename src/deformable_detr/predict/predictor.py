"""Prediction: images from files or memory in, `Detections` out."""

import logging
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..config.detector import DetectorConfig
from ..config.image_size import FixedSize, ResizeRule
from ..data.dataloader import pad_images
from ..data.discovery import describe_unread, is_hidden, is_unread_image
from ..data.matching import IMAGE_SUFFIXES
from ..model.mask_ops import content_ratios, has_masks
from ..model.postprocess import ScoredBoxes, postprocess, to_detections
from ..structures import Category, Detections
from ..utils.errors import UserError
from ..utils.tiles import DEFAULT_OVERLAP, TileOptions, Tiling, check_tiling
from .inputs import InputImage, batches, read_ahead
from .tiles import TiledImage, detect_tiles
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

    def predict(
        self,
        source: Any,
        threshold: float = 0.5,
        top_k: int = 100,
        batch_size: int = 1,
        tile: int | None = None,
        tile_overlap: float = DEFAULT_OVERLAP,
    ) -> Any:
        """Detect objects.

        Args:
            source: An image as a path, PIL image, HWC array or CHW tensor; a list of images, or the path of a folder.
            threshold: Minimum score, 0 to 1.
            top_k: Maximum number of detections per image, or per tile.
            batch_size: Images or tiles per forward pass.
            tile: Cut larger images into tiles of this many pixels, beside the whole image.
            tile_overlap: Minimum overlap of neighboring tiles as a share of their side.

        Returns:
            `Detections` for an image, a list of them for a list or a folder.
        """
        return predict(self, source, threshold, top_k, batch_size, tile, tile_overlap)


def predict(
    model: Detector,
    source: Any,
    threshold: float = 0.5,
    top_k: int = 100,
    batch_size: int = 1,
    tile: int | None = None,
    tile_overlap: float = DEFAULT_OVERLAP,
) -> Detections | list[Detections]:
    """Detect the objects in one or more images.

    Args:
        model: A detector; it keeps its device and training mode.
        source: A path, PIL image, RGB array (H, W, 3) uint8 or RGB tensor (3, H, W) uint8. A list or tuple of these,
            or the path of a folder, returns a list.
        threshold: Minimum score, 0..1.
        top_k: Maximum number of detections per image; with tiles, per tile and in the whole image at its usual size,
            so that an image may have more.
        batch_size: Images or tiles per batch. Images are padded to the largest, and group normalization sees the
            padding: scores of differently shaped images can differ by up to 0.1 from those at batch_size 1.
        tile: Side in pixels of the tiles that larger images are cut into, beside the whole image, to find small
            objects. TIFF files of any size are then read in parts. Default: no tiles.
        tile_overlap: Minimum overlap of neighboring tiles as a share of their side, 0..0.9. It should exceed the
            objects that only tiles show well.

    Returns:
        `Detections` in pixels of the original image, or a list of them in the order of the source; those of a folder
        are sorted by name.

    Raises:
        UserError: A setting is out of range or an image cannot be read.
    """
    many = isinstance(source, list | tuple) or _is_folder(source)
    sources = source if many else [source]
    results = list(predict_iter(model, sources, threshold, top_k, batch_size, tile=tile, tile_overlap=tile_overlap))
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
    **tiles: Unpack[TileOptions],
) -> Iterator[Detections]:
    """Detect the objects in any number of images in constant memory; see `predict`.

    Args:
        sources: The path of a folder, or an iterable of single images as for `predict`, which may be endless.
        track: The images are the frames of a video: set `Detections.track_ids`. See `track.Tracker`.
        frame_rate: Frames per second, for `track`.
        **tiles: `tile` and `tile_overlap` of `predict`.

    Yields:
        The `Detections` of each image. Files are read ahead in threads while the model runs.
    """
    tiling = check_tiling(**tiles, batch_size=batch_size)
    if not track:
        return _raise_errors(predict_each(model, sources, threshold, top_k, batch_size, tiling=tiling))
    tracker = Tracker(threshold, frame_rate)
    results = predict_each(model, sources, tracker.min_score, top_k, batch_size, tiling=tiling)
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
    tiling: Tiling | None = None,
) -> Generator[Detections | UserError, None, None]:
    """Like `predict_iter`, but yield the `UserError` of an image that cannot be read and continue.

    Args:
        keep_pixels: Set `Detections.image` to the decoded image (3, H, W) instead of the source, so that drawing it
            does not decode it again. Not for an image that is larger than memory.
        tiling: How larger images are cut.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold}: must be from 0 to 1")
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} {value}: must be 1 or more")
    images = iter(folder_images(Path(sources)) if _is_folder(sources) else sources)
    inputs = read_ahead(model.resize_rule, images, batch_size, keep_pixels, tiling)
    return _predictions(model, inputs, threshold, top_k, batch_size)


def _predictions(
    model: Detector, inputs: Generator[InputImage, None, None], threshold: float, top_k: int, batch_size: int
) -> Generator[Detections | UserError, None, None]:
    categories = model_categories(model.config)
    with closing(inputs):
        for batch in batches(inputs, batch_size):
            readable = [(item.pixels, item.size) for item in batch if isinstance(item.pixels, Tensor)]
            results = iter(_detect(model, readable, threshold, top_k) if readable else ())
            for item in batch:
                scored = _scored_boxes(model, item.pixels, results, threshold, top_k)
                if isinstance(scored, UserError):
                    yield scored
                else:
                    yield to_detections(scored, item.size, threshold, categories, item.image)
            del batch, readable, item  # before the next batch is read


def _scored_boxes(
    model: Detector, pixels: Any, results: Iterator[ScoredBoxes], threshold: float, top_k: int
) -> ScoredBoxes | UserError:
    """Return the detections of an `InputImage`: the next of `results`, unless it has tiles; or its error."""
    if isinstance(pixels, TiledImage):
        try:
            return detect_tiled(model, pixels, threshold, top_k)
        except UserError as error:  # a part of the file is damaged
            return error
    return next(results) if isinstance(pixels, Tensor) else pixels


def detect_image(model: Detector, source: Any, tiling: Tiling, top_k: int) -> tuple[ScoredBoxes, tuple[int, int]]:
    """Detect the objects in one image, with tiles if it is larger than one.

    Returns the detections and the image's (height, width). Raises UserError if it cannot be read.
    """
    with closing(read_ahead(model.resize_rule, iter([source]), 1, False, tiling)) as inputs:
        _, size, pixels = next(inputs)
    if isinstance(pixels, UserError):
        raise pixels
    if isinstance(pixels, TiledImage):
        return detect_tiled(model, pixels, 0.0, top_k), size
    return _detect(model, [(pixels, size)], 0.0, top_k)[0], size


def detect_tiled(model: Detector, image: TiledImage, threshold: float = 0.0, top_k: int = 100) -> ScoredBoxes:
    """Detect the objects in an image with tiles, in at most `top_k` query and class pairs per tile, and close it.

    Logs a warning if tiles have this maximum of detections at a threshold over 0.
    """
    full = 0

    def detect(pixels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[ScoredBoxes]:
        nonlocal full
        results = _detect(model, list(zip(pixels, sizes, strict=True)), threshold, top_k)
        full += sum(len(scored.scores) == top_k and bool(scored.scores[-1] >= threshold) for scored in results)
        return results

    with closing(image):
        scored = detect_tiles(image, detect, threshold)
    if full and threshold > 0 and top_k < model.config.num_queries * model.config.num_classes:
        log.warning("%s: %d detections in %d tiles, the maximum; allow more with top_k", image.name, top_k, full)
    return scored


def _detect(
    model: Detector, images: Sequence[tuple[Tensor, tuple[int, int]]], threshold: float, top_k: int
) -> list[ScoredBoxes]:
    """Run the model on a batch of resized images with their original sizes."""
    pixels, sizes = zip(*images, strict=True)
    with evaluating(model):
        return postprocess(forward(model, pad_images(pixels)), sizes, top_k, threshold, model.config.nms_iou)


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
