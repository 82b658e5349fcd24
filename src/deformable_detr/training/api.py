"""Training from Python: a preset and the options that differ from it, in one call."""

import difflib
import os
from collections.abc import Mapping
from typing import Any

from ..config.resolve import resolve_config
from ..config.schema import Config, DataConfig, ModelConfig, TrainConfig
from ..detector import finetune_config
from ..utils.errors import UserError
from .run_dir import run_config
from .trainer import train_model

_SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
_SECTION_OF = {name: section for section, config in _SECTIONS.items() for name in config.model_fields}


def train(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    preset: str | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    image_size: int | None = None,
    weights: str | None = None,
    resume: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a detector on a dataset; the run and its best model are saved in the folder `out`.

    Args:
        data: Folder of the dataset: COCO JSON, YOLO or Pascal VOC.
        out: Folder of the run.
        preset: Preset to start from. Default: the config of the model that `weights` names, else "small".
        epochs: Maximum number of epochs. Setting only one of `epochs` and `minutes` clears the other.
        minutes: Maximum minutes of training steps.
        image_size: Short side of the input in pixels.
        weights: Model to fine-tune: a run or model folder, a transformers folder or hub id, or an official `.pth`.
        resume: Resume the run in `out` with its own config and these options; `preset` is ignored.
        options: Any other field of `ModelConfig`, `DataConfig` and `TrainConfig` by its own name.

    Returns:
        The metrics of the last evaluation; see `train_model`, also for the errors.

    >>> train("datasets/cards", "runs/cards", epochs=30, image_size=480)  # doctest: +SKIP
    {'AP': 0.71, 'AP50': 0.93, …}
    """
    common = {"epochs": epochs, "minutes": minutes, "image_size": image_size, "weights": weights}
    options |= {name: value for name, value in common.items() if value is not None}
    return train_model(data, out, _config(out, preset, resume, options), resume=resume)


def _config(out: str | os.PathLike[str], preset: str | None, resume: bool, options: Mapping[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if name not in _SECTION_OF:
            close = difflib.get_close_matches(name, _SECTION_OF, n=1)
            raise UserError(f"train(): unknown option '{name}'" + (f"; did you mean '{close[0]}'?" if close else ""))
        sections.setdefault(_SECTION_OF[name], {})[name] = value
    if options.keys() & {"epochs", "minutes"}:
        sections["train"] = {"epochs": None, "minutes": None, **sections["train"]}
    if resume:
        base = run_config(out)
    else:
        weights = {"train.weights": options.get("weights")}
        model = sections.get("model", {})
        base = resolve_config(
            preset, options=weights, config_of_weights=lambda source, _: finetune_config(source, model)
        )
    return base.updated(sections, "train()")
