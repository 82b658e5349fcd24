"""Preparation of a run: classes, automatic settings, model, error messages."""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ..config.schema import Config, DataConfig
from ..data.tiles import TiledDataset
from ..utils.errors import UserError
from ..utils.failures import explain_machine_errors
from .checkpoint import generations
from .run_dir import RunDir

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset
    from ..predict.predictor import Detector

log = logging.getLogger(__name__)

# epochs=auto: 30 epochs at 300 images, changing with the square root, between 12 (as DETRs on COCO) and 150.
_EPOCHS, _EPOCHS_IMAGES = 30, 300
_MIN_EPOCHS, _MAX_EPOCHS = 12, 150
# eval_every=auto: about 50 evaluations per run at most, and at least 100 training images between two.
_MAX_EVALUATIONS, _IMAGES_PER_EVALUATION = 50, 100


def with_classes(config: Config, dataset: CocoDataset) -> Config:
    """Return the config with the classes of the training set."""
    categories = dataset.categories
    classes = {
        "num_classes": len(categories),
        "class_names": tuple(category.name for category in categories),
        "category_ids": tuple(category.id for category in categories),
    }
    return config.updated({"model": classes}, "the training set")


def check_masks(dataset: CocoDataset) -> str | None:
    """Return a note if only some objects of a training set have a mask. Raises UserError if none has."""
    masks, objects = dataset.num_masks, dataset.num_objects
    if not masks:
        raise UserError(f"{dataset.annotation_file} has no masks; use --no-masks to train on its boxes")
    if masks < objects:
        return f"{masks} of {objects} training objects have a mask; the others train their box only"
    return None


def training_samples(dataset: CocoDataset, config: Config) -> CocoDataset | TiledDataset:
    """Return the samples of a training: images, or with `data.tile` tiles of large ones."""
    data, rule = config.data, config.model.resize_rule
    return dataset if data.tile is None else TiledDataset(dataset, data.tile, data.empty_tile_share, rule)


def sampling_note(samples: CocoDataset | TiledDataset, data: DataConfig) -> tuple[int, str]:
    """Return the number of samples per epoch, and a line about them; "" if an epoch shows each image once."""
    sampling = samples.sampling(data.repeat_threshold)
    if sampling is None:
        return len(samples), ""
    count, once = len(sampling), len(samples.sampling() or samples)
    settings = {"tile": data.tile, "repeat_threshold": data.repeat_threshold or None}
    names = ", ".join(f"data.{name}={value:g}" for name, value in settings.items() if value is not None)
    repeated = f", {count - once} of them repeated" if data.repeat_threshold else ""
    return count, f"{names}: an epoch has {count} samples{repeated}"


def resolve_auto(config: Config, images: int, unit: str = "training images") -> tuple[Config, str | None]:
    """Replace "auto" settings by numbers for this many training images; return a line that names them, or None."""
    train, chosen = config.train, {}
    epochs = train.epochs
    if epochs == "auto":
        epochs = round(_EPOCHS * math.sqrt(_EPOCHS_IMAGES / images))
        epochs = chosen["epochs"] = min(max(epochs, _MIN_EPOCHS), _MAX_EPOCHS)
    if train.eval_every == "auto":
        chosen["eval_every"] = max((epochs or 0) // _MAX_EVALUATIONS, math.ceil(_IMAGES_PER_EVALUATION / images))
    if not chosen:
        return config, None
    settings = ", ".join(f"train.{name}={value}" for name, value in chosen.items())
    return config.updated({"train": chosen}), f"for {images} {unit}: {settings}"


def fix_batch_size(config: Config, total: int) -> Config:
    """Return the config with an explicit total batch size, so that it stays with any number of processes."""
    base = config.train.base_batch_size or config.train.batch_size
    return config.updated({"train": {"total_batch_size": total, "base_batch_size": base}})


def build_model(config: Config, resumed: bool, verbose: bool = True) -> Detector:
    """Build the model: with the weights of `train.weights` or of the backbone, or, if resumed, without any."""
    from ..detector import build_detector, load_for_finetuning
    from ..weights.convert import portability_note

    if resumed:
        return build_detector(config.model.without_pretrained_backbone())
    if verbose and (note := portability_note(config.model)):
        log.warning(note)
    if config.train.weights:
        return load_for_finetuning(config.model, config.train.weights, print if verbose else lambda line: None)
    return build_detector(config.model)


def explain_errors(run_dir: RunDir, config: Config) -> AbstractContextManager[None]:
    """Turn full memory, killed loader workers and failed file access into a `UserError` with cause and fix.

    Other errors pass unchanged.
    """
    train, model = config.train, config.model
    hint = (
        f"use a smaller --batch-size (now {train.batch_size}; --total-batch-size keeps the optimizer's batch) or "
        f"--image-size (now {model.image_size}), or --set model.gradient_checkpointing=true"
    )

    def resume_hint() -> str:
        if generations(run_dir.checkpoints.last):
            return "; resume from the last checkpoint with --resume"
        return f"; no checkpoint was saved: start again{' with --resume' if run_dir.started else ''}"

    return explain_machine_errors(train.batch_size, config.data.workers, hint, resume_hint)
