"""Evaluate models on a split of a dataset."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ..config.schema import DataConfig
from ..data.discovery import split_aliases
from ..detector import load_detector
from ..model.postprocess import ScoredBoxes, postprocess
from ..predict.predictor import Detector, detect_image, evaluating, forward, model_categories
from ..utils.errors import UserError
from ..utils.failures import explain_machine_errors
from ..utils.progress import progress_bar
from ..utils.tiles import DEFAULT_OVERLAP, Tiling, check_tiling
from ..visualize.web.html import embed_page
from .masks import has_mask
from .metrics import CocoEvaluation, Metrics, coco_metrics, run_coco_eval, summarize
from .report import render_report

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset
    from ..distributed.context import DistributedContext
    from ..structures import Target

log = logging.getLogger(__name__)

ModelSource = Detector | str | os.PathLike[str]

BATCH_SIZE, WORKERS = 4, 2
TOP_K = 100  # detections per image, as COCO counts


class EvalOptions(TypedDict, total=False):
    """Options of an evaluation."""

    batch_size: int  # images per batch; default: 4
    workers: int  # data loader processes, 0 loads in the main process; default: 2
    limit: int | None  # evaluate only the first images, at most this many; default: all
    progress: bool  # show a progress bar; default: True
    tile: int | None  # side in pixels of the tiles that larger images are cut into; default: no tiles
    tile_overlap: float  # minimum overlap of tiles as a share of their side; default: 0.2


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """The detections of a model on a split, and their metrics."""

    metrics: Metrics  # as `evaluate` returns them
    coco: CocoEvaluation
    results: list[dict[str, Any]]  # COCO results
    paths: dict[Any, Path]  # image files by image id
    model_seconds: float  # of the model and its postprocessing, over all images
    device: str
    name: str = "model"  # the model's path, or the name of its class
    coco_masks: CocoEvaluation | None = None  # None: the model or the dataset has no masks
    data: str = "the dataset"  # its name
    split: str = "val"

    def __repr__(self) -> str:
        figures = [f"{name} {'—' if (ap := self.metrics[name]) is None else f'{ap:.3f}'}" for name in ("AP", "AP50")]
        return f"EvaluationResult({self.name} on {self.metrics['images']} images: {', '.join(figures)})"

    def _repr_html_(self) -> str:
        """Return the report, which a notebook shows."""
        return embed_page(render_report([self], self.data, self.split))


def evaluate(
    model: ModelSource,
    data: str | os.PathLike[str],
    split: str = "val",
    data_config: DataConfig | None = None,
    device: str = "auto",
    **options: Unpack[EvalOptions],
) -> Metrics:
    """Return the COCO metrics of a model on one split of a dataset.

    Args:
        model: A `DeformableDETR` on its current device, or the path of a model, a run or an exported file.
        data: Folder or annotation file of the dataset.
        split: Name of the split.
        data_config: Data settings, such as the paths of images and annotations. Default: `DataConfig()`.
        device: Device of a model that is loaded from a path; "auto" selects a GPU if available.
        **options: See `EvalOptions`.

    Returns:
        The dict of `coco_metrics`, with "segm" if model and dataset have masks, "images" (their number) and
        "images_per_second" (loading included).

    Raises:
        UserError: The dataset cannot be read, has classes that the model lacks, or memory is full.
    """
    return evaluate_models([model], data, split, data_config, device, **options)[0].metrics


def evaluate_models(
    models: Sequence[ModelSource],
    data: str | os.PathLike[str],
    split: str = "val",
    data_config: DataConfig | None = None,
    device: str = "auto",
    precision: str | None = None,
    **options: Unpack[EvalOptions],
) -> list[EvaluationResult]:
    """Evaluate models one after the other; arguments as in `evaluate` and, for `precision`, `load_detector`.

    All models and datasets are opened first, so that an error shows before the first evaluation.
    """
    detectors = [model if isinstance(model, Detector) else load_detector(model, device, precision) for model in models]
    datasets = [open_eval_dataset(detector, data, split, data_config) for detector in detectors]
    names = [type(model).__name__ if isinstance(model, Detector) else os.fspath(model) for model in models]
    rest: dict[str, Any] = dict(options)
    tile, overlap = rest.pop("tile", None), rest.pop("tile_overlap", DEFAULT_OVERLAP)
    tiling = check_tiling(tile, overlap, options.get("batch_size", BATCH_SIZE))
    with explain_machine_errors(options.get("batch_size", BATCH_SIZE), options.get("workers", WORKERS)):
        results = [
            evaluate_dataset(detector, dataset, name=name, tiling=tiling, **rest)
            for detector, dataset, name in zip(detectors, datasets, names, strict=True)
        ]
    return [replace(result, data=Path(data).resolve().name, split=split) for result in results]


def compare_metrics(results: Sequence[EvaluationResult]) -> dict[str, Any]:
    """Return the first model's metrics; with a second model also "compare" (its metrics) and "difference" (B - A)."""
    first, *others = [result.metrics for result in results]
    return {**first, "compare": others[0], "difference": _difference(first, others[0])} if others else first


def evaluate_dataset(
    model: Detector,
    dataset: CocoDataset,
    batch_size: int = BATCH_SIZE,
    workers: int = WORKERS,
    limit: int | None = None,
    progress: bool = True,
    name: str = "model",
    tiling: Tiling | None = None,
) -> EvaluationResult:
    """Evaluate a model on an open dataset with the evaluation transform; for options see `EvalOptions`.

    With `tiling`, images that are larger than a tile are cut, and AP counts more than 100 detections per class.
    """
    for option, value, minimum in (("batch_size", batch_size, 1), ("limit", limit, 1), ("workers", workers, 0)):
        if value is not None and value < minimum:
            raise UserError(f"{option} {value}: must be at least {minimum}")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    start = time.perf_counter()
    results, image_ids, model_seconds = detect(model, dataset, count, tiling, batch_size, workers, progress)
    seconds = time.perf_counter() - start

    ground_truth = dataset.ground_truth
    if count < len(dataset):
        images = [image for image in ground_truth["images"] if image["id"] in image_ids]
        ground_truth = {**ground_truth, "images": images}
    tiled = tiling is not None
    coco, coco_masks = run_coco_eval(ground_truth, results, tiled=tiled), None
    metrics = summarize(coco)
    if _compares_masks(model, dataset):
        coco_masks = run_coco_eval(ground_truth, results, "segm", tiled)
        metrics["segm"] = summarize(coco_masks)
    metrics |= {"images": count, "images_per_second": count / seconds}
    paths = {int(image_id): dataset.path(index) for index, image_id in enumerate(dataset.image_ids[:count])}
    device = str(model.pixel_mean.device)
    return EvaluationResult(metrics, coco, results, paths, model_seconds, device, name, coco_masks)


def evaluate_distributed(
    model: Detector,
    dataset: CocoDataset,
    batch_size: int,
    workers: int,
    context: DistributedContext,
    on_results: Callable[[CocoDataset, list[dict[str, Any]]], object] = lambda dataset, results: None,
    tiling: Tiling | None = None,
) -> Metrics:
    """Return the metrics of `evaluate` in every process. All processes call it with the same model.

    Each process takes every n-th batch, so that images are padded as in one process. Rank 0 calls `on_results` and
    counts the detections in the order of the dataset, which decides between equal scores.
    """
    start = time.perf_counter()
    with context.sync_errors():
        shard = (context.rank, context.world_size)
        part = detect(model, dataset, len(dataset), tiling, batch_size, workers, False, shard=shard)[0]
    parts = context.all_gather_object(part)
    seconds = time.perf_counter() - start

    def metrics_of_all_parts() -> Metrics:
        order = {int(image_id): index for index, image_id in enumerate(dataset.image_ids)}
        results = sorted((row for rows in parts for row in rows), key=lambda row: order[row["image_id"]])
        on_results(dataset, results)
        metrics = coco_metrics(dataset.ground_truth, results, _compares_masks(model, dataset), tiling is not None)
        return {**metrics, "images": len(dataset), "images_per_second": len(dataset) / seconds}

    return context.on_rank_zero(metrics_of_all_parts)


def detect(
    model: Detector,
    dataset: CocoDataset,
    count: int,
    tiling: Tiling | None,
    batch_size: int,
    workers: int,
    progress: bool,
    **options: Any,
) -> tuple[list[dict[str, Any]], set[Any], float]:
    """Detect objects with `detect_in_tiles` if an image is larger than a tile, else with `detect_images`.

    `options` are the other arguments of both.
    """
    if tiling is not None and has_tiles(dataset, count, tiling):
        return detect_in_tiles(model, dataset, count, tiling, progress, **options)
    return detect_images(model, dataset, count, batch_size, workers, progress, **options)


def detect_images(
    model: Detector,
    dataset: CocoDataset,
    count: int,
    batch_size: int,
    workers: int,
    progress: bool,
    shard: tuple[int, int] = (0, 1),
    top_k: int = TOP_K,
) -> tuple[list[dict[str, Any]], set[Any], float]:
    """Detect objects in the first `count` images; the model's modules keep their train or eval mode.

    `shard` (k, n) selects every n-th batch, starting with batch k. Returns COCO results, the image ids, and the seconds
    that the model and its postprocessing took.
    """
    from torch.utils.data import Subset

    from ..data.dataloader import LoaderOptions, build_dataloader

    category_ids = [category.id for category in dataset.categories]
    images = dataset if count == len(dataset) else Subset(dataset, range(count))
    batches = build_dataloader(images, LoaderOptions(batch_size, workers))
    batches.sampler.set_epoch(0, start_step=shard[0], step_stride=shard[1])
    results: list[dict[str, Any]] = []
    image_ids: set[Any] = set()
    model_seconds = 0.0
    with evaluating(model), progress_bar(count, "images", "evaluate", progress) as bar:
        for batch, targets in batches:
            start = time.perf_counter()
            sizes = [target.original_size for target in targets]
            detections = postprocess(forward(model, batch), sizes, top_k, nms_iou=model.config.nms_iou)
            # The model can have more class logits than the dataset has classes.
            listed = [scored.select(scored.labels < len(category_ids)) for scored in detections]
            rows = [_coco_rows(*pair, category_ids) for pair in zip(targets, listed, strict=True)]
            model_seconds += time.perf_counter() - start  # `postprocess` waits for the device
            image_ids.update(target.image_id for target in targets)
            results.extend(itertools.chain.from_iterable(rows))
            bar.update(len(targets))
    return results, image_ids, model_seconds


def has_tiles(dataset: CocoDataset, count: int, tiling: Tiling) -> bool:
    """Return whether one of the first `count` images may be larger than a tile: by its record, which may not say."""
    sizes = dataset.sizes[:count]
    return not bool(((sizes > 1) & (sizes <= tiling.tile)).all())


def detect_in_tiles(
    model: Detector,
    dataset: CocoDataset,
    count: int,
    tiling: Tiling,
    progress: bool,
    shard: tuple[int, int] = (0, 1),
    top_k: int = TOP_K,
) -> tuple[list[dict[str, Any]], set[Any], float]:
    """Detect objects in the first `count` images, the larger of which are cut into tiles; see `detect_images`.

    `top_k` is the maximum of a tile. `shard` selects images instead of batches. The seconds include reading.
    """
    from ..structures import Target

    category_ids = [category.id for category in dataset.categories]
    results: list[dict[str, Any]] = []
    image_ids: set[Any] = set()
    start = time.perf_counter()
    indices = range(shard[0], count, shard[1])
    with progress_bar(len(indices), "images", "evaluate", progress) as bar:
        for index in indices:
            scored, size = detect_image(model, dataset.path(index), tiling, top_k)
            target = Target.empty(int(dataset.image_ids[index]), size)
            results += _coco_rows(target, scored.select(scored.labels < len(category_ids)), category_ids)
            image_ids.add(target.image_id)
            bar.update()
    return results, image_ids, time.perf_counter() - start


def _coco_rows(target: Target, scored: ScoredBoxes, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return the COCO results of one image; boxes are not clipped to it."""
    boxes, scores, labels, _, masks = scored
    boxes[:, 2:] -= boxes[:, :2]
    rows: list[dict[str, Any]] = [
        {"image_id": target.image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    ]
    if masks is not None:
        size = list(target.original_size)  # one list for all masks saves memory
        for row, rle in zip(rows, masks.to_rle(target.original_size), strict=True):
            row["segmentation"] = {"size": size, "counts": rle["counts"]}
    return rows


def _compares_masks(model: Detector, dataset: CocoDataset) -> bool:
    return model.config.masks and any(map(has_mask, dataset.ground_truth["annotations"]))


def open_eval_dataset(
    model: Detector, data: str | os.PathLike[str], split: str = "val", data_config: DataConfig | None = None
) -> CocoDataset:
    """Open a split with the model's evaluation transform; arguments and errors as in `evaluate`."""
    from ..data.dataset import open_dataset
    from ..data.source import AnnotationCache
    from ..data.transforms import EvalTransform

    config, data_config, cache = model.config, data_config or DataConfig(), AnnotationCache(model.config.masks)
    dataset = open_dataset(
        data,
        split=split,
        data=data_config,
        categories=model_categories(config) if config.category_ids else None,
        transform=EvalTransform(model.resize_rule),
        cache=cache,
        masks=config.masks,
    )
    dataset.load_ground_truth(cache)
    if config.masks and not _compares_masks(model, dataset):
        log.warning("%s has no masks: only boxes are evaluated", dataset.annotation_file)
    if len(dataset.categories) > config.num_classes:
        raise UserError(
            f"the dataset has {len(dataset.categories)} classes, but the model {config.num_classes}; "
            "train a model for these classes"
        )
    _warn_about_training_images(dataset, Path(data).expanduser(), split, data_config)
    return dataset


def _warn_about_training_images(dataset: CocoDataset, root: Path, split: str, data_config: DataConfig) -> None:
    """Warn if a folder without splits is both the training split and this one."""
    from ..data.formats import find_source
    from ..data.source import same_split

    if not root.is_dir() or split in split_aliases(data_config.train_split):
        return
    try:
        train = find_source(root, data_config.train_split, data_config)
    except UserError:  # there is no training split
        return
    if same_split(train, dataset.source):
        log.warning("%s is not split: the evaluation includes the training images", dataset.annotation_file)


def _difference(first: Metrics, second: Metrics) -> Metrics:
    """Return second - first for each metric of both; None if either is None."""
    differences: Metrics = {}
    for name in [name for name in first if name in second]:
        a, b = first[name], second[name]
        if isinstance(a, dict):
            differences[name] = _difference(a, b)
        elif not isinstance(a, int):
            differences[name] = None if a is None or b is None else b - a
    return differences
