"""A model over a split of a data set."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config.schema import DataConfig, ModelConfig
from ..data.discovery import split_aliases
from ..detector import load_detector
from ..model.postprocess import postprocess
from ..predict.predictor import evaluating, forward, model_categories
from ..utils.errors import UserError
from ..utils.failures import explain_machine_errors
from .metrics import Counted, Metrics, figures
from .metrics import count as count_detections

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset

    Keep = Callable[[CocoDataset, list[dict[str, Any]]], object]

log = logging.getLogger(__name__)

TOP_K = 100  # detections an image, as COCO counts


def evaluate(
    model: nn.Module | str | os.PathLike[str],
    data: str | os.PathLike[str],
    split: str = "val",
    data_config: DataConfig | None = None,
    batch_size: int = 4,
    workers: int = 2,
    limit: int | None = None,
    progress: bool = True,
    device: str = "auto",
) -> Metrics:
    """The COCO figures of a model on one split of a data set.

    model: a `DeformableDETR`, used where it is, or the folder of one or an exported file, put on `device` (see
        `device.pick_device`).
    data: the data set's folder; split and data_config as in `data.coco.open_dataset`.
    batch_size, workers, limit, progress: see `evaluate_dataset`.

    Returns the dict of `evaluate_dataset`.
    Raises UserError for a data set that cannot be read or that does not fit the model's classes.
    """
    return detect(model, data, split, data_config, batch_size, workers, limit, progress, device).metrics


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What a model found in a split, counted.

    metrics: what `evaluate_dataset` returns. counted: the detections matched to the ground truth.
    results: COCO's records of the detections. paths: the images' files, by image id.
    model_seconds: what the model and the choice of boxes took, of all images. device: what they ran on.
    """

    metrics: Metrics
    counted: Counted
    results: list[dict[str, Any]]
    paths: dict[Any, Path]
    model_seconds: float
    device: str


def detect(
    model: nn.Module | str | os.PathLike[str],
    data: str | os.PathLike[str],
    split: str = "val",
    data_config: DataConfig | None = None,
    batch_size: int = 4,
    workers: int = 2,
    limit: int | None = None,
    progress: bool = True,
    device: str = "auto",
) -> Evaluated:
    """As `evaluate`, with all that a report needs."""
    if not isinstance(model, nn.Module):
        loaded: nn.Module = load_detector(model, device)
        model = loaded
    dataset = dataset_for(model, data, split, data_config)
    with explain_machine_errors(batch_size, workers):
        return detect_dataset(model, dataset, batch_size, workers, limit, progress)


def dataset_for(
    model: nn.Module, data: str | os.PathLike[str], split: str = "val", data_config: DataConfig | None = None
) -> CocoDataset:
    """The split as the model takes it. Raises UserError where it cannot be read or does not fit the model's classes."""
    from ..data.dataset import open_dataset
    from ..data.transforms import EvalTransform

    config: ModelConfig = model.config  # pyright: ignore[reportAssignmentType]
    canvas = getattr(model, "canvas", None)
    dataset = open_dataset(
        data,
        split=split,
        data=data_config or DataConfig(),
        categories=model_categories(config) if config.category_ids else None,
        transform=EvalTransform(config.image_size, config.long_side, canvas, config.size_divisor),
    )
    _refuse_more_classes(config, dataset)
    _warn_of_training_images(dataset, Path(data).expanduser(), split, data_config or DataConfig())
    return dataset


def _warn_of_training_images(dataset: CocoDataset, root: Path, split: str, data: DataConfig) -> None:
    """Says so where a folder's split is its training split too."""
    from ..data.formats import find_source
    from ..data.problems import same_split

    if not root.is_dir() or split in split_aliases(data.train_split):
        return
    try:
        train = find_source(root, data.train_split, data)
    except UserError:  # there is none
        return
    if same_split(train, dataset.source):
        log.warning("%s is not divided: images that the model was trained on are measured too", dataset.annotation_file)


def _refuse_more_classes(config: ModelConfig, dataset: CocoDataset) -> None:
    if len(dataset.categories) > config.num_classes:
        raise UserError(f"the data set has {len(dataset.categories)} classes, the model {config.num_classes}")


def evaluate_dataset(
    model: nn.Module,
    dataset: CocoDataset,
    batch_size: int = 4,
    workers: int = 2,
    limit: int | None = None,
    progress: bool = True,
    keep: Keep | None = None,
) -> Metrics:
    """`evaluate` for a data set that is open already, with the evaluation transform.

    workers: processes that load images; 0: none beside this one.
    limit: only the first so many images, and the ground truth of these.
    progress: a bar on standard error, where that is a terminal.
    keep: is called with the data set and all detections as COCO results.

    Returns the dict of `coco_metrics` with "images", how many, and "images_per_second", of loading and model together.
    The model's modules end in the modes they were in.
    """
    evaluated = detect_dataset(model, dataset, batch_size, workers, limit, progress)
    if keep is not None:
        keep(dataset, evaluated.results)
    return evaluated.metrics


def detect_dataset(
    model: nn.Module,
    dataset: CocoDataset,
    batch_size: int = 4,
    workers: int = 2,
    limit: int | None = None,
    progress: bool = True,
) -> Evaluated:
    """As `evaluate_dataset`, with all that a report needs."""
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} is under 1")
    if workers < 0:
        raise UserError(f"workers {workers} is under 0")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    start = time.perf_counter()
    results, seen, model_seconds = _detect(model, dataset, count, batch_size, workers, progress)
    seconds = time.perf_counter() - start

    truth = dataset.ground_truth
    if count < len(dataset):
        truth = {**truth, "images": [image for image in truth["images"] if image["id"] in seen]}
    counted = count_detections(truth, results)
    metrics = {**figures(counted), "images": count, "images_per_second": count / seconds}
    paths = {int(identity): dataset.path(index) for index, identity in enumerate(dataset.image_ids[:count])}
    device = str(model.pixel_mean.device)  # pyright: ignore[reportAttributeAccessIssue]
    return Evaluated(metrics, counted, results, paths, model_seconds, device)


def _detect(
    model: nn.Module,
    dataset: CocoDataset,
    count: int,
    batch_size: int,
    workers: int,
    progress: bool,
    part: tuple[int, int] = (0, 1),
) -> tuple[list[dict[str, Any]], set[Any], float]:
    """COCO results of the first `count` images, the ids of these, and the seconds in which no image was waited for.

    part: (k, n), every n-th batch from the k-th on.
    """
    from torch.utils.data import Subset
    from tqdm import tqdm

    from ..data.dataloader import LoaderOptions, build_dataloader

    config: ModelConfig = model.config  # pyright: ignore[reportAssignmentType]
    ids = [category.id for category in dataset.categories]
    _refuse_more_classes(config, dataset)
    images = dataset if count == len(dataset) else Subset(dataset, range(count))
    batches = build_dataloader(images, LoaderOptions(batch_size, workers))
    batches.sampler.set_epoch(0, start_step=part[0], step_stride=part[1])
    results: list[dict[str, Any]] = []
    seen: set[Any] = set()
    working = 0.0
    with evaluating(model), tqdm(total=count, unit="image", desc="evaluate", disable=None if progress else True) as bar:
        for batch, targets in batches:
            start = time.perf_counter()
            found = postprocess(forward(model, batch), [target.original_size for target in targets], TOP_K)
            working += time.perf_counter() - start  # `postprocess` waits for the device
            for target, (boxes, scores, labels) in zip(targets, found, strict=True):
                seen.add(target.image_id)
                boxes[:, 2:] -= boxes[:, :2]
                results.extend(
                    {"image_id": target.image_id, "category_id": ids[label], "bbox": box, "score": score}
                    for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
                    if label < len(ids)  # a model with spare class logits
                )
            bar.update(len(targets))
    return results, seen, working
